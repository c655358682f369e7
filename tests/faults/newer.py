"""Runs lmdaemon as if it were a later version, with one more migration, MORE. If OLDEST is given, programs that know
fewer migrations than OLDEST may not use the database afterwards. `MORE=SQL [OLDEST=NUMBER] python newer.py --config
FILE serve`.
"""

import os
import sys
from importlib import import_module

from lmdaemon.store.postgres import versions

versions.MIGRATIONS = (*versions.MIGRATIONS, os.environ["MORE"])
versions.OLDEST = int(os.environ.get("OLDEST", versions.OLDEST))
sys.exit(import_module("lmdaemon.__main__").main())
