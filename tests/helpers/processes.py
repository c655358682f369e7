"""The daemon as a process, started as users start it. Tests kill, stop and restart it."""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest

AS_USERS_DO = (sys.executable, "-m", "lmdaemon")
FORKED: Sequence[str] = ()  # run by a forked process (`helpers.forked`), which saves the imports
# A command that calls the daemon loads all CAs of the machine with aiohttp, which is slow. No test needs them: a test
# that uses TLS has its CA in a file.
NO_CAS = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}


class Process:
    """One daemon over several runs. Directory, file and ports stay the same, so that its clients find it again.

    `command` is the command line before `--config FILE serve`. If it is FORKED, the process calls `first` before it
    begins.
    """

    def __init__(
        self,
        directory: Path,
        toml: str = "",
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = AS_USERS_DO,
        first: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        server, api = free_ports(2)
        self.directory = directory
        self.config = directory / "config.toml"
        self.config.write_text(f'[server]\nlisten = "127.0.0.1:{server}"\n[api]\nlisten = "127.0.0.1:{api}"\n' + toml)
        self.server, self.api = f"http://127.0.0.1:{server}", f"http://127.0.0.1:{api}"
        self.log = directory / "log"
        self.environment = dict(environment or {})
        self.command = command
        self.first = first
        self.options = options
        self.popen: subprocess.Popen[str] | forked.Started

    @property
    def path(self) -> Path:
        return self.directory / "lmdaemon.sqlite3"

    def spawn(self) -> None:
        """Starts the daemon and does not wait."""
        command = [*self.command, "--config", str(self.config), "serve"]
        environment = os.environ | NO_CAS | self.environment
        if not self.command:
            self.log.touch()
            said = {"out": Path(os.devnull), "err": self.log}
            self.popen = forked.Started(command, Path.cwd(), environment, **said, first=self.first)
            return
        with self.log.open("a") as stderr:
            self.popen = subprocess.Popen(command, stderr=stderr, text=True, env=environment, **self.options)

    def start(self) -> None:
        """Starts the daemon and waits until it serves."""
        self.spawn()
        self.wait_until_serving()

    def wait_until_serving(self, within_s: float = 60.0) -> None:
        def serves() -> bool:
            assert self.popen.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return self.call("GET", self.api + "/health")[0] == 200
            return False

        wait_for(serves, within_s, lambda: f"not serving: {self.log.read_text()}")

    def call(self, method: str, url: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def stop(self, number: int = signal.SIGTERM, within_s: float = 60) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(within_s)

    def kill(self) -> None:
        """Sends SIGKILL, also to a daemon that is stopped (SIGSTOP). Does nothing if the daemon has ended."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait()

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Reads rows from the SQLite file, over a separate connection."""
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=20)) as connection:
            return connection.execute(sql, arguments).fetchall()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log (JSON) with this event."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line["event"] == name]

    @property
    def memory_kib(self) -> int:
        """Resident memory of the process, in KiB."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


def wait_for(condition: Callable[[], Any], within_s: float = 40.0, otherwise: Callable[[], str] = str) -> Any:
    """Waits until the condition holds, for a state that another process has to reach. Fails the test after
    `within_s`.
    """
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() >= deadline:
            pytest.fail(otherwise() or f"not within {within_s:g} s")
        time.sleep(0.01)
    return result


# For each port given out, an abstract socket whose name reserves the port until the tests end
_OURS: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Ports that no other program uses: not before the daemon first listens there, nor while it is down between two
    runs.

    A port that the system chooses could be taken in the meantime, even by a client's connection. So these ports are
    below the range from which the system chooses. Other tests on this machine see from the sockets' names which ports
    are taken.
    """
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, max(int(lowest), 20_000))
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0lmdaemon-tests-port-{port}")
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            name.close()
            continue
        _OURS.append(name)
        found.append(port)
    return found


@contextlib.contextmanager
def process(
    directory: Path, toml: str = "", environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Process]:
    """A running daemon that serves. It is killed at the end if it still runs."""
    running = Process(directory, toml, environment, **options)
    running.spawn()
    try:
        running.wait_until_serving()
        yield running
    finally:
        running.kill()
