"""`python -m lmdaemon` and the `lmdaemon` command."""

import sys

from lmdaemon.cli import main

if __name__ == "__main__":
    sys.exit(main())
