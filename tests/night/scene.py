"""The scene of a situation: a daemon, operators and game servers as processes, with a directory of their own."""

import json
import os
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forked
from processes import AS_USERS_DO, FORKED, Process, free_ports, wait_for

TOKEN = "token-of-the-player"
OPERATORS_SCHEDULE = ["5s", "30s", "2m", "10m"]
CALLS_AT_ONCE = 10_000  # sessions in one bulk call


def set_clock(ago_s: float, speed: int) -> None:
    """From now on, this process's wall clock is `ago_s` seconds behind, and goes `speed` times as fast."""
    now_ns, began_ns = time.time_ns, time.time_ns()
    ago_ns = int(ago_s * 1e9)
    time.time_ns = lambda: began_ns + (now_ns() - began_ns) * speed - ago_ns
    time.time = lambda: time.time_ns() / 1e9


class CannotBePlayedError(Exception):
    """This user or this machine cannot play a situation; the text says why."""


class Asked(NamedTuple):
    """A command line and its result."""

    command: str
    code: int
    output: str
    messages: str

    @property
    def text(self) -> str:
        """Everything that a person at a terminal sees."""
        return self.output + self.messages


class Scene:
    """One daemon with its operators. It can be stopped and started, also with a wall clock in the past."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._secret = os.urandom(16).hex()
        self.directory = directory
        self.peers: dict[str, Peer] = {}
        self.daemon = Process(directory, 'token_file = "tokens"\n[log]\nformat = "json"\n', {"TZ": "UTC"}, FORKED)
        (directory / "tokens").touch(0o600)
        (directory / "tokens").write_text(f"anna:{self._secret}\n")
        stack.callback(self._end)

    def _end(self) -> None:
        if hasattr(self.daemon, "popen"):
            self.daemon.kill()

    # -- setting it up

    def settings(self, toml: str) -> None:
        """Adds TOML to the daemon's configuration."""
        with self.daemon.config.open("a") as file:
            file.write(toml)

    def operator(self, name: str, script: str = "", *, tls: bool = False, **keys: Any) -> "Peer":
        """Starts an operator that answers by a script, and adds its table to the configuration."""
        self.peers[name] = peer = Peer(self.directory / name, script, tls=tls)
        self._stack.callback(peer.stop)
        table = {"provider_id": name, "notify": True, "url": peer.url, "allow_private_network": True, "endpoint": ""}
        table |= {"schedule": OPERATORS_SCHEDULE} | ({"ca_file": str(peer.ca_file)} if tls else {}) | keys
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        self.settings(f"[operators.{name}]\n{lines}")
        return peer

    def disk(self, options: str) -> Path:
        """Mounts a small disk for the database. Raises CannotBePlayedError if this user may not mount."""
        directory = self.directory / "disk"
        directory.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", directory], capture_output=True, text=True
        )
        if done.returncode:
            raise CannotBePlayedError(f"nothing can be mounted here: {done.stderr.strip()}")
        self._stack.callback(subprocess.run, ["umount", "--lazy", directory], check=True)
        self._stack.callback(self._end)  # called before the unmounting
        self.settings('[database]\npath = "disk/lmdaemon.sqlite3"\n')
        return directory

    def start(self, ago_s: float = 0, speed: int = 1) -> None:
        """Starts the daemon with a wall clock that is `ago_s` seconds behind and goes `speed` times as fast, and waits
        until it serves.
        """
        self.daemon.first = partial(set_clock, ago_s, speed) if ago_s or speed != 1 else None
        self.daemon.start()

    def stop(self) -> None:
        assert self.daemon.stop() == 0, self.daemon.log.read_text()

    # -- what game servers do

    def opens(self, operator: str, sessions: Sequence[str], player: str = "p-1") -> None:
        for start in range(0, len(sessions), CALLS_AT_ONCE):
            some = sessions[start : start + CALLS_AT_ONCE]
            body = [{"sessionId": one, "playerId": player, "token": TOKEN} for one in some]
            self.call("POST", f"v1/operators/{operator}/sessions", {"sessions": body})

    def touches(self, operator: str, sessions: Sequence[str], request_id: str = "gs-1") -> None:
        """Makes one bulk touch, with an `X-Request-Id` that names the game server."""
        path = f"v1/operators/{operator}/sessions/touch"
        status, answer = self.status_of("POST", path, {"sessionIds": list(sessions)}, {"X-Request-Id": request_id})
        assert status == 200, answer

    def closes(self, operator: str, sessions: Sequence[str]) -> None:
        for session in sessions:
            self.call("POST", f"v1/operators/{operator}/sessions/{session}/close")

    def plays(self, operator: str, sessions: Sequence[str], player: str = "p-1") -> None:
        """Opens sessions and closes them."""
        self.opens(operator, sessions, player)
        self.closes(operator, sessions)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Makes a call of the private API, which must succeed."""
        status, answer = self.status_of(method, path, body)
        assert status < 300, answer
        return answer

    def status_of(
        self, method: str, path: str, body: object = None, more: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Makes a call of the private API with additional headers. Returns status and answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._secret}", **(more or {})}
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.daemon.api}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    # -- what the person on call does

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a shell in which `lmdaemon` talks to this daemon and `journalctl` shows its log."""
        tools = self.directory / "bin"
        if not tools.exists():
            tools.mkdir()
            log = shlex.quote(str(self.daemon.log))
            lines = {"lmdaemon": f'exec {shlex.join(AS_USERS_DO)} "$@"', "journalctl": f"exec cat {log}"}
            for name, line in lines.items():
                (tools / name).write_text(f"#!/bin/sh\n{line}\n")
                (tools / name).chmod(0o700)
        ours = {"LMDAEMON_CONFIG": str(self.daemon.config), "TZ": "UTC", "PYTHONUTF8": "1"}
        return os.environ | ours | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def asks(self, command: str) -> Asked:
        """Runs a command line as if it were typed into a shell in the daemon's directory."""
        if command.startswith("lmdaemon ") and "|" not in command:
            # How many sessions `lmdaemon size` opens
            few = partial(forked.put, "lmdaemon.workbench.sizing", "BULK", 200)
            done = forked.run(shlex.split(command)[1:], self.directory, self.environment, within_s=300, first=few)
            return Asked(command, done.returncode, done.stdout, done.stderr)
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(["sh", "-c", command], cwd=self.directory, env=self.environment, **options)
        return Asked(command, done.returncode, done.stdout, done.stderr)

    # -- waiting for what another process does

    def until(self, condition: Callable[[], Any]) -> Any:
        return wait_for(condition, otherwise=self.daemon.log.read_text)

    def until_logged(self, event: str) -> dict[str, Any]:
        """Waits until the log has a line with this event. Returns the first such line."""
        found: dict[str, Any] = self.until(lambda: self.daemon.events(event))[0]
        return found

    def until_settled(self, operator: str) -> None:
        """Waits until no delivery is pending for an operator."""
        self.until(lambda: not self.of(operator)["pending"])

    def of(self, operator: str) -> dict[str, Any]:
        """The entry of an operator in the API's list."""
        found: list[dict[str, Any]] = self.call("GET", "v1/operators")["items"]
        return next(one for one in found if one["operator"] == operator)

    def check(self, name: str) -> dict[str, Any]:
        """One check of `/health`."""
        _, health = self.status_of("GET", "health")
        found: dict[str, Any] = health["checks"][name][0]
        return found


