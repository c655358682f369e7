"""The sides of the figures about ends: how fast ends are delivered, how late they are, a storm, and what a kill
loses.
"""

import json
import math
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.compare import Bench, Run, Sample
from benchmarks.load import Load, session_id
from benchmarks.peers import peer, redis
from benchmarks.processes import (
    ACME,
    BUILD,
    Broken,
    Daemon,
    Process,
    Python,
    columns_of,
    free_ports,
    generate,
    operator,
    prefilled,
    python_process,
    report_of,
    running,
    scratch,
    serving,
)

WALLETS = [f"w{number}" for number in range(16)]  # with a concurrency of 4 each, 64 requests are under way
MANY = [f"w{number}" for number in range(50)]
IN_FLIGHT = 64
IDLE_MS = 60_000
GRACE_S = 1
DUE = 20_000_000  # the numbers of sessions that are made due begin here
NEW = 40_000_000


class Wallet:
    """The scripted operator's process, and the notices that have arrived there."""

    def __init__(self, directory: Path) -> None:
        (self.port,) = free_ports(1)
        self.process = python_process(Python(uvloop=True), directory, "benchmarks.wallet", "serve", port=self.port)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def arrived(self) -> dict[str, float]:
        """The notices that have arrived since the last call."""
        with urllib.request.urlopen(self.url("arrived"), timeout=30) as answer:
            found: dict[str, float] = json.load(answer)
        return found


@contextmanager
def wallet() -> Iterator[Wallet]:
    with scratch() as directory:
        made = Wallet(directory)
        with running(made.process):
            yield made


def settings(wallets: list[str], url: Callable[[str], str], hanging: str = "", grace_s: int = GRACE_S) -> str:
    """The configuration of operators with a URL, one of which may hang, and of ACME, which has none."""
    toml = f'[sessions]\nrestart_grace = "{grace_s}s"\n' + operator(ACME)
    return toml + "".join(operator(name, url("hang" if name == hanging else "ok")) for name in wallets)


def make_due(path: Path, owners: list[str], first: int, count: int) -> None:
    """Adds sessions that are due as soon as the restart grace is over, to a file that no daemon has open."""
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("BEGIN IMMEDIATE")
        sql.execute("UPDATE clock SET service_ms = service_ms + ?", (IDLE_MS,))
        (service_ms,) = sql.execute("SELECT service_ms FROM clock").fetchone()
        columns = columns_of(sql)
        live = sql.execute("SELECT * FROM session WHERE reason IS NULL LIMIT 1").fetchone()
        times = {"id": None, "idle_ms": IDLE_MS, "seen_ms": service_ms - IDLE_MS, "due_ms": service_ms}
        template = dict(zip(columns, live, strict=True)) | times
        rows = []
        for number in range(first, first + count):
            row = template | {"session_id": session_id(number), "operator": owners[number % len(owners)]}
            rows.append([row[column] for column in columns])
        sql.executemany(f"INSERT INTO session VALUES ({', '.join('?' * len(columns))})", rows)
        for name in owners:
            added = sum(owners[number % len(owners)] == name for number in range(first, first + count))
            sql.execute(
                "INSERT INTO operator (name, live) VALUES (?, ?) ON CONFLICT DO UPDATE SET live = live + excluded.live",
                (name, added),
            )
        sql.execute("COMMIT")


def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"not within {within_s:g} s: {what}")
        time.sleep(0.1)


def live_of(daemon: Daemon, name: str) -> int:
    """The number of live sessions, read from the file: asking the daemon ten times a second would be a twentieth of its
    work.
    """
    ((live,),) = daemon.rows("SELECT live FROM operator WHERE name = ?", name)
    return int(live)


def settled(daemon: Daemon, names: list[str]) -> bool:
    waiting = "SELECT count(*) FROM operator WHERE live + pending > 0 AND name IN (SELECT value FROM json_each(?))"
    return daemon.rows(waiting, json.dumps(names)) == [(0,)]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(len(values) * share) - 1)]


# -- deliveries


