"""How a figure is compared: its sides (the daemon, a floor, peers) are measured in turns. This module does not know
what is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.peers import Absent
from benchmarks.processes import BUILD, Python

FEW = 5  # figures with fewer rounds than this have long rounds, so a quick run has one round of them
PEER_ROUNDS = 3  # peers differ from the daemon by far more than measurements of one peer vary
Sample = Mapping[str, float]
Run = Callable[[int], Sample]  # measures once; the argument is the number of the round
Side = Callable[["Bench", Python], AbstractContextManager[Run]]


@dataclass(frozen=True)
class Bench:
    """The sizes and times of a run of the benchmarks."""

    live: int = 1_000_000
    seconds: float = 1.0  # the duration of one slice of load
    rounds: int = 8  # the number of slices of each side
    quick: bool = False

    @property
    def crowd(self) -> int:
        """How many sessions are to end in the same millisecond."""
        return self.live // 10

    @property
    def notices(self) -> int:
        """How many deliveries are made in one slice."""
        return 400 if self.quick else 6000

    @property
    def ends(self) -> int:
        """How many sessions end while the daemon is killed."""
        return 300 if self.quick else 1000

    @property
    def operators(self) -> int:
        """How many operators are configured at the same time."""
        return 100 if self.quick else 1000

    def titled(self, title: str) -> str:
        figures = {name: f"{getattr(self, name):,}" for name in ("live", "crowd", "ends", "operators")}
        return title.format(**figures)


@dataclass(frozen=True)
class Row:
    """One line of the table: a value from the samples and what it should be, as a ratio to the floor or as the value
    itself.
    """

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
        """Whether the figure still measures what it should, however disturbed the machine: a ratio within ten times of
        its bound, a value within a hundred times, and nothing lost.
        """
        slack = 10 if self.of == "ratio" else 100
        return figure >= self.must / slack if self.better == "higher" else figure <= self.must * slack


@dataclass(frozen=True)
class Figure:
    key: str
    daemon: Side
    rows: Sequence[Row]
    floor: Side | None = None
    floor_name: str = ""
    peers: Mapping[str, Side] = field(default_factory=dict)
    most_rounds: int = 1000
    in_quick: bool = True


@dataclass
class Result:
    """The samples of one figure. Each ratio is of two slices that were measured one right after the other."""

    figure: Figure
    bench: Bench
    daemon: list[Sample] = field(default_factory=list)
    floor: list[Sample] = field(default_factory=list)
    peers: dict[str, list[Sample]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def ratios(self, value: str) -> list[float]:
        pairs = zip(self.daemon, self.floor, strict=False)
        return [mine[value] / theirs[value] for mine, theirs in pairs if theirs.get(value)]


def measure(figure: Figure, bench: Bench, python: Python, reference: Python | None = None) -> Result:
    """Measures daemon, floor and peers in turns, in one order and then in the reverse order. With a reference, the
    daemon of that source tree takes the place of the floor.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    result = Result(figure, bench)
    sides: list[tuple[Run, list[Sample]]] = []
    with ExitStack() as stack:

        def enter(side: Side, code: Python, samples: list[Sample]) -> None:
            sides.append((stack.enter_context(side(bench, code)), samples))

        try:
            enter(figure.daemon, python, result.daemon)
            if reference is not None:
                enter(figure.daemon, reference, result.floor)
            elif figure.floor is not None:
                enter(figure.floor, python, result.floor)
        except Absent as absent:
            result.absent.append(f"no {absent}")
            return result
        for name, peer in figure.peers.items() if reference is None and not bench.quick else ():
            samples = result.peers.setdefault(name, [])
            try:
                enter(peer, python, samples)
            except Absent as absent:
                result.absent.append(f"{name}: no {absent}")
        for number in range(min(bench.rounds, 1 if bench.quick and figure.most_rounds < FEW else figure.most_rounds)):
            turn = sides if number < PEER_ROUNDS else sides[:2]
            for run, samples in turn if number % 2 == 0 else turn[::-1]:
                samples.append(run(number))
    return result
