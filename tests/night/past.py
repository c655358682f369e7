"""lmdaemon as it would have run so many seconds ago: `past.py SECONDS WORDS…`, the wall clock set back by them."""

import sys
import time

ago_s = float(sys.argv.pop(1))
ago_ns = int(ago_s * 1e9)
now, now_ns = time.time, time.time_ns
time.time = lambda: now() - ago_s
time.time_ns = lambda: now_ns() - ago_ns

from lmdaemon.__main__ import main  # noqa: E402 - with the clock set

if __name__ == "__main__":
    sys.exit(main())
