"""A real PostgreSQL server for the tests: the server that POSTGRES_URL names, or one started from Debian's binaries.

POSTGRES_URL is a libpq URL whose role may create databases. POSTGRES_BINARIES takes the place of Debian's directory:
the programs of version N are in its `N/bin`, and the newest version is started. A server that the tests start keeps its
data in a temporary directory and does not sync to disk, because its data need not survive a power cut.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ASKED = "POSTGRES_URL"
BINARIES = Path(os.environ.get("POSTGRES_BINARIES", "/usr/lib/postgresql"))
SETTINGS = (
    "max_wal_size=64MB",
    "fsync=off",
    "full_page_writes=off",
    "max_connections=200",
    "max_wal_senders=4",
    "autovacuum_naptime=5s",
)


class NoServerError(Exception):
    """No PostgreSQL server is there and none can be started; the message says why."""


@contextmanager
def server() -> Iterator[str]:
    """The URL of a database on a server where further databases can be created. Raises NoServerError."""
    if url := os.environ.get(ASKED):
        yield url
        return
    with OwnServer() as own:
        yield own.url


@contextmanager
def own_server(of: "OwnServer | None" = None, disk_mib: int | None = None) -> "Iterator[OwnServer]":
    """A server that a test may stop. Where none can be started, the test is skipped with the reason."""
    try:
        own = OwnServer(of, disk_mib)
    except NoServerError as error:
        pytest.skip(str(error))
    with own:
        yield own


def _binaries() -> Path:
    found = sorted(
        (one for one in BINARIES.glob("*/bin") if (one / "initdb").exists()), key=lambda one: int(one.parent.name)
    )
    if not found:
        raise NoServerError(
            f"no PostgreSQL: {ASKED} is not set, and there is none in {BINARIES} (apt install postgresql)"
        )
    return found[-1]


class OwnServer:
    """A server in a temporary directory with a port on loopback. A test can stop, kill and start it again.

    With `of`, it is a standby of that server, named `standby`. With `disk_mib`, its data are on a disk of their own, of
    that size in MiB.
    """

    def __init__(self, of: "OwnServer | None" = None, disk_mib: int | None = None) -> None:
        self._binaries = _binaries()
        self._has_disk = False
        # The directory is in memory if the tests' own files are: each new database makes 300 files
        self.directory = Path(
            tempfile.mkdtemp(prefix="lmdaemon-postgres-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.run_as: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.directory, "postgres", "postgres")
            self.run_as = ["runuser", "-u", "postgres", "--"]
        if disk_mib is not None:
            self._mount(disk_mib)
        if of is None:
            self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C")
        else:
            primary = f"host=127.0.0.1 port={of.port} user=postgres application_name=standby"
            self._run("pg_basebackup", "-d", primary, "-R", "--checkpoint=fast", "--no-sync")

    def _mount(self, mib: int) -> None:
        (data := self.directory / "data").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "none", str(data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoServerError(f"nothing can be mounted: {done.stderr.strip()}")
        self._has_disk = True
        if self.run_as:
            shutil.chown(data, "postgres", "postgres")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self.run_as, str(self._binaries / program), "-D", str(self.directory / "data"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.directory, check=False)
        if done.returncode:
            raise NoServerError(f"{program}: {done.stdout}{done.stderr}")

    def start(self, *more: str) -> None:
        """`more` settings come after its own."""
        own = (f"port={self.port}", f"unix_socket_directories={self.directory}")
        settings = [f"-c {one}" for one in (*SETTINGS, *own, *more)]
        self._run("pg_ctl", "-w", "-l", str(self.directory / "log"), "-o", " ".join(settings), "start")

    def stop(self, how: str = "fast") -> None:
        """Stops the server: `fast` ends its connections in good order, `immediate` is like a crash."""
        self._run("pg_ctl", "-w", "-m", how, "stop")

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the server."""
        pid = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
        processes = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        for one in processes:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(_runs(one) for one in processes) and time.monotonic() < deadline:
            time.sleep(0.01)

    def is_down(self) -> bool:
        """Whether the server has ended by itself."""
        found = self.directory / "data" / "postmaster.pid"
        return not found.exists() or not _runs(int(found.read_text().split()[0]))

    def promote(self) -> None:
        """Makes the standby a primary."""
        self._run("pg_ctl", "-w", "promote")

    @contextmanager
    def receiver(self) -> Iterator[None]:
        """A client that receives the write-ahead log, as a replica does."""
        target = self.directory / "received"
        target.mkdir()
        if self.run_as:
            shutil.chown(target, "postgres", "postgres")
        where = ["-D", str(target), "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        received = subprocess.Popen(
            [*self.run_as, str(self._binaries / "pg_receivewal"), *where],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(received.pid, signal.SIGKILL)  # the whole process group, because `runuser` has started a child
            received.wait()

    def __enter__(self) -> "OwnServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(NoServerError):  # the server may be stopped already
                self.stop("immediate")
        finally:
            if self._has_disk:
                subprocess.run(["umount", "--lazy", str(self.directory / "data")], check=True)
            shutil.rmtree(self.directory, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Whether a process with this id exists and is not a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class PgBouncer:
    """A connection pooler in front of a server, in transaction mode: each transaction may run on another of its
    connections to the server.
    """

    def __init__(self, server: OwnServer) -> None:
        if shutil.which("pgbouncer") is None:
            raise NoServerError("no pgbouncer here (apt install pgbouncer)")
        self._server = server
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> "PgBouncer":
        place = self._server.directory
        (place / "users").write_text('"postgres" ""\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "auth_type": "any",
            "auth_file": place / "users",
            "logfile": place / "pgbouncer.log",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        database = f"postgres = host=127.0.0.1 port={self._server.port} user=postgres"
        (place / "pgbouncer.ini").write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines]))
        command = [*self._server.run_as, "pgbouncer", "--quiet", str(place / "pgbouncer.ini")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            time.sleep(0.02)
        raise NoServerError((place / "pgbouncer.log").read_text())

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
