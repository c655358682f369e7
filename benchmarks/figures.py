"""The figures: how each is measured on the daemon, on its floor and on its peers, and what it should be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from benchmarks.floors import make_table
from benchmarks.load import BULK, Load
from benchmarks.processes import (
    ACME,
    BUILD,
    Process,
    Python,
    free_ports,
    generate,
    python_process,
    report_of,
    scratch,
    serving,
)

NEW = 10_000_000  # numbers of sessions that are opened or told: beyond those that are prefilled
Sample = Mapping[str, float]
Run = Callable[[int], Sample]  # measures once; the argument is the number of the round
Side = Callable[["Bench", Python], AbstractContextManager[Run]]


@dataclass(frozen=True)
class Bench:
    """How large and how long."""

    live: int = 1_000_000
    seconds: float = 2.0  # of one slice of load
    rounds: int = 6  # slices of each side
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: a value of the samples and what it should be, as a ratio to the floor or as it is."""

    value: str
    title: str
    unit: str
    must: float
    goal: float
    better: Literal["higher", "lower"] = "higher"
    of: Literal["ratio", "value"] = "ratio"

    def meets(self, figure: float, bound: float) -> bool:
        return figure >= bound if self.better == "higher" else figure <= bound

    def sane(self, figure: float) -> bool:
        """Whether it is within ten times of what it must be: a bench that is off by more measures something else."""
        return figure >= self.must / 10 if self.better == "higher" else figure <= self.must * 10 + 1


@dataclass(frozen=True)
class Figure:
    key: str
    daemon: Side
    rows: Sequence[Row]
    floor: Side | None = None
    floor_name: str = ""
    peers: Mapping[str, Side] = field(default_factory=dict)
    most_rounds: int = 1000


def loaded(process: Process, load: Load, times: int = 1) -> Sample:
    """What a process does under a load: a rate and its CPU time for each of what was asked for."""
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


# -- requests, against a handler that parses and answers a constant


def _request_load(bench: Bench, kind: str, port: int, connections: int, number: int) -> Load:
    return Load(
        kind,
        port,
        connections,
        bench.seconds,
        [ACME],
        population=bench.live,
        first=NEW * (1 + number),
        seed=number,
    )


@contextmanager
def requests(bench: Bench, python: Python, *, kind: str, connections: int = 64) -> Iterator[Run]:
    with scratch() as directory, serving(python, directory, bench.live) as daemon:
        port = daemon.server if kind == "notice" else daemon.api
        times = BULK if kind == "bulk" else 1
        yield lambda number: loaded(daemon, _request_load(bench, kind, port, connections, number), times)


@contextmanager
def bare_requests(bench: Bench, python: Python, *, kind: str, connections: int = 64) -> Iterator[Run]:
    (port,) = free_ports(1)
    with scratch() as directory:
        handler = python_process(python, directory, "benchmarks.floors", "handler", port=port)
        handler.start()
        try:
            yield lambda number: loaded(handler, _request_load(bench, kind, port, connections, number))
        finally:
            handler.stop()


@contextmanager
def raw_sqlite(bench: Bench, python: Python) -> Iterator[Run]:
    with scratch() as directory:
        path = directory / "raw.sqlite3"
        make_table(path, bench.live)
        arguments = {"path": str(path), "rows": bench.live, "seconds": bench.seconds}

        def run(number: int) -> Sample:
            report = report_of(python, "benchmarks.floors", "sqlite", _json(arguments | {"seed": number}))
            count = report["answered"] * BULK
            return {"rate": count / report["seconds"], "cpu_us": report["cpu_s"] / count * 1e6}

        yield run


def _json(value: object) -> str:
    import json

    return json.dumps(value)


HANDLER = "aiohttp handler"


def _requests(key: str, kind: str, connections: int, rows: Sequence[Row]) -> Figure:
    return Figure(
        key,
        partial(requests, kind=kind, connections=connections),
        rows,
        partial(bare_requests, kind=kind, connections=connections),
        HANDLER,
    )


FIGURES = (
    _requests(
        "touch",
        "touch",
        64,
        (
            Row("rate", "durable touches, 64 connections", "/s", 0.50, 0.85),
            Row("cpu_us", "CPU of one", "µs", 1.75, 1.3, "lower"),
        ),
    ),
    _requests("touch256", "touch", 256, (Row("rate", "durable touches, 256 connections", "/s", 0.65, 1.3),)),
    Figure(
        "bulk",
        partial(requests, kind="bulk", connections=4),
        (Row("rate", "ids touched in bulk, 4 × 1,000", "/s", 1.0, 1.8),),
        raw_sqlite,
        "sqlite3, 1,000 a transaction",
    ),
    _requests(
        "notice",
        "notice",
        64,
        (Row("rate", "notices accepted, 64 connections", "/s", 0.45, 0.75),),
    ),
    _requests("open", "open", 64, (Row("rate", "sessions opened, 64 connections", "/s", 0.38, 0.55),)),
)


@dataclass
class Result:
    """The samples of one figure. A ratio is of two slices next to each other."""

    figure: Figure
    daemon: list[Sample] = field(default_factory=list)
    floor: list[Sample] = field(default_factory=list)
    peers: dict[str, list[Sample]] = field(default_factory=dict)

    def ratios(self, value: str) -> list[float]:
        return [mine[value] / theirs[value] for mine, theirs in zip(self.daemon, self.floor, strict=False)]


def measure(figure: Figure, bench: Bench, python: Python, reference: Python | None) -> Result:
    """Daemon, floor and peers in turns, forward and back again. With a reference, that tree's daemon is the floor."""
    BUILD.mkdir(parents=True, exist_ok=True)
    result = Result(figure)
    with ExitStack() as stack:
        sides: list[tuple[Run, list[Sample]]] = [(stack.enter_context(figure.daemon(bench, python)), result.daemon)]
        if reference is not None:
            sides.append((stack.enter_context(figure.daemon(bench, reference)), result.floor))
        elif figure.floor is not None:
            sides.append((stack.enter_context(figure.floor(bench, python)), result.floor))
        if reference is None:
            for name, peer in figure.peers.items():
                samples = result.peers.setdefault(name, [])
                sides.append((stack.enter_context(peer(bench, python)), samples))
        for number in range(min(bench.rounds, figure.most_rounds)):
            for run, samples in sides if number % 2 == 0 else sides[::-1]:
                samples.append(run(number))
    return result
