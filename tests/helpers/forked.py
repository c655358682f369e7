"""Commands in processes of their own that need not import anything: they are forked from one that has done so.

So a command takes 20 ms of CPU time instead of 150, most of which is the import of aiohttp. Streams, environment,
directory and exit code are its own. What the interpreter reads when it starts (PYTHON*, the locale) is as in the
process of the tests; what is about that, about imports or about a start is tested with processes of the usual kind.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(
    [f"lmdaemon.commands.{name}" for name in ("admin", "backup", "check", "export", "send")]
)


def run(
    words: Sequence[str], directory: Path, environment: Mapping[str, str], within_s: float
) -> "subprocess.CompletedProcess[str]":
    """One command to its end."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = _FORKING.Process(target=_main, args=(words, str(directory), dict(environment), str(out), str(err)))
        process.start()
        process.join(within_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{words}: not over within {within_s:g} s")
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _main(words: Sequence[str], directory: str, environment: Mapping[str, str], out: str, err: str) -> None:
    gc.freeze()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, _NEW), (err, _NEW)]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    warnings.simplefilter("error")
    sys.argv = ["lmdaemon", *words]
    sys.path.insert(0, directory)  # as for `python -m`
    from lmdaemon.__main__ import main

    code = main()
    gc.collect()  # tells of what was left open, as the interpreter's end does
    sys.exit(code)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
