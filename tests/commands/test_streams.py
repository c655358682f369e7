"""Standard streams that are closed, full, or left by their reader, with every command and both event loops."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from commands import COMMAND, Running, configure, daemon, environment, poll, run

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}
FULL = Path("/dev/full")
NO_SPACE = "lmdaemon: standard output cannot be written to: No space left on device\n"
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("lm")
    configure(directory)
    with daemon(directory) as running:
        running.started().open("acme", "s-1")
        running.open("acme", "s-2")
        running.api("POST", "operators/acme/sessions/s-2/close")
        yield running


def shell(line: str, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs a line of shell in which `$LM` stands for the command: `$LM version >&-`."""
    return subprocess.run(
        ["sh", "-c", line.replace("$LM", " ".join(COMMAND))],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def into(words: str, cwd: Path, *, out: Path | None = None, err: Path | None = None) -> tuple[int, str, str]:
    """Runs a command in a forked process, with streams that go to these files. Returns its exit code, and what it wrote
    to the streams for which no file was given.
    """
    places = [out or cwd / "out", err or cwd / "err"]
    for place in (cwd / "out", cwd / "err"):
        place.write_bytes(b"")
    process = forked.Started(words.split(), cwd, environment(), out=places[0], err=places[1])
    try:
        code = process.wait(120)
    finally:
        process.kill()
    return code, (cwd / "out").read_text(), (cwd / "err").read_text()


COMMANDS = [
    "--help",
    "sessions list --help",
    "version",
    "version --json",
    "check-config",
    "check-config --json",
    "status",
    "status --json",
    "sessions list acme",
    "sessions show acme s-1 --json",
    "sessions touch acme s-1",
    "sessions export",
    "deliveries list --json",
    "hold acme",
    "release acme",
    "backup --force copy",
    "send --url http://127.0.0.1:9/",
]


@needs_full
@pytest.mark.parametrize("words", COMMANDS)
def test_a_result_that_cannot_be_written_is_one_line_and_exits_1(lm: Running, words: str) -> None:
    assert into(words, lm.directory, out=FULL) == (1, "", NO_SPACE)


@needs_full
def test_in_a_new_interpreter_too_it_is_one_line(lm: Running) -> None:
    done = shell("$LM version > /dev/full", lm.directory)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", NO_SPACE)


@needs_full
def test_a_long_result_that_cannot_be_written_is_one_line(lm: Running) -> None:
    """The result is longer than every buffer. The command exits with 1."""
    for number in range(300):
        lm.open("acme", f"{'long' * 50}-{number}")
    for words in ("sessions list acme --all", "sessions list acme --all --json"):
        assert into(words, lm.directory, out=FULL) == (1, "", NO_SPACE)


@needs_full
@pytest.mark.parametrize(
    ("words", "code"),
    [("version", 0), ("status", 0), ("hold nobody", 1), ("check-config --config none", 2), ("sessions", 2)],
)
@pytest.mark.slow
def test_messages_that_cannot_be_written_change_no_exit_code(lm: Running, words: str, code: int) -> None:
    assert into(words, lm.directory, err=FULL)[0] == code
    assert into(words, lm.directory, out=FULL, err=FULL)[0] == (code or 1)
    assert shell(f"$LM {words} 2>&-", lm.directory).returncode == code
    assert shell(f"$LM {words} > /dev/full 2>&-", lm.directory).returncode == (code or 1)


@pytest.mark.slow
@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("words", ["version", "status --json", "sessions touch acme s-1", "backup --force copy"])
def test_a_command_does_its_work_without_standard_streams(lm: Running, words: str, closed: str) -> None:
    done = shell(f"$LM {words} {CLOSED[closed]}", lm.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) is (closed in ("stdin", "stderr"))


def test_nothing_is_opened_in_a_standard_streams_place(lm: Running) -> None:
    """A database that was opened as file descriptor 2 would be overwritten by the first message."""
    done = shell("$LM backup --force copy >&- 2>&-; $LM restore copy >&- 2>&-", lm.directory)
    assert done.returncode == 1  # refused, because the daemon runs
    assert (lm.directory / "copy").read_bytes().startswith(b"SQLite format 3\0")


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A value of PYTHONPATH with which `serve` uses this event loop."""
    ours = environment()["PYTHONPATH"]
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
        return ours
    directory = tmp_path_factory.mktemp("no-uvloop")
    (directory / "uvloop.py").write_text("raise ImportError('not installed')\n")
    return f"{directory}{os.pathsep}{ours}"


@pytest.mark.slow
@pytest.mark.parametrize("closed", CLOSED)
def test_the_daemon_serves_without_standard_streams(tmp_path: Path, loop: str, closed: str) -> None:
    configure(tmp_path)
    serves(tmp_path, loop, CLOSED[closed])


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("full", ["2> /dev/full", "> /dev/full"])
def test_the_daemon_serves_with_full_standard_streams(tmp_path: Path, loop: str, full: str) -> None:
    configure(tmp_path)
    serves(tmp_path, loop, full)


def serves(directory: Path, loop: str, redirections: str) -> None:
    """The daemon starts, answers, and stops in good order with exit code 0."""
    line = f"exec {' '.join(COMMAND)} serve {redirections}"
    running = subprocess.Popen(
        ["sh", "-c", line], cwd=directory, env=environment(PYTHONPATH=loop), stderr=subprocess.DEVNULL
    )
    try:
        poll(lambda: run("status", cwd=directory).returncode == 0 or running.poll() is not None, every_s=0.2)
        assert running.poll() is None
        for number in range(3):
            opened = str(Path(f"/proc/{running.pid}/fd/{number}").readlink())
            assert "sqlite" not in opened
            assert "socket:" not in opened
        running.terminate()
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.wait()


def test_a_log_on_a_disk_that_was_full_goes_on_when_there_is_room(tmp_path: Path) -> None:
    script = """
import os, sys
from lmdaemon.commands import streams
streams.prepare()
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
print("lost", file=sys.stderr)
os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT), 2)
print("kept", file=sys.stderr)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), check=True, timeout=60)
    assert (tmp_path / "log").read_text() == "kept\n"
