"""A connection to PostgreSQL on a thread of its own, every wait of which ends.

psycopg's asyncio interface cannot bound a wait on Python 3.11: it waits for the server to confirm a cancellation. So
this is the synchronous one, and what takes too long is ended by shutting its socket down, which needs nobody's answer.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

import psycopg

CONNECT_S = 3  # for one host
CUT_S = 0.3  # for a wait to end whose socket was shut down
# Bounds on the server's side, and of the network. The daemon's own deadline is there for what none of them ends, such
# as a proxy that swallows everything.
SERVER_LIMITS = {
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
    "jit": "off",
}
NETWORK_LIMITS: Mapping[str, int] = {
    "connect_timeout": CONNECT_S,
    "tcp_user_timeout": 3000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"
Result = TypeVar("Result")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class NoAnswerError(Exception):
    """The database has not answered in time, and may have done what it was asked for."""


def title_of(url: str) -> str:
    """The database in words, without user and parameters: hosts, or the service, and its name."""
    found = psycopg.conninfo.conninfo_to_dict(url)
    place = found.get("host") or found.get("service") or "local socket"
    return f"postgresql {place}/{found.get('dbname') or found.get('user') or ''}"


class Database:
    """Where to connect to. `url` is a libpq URL without a password. `title` names it in log lines and errors."""

    def __init__(self, url: str, password: str | None, name: str) -> None:
        self._url = url
        self._secret = {"password": password} if password else {}
        self._name = name
        self.title = title_of(url)
        self._is_pooled = False  # PgBouncer in transaction mode takes no options and forgets prepared statements

    def connect(self, *, prepares: bool) -> Connection:
        """Raises psycopg.Error. Statements that are skipped in a flush that fails are not prepared, though psycopg
        takes them to be; so a connection on which that happens must not prepare any.
        """
        if not self._is_pooled:
            options = " ".join(f"-c {name}={value}" for name, value in SERVER_LIMITS.items())
            try:
                return self._connect(options=options, **({} if prepares else {"prepare_threshold": None}))
            except psycopg.OperationalError as error:
                if "unsupported startup parameter" not in str(error):
                    raise
            self._is_pooled = True
        return self._connect(prepare_threshold=None)

    def _connect(self, **how: Any) -> Connection:
        limits: Mapping[str, Any] = {"application_name": f"lmdaemon {self._name}", **NETWORK_LIMITS, **self._secret}
        return psycopg.connect(self._url, autocommit=True, **limits, **how)


class Thread:
    """Runs functions on its connection, one at a time; it connects when one is needed and none is open."""

    def __init__(self, database: Database, *, prepares: bool = True) -> None:
        self._database = database
        self._prepares = prepares
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._lock = threading.Lock()  # of the two below, and of the connection's socket
        self._running: asyncio.Future[Any] | None = None
        self._dropped: set[asyncio.Future[Any]] = set()  # jobs not to be begun
        self._thread = threading.Thread(target=self._work, name="lmdaemon-postgres", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., Result], *arguments: Any, within_s: float) -> Result:
        """Runs `function(connection, *arguments)`. Raises what it raises, and NoAnswerError when the time is over. A
        connection on which something went wrong is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask for it
        self._jobs.put((lambda: self._call(function, arguments), future, loop))
        try:
            done, _ = await asyncio.wait({future}, timeout=within_s)
        except asyncio.CancelledError:
            self._end(future)
            raise
        if done:
            return future.result()
        was_running = self._end(future)
        if was_running:
            await asyncio.wait({future}, timeout=CUT_S)  # so that nothing of it goes on
        future.cancel()
        raise NoAnswerError(f"no answer within {within_s:g} s")

    def close(self) -> None:
        """Lets the thread end; what it waits for is cut off."""
        self._jobs.put(None)
        with self._lock:
            self._shut_down()

    def _end(self, future: "asyncio.Future[Any]") -> bool:
        """Cuts the connection if the job is the one that is running, and sees to it that it is not begun otherwise.
        Whether it was running.
        """
        with self._lock:
            if self._running is not future:
                self._dropped.add(future)
                return False
            self._shut_down()
            return True

    def _shut_down(self) -> None:
        connection = self._connection
        if connection is not None and not connection.closed:
            with suppress(OSError, psycopg.Error):
                handle = socket.socket(fileno=connection.fileno())
                try:
                    handle.shutdown(socket.SHUT_RDWR)
                finally:
                    handle.detach()

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        if self._connection is None or self._connection.closed:
            self._connection = self._database.connect(prepares=self._prepares)
        connection = self._connection
        try:
            result = function(connection, *arguments)
        except psycopg.Error:
            if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise
        return result

    def _drop(self) -> None:
        with self._lock:  # so that no other file has the socket's number when that is to be shut down
            connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            run, future, loop = job
            with self._lock:
                if future in self._dropped:
                    self._dropped.discard(future)
                    continue
                self._running = future
            result, failure = None, None
            try:
                result = run()
            except BaseException as error:
                failure = error
            with self._lock:
                self._running = None
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_answer, future, result, failure)
        self._drop()


def _answer(future: "asyncio.Future[Any]", result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
