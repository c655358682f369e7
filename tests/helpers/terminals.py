"""Runs the `lmdaemon` command on a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

from commands import COMMAND, environment, poll


class Terminal:
    """A terminal of this many columns (0: it does not tell its size), and a command that runs on it. `text` is
    everything shown so far.
    """

    def __init__(self, directory: Path, *words: object, columns: int = 80, only_messages: bool = False) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        os.set_blocking(self._ours, False)
        self.text = ""
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=directory,
            env={name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if only_messages else theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def read(self) -> str:
        try:
            while piece := os.read(self._ours, 65536):
                self.text += piece.decode()
        except BlockingIOError:
            pass
        except OSError:  # every process has closed the terminal
            os.set_blocking(self._ours, True)
        return self.text

    def ended(self) -> int:
        poll(lambda: self.read() is not None and self.process.poll() is not None)
        self.read()
        os.close(self._ours)
        return self.process.wait()
