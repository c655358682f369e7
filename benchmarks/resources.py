"""The sides of the figures about a process that gets no requests: memory, start, idleness."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.compare import Bench, Run, Sample
from benchmarks.ends import Wallet, make_due, settings, wallet
from benchmarks.load import Load
from benchmarks.peers import peer, redis
from benchmarks.processes import (
    ACME,
    Daemon,
    Process,
    Python,
    free_ports,
    generate,
    prefilled,
    python_process,
    running,
    scratch,
    serving,
)

SETTLE_S = 1.0
CALM_S = 16.0  # after this time (s) the restart grace is over, and the clock is stored only every ten seconds
STARTS = 2  # starts per round


def _bare(python: Python, directory: Path) -> Process:
    (port,) = free_ports(1)
    return python_process(
        python, directory, "benchmarks.floors", "bare", port=port, path=str(directory / "bare.sqlite3")
    )


# -- memory


@contextmanager
def memory(bench: Bench, python: Python) -> Iterator[Run]:
    """Memory with nothing live, and with live sessions after a second of touches."""

    def run(number: int) -> Sample:
        with scratch() as directory, serving(python, directory) as daemon:
            time.sleep(SETTLE_S)
            empty_mib = daemon.rss_mib
        with scratch() as directory, serving(python, directory, bench.live) as daemon:
            generate(Load("touch", daemon.api, 64, 1.0, [ACME], population=bench.live))
            time.sleep(SETTLE_S)
            return {"empty_mib": empty_mib, "live_mib": daemon.rss_mib}

    yield run


@contextmanager
def bare_memory(bench: Bench, python: Python) -> Iterator[Run]:
    def run(number: int) -> Sample:
        with scratch() as directory:
            process = _bare(python, directory)
            with running(process):
                time.sleep(SETTLE_S)
                return {"empty_mib": process.rss_mib, "live_mib": process.rss_mib}

    yield run


@contextmanager
def timers_memory(bench: Bench, python: Python) -> Iterator[Run]:
    def run(number: int) -> Sample:
        (port,) = free_ports(1)
        with scratch() as directory:
            process = peer(python, directory, "timers", port=port, url="", live=bench.live)
            with running(process):
                return {"live_mib": process.rss_mib}

    yield run


@contextmanager
def redis_memory(bench: Bench, python: Python) -> Iterator[Run]:
    def run(number: int) -> Sample:
        with scratch() as directory, redis(directory, bench.live) as (server, web, _, _):
            return {"live_mib": server.rss_mib + web.rss_mib}

    with scratch() as directory, redis(directory, 0):
        pass  # fails here if Redis is not installed
    yield run


# -- start


@contextmanager
def start(bench: Bench, python: Python) -> Iterator[Run]:
    with ExitStack() as stack:
        empty, live = (Daemon(stack.enter_context(scratch()), python) for _ in range(2))
        shutil.copyfile(prefilled(python, bench.live), live.path)

        def run(number: int) -> Sample:
            ready_s, live_s = _starts(empty), _starts(live)
            return {"ready_s": ready_s, "added_s": max(0.0, live_s - ready_s)}

        yield run


@contextmanager
def bare_start(bench: Bench, python: Python) -> Iterator[Run]:
    with scratch() as directory:
        process = _bare(python, directory)
        yield lambda number: {"ready_s": _starts(process)}


def _starts(process: Process) -> float:
    took = []
    for _ in range(STARTS):
        process.start()
        took.append(process.ready_s)
        process.stop()
    return min(took)  # the shortest, because time that other processes take does not belong to the start


# -- idleness


@contextmanager
def idle(bench: Bench, python: Python) -> Iterator[Run]:
    """Three daemons at the same time: one with nothing live, one with live sessions, and one with a backlog whose
    operator hangs.
    """
    seconds = 5.0 if bench.quick else 30.0

    def run(number: int) -> Sample:
        with ExitStack() as stack:
            peers = stack.enter_context(wallet())
            toml = settings([], peers.url)
            empty = stack.enter_context(serving(python, stack.enter_context(scratch()), 0, toml))
            live = stack.enter_context(serving(python, stack.enter_context(scratch()), bench.live, toml))
            backlog = stack.enter_context(_backlog(python, bench, peers))
            time.sleep(3 * SETTLE_S if bench.quick else CALM_S)
            return _watch({"empty": empty, "live": live, "backlog": backlog}, seconds)

    yield run


@contextmanager
def _backlog(python: Python, bench: Bench, peers: Wallet) -> Iterator[Daemon]:
    with scratch() as directory:
        daemon = Daemon(directory, python, settings(["w0"], peers.url, "w0"))
        shutil.copyfile(prefilled(python, bench.live), daemon.path)
        make_due(daemon.path, ["w0"], 20_000_000, 1000)
        with running(daemon, hangs=True):
            while daemon.operators()["w0"]["live"]:
                time.sleep(0.1)
            yield daemon


@contextmanager
def bare_idle(bench: Bench, python: Python) -> Iterator[Run]:
    def run(number: int) -> Sample:
        with scratch() as directory:
            process = _bare(python, directory)
            with running(process):
                time.sleep(SETTLE_S)
                bare = _watch({"bare": process}, 3.0)
        return {f"{name}_{what}": bare[f"bare_{what}"] for name in ("empty", "live", "backlog") for what in WHAT}

    yield run


WHAT = ("switches", "cpu")


def _watch(processes: dict[str, Process], seconds: float) -> Sample:
    before = {name: process.usage() for name, process in processes.items()}
    time.sleep(seconds)
    sample = {}
    for name, process in processes.items():
        was, now = before[name], process.usage()
        sample[f"{name}_switches"] = (now.switches - was.switches) / (now.at - was.at)
        sample[f"{name}_cpu"] = (now.cpu_s - was.cpu_s) / (now.at - was.at) * 100
    return sample