@contextmanager
def backlog(bench: Bench, python: Python) -> Iterator[Run]:
    """Operators are held until all their sessions have ended, and then released. Measured is the time from the release
    to the last result.
    """
    size = bench.notices
    with wallet() as peers, scratch() as directory:
        daemon = Daemon(directory, python, settings(WALLETS, peers.url))
        shutil.copyfile(prefilled(python, bench.live), daemon.path)
        with running(daemon):
            _gate(daemon, "hold")

        def run(number: int) -> Sample:
            first = DUE + size * number
            make_due(daemon.path, WALLETS, first, size)
            last = _last_delivery(daemon)
            with running(daemon):
                until(lambda: sum(live_of(daemon, name) for name in WALLETS) == 0, 120, "all have ended")
                before, released_at = daemon.cpu_s, time.time() * 1000
                _gate(daemon, "release")
                until(lambda: settled(daemon, WALLETS), 120, "deliveries are settled")
                cpu_s = daemon.cpu_s - before
                _gate(daemon, "hold")
            _, ended = _delivered(daemon, peers, last, first, size)
            return {"rate": size / (ended - released_at) * 1000, "cpu_us": cpu_s / size * 1e6}

        yield run


def _gate(daemon: Daemon, verb: str) -> None:
    """Calls hold or release for all operators at the same time. One after the other, the last operator would wait for a
    fifth of the whole measurement.
    """
    with ThreadPoolExecutor(len(WALLETS)) as pool:
        for called in [pool.submit(daemon.call, "POST", f"/v1/operators/{name}/{verb}") for name in WALLETS]:
            called.result()


def _last_delivery(daemon: Daemon) -> int:
    ((last,),) = daemon.rows("SELECT coalesce(max(id), 0) FROM delivery")
    return int(last)


def _delivered(daemon: Daemon, peers: Wallet, last: int, first: int, size: int) -> tuple[float, float]:
    """The times of the first end of this round and of its last result. Raises Broken unless all notices have
    arrived.
    """
    ((count, began, ended),) = daemon.rows(
        "SELECT count(*), min(created_at), max(settled_at) FROM delivery WHERE id > ? AND state = 'delivered'", last
    )
    missing = {session_id(number) for number in range(first, first + size)} - set(peers.arrived())
    if count != size or missing:
        raise Broken(f"{count} of {size} ends were delivered, {len(missing)} have not arrived")
    return began, ended


