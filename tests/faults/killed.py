"""Runs lmdaemon and kills it (SIGKILL) before one of its statements for PostgreSQL: `KILL_AT=7 python killed.py …
import FILE` kills it before the seventh.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import psycopg

KILL_AT = int(os.environ.get("KILL_AT", 0))
execute = psycopg.Connection.execute
statements = 0


def counted(self: Any, *arguments: Any, **named: Any) -> Any:
    global statements
    statements += 1
    if statements == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(self, *arguments, **named)


psycopg.Connection.execute = counted  # type: ignore[method-assign]
sys.exit(import_module("lmdaemon.__main__").main())