class Peer:
    """An operator, played by `lmdaemon simulate operator`."""

    def __init__(self, directory: Path, script: str, *, tls: bool) -> None:
        directory.mkdir()
        (port,) = free_ports(1)
        self.ca_file = directory / "ca.pem"
        self.output = directory / "output"
        self._words = ["simulate", "operator", "--listen", f"127.0.0.1:{port}"]
        self._words += ["--tls-ca", str(self.ca_file)] if tls else []
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/V4/SessionExpired"
        self._popen: forked.Started | None = None
        self.play(script)

    def play(self, script: str) -> None:
        """Answers by this script from now on."""
        self.stop()
        self.output.write_bytes(b"")
        words = [*self._words, "--script", script] if script else self._words
        self._popen = forked.Started(words, Path.cwd(), os.environ, out=self.output, err=self.output)
        wait_for(lambda: b"Serving" in self.output.read_bytes(), otherwise=self.output.read_text)

    @property
    def notices(self) -> int:
        """How many notices an operator without TLS has received."""
        with urllib.request.urlopen(self.url.removesuffix("V4/SessionExpired"), timeout=60) as answer:
            found: int = json.loads(answer.read())["counts"]["notices"]
        return found

    def stop(self) -> None:
        """Stops the operator, so that nobody listens at its address."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        self._popen = None


@contextmanager
def scene() -> Iterator[Scene]:
    """A scene. At its end, its processes are ended and its files deleted."""
    with tempfile.TemporaryDirectory(prefix="lmdaemon-night-") as directory, ExitStack() as stack:
        yield Scene(Path(directory), stack)