@contextmanager
def beside_a_hanging(bench: Bench, python: Python, *, ends_for_it: bool = True) -> Iterator[Run]:
    """The time from the first end to the last stored result, over the operators that answer."""
    *healthy, hanging = MANY
    size = bench.notices
    with wallet() as peers, scratch() as directory:
        daemon = Daemon(directory, python, settings(MANY, peers.url, hanging))
        shutil.copyfile(prefilled(python, bench.live), daemon.path)

        def run(number: int) -> Sample:
            first = DUE + 2 * size * number
            make_due(daemon.path, healthy, first, size)
            if ends_for_it:
                make_due(daemon.path, [hanging], first + size, size // len(healthy))
            last = _last_delivery(daemon)
            with running(daemon, hangs=True):
                before = daemon.cpu_s
                until(lambda: settled(daemon, healthy), 120, "deliveries are settled")
                cpu_s = daemon.cpu_s - before
            began, ended = _delivered(daemon, peers, last, first, size)
            return {"rate": size / (ended - began) * 1000, "cpu_us": cpu_s / size * 1e6}

        yield run


@contextmanager
def bare_client(bench: Bench, python: Python) -> Iterator[Run]:
    size = bench.notices
    with wallet() as peers:

        def run(number: int) -> Sample:
            arguments = json.dumps({"port": peers.port, "in_flight": IN_FLIGHT, "count": size})
            report = report_of(python, "benchmarks.floors", "client", arguments)
            return {"rate": size / report["seconds"], "cpu_us": report["cpu_s"] / size * 1e6}

        yield run


# -- how late


def _steady_opens(port: int, seconds: int, number: int) -> Load:
    """Opens 1,000 sessions a second. They end at the same rate, once no more are opened."""
    first = NEW + number * 1_000_000
    return Load("open", port, 50, seconds, WALLETS, first=first, pause_s=0.05, idle_s=seconds + 1)


@contextmanager
def lag(bench: Bench, python: Python) -> Iterator[Run]:
    """Sessions are opened at 1,000 a second and never touched, so they end at the same rate. All is measured from
    outside.
    """
    seconds = 2 if bench.quick else 6
    with wallet() as peers, scratch() as directory, ExitStack() as stack:
        daemon = stack.enter_context(serving(python, directory, bench.live, settings(WALLETS, peers.url)))

        def run(number: int) -> Sample:
            count = generate(_steady_opens(daemon.api, seconds, number))["answered"]
            until(lambda: settled(daemon, WALLETS), 60, "all have ended and are delivered")
            arrived = peers.arrived()
            ends, arrivals = [], []
            for name, deadline_at, ended_at in daemon.rows(
                "SELECT session_id, seen_at + idle_ms, ended_at FROM session "
                "WHERE ended_at IS NOT NULL AND operator <> ? ORDER BY id DESC LIMIT ?",
                ACME,
                count,
            ):
                ends.append(ended_at - deadline_at)
                arrivals.append(arrived[name] - deadline_at)
            if len(ends) != count or min(ends) < 0:
                raise Broken(f"{len(ends)} of {count} have ended, the earliest {min(ends)} ms after its deadline")
            return {
                "end_p50": percentile(ends, 0.5),
                "end_p99": percentile(ends, 0.99),
                "arrival_p50": percentile(arrivals, 0.5),
                "arrival_p99": percentile(arrivals, 0.99),
            }

        yield run


@contextmanager
def heard(bench: Bench, python: Python, *, listeners: int) -> Iterator[Run]:
    """The cost of a session that is opened, ends and is delivered, at 1,000 a second, while `listeners` clients listen
    to events. The difference from the cost without listeners, times 1,000, is the share of a core that they take.
    """
    seconds = 2 if bench.quick else 6
    with wallet() as peers, scratch() as directory, ExitStack() as stack:
        daemon = stack.enter_context(serving(python, directory, bench.live, settings(WALLETS, peers.url)))
        taken = stack.enter_context(_listening(daemon.api, listeners))

        def run(number: int) -> Sample:
            before, events = daemon.cpu_s, len(taken) and taken[0]
            count = generate(_steady_opens(daemon.api, seconds, number))["answered"]
            until(lambda: settled(daemon, WALLETS), 60, "all have ended and are delivered")
            cpu_s = daemon.cpu_s - before
            # In bytes; an end and its result take more than that
            if listeners and taken[0] - events < count * listeners * 200:
                raise Broken("the listeners were not told of everything")
            return {"cpu_us": cpu_s / count * 1e6}

        yield run


@contextmanager
def _listening(port: int, clients: int) -> Iterator[list[int]]:
    """Clients that read every event, on a thread of this process. The list holds how many bytes they have received."""
    taken, stopping = [0], threading.Event()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            selector.register(client, selectors.EVENT_READ)

        def take() -> None:
            while not stopping.is_set():
                for key, _ in selector.select(0.1):
                    taken[0] += len(key.fileobj.recv(1 << 20))  # type: ignore[union-attr]

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield taken
        finally:
            stopping.set()
            thread.join()


@contextmanager
def timers_lag(bench: Bench, python: Python) -> Iterator[Run]:
    """The same load on timers in memory with aiohttp's client, on this machine at this time."""
    seconds = 2 if bench.quick else 6
    (port,) = free_ports(1)
    with wallet() as peers, scratch() as directory:
        process = peer(python, directory, "timers", port=port, url=peers.url("ok"), live=0)

        def run(number: int) -> Sample:
            report = generate(_steady_opens(port, seconds, number)._replace(times=True))
            heard: dict[str, float] = {}

            def all_arrived() -> bool:
                heard.update(peers.arrived())
                return len(heard) >= len(report["acknowledged"])

            until(all_arrived, 60, "all have ended and are delivered")
            opened = zip(report["acknowledged"], report["began_at"], report["took_ms"], strict=True)
            late = [heard[name] - began_at - took_ms - (seconds + 1) * 1000 for name, began_at, took_ms in opened]
            return {"arrival_p50": percentile(late, 0.5), "arrival_p99": percentile(late, 0.99)}

        with running(process):
            yield run


# -- a storm


@contextmanager
def storm(bench: Bench, python: Python) -> Iterator[Run]:
    """A crowd of sessions is due in one millisecond, while other sessions are touched and `/health` is asked. The
    crowd's operator has no URL, because the speed of deliveries is another figure.
    """
    crowd, grace_s = bench.crowd, 4  # long enough for the probes to begin before the storm

    def run(number: int) -> Sample:
        with scratch() as directory:
            toml = f'[sessions]\nrestart_grace = "{grace_s}s"\n' + operator(ACME) + operator("crowd")
            daemon = Daemon(directory, python, toml)
            shutil.copyfile(prefilled(python, bench.live), daemon.path)
            make_due(daemon.path, ["crowd"], DUE, crowd)
            with running(daemon):
                return _weather(daemon, bench, crowd)

    yield run


# -- many operators


@contextmanager
def many_operators(bench: Bench, python: Python) -> Iterator[Run]:
    """Touches of one operator among many, first while nothing else happens, and then while the daemon is scraped and
    reloaded all the time.
    """

    def run(number: int) -> Sample:
        with scratch() as directory:
            others = "".join(operator(f"op{number}", "http://127.0.0.1:9/") for number in range(bench.operators))
            daemon = Daemon(directory, python, operator(ACME) + others)
            shutil.copyfile(prefilled(python, bench.live), daemon.path)
            with running(daemon):
                return _asked_all_the_time(daemon, bench)

    yield run


def _asked_all_the_time(daemon: Daemon, bench: Bench) -> Sample:
    touch = Load("touch", daemon.api, 8, 600, [ACME], population=bench.live, pause_s=0.02, times=True)
    probe = _background(touch)
    time.sleep(4 * bench.seconds)
    busy_from, config = time.time() * 1000, daemon.directory / "config.toml"
    asked, until = 0, time.monotonic() + 4 * bench.seconds
    while time.monotonic() < until or not asked:
        config.write_text(config.read_text() + "\n")
        daemon.popen.send_signal(signal.SIGHUP)
        asked += len(daemon.text("/metrics")) > 0
        daemon.call("GET", "/openapi.json")
        daemon.call("GET", "/v1/operators")
    busy_to = time.time() * 1000
    report = _ended(probe)
    samples = list(zip(report["began_at"], report["took_ms"], strict=True))
    calm = [took for at, took in samples if at + took < busy_from]
    busy = [took for at, took in samples if at + took >= busy_from and at <= busy_to]
    if not calm or not busy:
        raise Broken(f"{len(calm)} touches in calm, {len(busy)} meanwhile")
    return {"worst_added_ms": max(busy) - max(calm), "p99_added_ms": percentile(busy, 0.99) - percentile(calm, 0.99)}


def _weather(daemon: Daemon, bench: Bench, crowd: int) -> Sample:
    touch = Load("touch", daemon.api, 8, 600, [ACME], population=bench.live, pause_s=0.02, times=True)
    health = Load("health", daemon.api, 1, 600, [], pause_s=0.03, times=True)
    probes = {name: _background(load) for name, load in (("touch", touch), ("health", health))}
    calm_mib, rss_mib = 0.0, []
    try:
        while (live := live_of(daemon, "crowd")) > 0:
            rss_mib.append(daemon.rss_mib)
            calm_mib = rss_mib[-1] if live == crowd else calm_mib
            time.sleep(0.05)
    finally:
        reports = {name: _ended(probe) for name, probe in probes.items()}
    began, ended, count = daemon.rows(
        "SELECT min(ended_at), max(ended_at), count(*) FROM session WHERE operator = 'crowd' AND reason = 'inactivity'"
    )[0]
    if count != crowd:
        raise Broken(f"{count} of {crowd} have ended")
    sample = {"rate": crowd / max(1, ended - began) * 1000, "mib": max(rss_mib) - calm_mib}
    for name, report in reports.items():
        samples = list(zip(report["began_at"], report["took_ms"], strict=True))
        calm = [took for at, took in samples if at + took < began]
        during = [took for at, took in samples if at + took >= began and at <= ended]
        if not calm or not during:
            raise Broken(f"{name}: {len(calm)} answers in calm, {len(during)} in the storm")
        sample[f"{name}_calm_ms"], sample[f"{name}_storm_ms"] = percentile(calm, 0.99), percentile(during, 0.99)
        sample[name] = sample[f"{name}_storm_ms"] / sample[f"{name}_calm_ms"]
    return sample


def _background(load: Load) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.load", json.dumps(load._asdict())]
    return subprocess.Popen(command, cwd=BUILD, env=Python().environment(), stdout=subprocess.PIPE)


def _ended(probe: "subprocess.Popen[bytes]") -> dict[str, Any]:
    probe.terminate()
    report: dict[str, Any] = json.loads(probe.communicate(timeout=60)[0])
    return report


# -- what a kill loses


@contextmanager
def killed(bench: Bench, python: Python) -> Iterator[Run]:
    """kill -9 while touches are acknowledged, and again while ends are delivered. Then the missing touches and ends are
    counted.
    """
    live = min(bench.live, 100_000)

    def run(number: int) -> Sample:
        with wallet() as peers, scratch() as directory:
            daemon = Daemon(directory, python, settings(WALLETS, peers.url))
            shutil.copyfile(prefilled(python, live), daemon.path)
            with running(daemon, hangs=True):
                load = Load("touch", daemon.api, 64, 5, [ACME], population=live, seed=number, times=True)
                touches = _background(load)
                time.sleep(1.5)
                daemon.kill()
                report = _ended(touches)
                daemon.start()
                lost = _lost_touches(daemon, report)
                ends = _lost_ends(bench, daemon, Load("open", daemon.api, 16, 60, WALLETS), peers)
                return {"touches": float(len(report["acknowledged"])), "touches_lost": lost, **ends}

    yield run


def _lost_touches(daemon: Daemon, report: dict[str, Any]) -> float:
    latest = dict(zip(report["acknowledged"], report["began_at"], strict=True))
    seen = dict(daemon.rows("SELECT session_id, seen_at FROM session WHERE operator = ?", ACME))
    return float(sum(seen.get(name, 0) < int(began_at) for name, began_at in latest.items()))


def _lost_ends(bench: Bench, process: Process, load: Load, peers: Wallet) -> Sample:
    """Opens sessions that end two seconds later, kills the process that tells the operator while it does so, and starts
    it again. Sessions of which the operator never hears count as lost.
    """
    count = bench.ends
    report = generate(load._replace(most=count, first=NEW, idle_s=2, times=True))
    heard: set[str] = set()

    def some_arrived() -> bool:
        heard.update(peers.arrived())
        return len(heard) > count // 5

    until(some_arrived, 30, "some have ended")
    process.kill()
    time.sleep(1.0)
    process.start()
    quiet_since = time.monotonic()
    while len(heard) < len(report["acknowledged"]) and time.monotonic() - quiet_since < 5:
        before = len(heard)
        heard.update(peers.arrived())
        if len(heard) > before:
            quiet_since = time.monotonic()
        time.sleep(0.1)
    return {"ends": float(count), "ends_lost": float(len(set(report["acknowledged"]) - heard))}


@contextmanager
def killed_peer(bench: Bench, python: Python, *, name: str) -> Iterator[Run]:
    def run(number: int) -> Sample:
        with wallet() as peers, scratch() as directory:
            (port,) = free_ports(1)
            more = {"path": str(directory / "jobs.sqlite3")} if name == "scheduler" else {}
            process = peer(python, directory, name, port=port, url=peers.url("ok"), live=0, **more)
            with running(process, hangs=True):
                return _lost_ends(bench, process, Load("open", port, 16, 60, [ACME]), peers)

    peer(python, BUILD, name)  # fails here if the peer is not installed
    yield run


@contextmanager
def killed_listener(bench: Bench, python: Python) -> Iterator[Run]:
    """Only the listener of the Redis peer is killed. What Redis publishes while nobody listens is lost."""
    with wallet() as peers, scratch() as directory, redis(directory, 0) as (_, _, redis_port, http_port):

        def run(number: int) -> Sample:
            process = peer(python, directory, "listener", port=redis_port, url=peers.url("ok"))
            with running(process, hangs=True):
                return _lost_ends(bench, process, Load("setex", http_port, 16, 60, []), peers)

        yield run
