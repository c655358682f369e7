"""The peers: what could be used instead of lmdaemon, each as a small server with the session API's PUT and touch.

`timers`: `loop.call_later` for each session, in memory. `scheduler`: APScheduler 3 with a job for each session in
SQLite. `listener`: hears of Redis keys that expire and posts the notice; Redis and webdis themselves are Debian's.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.floors import OPENED, run, until_told
from benchmarks.load import session_id
from benchmarks.processes import Process, Python, free_ports, python_process

IDLE_S = 2_592_000  # the idle time of sessions that are live from the start
Ended = Any  # called with the id of a session that has been idle for too long


class Absent(Exception):  # noqa: N818
    """A peer is not installed; the text says which."""


async def _post(http: Any, url: str, name: str) -> None:
    body = {"providerId": "acme", "sessionId": name, "externalPlayerId": "p", "token": "tok-0123456789"}
    async with http.post(url, json=body) as answer:
        await answer.read()


async def _serve(port: int, open_session: Any, touch_session: Any) -> None:
    import orjson
    from aiohttp import web

    async def opened(request: web.Request) -> web.Response:
        fields = orjson.loads(await request.read())
        open_session(request.match_info["sessionId"], fields["idleTimeoutSeconds"])
        return web.Response(body=OPENED, status=201, content_type="application/json")

    async def touched(request: web.Request) -> web.Response:
        return web.Response(status=204 if touch_session(request.match_info["sessionId"]) else 404)

    app = web.Application()
    session = "/v1/operators/{operator}/sessions/{sessionId}"
    app.router.add_routes([web.put(session, opened), web.post(session + "/touch", touched)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=512).start()
    await until_told()
    await runner.cleanup()


async def timers(port: int, url: str, live: int) -> None:
    import aiohttp

    loop = asyncio.get_running_loop()
    handles: dict[str, tuple[asyncio.TimerHandle, float]] = {}
    posting: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession() as http:

        def ended(name: str) -> None:
            del handles[name]
            task = asyncio.create_task(_post(http, url, name))
            posting.add(task)
            task.add_done_callback(posting.discard)

        def open_session(name: str, idle_s: float) -> None:
            handles[name] = loop.call_later(idle_s, ended, name), idle_s

        def touch_session(name: str) -> bool:
            handle, idle_s = handles[name]
            handle.cancel()
            open_session(name, idle_s)
            return True

        for number in range(live):
            open_session(session_id(number), IDLE_S)
        await _serve(port, open_session, touch_session)


async def end_job(url: str, name: str) -> None:
    """The function that APScheduler runs. The stored job finds it by its name."""
    import aiohttp

    async with aiohttp.ClientSession() as http:
        await _post(http, url, name)


async def scheduler(port: int, url: str, live: int, path: str) -> None:
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
    from apscheduler.schedulers.asyncio import AsyncIOScheduler

    # A job that comes late is still run; by default APScheduler would drop it.
    defaults = {"misfire_grace_time": None}
    jobs = AsyncIOScheduler(jobstores={"default": SQLAlchemyJobStore(f"sqlite:///{path}")}, job_defaults=defaults)
    known: dict[str, float] = {}

    def due(idle_s: float) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=idle_s)

    def open_session(name: str, idle_s: float) -> None:
        known[name] = idle_s
        target = "benchmarks.peers:end_job"
        jobs.add_job(target, "date", run_date=due(idle_s), args=(url, name), id=name, replace_existing=True)

    def touch_session(name: str) -> bool:
        jobs.reschedule_job(name, trigger="date", run_date=due(known[name]))
        return True

    jobs.start()
    for number in range(live):
        open_session(session_id(number), IDLE_S)
    await _serve(port, open_session, touch_session)
    jobs.shutdown(wait=False)


async def listener(port: int, url: str) -> None:
    import aiohttp

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"SUBSCRIBE __keyevent@0__:expired\r\n")
    posting: set[asyncio.Task[None]] = set()

    async def listen() -> None:
        async with aiohttp.ClientSession() as http:
            while line := await reader.readline():
                if not line.startswith(b"*3"):
                    continue
                event = [(await reader.readline(), await reader.readline())[1].strip() for _ in range(2)]
                kind_or_size = await reader.readline()
                if event[0] == b"message":
                    name = (await reader.readline()).strip().decode()
                    task = asyncio.create_task(_post(http, url, name))
                    posting.add(task)
                    task.add_done_callback(posting.discard)
                elif not kind_or_size.startswith(b":"):
                    await reader.readline()

    listening = asyncio.create_task(listen())
    await until_told()
    listening.cancel()


# -- Redis and webdis as processes


@contextmanager
def redis(directory: Path, live: int) -> Iterator[tuple[Process, Process, int, int]]:
    """Runs Redis with `live` keys, which writes each command to disk before its answer, and webdis in front of it.
    Yields both processes and their ports.
    """
    programs = {name: shutil.which(name) for name in ("redis-server", "webdis")}
    if missing := [name for name, path in programs.items() if path is None]:
        raise Absent(", ".join(missing))
    redis_port, http_port = free_ports(2)
    options = f"--port {redis_port} --bind 127.0.0.1 --dir {directory} --appendonly yes --appendfsync always"
    command = [str(programs["redis-server"]), *options.split(), "--save", "", "--notify-keyspace-events", "Ex"]
    server = Process(command, directory, {})
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "webdis.json"
    config.write_text(
        json.dumps(
            {
                "redis_host": "127.0.0.1",
                "redis_port": redis_port,
                "http_host": "127.0.0.1",
                "http_port": http_port,
                "threads": 2,
                "pool_size": 8,
                "daemonize": False,
                "verbosity": 0,
                "logfile": str(directory / "webdis.log"),
            }
        )
    )
    web = Process([str(programs["webdis"]), str(config)], directory, {})
    server.start_until_connected(redis_port)
    try:
        web.start_until_connected(http_port)
        try:
            _fill(redis_port, live)
            yield server, web, redis_port, http_port
        finally:
            web.kill()
    finally:
        server.kill()


def _fill(port: int, live: int) -> None:
    """Writes all keys in one go, and reads all answers."""
    import socket

    with socket.create_connection(("127.0.0.1", port)) as connection:
        for first in range(0, live, 10_000):
            numbers = range(first, min(first + 10_000, live))
            lines = [f"SET {session_id(number)} acme:p{number}:tok-0123456789 EX {IDLE_S}\r\n" for number in numbers]
            connection.sendall("".join(lines).encode())
            left = 5 * len(numbers)  # +OK\r\n each
            while left:
                left -= len(connection.recv(65536))


def peer(python: Python, directory: Path, name: str, **arguments: Any) -> Process:
    """The process of `timers`, `scheduler` or `listener`, not started yet."""
    if name == "scheduler" and not (find_spec("apscheduler") and find_spec("sqlalchemy")):
        raise Absent("apscheduler")
    return python_process(python, directory, "benchmarks.peers", name, **arguments)


if __name__ == "__main__":
    serve: Any = {"timers": timers, "scheduler": scheduler, "listener": listener}[sys.argv[1]]
    run(serve(**json.loads(sys.argv[2])))
