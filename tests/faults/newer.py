"""lmdaemon as a later version of it: with one migration more, MORE, after which no program may use the database that
knows fewer than OLDEST. `MORE=SQL [OLDEST=NUMBER] python newer.py --config FILE serve`.
"""

import os
import sys
from importlib import import_module

from lmdaemon.store.postgres import versions

versions.MIGRATIONS = (*versions.MIGRATIONS, os.environ["MORE"])
versions.OLDEST = int(os.environ.get("OLDEST", versions.OLDEST))
sys.exit(import_module("lmdaemon.__main__").main())
