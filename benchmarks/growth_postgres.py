"""`python -m benchmarks.growth_postgres`: what a touch, an end and a start cost on PostgreSQL as the table grows.

It also measures how long a vacuum takes, and how much disk space a session takes. Each size is prefilled first, and its
server is deleted afterwards.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.compare import Bench, Sample
from benchmarks.ends import DUE, WALLETS
from benchmarks.load import Load
from benchmarks.postgres import Server, held, hurry, make_due, prefilled
from benchmarks.processes import ACME, BUILD, Daemon, Python, running, scratch
from benchmarks.requests import loaded

SIZES = (1_000_000, 10_000_000)
TICK = os.sysconf("SC_CLK_TCK")
SIZE = "SELECT pg_table_size('lmdaemon.session'), pg_indexes_size('lmdaemon.session')"
UPDATES = "SELECT n_tup_upd, n_tup_hot_upd, n_dead_tup FROM pg_stat_user_tables WHERE relname = 'session'"
WAL = "SELECT wal_bytes FROM pg_stat_wal"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth_postgres", description=__doc__)
    parser.add_argument("--live", type=int, nargs="*", default=SIZES, help="live sessions")
    parser.add_argument("--fill", action="store_true", help="only prefill, and keep it for the next run")
    arguments = parser.parse_args()
    for live in arguments.live:
        kept = prefilled(Python(uvloop=True), live)
        if not arguments.fill:
            for name, value in costs(kept, live).items():
                print(f"{live:>12,}  {name:<32} {value:,.3g}", flush=True)


def costs(kept: Path, live: int) -> Sample:
    """The costs with this number of live sessions. They are measured on the prefilled server itself, because a copy
    would need the same disk space again.
    """
    with _on(kept) as server:
        return {**_disk(server, live), **_start(server), **_touches(server, live), **_vacuum(server), **_ends(server)}


@contextmanager
def _on(kept: Path) -> Iterator[Server]:
    with scratch() as directory:
        server = Server(directory / "server")
        server.directory.mkdir()
        shutil.move(kept, server.data)
        server.own()
        with server.running():
            yield server


def _disk(server: Server, live: int) -> Sample:
    ((table, indexes),) = server.rows(SIZE)
    return {"table, bytes a session": table / live, "indexes, bytes a session": indexes / live}


def _start(server: Server) -> Sample:
    took = []
    for _ in range(3):
        with _daemon(server) as daemon:
            took.append(daemon.ready_s)
    return {"start until READY, s": min(took)}


@contextmanager
def _daemon(server: Server) -> Iterator[Daemon]:
    with scratch() as directory, running(daemon := server.daemon(directory, Python(uvloop=True))):
        yield daemon


def _touches(server: Server, live: int) -> Sample:
    """Touches of random sessions, first one per request and then in bulk. The first touches of each kind are not
    counted, because they write whole pages into the write-ahead log.
    """
    sample: dict[str, float] = {}
    with _daemon(server) as daemon:
        for kind, connections, times in (("touch", 64, 1), ("bulk", 4, 1000)):
            load = Load(kind, daemon.api, connections, 4.0, [ACME], population=live)
            loaded(daemon, load, times)
            ((wal,),), cpu_s = server.rows(WAL), _cpu_s(server)
            found = loaded(daemon, load._replace(seed=1), times)
            count = found["rate"] * load.seconds
            sample[f"{kind}: rate, /s"] = found["rate"]
            sample[f"{kind}: daemon, µs CPU"] = found["cpu_us"]
            sample[f"{kind}: server, µs CPU"] = (_cpu_s(server) - cpu_s) / count * 1e6
            time.sleep(1.0)  # the server's statistics are a second late
            sample[f"{kind}: write-ahead log, bytes"] = float(server.rows(WAL)[0][0] - wal) / count
    ((updates, hot, dead),) = server.rows(UPDATES)
    return sample | {"updates without an index, share": hot / updates, "dead rows left": dead}


def _cpu_s(server: Server) -> float:
    """The CPU time (s) of all processes of the server, including those that have ended."""
    postmaster, used = int((server.data / "postmaster.pid").read_text().split()[0]), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if pid == postmaster:
            used += sum(map(int, rest[11:15]))
        elif int(rest[1]) == postmaster:
            used += int(rest[11]) + int(rest[12])
    return used / TICK


def _vacuum(server: Server) -> Sample:
    began, cpu_s = time.perf_counter(), _cpu_s(server)
    with server.connected() as sql:
        sql.execute("VACUUM lmdaemon.session")
    return {"vacuum, s": time.perf_counter() - began, "vacuum, s CPU": _cpu_s(server) - cpu_s}


def _ends(server: Server) -> Sample:
    size, toml = Bench().notices // len(WALLETS) * len(WALLETS), held(server, Python(uvloop=True))
    make_due(server, WALLETS, DUE, size)
    cpu_s = _cpu_s(server)
    found = hurry(server, Python(uvloop=True), toml, size)
    return {
        "end with a delivery: rate, /s": found["rate"],
        "end: daemon, µs CPU": found["cpu_us"],
        "end: server, µs CPU": (_cpu_s(server) - cpu_s) / size * 1e6,
    }


if __name__ == "__main__":
    BUILD.mkdir(parents=True, exist_ok=True)
    main()
