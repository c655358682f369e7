"""`python -m lmdaemon` and the `lmdaemon` command."""

import sys

from lmdaemon.commands import streams


def main() -> int:
    """Runs the command line. What it needs is imported when the standard streams can be relied upon."""
    streams.prepare()
    from lmdaemon.commands.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
