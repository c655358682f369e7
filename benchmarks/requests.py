"""The sides of the figures about requests: a server, a load, and what each request costs. Each side runs one slice per
round.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from benchmarks.compare import Bench, Run, Sample
from benchmarks.floors import make_table
from benchmarks.load import BULK, Load
from benchmarks.peers import peer, redis
from benchmarks.processes import (
    ACME,
    Process,
    Python,
    certificate,
    free_ports,
    generate,
    python_process,
    report_of,
    running,
    scratch,
    serving,
)

JOBS, JOBS_QUICK = 2000, 200  # live sessions in the APScheduler peer
NEW = 10_000_000  # the numbers of sessions that are opened or reported begin here, beyond the prefilled ones


def loaded(process: Process, load: Load, times: int = 1) -> Sample:
    """What a process does under a load: the rate, and the CPU time per request or id."""
    before = process.cpu_s
    report = generate(load)
    cpu_s = process.cpu_s - before
    count = report["answered"] * times
    return {
        "rate": count / report["seconds"],
        "cpu_us": cpu_s / count * 1e6,
        "p99_ms": report["p99_ms"],
        "load_cpu_us": report["cpu_s"] / count * 1e6,
    }


def _request_load(bench: Bench, kind: str, port: int, connections: int, number: int, *, tls: bool = False) -> Load:
    return Load(
        kind,
        port,
        connections,
        bench.seconds,
        [ACME],
        population=bench.live,
        first=NEW * (1 + number),
        seed=number,
        tls=tls,
    )


@contextmanager
def requests(bench: Bench, python: Python, *, kind: str, connections: int = 64, tls: bool = False) -> Iterator[Run]:
    with scratch() as directory, serving(python, directory, bench.live, tls=tls) as daemon:
        port = daemon.server if kind == "notice" else daemon.api
        times = BULK if kind == "bulk" else 1
        yield lambda number: loaded(daemon, _request_load(bench, kind, port, connections, number, tls=tls), times)


@contextmanager
def bare_requests(
    bench: Bench, python: Python, *, kind: str, connections: int = 64, tls: bool = False
) -> Iterator[Run]:
    (port,) = free_ports(1)
    with scratch() as directory:
        own = certificate(directory) if tls else None
        handler = python_process(python, directory, "benchmarks.floors", "handler", port=port, own=own)
        with running(handler):
            yield lambda number: loaded(handler, _request_load(bench, kind, port, connections, number, tls=tls))


@contextmanager
def raw_sqlite(bench: Bench, python: Python) -> Iterator[Run]:
    with scratch() as directory:
        path = directory / "raw.sqlite3"
        make_table(path, bench.live)
        arguments = {"path": str(path), "rows": bench.live, "seconds": bench.seconds}

        def run(number: int) -> Sample:
            report = report_of(python, "benchmarks.floors", "sqlite", json.dumps(arguments | {"seed": number}))
            count = report["answered"] * BULK
            return {"rate": count / report["seconds"], "cpu_us": report["cpu_s"] / count * 1e6}

        yield run


@contextmanager
def timers(bench: Bench, python: Python) -> Iterator[Run]:
    (port,) = free_ports(1)
    with scratch() as directory:
        process = peer(python, directory, "timers", port=port, url="", live=bench.live)
        with running(process):
            yield lambda number: loaded(process, _request_load(bench, "touch", port, 64, number))


@contextmanager
def scheduler(bench: Bench, python: Python) -> Iterator[Run]:
    """APScheduler with only a few jobs, because adding each job is a transaction."""
    (port,) = free_ports(1)
    few = replace(bench, live=JOBS_QUICK if bench.quick else JOBS)
    with scratch() as directory:
        path = str(directory / "jobs.sqlite3")
        process = peer(python, directory, "scheduler", port=port, url="", live=few.live, path=path)
        with running(process):
            yield lambda number: loaded(process, _request_load(few, "touch", port, 64, number))


@contextmanager
def webdis(bench: Bench, python: Python) -> Iterator[Run]:
    """Touches that prolong the lives of Redis keys. The CPU time is that of Redis and webdis together."""
    with scratch() as directory, redis(directory, bench.live) as (server, web, _, port):

        def run(number: int) -> Sample:
            before = server.cpu_s
            sample = dict(loaded(web, _request_load(bench, "webdis", port, 64, number)))
            sample["cpu_us"] += (server.cpu_s - before) / (sample["rate"] * bench.seconds) * 1e6
            return sample

        yield run
