"""The entry point of `python -m lmdaemon` and of the `lmdaemon` command."""

import sys

from lmdaemon.commands import streams


def main() -> int:
    """Runs the command line and returns the exit code. The standard streams are made reliable before other imports."""
    streams.prepare()
    from lmdaemon.commands.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
