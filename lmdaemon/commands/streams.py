"""The standard streams, which a caller may have closed (`>&-`) or led to a full disk.

Called by `__main__` before anything else is imported.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare() -> None:
    """Makes sure that all three are there, and that a failed write ends in one line instead of a traceback."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # whatever were opened next would take its number, and with it what is meant for the stream
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - a number, open to the end
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool = False) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    lines = line_buffering or raw.isatty()
    # An id, or the name of a file, may not fit the terminal's encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


class _Output(io.FileIO):
    """Standard output: the first write that fails raises Failed, the rest goes nowhere.

    A reader that has seen enough is no failure of ours to be told: BrokenPipeError.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # or the interpreter's own flush at its end would fail once more
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise
            from lmdaemon.commands.shared import Failed, reason

            raise Failed(f"standard output cannot be written to: {reason(error)}") from error


class _Messages(io.FileIO):
    """Standard error: a message that cannot be written is let go; the next is tried again."""

    def write(self, data: Any) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written
