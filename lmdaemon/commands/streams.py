"""Makes the standard streams reliable: a caller may have closed them (`>&-`) or redirected them to a full disk.

`__main__` does this before it imports anything else.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare() -> None:
    """Opens the streams that are closed, and makes a failed write to stdout one line of error instead of a
    traceback.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get this number, and everything that is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - stays open to the end
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool = False) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    lines = line_buffering or raw.isatty()
    # The terminal's encoding may lack characters of an id or of a file's name
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


class _Output(io.FileIO):
    """Standard output: the first write that fails raises Failed, or BrokenPipeError if the reader has closed the pipe.

    What is written after that is discarded.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # otherwise the interpreter's flush at exit would fail again
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise
            from lmdaemon.commands.shared import Failed, reason

            raise Failed(f"standard output cannot be written to: {reason(error)}") from error


class _Messages(io.FileIO):
    """Standard error: a message that cannot be written is dropped; the next one is tried again."""

    def write(self, data: Any) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written
