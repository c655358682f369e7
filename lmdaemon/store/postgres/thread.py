"""A connection to PostgreSQL on a thread of its own, with a time limit for every wait.

psycopg's asyncio interface cannot limit a wait on Python 3.11, because it waits until the server confirms a
cancellation. So the synchronous interface is used, and a wait that takes too long is ended by shutting the socket down.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

import psycopg

from lmdaemon.limits import LIMITS, StoreLimits

CONNECT_S = 3  # seconds to connect to one host
CUT_S = 0.3  # how long a wait may take to end after its socket was shut down
# Settings of each connection, whatever the role or the database is set to: time limits (StoreLimits has two more), and
# what the statements rely on. Behind PgBouncer in transaction mode they have to be set for the role. The daemon's own
# time limit (`Thread.run`) ends what none of these can end, such as a wait for a proxy that forwards nothing.
SERVER_SETTINGS = {
    "idle_in_transaction_session_timeout": "5s",
    "idle_session_timeout": "0",  # no limit, because a daemon with nothing to do keeps its connections
    "default_transaction_isolation": "read committed",
    "jit": "off",
}
# Settings that only newer servers have, each with its value and the first version that has it. An older server refuses
# a connection that names it.
NEWER_SETTINGS = {"transaction_timeout": ("0", 170_000)}
# Every statement finds its rows through an index. Without these settings a plan could read a whole table that was small
# when the plan was made, and would still be used when the table has grown.
PLANS = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
NEVER = 2**31 - 1  # executions before psycopg prepares a statement by itself
NETWORK_LIMITS: Mapping[str, Any] = {
    "connect_timeout": CONNECT_S,
    "tcp_user_timeout": 3000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

# The function of the server that warns when it stops waiting for a standby to confirm a commit, for example because
# somebody has cancelled the statement. The transaction is committed all the same, and may be lost at a failover.
UNCONFIRMED = "SyncRepWaitForLSN"

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"
Result = TypeVar("Result")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class NoAnswerError(Exception):
    """The database has not answered in time, and may have done what it was asked for."""


def in_ms(span_s: float) -> str:
    """A span as the value of a setting of the server."""
    return f"{span_s * 1000:.0f}ms"


def title_of(url: str) -> str:
    """The database in words, without user and parameters: hosts, or the service, and its name."""
    found = psycopg.conninfo.conninfo_to_dict(url)
    place = found.get("host") or found.get("service") or "local socket"
    return f"postgresql {place}/{found.get('dbname') or found.get('user') or ''}"


class Database:
    """Where to connect to. `url` is a libpq URL without a password. `title` names it in log lines and errors."""

    def __init__(self, url: str, password: str | None, name: str, limits: StoreLimits = LIMITS.store) -> None:
        self._url = url
        self._secret: Mapping[str, Any] = {"password": password} if password else {}
        self._name = name
        waits = {"statement_timeout": in_ms(limits.statement_s), "lock_timeout": in_ms(limits.lock_s)}
        self._settings = SERVER_SETTINGS | waits | PLANS
        self.title = title_of(url)
        self._is_pooled = False  # PgBouncer in transaction mode takes no options and forgets prepared statements

    def connect(self, *, prepares: bool) -> Connection:
        """Opens a connection. Raises psycopg.Error. Without `prepares` psycopg prepares no statement by itself: it
        would take a statement to be prepared that the server has skipped in a flush that failed. Callers then say which
        statements to prepare.
        """
        if not self._is_pooled:
            settings = ((name, value.replace(" ", "\\ ")) for name, value in self._settings.items())
            options = " ".join(f"-c {name}={value}" for name, value in settings)
            try:
                connection = self._connect(options=options, **({} if prepares else {"prepare_threshold": NEVER}))
            except psycopg.OperationalError as error:
                if "unsupported startup parameter" not in str(error):
                    raise
            else:
                for name, (value, version) in NEWER_SETTINGS.items():
                    if connection.info.server_version >= version:
                        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
                return connection
            self._is_pooled = True
        return self._connect(prepare_threshold=None)

    def _connect(self, **how: Any) -> Connection:
        how |= {"application_name": f"lmdaemon {self._name}", "client_encoding": "utf8"}
        return psycopg.connect(self._url, autocommit=True, **NETWORK_LIMITS, **self._secret, **how)


class Thread:
    """Runs functions on its connection, one at a time; it connects when one is needed and none is open."""

    def __init__(self, database: Database, *, prepares: bool = True) -> None:
        self._database = database
        self._prepares = prepares
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._is_unconfirmed = False  # whether no standby has confirmed a commit of the running job
        self._lock = threading.Lock()  # protects the three attributes below and the connection's socket
        self._running: asyncio.Future[Any] | None = None
        self._is_cut = False  # the socket was shut down, which a job that had its answer by then has not noticed
        self._dropped: set[asyncio.Future[Any]] = set()  # jobs that must not be begun any more
        self._thread = threading.Thread(target=self._work, name="lmdaemon-postgres", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., Result], *arguments: Any, within_s: float) -> Result:
        """Runs `function(connection, *arguments)`. Raises what it raises, and NoAnswerError after `within_s`. A
        connection on which something went wrong is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        # Marks the exception as retrieved, since nobody may be waiting for the result any more
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
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
            await asyncio.wait({future}, timeout=CUT_S)  # until the job has really ended
        future.cancel()
        raise NoAnswerError(f"no answer within {within_s:g} s")

    def close(self) -> None:
        """Ends the thread, also while it waits for an answer."""
        self._jobs.put(None)
        with self._lock:
            self._shut_down()

    def _end(self, future: "asyncio.Future[Any]") -> bool:
        """Ends a job: shuts the connection's socket down if the job is running, else keeps it from being begun. Returns
        whether it was running.
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
                self._is_cut = True
                try:
                    handle.shutdown(socket.SHUT_RDWR)
                finally:
                    handle.detach()

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        if self._is_cut:
            self._is_cut = False
            self._drop()
        if self._connection is None or self._connection.closed:
            self._connection = self._database.connect(prepares=self._prepares)
            self._connection.add_notice_handler(self._notice)
        connection = self._connection
        self._is_unconfirmed = False
        try:
            result = function(connection, *arguments)
            if self._is_unconfirmed:
                raise NoAnswerError("no standby has confirmed the commit")
        except psycopg.Error:
            if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise
        return result

    def _notice(self, notice: psycopg.errors.Diagnostic) -> None:
        self._is_unconfirmed |= notice.source_function == UNCONFIRMED

    def _drop(self) -> None:
        # The socket must not be closed while another thread shuts it down, since its descriptor could by then belong to
        # another file
        with self._lock:
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
