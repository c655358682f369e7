"""Runs the `lmdaemon` command as a process, and a daemon process beside it in a directory of its own."""

import asyncio
import base64
import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import forked
import pytest
from processes import NO_CAS, free_ports

ROOT = Path(__file__).resolve().parents[2]
API_TOKEN = "api-token-that-nobody-sees"
# the escapings in use (URL, JSON, HTML, shell) each write it in another way
PLAYER_TOKEN = 'plåyer/to"ken+<>~never shown'
HASH_KEY = "hash-key-that-nobody-sees"
SIGNING_SECRET = "whsec_" + base64.b64encode(b"signing-secret-that-nobody-sees!").decode()
SECRETS = (API_TOKEN, PLAYER_TOKEN, HASH_KEY, SIGNING_SECRET)
COMMAND = [sys.executable, "-W", "error", "-m", "lmdaemon"]


def environment(**extra: str) -> dict[str, str]:
    ours = ("LMDAEMON_CONFIG", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "JOURNAL_STREAM")
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PYTHON")}
    return kept | NO_CAS | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | extra


def forgo_privileges() -> None:
    """Makes file modes apply to root as to every other user (PR_CAPBSET_DROP, CAP_DAC_*)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability)


def of_interpreter(names: Iterable[str]) -> bool:
    """Whether one of these variables is read when an interpreter starts."""
    return any(name.startswith(("PYTHON", "LC_", "LANG", "LD_")) for name in names)


def run(
    *words: object,
    cwd: Path,
    before: Callable[[], None] | None = None,
    first: Callable[[], None] | None = None,
    **env: str,
) -> "subprocess.CompletedProcess[str]":
    """Runs one command to its end. No secret may be in what it prints.

    The command runs in a new interpreter if `before` or a variable that an interpreter reads is given. Otherwise it
    runs in a forked process, which calls `first` at its beginning.
    """
    if before is None and not of_interpreter(env):
        done = forked.run([*map(str, words)], cwd, environment(**env), within_s=120, first=first)
    else:
        # `before` may limit the size of files. A bytecode file that is cut short by that would stay, so none is
        # written.
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            cwd=cwd,
            env=environment(**{"PYTHONDONTWRITEBYTECODE": "1"} | env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=before,
        )
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    assert "Traceback" not in done.stderr, done.stderr
    return done


def text_and_json(*words: object, cwd: Path) -> tuple["subprocess.CompletedProcess[str]", Any]:
    """Runs a reading command twice at the same time, as text and with `--json`; both must succeed."""
    with ThreadPoolExecutor(2) as pool:
        text, as_json = pool.map(lambda more: run(*words, *more, cwd=cwd), ([], ["--json"]))
    assert (text.returncode, as_json.returncode) == (0, 0), text.stderr + as_json.stderr
    assert text.stderr == as_json.stderr
    return text, json.loads(as_json.stdout)


def poll(condition: Callable[[], Any], within_s: float = 40.0, every_s: float = 0.01) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every_s)
    return result


def free_port() -> int:
    return free_ports(1)[0]


@dataclass
class Running:
    """A daemon process in its directory; its log is in `log`."""

    directory: Path
    process: "subprocess.Popen[bytes] | forked.Started"
    log: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]

    def started(self, event: str = "daemon.serving") -> "Running":
        poll(lambda: self.events(event) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def ended(self) -> int:
        """Waits until the daemon ends by itself, and returns its exit code."""
        return self.process.wait(60)

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Calls the daemon's private API directly: to prepare a test, and to check what the command line prints."""
        address = tomllib.loads((self.directory / "config.toml").read_text())["api"]["listen"]
        asked = urllib.request.Request(
            f"http://{address}/v1/{path}",
            json.dumps(body or {}).encode() if method != "GET" else None,
            {"Authorization": f"Bearer {API_TOKEN}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def open(self, operator: str, session: str) -> dict[str, Any]:
        path = f"operators/{operator}/sessions/{quote(session, safe='').replace('.', '%2E')}"
        found: dict[str, Any] = self.api("PUT", path, {"playerId": "p1", "token": PLAYER_TOKEN})
        return found

    def __call__(self, *words: object, **env: str) -> "subprocess.CompletedProcess[str]":
        return run(*words, cwd=self.directory, **env)


LIBRARIES = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])


@functools.cache
def command_for(user: int) -> list[str]:
    """The command, run by a Python that this user may execute. The Python that runs the tests may lie in somebody's
    home.
    """
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            found = subprocess.run(
                [python, "-c", "import lmdaemon.daemon"],
                cwd="/",
                env=environment(PYTHONPATH=LIBRARIES),
                capture_output=True,
                user=user,
                group=user,
                extra_groups=[],
                timeout=120,
            )
            if found.returncode == 0:
                return [python, *COMMAND[1:]]
    pytest.skip("no Python here that another user may execute")


@contextlib.contextmanager
def daemon(
    directory: Path, *words: str, user: int | None = None, before: Callable[[], None] | None = None, **env: str
) -> Iterator[Running]:
    """A daemon that runs in this directory. It is forked, which is quicker, unless an argument needs a new
    interpreter.
    """
    log = directory / "log"
    log.write_bytes(b"")
    process: subprocess.Popen[bytes] | forked.Started
    words = words or ("serve",)
    if user is None and before is None and not of_interpreter(env):
        process = forked.Started(words, directory, environment(**env), out=Path(os.devnull), err=log)
    else:
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [*(COMMAND if user is None else command_for(user)), *words],
                cwd=directory,
                env=environment(**({} if user is None else {"PYTHONPATH": LIBRARIES}), **env),
                stderr=stderr,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
                preexec_fn=before,
            )
    try:
        yield Running(directory, process, log)
    finally:
        process.terminate()
        process.wait(60)
        assert not [secret for secret in SECRETS if secret in log.read_text()]


def secret_file(path: Path, content: str) -> Path:
    path.write_text(content + "\n")
    path.chmod(0o600)
    return path


def configure(directory: Path, more: str = "", *, server: str = "", api: str = "") -> Path:
    """Writes a configuration on free ports, with an operator acme to whom nothing is sent. Returns the file's path."""
    file = directory / "config.toml"
    ports = free_ports(2)  # asked for together, because two separate calls may return the same port
    file.write_text(f"""
[server]
listen = "{server or f"127.0.0.1:{ports[0]}"}"
[api]
listen = "{api or f"127.0.0.1:{ports[1]}"}"
token_file = "api-token"
[operators.acme]
provider_id = "luckymonaco"
{more}""")
    secret_file(directory / "api-token", API_TOKEN)
    secret_file(directory / "player-token", PLAYER_TOKEN)
    return file


UNREACHABLE = f"""
url = "http://127.0.0.1:{free_port()}/gone"
provider_id = "luckymonaco"
endpoint = ""
notify = true
allow_private_network = true
schedule = ["1ms"]
"""


async def open_many(lm: Running, operator: str, ids: list[str]) -> None:
    """Opens sessions over the API as a game server does. Returns when all are acknowledged."""
    base = "http://" + tomllib.loads((lm.directory / "config.toml").read_text())["api"]["listen"]
    headers = {"Authorization": f"Bearer {API_TOKEN}"}

    async with aiohttp.ClientSession(base, headers=headers) as client:

        async def open_one(session: str) -> None:
            body = {"playerId": "p1", "token": PLAYER_TOKEN}
            async with client.put(f"/v1/operators/{operator}/sessions/{session}", json=body) as response:
                assert response.status == 201

        await asyncio.gather(*map(open_one, ids))
