"""The endpoints in docs/examples, run as their users run them, pass `lmdaemon check`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import environment, poll
from endpoints import PROVIDER, QUICK, TOKEN, UNTIMED, to
from processes import free_ports

from lmdaemon.workbench.runner import Report, Runner, chosen

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@contextmanager
def process(*words: object, cwd: Path, port: int, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A server process on this port. It and all its children are ended with the context."""
    with (cwd / "server.log").open("ab") as log:
        started = subprocess.Popen(
            list(map(str, words)),
            cwd=cwd,
            env=environment(**env),
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        poll(lambda: listens(port) or started.poll() is not None)
        assert started.poll() is None, (cwd / "server.log").read_text()
        yield started
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(30)


def listens(port: int) -> bool:
    row = f":{port:04X} 00000000:0000 0A"
    return any(row in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def checked(port: int) -> Report:
    operator = to(f"http://127.0.0.1:{port}/V4/SessionExpired", provider_id=PROVIDER)
    return await Runner(operator, checks=UNTIMED, token=TOKEN, limits=QUICK).run()


def found(report: Report, verdict: str) -> dict[str, str]:
    return {result.check.id: result.text for result in report.results if result.verdict == verdict}


async def test_the_endpoint_in_python_passes_every_check(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (port,) = free_ports(1)
    with process(sys.executable, EXAMPLES / "endpoint.py", port, "token", cwd=tmp_path, port=port):
        report = await checked(port)
    assert found(report, "fail") == {}
    # A slow body is cut off after 10 s. This run sends it for 1 s
    assert set(found(report, "warn")) <= {"strictness.slow-body"}


@pytest.mark.slow
async def test_the_endpoint_in_python_cuts_off_a_slow_body(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (port,) = free_ports(1)
    with process(sys.executable, EXAMPLES / "endpoint.py", port, "token", cwd=tmp_path, port=port):
        operator = to(f"http://127.0.0.1:{port}/V4/SessionExpired", provider_id=PROVIDER)
        report = await Runner(operator, checks=chosen(["strictness.slow-body"], []), token=TOKEN).run()
    assert "strictness.slow-body" in found(report, "pass")


def test_the_endpoint_in_python_says_how_it_is_started(tmp_path: Path) -> None:
    for words in ((), ("8190",), ("8190", "token", "more")):
        command = [sys.executable, EXAMPLES / "endpoint.py", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "usage: python endpoint.py PORT TOKEN_FILE\n"


@pytest.mark.skipif(not (shutil.which("php") and shutil.which("nginx")), reason="needs php-cli and nginx")
async def test_the_endpoint_in_php_behind_nginx_passes_every_check(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ended").mkdir()
    front, back = free_ports(2)
    conf = (EXAMPLES / "nginx.conf").read_text().replace(":8080", f":{front}").replace(":8081", f":{back}")
    (tmp_path / "nginx.conf").write_text(conf)
    serve = ("php", "-d", "display_errors=0", "-S", f"127.0.0.1:{back}", EXAMPLES / "endpoint.php")
    env = {"TOKEN_FILE": str(tmp_path / "token"), "ENDED_DIR": str(tmp_path / "ended"), "PHP_CLI_SERVER_WORKERS": "4"}
    nginx = ("nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", "daemon off;")
    with (
        process(*serve, cwd=tmp_path, port=back, **env),
        process(*nginx, cwd=tmp_path, port=front),
    ):
        report = await checked(front)
    assert found(report, "fail") == {}
    assert set(found(report, "warn")) <= {"strictness.slow-body"}
    assert list((tmp_path / "ended").glob("new*")) == []


@pytest.mark.skipif(not shutil.which("php"), reason="needs php-cli")
async def test_the_endpoint_in_php_says_what_must_be_configured(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    serve = ("php", "-S", f"127.0.0.1:{port}", EXAMPLES / "endpoint.php")
    with process(*serve, cwd=tmp_path, port=port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/V4/SessionExpired", b"{}", timeout=60) as answer:
            assert json.loads(answer.read()) == {"error": 100, "description": "Not configured"}
        poll(lambda: "TOKEN_FILE must name a file, and ENDED_DIR a directory" in read(tmp_path / "server.log"))


def test_the_endpoints_stay_short() -> None:
    """Fifty lines at most. Empty lines, comments and single braces do not count."""
    for name in ("endpoint.py", "endpoint.php"):
        lines = [line.strip() for line in (EXAMPLES / name).read_text().splitlines()]
        code = [line for line in lines if line.strip("{}") and not line.startswith(("//", "#", '"""', "<?php"))]
        assert len(code) <= 50, name


def demonstration(directory: Path, **sizes: str) -> "subprocess.Popen[str]":
    """Starts the demonstration in a process group of its own, without a limit of lateness that a busy machine could
    miss.
    """
    server, api, operator = map(str, free_ports(3))
    return subprocess.Popen(
        ["sh", EXAMPLES / "demo.sh"],
        cwd=directory,
        env=environment(
            LMDAEMON=f"{sys.executable} -m lmdaemon",
            DEMO=str(directory / "demo"),
            LATE="60s",
            PORT=server,
            API_PORT=api,
            OPERATOR_PORT=operator,
            **sizes,
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_demonstration_runs_and_every_side_is_content(tmp_path: Path) -> None:
    with demonstration(tmp_path, PLAYERS="40", DURATION="2s", DOWN="1s") as demo:
        said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, said
    assert "/console/" in said
    assert "Verdict: every promise was kept" in said
    assert "massExpired=casino comes from the end of this demonstration" in said
    assert said.endswith("Verdict: as expected\n")


@pytest.mark.slow
def test_the_demonstration_ends_at_ctrl_c_with_what_was_seen(tmp_path: Path) -> None:
    with demonstration(tmp_path, PLAYERS="10", DURATION="10m", DOWN="1s") as demo:
        poll(lambda: "attempt 1" in read(tmp_path / "demo" / "operator.txt"))
        os.killpg(demo.pid, signal.SIGINT)
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "Verdict, of what was seen so far: every promise was kept" in said
    assert said.endswith("Verdict: as expected\n")
    with pytest.raises(ProcessLookupError):  # no process of the demonstration is left
        os.killpg(demo.pid, 0)


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""
