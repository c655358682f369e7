"""Runs commands in processes that import nothing: they are forked from a process that has imported everything.

A command then takes 20 ms of CPU time instead of 150, and a daemon starts in 50 ms instead of 400 (most of which is
importing aiohttp). Each process has its own streams, environment, directory and exit code. What a Python interpreter
reads at its start (PYTHON* variables, the locale) stays as in the process of the tests. So tests about those variables,
imports, memory or starting use ordinary processes instead.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(
    [
        "lmdaemon.daemon",
        *(f"lmdaemon.commands.{name}" for name in ("admin", "backup", "check", "export", "send", "serve", "size")),
        "lmdaemon.commands.simulate_operator",
    ]
)


class Started:
    """A running command, with the methods of `subprocess.Popen`.

    Its output is appended to the files `out` and `err`, which may be the same file. `first` is called in the new
    process before the command begins.
    """

    def __init__(
        self,
        words: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        *,
        out: Path,
        err: Path,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.args = ["lmdaemon", *words]
        streams = (str(out), str(err))
        self._process = _FORKING.Process(target=_main, args=(words, str(directory), dict(environment), streams, first))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    words: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    within_s: float,
    first: Callable[[], None] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Runs one command to its end."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = Started(words, directory, environment, out=out, err=err, first=first)
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TimeoutError(f"{words}: not over within {within_s:g} s") from None
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def put(module: str, name: str, value: object) -> None:
    """Sets a name in a module. Meant for `first`, as a `partial`: the process then has another value for a constant."""
    setattr(import_module(module), name, value)


def _main(
    words: Sequence[str],
    directory: str,
    environment: Mapping[str, str],
    streams: tuple[str, str],
    first: Callable[[], None] | None,
) -> None:
    gc.freeze()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), *((path, _APPENDED) for path in streams)]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    warnings.simplefilter("error")
    sys.argv = ["lmdaemon", *words]
    sys.path.insert(0, directory)  # as `python -m` does
    if first is not None:
        first()
    from lmdaemon.__main__ import main

    code = main()
    gc.collect()  # reports files and connections that were left open, as the end of an interpreter does
    sys.exit(code)


_APPENDED = os.O_WRONLY | os.O_CREAT | os.O_APPEND
