"""Internals of libraries on which the daemon relies beyond their documentation. If an upgrade removes one, a test here
fails with a sentence that says what the daemon relied on.

RELIED has a sentence for every private name that a class of lmdaemon uses of the library class that it extends. The
first test finds these names in the code, so that none is used without a sentence.
"""

import ast
import asyncio
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import aiosqlite
import pytest
from aiohttp import web, web_protocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.streams import EMPTY_PAYLOAD
from certificates import make
from commands import environment
from prometheus_client import ProcessCollector

import lmdaemon

RELIED = {
    "aiohttp.BaseProtocol._paused": "It is true while the transport takes no more.",
    "aiohttp.BaseProtocol._upgraded": "It is true once the connection speaks another protocol.",
    "aiohttp.RequestHandler._close": "It is true once the connection is to end after the answer under way.",
    "aiohttp.RequestHandler._handler_waiter": "A stop waits for this future, which the end of a handler resolves.",
    "aiohttp.RequestHandler._keepalive_handle": "It is the timer that ends an idle connection, or None.",
    "aiohttp.RequestHandler._keepalive_timeout": "It is the idle time in seconds after which the connection ends.",
    "aiohttp.RequestHandler._manager": "It is the server, which counts requests.",
    "aiohttp.RequestHandler._next_keepalive_close_time": "It is the loop's time at which an idle connection ends.",
    "aiohttp.RequestHandler._process_keepalive": "It ends the connection if it is still idle at that time.",
    "aiohttp.RequestHandler._request_handler": "It is awaited with each request, and looked up for each anew.",
    "aiohttp.RequestHandler._force_close": "force_close() sets it, and no further request of the connection is served.",
    "aiohttp.BaseProtocol._loop": "It is the loop that the connection runs in, without a look-up.",
    "aiohttp.RequestHandler._messages": "It has the parsed heads that wait for the handler, as (message, body) pairs.",
    "aiohttp.RequestHandler._request_count": "data_received() raises it by one for each head that it has parsed.",
    "aiohttp.RequestHandler._request_in_progress": "It is true while a handler runs for a request of the connection.",
    "aiohttp.RequestHandler._task_handler": "It is the task that serves the connection, None when there is none.",
    "aiohttp.RequestHandler._waiter": "It is a future while the task waits for a head; its result wakes the task.",
    "aiohttp.BaseSite._runner": "It is the runner that the site was made with.",
    "aiohttp.BaseRequest._prepare_hook": "It is awaited with each response after its headers are made, before they go.",
    "aiohttp.BaseConnector._create_connection": "It makes every new connection and returns its protocol.",
    "aiohttp.ResponseHandler._connection_lost_called": "It is false until connection_lost() has been called.",
    "aiohttp.DataQueue._exception": "set_exception() keeps the exception there.",
    "aiohttp.BaseProtocol._parser": "It is None until the parameters of a response are set.",
    "aiohttp.ResponseHandler._tail": "It has what came before the parameters of a response were set.",
    "aiosqlite.Connection._conn": "It is the sqlite3 connection that the thread works with.",
    "aiosqlite.Connection._execute": "It runs a function with its arguments on the connection's thread.",
    "prometheus_client.ProcessCollector._boot_time": "It is what reads /proc/stat, which a sandbox may hide.",
}
# Private names of libraries that are imported
IMPORTED = {"aiohttp.web_protocol._ErrInfo": "It stands in a head's place for what is no HTTP, and is answered."}


