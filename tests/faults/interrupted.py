"""Runs lmdaemon and kills it (SIGKILL) when it reaches a line: `KILL_AT=store/writer.py:210 python interrupted.py …
serve`.

These lines are the ones before and after each await, each SQL statement, each operation that is queued or answered, and
each request or answer that is sent: all steps between the queue and the commit, and between the claim of a delivery and
its settled row. Between two such steps, nothing changes that would still exist after the kill. With `REACHED=FILE`,
lmdaemon runs on and writes down which of the lines it reaches.
"""

import ast
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lmdaemon import sweeper
from lmdaemon.__main__ import main
from lmdaemon.delivery import attempts, exchange, running, sender
from lmdaemon.delivery import dispatcher as delivery
from lmdaemon.store import projection, writer
from lmdaemon.store.sqlite import batch as batches
from lmdaemon.store.sqlite import store
from lmdaemon.store.sqlite import writer as disk
from lmdaemon.web import endpoint, frequent, hot, sessions

WATCHED = [
    # A request: into the queue of the writer, and back
    hot.HotConnection._takes,
    hot.HotConnection._stored,
    hot.HotConnection._answer,
    frequent.Frequent.begin,
    endpoint.Endpoint.begin,
    endpoint.Endpoint._receive,
    endpoint.Endpoint._check,
    sessions.Sessions.open,
    sessions.Sessions.touch,
    sessions.Sessions.close,
    writer.Writer.submit,
    # The writer: from the queue into the file
    writer.Writer.run,
    writer.Writer.write_batch,
    writer.Writer._write_and_answer,
    writer.Writer._write,
    writer.Writer._answered,
    disk.Disk.commit,
    disk.Disk._commit,
    store.Store.begin,
    store.Store.committed,
    projection.Projection.absorb,
    batches.Batch.run,
    batches.Batch._decide_and_apply,
    batches.Batch._answered,
    batches.Written.apply,
    batches._in_transaction,
    batches.read_facts,
    # The end of a session
    sweeper.Sweeper.once,
    sweeper.Sweeper._end_some,
    # A delivery: from the claim to the settled row
    delivery.Dispatcher.delivery_due,
    delivery.Dispatcher.once,
    delivery.Dispatcher._start,
    running.RunningAttempts._deliver,
    running.RunningAttempts._settle,
    attempts.Attempts.make,
    attempts.Attempts._post,
    attempts.Attempts._call,
    attempts.Attempts.settlement,
    sender.Sender.post,
    exchange.Exchange.post,
    exchange.read_some,
]


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


CALLS = ("execute", "fetch", "fetch_sessions", "apply", "run", "send", "write", "submit", "append", "done", "_answer")
CODES = {code for function in WATCHED for code in codes(function.__code__)}
KILL_AT = os.environ.get("KILL_AT")
REACHED = os.environ.get("REACHED")
reached: set[str] = set()


def steps(path: str) -> set[int]:
    """The lines with an await, an SQL statement, an operation that is queued or answered, or a request or answer that
    is sent.
    """
    found: set[int] = set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        function = node.func if isinstance(node, ast.Call) else None
        called = getattr(function, "attr", "") or getattr(function, "id", "")
        if isinstance(node, ast.Await | ast.AsyncWith) or called in CALLS:
            first = node.items[0].context_expr if isinstance(node, ast.AsyncWith) else node
            found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


STEPS = {path: steps(path) for path in {code.co_filename for code in CODES}}


def on_call(frame: FrameType, event: str, argument: Any) -> Any:
    return Follow(frame) if frame.f_code in CODES else None


class Follow:
    """Follows one call of a function from line to line."""

    def __init__(self, frame: FrameType) -> None:
        self.steps = STEPS[frame.f_code.co_filename]
        self.name = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        self.last = frame.f_lineno  # the line at which a coroutine was resumed

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            if frame.f_lineno in self.steps or self.last in self.steps:
                come_to(f"{self.name}:{frame.f_lineno}")
            self.last = frame.f_lineno
        return self


def come_to(point: str) -> None:
    if point == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    if REACHED and point not in reached:
        reached.add(point)
        with Path(REACHED).open("a") as file:
            file.write(point + "\n")


importlib.import_module("lmdaemon.daemon")  # imported before tracing begins, because tracing makes the import slow
threading.settrace(on_call)
sys.settrace(on_call)
sys.exit(main())
