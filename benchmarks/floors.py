"""The floors: what the libraries cost without lmdaemon's code, each as a process.

`handler`: aiohttp that routes, parses and answers with a constant. `bare`: the same with an open database, for memory,
start and idle. `sqlite`: rows of a table updated by key, one batch per transaction. `client`: aiohttp that posts to the
operator.
"""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import ssl
import sys
import time
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.load import BULK, BULK_BODIES, session_id

SUCCESS = b'{"error":0,"description":"Success"}'
# The answer to an opening as the API shows it, as a constant.
OPENED = (
    b'{"operator":"acme","sessionId":"9e3779b1-000000000001","playerId":"p1","state":"active","reason":null,'
    b'"openedAt":"2026-01-01T00:00:00.000Z","lastSeenAt":"2026-01-01T00:00:00.000Z",'
    b'"expiresAt":"2026-01-31T00:00:00.000Z","endedAt":null,"idleTimeoutSeconds":2592000,"attributes":{}}'
)


def ready() -> None:
    """Tells the process that started this one that it is ready, as lmdaemon does: sd_notify(3)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address[0] == "@" else address)
            notify.send(b"READY=1")


def run(main: Any) -> None:
    """Runs a coroutine on the event loop that the daemon would use: uvloop if it can be imported."""
    factory = None
    with suppress(ImportError):
        factory = import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


async def until_told() -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    ready()
    await stopped.wait()


async def handler(port: int, own: tuple[str, str] | None = None) -> None:
    """Serves over HTTP; with the files of a certificate and its key, over TLS as aiohttp does it."""
    import orjson
    from aiohttp import web

    async def touch(request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def notice(request: web.Request) -> web.Response:
        orjson.loads(await request.read())
        return web.Response(body=SUCCESS, content_type="application/json")

    async def opened(request: web.Request) -> web.Response:
        orjson.loads(await request.read())
        return web.Response(body=OPENED, status=201, content_type="application/json")

    app = web.Application()
    session = "/v1/operators/{operator}/sessions/{sessionId}"
    app.router.add_routes(
        [web.post(session + "/touch", touch), web.put(session, opened), web.post("/{operator}", notice)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = None
    if own:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*own)
    await web.TCPSite(runner, "127.0.0.1", port, backlog=512, ssl_context=context).start()
    await until_told()
    await runner.cleanup()


async def bare(port: int, path: str) -> None:
    import aiosqlite
    import orjson
    from aiohttp import web

    async def health(request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps({"status": "pass"}), content_type="application/json")

    async with aiosqlite.connect(path) as database:
        await database.execute("PRAGMA journal_mode = WAL")
        await database.execute("CREATE TABLE IF NOT EXISTS session (id TEXT PRIMARY KEY, seen INTEGER) WITHOUT ROWID")
        app = web.Application()
        app.router.add_get("/health", health)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await until_told()
        await runner.cleanup()


def make_table(path: Path, rows: int) -> None:
    """Makes the smallest table that could hold sessions."""
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("CREATE TABLE session (id TEXT PRIMARY KEY, seen INTEGER) WITHOUT ROWID")
        sql.execute("BEGIN")
        sql.executemany("INSERT INTO session VALUES (?, 0)", ((name,) for name in sorted(map(session_id, range(rows)))))
        sql.execute("COMMIT")


def touch_rows(path: str, rows: int, seconds: float, seed: int) -> dict[str, float]:
    """For `seconds`, updates batches of BULK random ids, each in one durable transaction."""
    rng = Random(seed)
    sql = sqlite3.connect(path, isolation_level=None)
    sql.execute("PRAGMA synchronous = FULL")
    batches = [[session_id(number) for number in rng.sample(range(rows), BULK)] for _ in range(BULK_BODIES)]
    began, cpu, touched = time.perf_counter(), time.process_time(), 0
    while (now := time.perf_counter()) < began + seconds:
        seen, batch = time.time_ns() // 1_000_000, batches[touched // BULK % len(batches)]
        sql.execute("BEGIN IMMEDIATE")
        sql.executemany("UPDATE session SET seen = ? WHERE id = ?", [(seen, name) for name in batch])
        sql.execute("COMMIT")
        touched += BULK
    report = {"answered": touched / BULK, "seconds": now - began, "cpu_s": time.process_time() - cpu}
    sql.close()
    return report


async def client(port: int, in_flight: int, count: int) -> dict[str, float]:
    """Sends `count` notices from an aiohttp client to the operator, `in_flight` at a time."""
    import aiohttp
    import orjson

    numbers = iter(range(count))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as http:

        async def post_for_ever() -> None:
            for number in numbers:
                body = {"providerId": "w0", "sessionId": session_id(number), "externalPlayerId": "p", "token": "tok"}
                url, data = f"http://127.0.0.1:{port}/ok", orjson.dumps(body)
                async with http.post(url, data=data, headers={"Content-Type": "application/json"}) as answer:
                    if orjson.loads(await answer.read())["error"] != 0:
                        raise RuntimeError("the operator has refused")

        began, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(post_for_ever())
        return {"answered": count, "seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


async def _report(work: Any) -> None:
    json.dump(await work, sys.stdout)


if __name__ == "__main__":
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    if name == "sqlite":
        json.dump(touch_rows(**arguments), sys.stdout)
    elif name == "client":
        run(_report(client(**arguments)))
    else:
        run(handler(**arguments) if name == "handler" else bare(**arguments))