def modules() -> list[Any]:
    names = [one.name for one in pkgutil.walk_packages(lmdaemon.__path__, "lmdaemon.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def library_of(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


@functools.cache
def private_names(cls: type) -> set[str]:
    """Every name with one leading underscore that a class defines, sets or uses in its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in found if re.match(r"_[a-z]", name)}


def foreign_bases(cls: type) -> list[type]:
    """The classes of other libraries that a class extends, the most basic class first."""
    bases = [base for base in reversed(cls.__mro__) if base not in (cls, object)]
    return [base for base in bases if library_of(base) not in {"lmdaemon", "msgspec", *sys.stdlib_module_names}]


def relied_upon() -> dict[str, type]:
    """The private names that are used of libraries, each as `library.Class.name`, with the class of lmdaemon that uses
    it.
    """
    found: dict[str, type] = {}
    for module in modules():
        for cls in vars(module).values():
            if not isinstance(cls, type) or cls.__module__ != module.__name__:
                continue
            bases = foreign_bases(cls)
            ours = private_names(cls) if bases else set()
            for name in ours:
                for base in bases:
                    if name in private_names(base):
                        found[f"{library_of(base)}.{base.__name__}.{name}"] = base
                        break
    return found


def test_every_private_name_that_is_relied_upon_has_its_sentence() -> None:
    """A name that its library does not have any more fails here, too; its sentence in RELIED says what it was used
    for.
    """
    found = set(relied_upon())
    assert found - RELIED.keys() == set(), "say in RELIED what is relied upon"
    gone = {f"{name}: {RELIED[name]}" for name in RELIED.keys() - found}
    assert gone == set(), "no longer in the library, or no longer used"


def test_every_private_import_has_its_sentence() -> None:
    found = set()
    for module in modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lmdaemon"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names if re.match(r"_[A-Za-z]", alias.name)}
    assert found == IMPORTED.keys()


def hold(condition: object, *names: str) -> None:
    """Fails with the sentences for these names, unless the condition holds."""
    if not condition:
        pytest.fail("\n".join(f"{name}: {(RELIED | IMPORTED)[name]}" for name in names))


# -- aiohttp's server


class Wire(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@asynccontextmanager
async def served(handler: Any) -> AsyncIterator[tuple[Any, Wire]]:
    """A connection of aiohttp's own server, served by this handler, and its transport."""
    connection: Any = web.Server(handler)()
    wire = Wire()
    connection.connection_made(wire)
    await asyncio.sleep(0)
    try:
        yield connection, wire
    finally:
        connection.connection_lost(None)
        await asyncio.sleep(0)


async def turns() -> None:
    """Runs the event loop long enough for everything that needs no I/O."""
    for _ in range(20):
        await asyncio.sleep(0)


HEAD = b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_heads_are_counted_and_kept_as_they_are_parsed() -> None:
    answered = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.Response:
        await answered.wait()
        return web.Response()

    async with served(handler) as (connection, wire):
        at = "aiohttp.RequestHandler."
        hold(connection._request_count == 0 and not connection._messages, at + "_request_count", at + "_messages")
        hold(isinstance(connection._waiter, asyncio.Future), at + "_waiter")
        hold(isinstance(connection._task_handler, asyncio.Task), at + "_task_handler")
        hold(connection._loop is asyncio.get_running_loop(), "aiohttp.BaseProtocol._loop")
        connection.data_received(HEAD % 1)
        hold(connection._request_count == 1, at + "_request_count")
        message, body = connection._messages[-1]
        hold(message.path == "/1" and body is EMPTY_PAYLOAD, at + "_messages")
        hold(connection._waiter.done(), at + "_waiter")
        await turns()
        hold(connection._request_in_progress and not connection._messages, at + "_request_in_progress")
        connection.data_received(HEAD % 2)
        hold(connection._request_count == 2 and len(connection._messages) == 1, at + "_messages")
        answered.set()
        await turns()
        hold(not connection._request_in_progress and not connection._messages, at + "_request_in_progress")
        assert wire.written.count(b"HTTP/1.1 200 OK") == 2
        hold(connection._manager.requests_count == 2, at + "_manager")
        hold(not connection._close, at + "_close")
        hold(not connection._paused and not connection._upgraded, "aiohttp.BaseProtocol._paused")
        timer = connection._keepalive_handle
        hold(timer and timer.when() <= connection._next_keepalive_close_time, at + "_keepalive_handle")
        hold(timer.when() - connection._loop.time() < connection._keepalive_timeout, at + "_keepalive_timeout")
        hold(not connection._force_close, at + "_force_close")
        connection.force_close()
        hold(connection._force_close, at + "_force_close")


async def test_the_handler_is_looked_up_for_each_request() -> None:
    """A replaced handler serves the next request. A connection that stays idle is closed by its timer."""

    async def handler(request: web.BaseRequest) -> web.Response:
        raise AssertionError

    async def other(request: web.BaseRequest) -> web.Response:
        return web.Response(text=request.path)

    async with served(handler) as (connection, wire):
        at = "aiohttp.RequestHandler."
        connection._request_handler = other
        connection.data_received(HEAD % 1)
        await turns()
        hold(wire.written.endswith(b"/1"), at + "_request_handler")
        connection._next_keepalive_close_time = connection._loop.time() - 1
        connection._process_keepalive()
        await turns()
        hold(wire.closing, at + "_process_keepalive", at + "_next_keepalive_close_time")


async def test_what_is_no_http_is_answered_in_its_turn() -> None:
    """Put where a parsed head would stand, such an error is answered as a bad request once the waiting task is
    woken.
    """

    async def handler(request: web.BaseRequest) -> web.Response:
        raise AssertionError

    async with served(handler) as (connection, wire):
        error = web_protocol._ErrInfo(400, ValueError("no HTTP"), "no HTTP")
        connection._request_count += 1
        connection._messages.append((error, EMPTY_PAYLOAD))
        connection._waiter.set_result(None)
        await turns()
        hold(
            wire.written.startswith(b"HTTP/1.0 400") or wire.written.startswith(b"HTTP/1.1 400"),
            "aiohttp.web_protocol._ErrInfo",
            "aiohttp.RequestHandler._waiter",
        )


async def test_a_site_has_its_runner_and_responses_go_through_the_hook() -> None:
    class Own(web.BaseRequest):
        async def _prepare_hook(self, response: web.StreamResponse) -> None:
            hold("Server" in response.headers, "aiohttp.BaseRequest._prepare_hook")
            response.headers.popall("Server")

    async def handler(request: web.BaseRequest) -> web.Response:
        return web.Response()

    def make(*parts: Any) -> web.BaseRequest:
        return Own(*parts, asyncio.get_running_loop())

    runner = web.ServerRunner(web.Server(handler, request_factory=make))
    await runner.setup()
    try:
        site: Any = web.TCPSite(runner, "127.0.0.1", 0)
        hold(site._runner is runner, "aiohttp.BaseSite._runner")
        await site.start()
        async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{runner.addresses[0][1]}/") as got:
            hold("Server" not in got.headers, "aiohttp.BaseRequest._prepare_hook")
    finally:
        await runner.cleanup()


# -- aiohttp's client


async def test_every_connection_of_the_client_is_made_in_one_place() -> None:
    transports: list[Any] = []

    class Own(aiohttp.TCPConnector):
        async def _create_connection(self, *args: Any, **options: Any) -> Any:
            protocol = await super()._create_connection(*args, **options)
            transports.append(protocol.transport)
            return protocol

    async def handler(request: web.BaseRequest) -> web.Response:
        return web.Response()

    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with aiohttp.ClientSession(connector=Own()) as client:
            for _ in range(2):
                async with client.get(url) as got:
                    await got.read()
        hold(
            transports and all(transports),
            "aiohttp.BaseConnector._create_connection",
        )
    finally:
        await runner.cleanup()


async def test_a_response_has_its_parser_and_what_came_before_it() -> None:
    at = "aiohttp.ResponseHandler."
    protocol: Any = ResponseHandler(asyncio.get_running_loop())
    protocol.connection_made(Wire())
    hold(protocol._parser is None, "aiohttp.BaseProtocol._parser")
    protocol.data_received(b"unasked")
    hold(protocol._tail == b"unasked", at + "_tail")
    protocol._tail = b""
    protocol.set_response_params()
    hold(protocol._parser is not None, "aiohttp.BaseProtocol._parser")
    hold(protocol._exception is None, "aiohttp.DataQueue._exception")
    error = aiohttp.ClientError("ours")
    protocol.set_exception(error)
    hold(protocol._exception is error, "aiohttp.DataQueue._exception")
    hold(protocol._connection_lost_called is False, at + "_connection_lost_called")
    protocol.connection_lost(None)
    hold(protocol._connection_lost_called is True, at + "_connection_lost_called")


# -- other libraries


async def test_a_function_runs_on_the_thread_of_its_connection() -> None:
    async with aiosqlite.connect(":memory:") as opened:
        connection: Any = opened
        inside = await connection._execute(
            lambda sql, number: (threading.get_ident(), sql.execute("SELECT ?", [number]).fetchone()),
            connection._conn,
            7,
        )
        hold(inside[0] != threading.get_ident(), "aiosqlite.Connection._execute")
        hold(inside[1] == (7,), "aiosqlite.Connection._conn")


def test_the_time_of_boot_is_read_in_one_place() -> None:
    """With that method replaced, /proc/stat is not read, and the other figures of the process are still there."""

    class Own(ProcessCollector):
        def _boot_time(self) -> float:
            return 1.0

    class Hidden(ProcessCollector):
        def _boot_time(self) -> float:
            raise OSError

    shown = {metric.name for metric in Own(registry=None).collect()}
    hold("process_start_time_seconds" in shown, "prometheus_client.ProcessCollector._boot_time")
    hold(not list(Hidden(registry=None).collect()), "prometheus_client.ProcessCollector._boot_time")


def test_certificates_for_the_contexts_of_aiohttp_are_read_when_used(tmp_path: Path) -> None:
    """aiohttp makes them by the functions of the ssl module, so that a start need not wait for them
    (tls.system_certificates_unread).
    """
    script = """
import ssl
from lmdaemon import tls
with tls.system_certificates_unread():
    import aiohttp.connector as library
contexts = [one for one in vars(library).values() if isinstance(one, ssl.SSLContext)]
print(*(one.cert_store_stats()["x509"] for one in contexts))
for one in contexts:
    one.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")
print(*(one.cert_store_stats()["x509"] for one in contexts))
"""
    system = environment(SSL_CERT_FILE=str(make(tmp_path, "system", authority=True).cert))
    done = subprocess.run([sys.executable, "-c", script], env=system, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "0 0\n1 1\n"
