"""`python -m benchmarks.growth`: what a touch, an end, a delivery and a start cost as the tables grow.

Writes docs/growth.csv and docs/growth.svg. Measures CPU time, which varies less than rates while other processes run.
"""

import argparse
import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.compare import Run, Sample
from benchmarks.ends import DUE, WALLETS, make_due, settings, settled, until, wallet
from benchmarks.load import Load, session_id
from benchmarks.processes import (
    ACME,
    ROOT,
    Daemon,
    Python,
    add_sessions,
    check_live,
    columns_of,
    filling,
    operator,
    prefilled,
    running,
    scratch,
)
from benchmarks.requests import loaded

SIZES = (10_000, 100_000, 1_000_000)
ENDED = 10_000_000
OLD = 100_000_000  # the numbers of sessions that ended long ago begin here
ROUNDS = 5
ENDS, DELIVERIES = 20_000, 4_000
PANELS = (
    ("touch_us", "a touch, µs CPU"),
    ("end_us", "an end, µs CPU"),
    ("delivery_us", "an end delivered, µs CPU"),
    ("ready_s", "start until READY, s"),
)
DATA, PLOT = ROOT / "docs" / "growth.csv", ROOT / "docs" / "growth.svg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__)
    parser.add_argument("--ended", type=int, default=0, help=f"also with so many ended rows, such as {ENDED}")
    arguments = parser.parse_args()
    sizes = [(size, 0) for size in SIZES] + [(SIZES[-1], arguments.ended)] * bool(arguments.ended)
    samples: list[list[Sample]] = [[] for _ in sizes]
    with ExitStack() as stack:
        sides = [stack.enter_context(costs(Python(), live, ended)) for live, ended in sizes]
        for number in range(ROUNDS):  # in turns, so that other work on the machine disturbs every size alike
            for index in range(len(sides))[:: 1 if number % 2 == 0 else -1]:
                samples[index].append(sides[index](number))
                print(number, sizes[index], samples[index][-1], flush=True)
    rows = []
    for (live, ended), taken in zip(sizes, samples, strict=True):
        medians = {value: median(sample[value] for sample in taken) for value, _ in PANELS}
        rows.append({"live": live, "ended": ended, **medians})
    with DATA.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: round(value, 3 if value < 10 else None) for name, value in row.items()})
    plot(rows, PLOT)


@contextmanager
def costs(python: Python, live: int, ended: int) -> Iterator[Run]:
    """The costs with one file of this size, on which daemons run one after the other."""
    with wallet() as peers, scratch() as directory:
        daemon = Daemon(directory, python, settings(WALLETS, peers.url, grace_s=0) + operator("crowd"))
        shutil.copyfile(prefilled(python, live), daemon.path)
        if ended:
            add_ended(daemon.path, ended)
        with running(daemon):
            check_live(daemon, live)

        def run(number: int) -> Sample:
            with running(daemon):
                load = Load("touch", daemon.api, 64, 1.0, [ACME], population=live, seed=number)
                touch_us = loaded(daemon, load)["cpu_us"]
            return {
                "touch_us": touch_us,
                "end_us": _until_settled(daemon, ["crowd"], number * 2, ENDS),
                "delivery_us": _until_settled(daemon, WALLETS, number * 2 + 1, DELIVERIES),
                "ready_s": daemon.ready_s,
            }

        yield run


def _until_settled(daemon: Daemon, owners: list[str], number: int, count: int) -> float:
    """CPU time (µs) per session, for `count` sessions that are due when the daemon starts."""
    make_due(daemon.path, owners, DUE + number * 1_000_000, count)
    with running(daemon):
        before = daemon.cpu_s
        until(lambda: settled(daemon, owners), 300, "all have ended and are delivered")
        return (daemon.cpu_s - before) / count * 1e6


def add_ended(path: Path, count: int) -> None:
    """Adds copies of a live session that ended one after the other, without deliveries."""
    with filling(path) as sql:
        row = sql.execute("SELECT * FROM session WHERE reason IS NULL LIMIT 1").fetchone()
        template = dict(zip(columns_of(sql), row, strict=True)) | {"id": None, "reason": "inactivity"}
        own = (
            {"session_id": name, "player_id": f"p{number}", "ended_at": template["seen_at"] + number}
            for name, number in sorted((session_id(OLD + number), number) for number in range(count))
        )
        add_sessions(sql, template, own)


def plot(rows: Sequence[Sample], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 3), layout="constrained")
    for axis, (value, title) in zip(axes, PANELS, strict=True):
        plain = [row for row in rows if not row["ended"]]
        axis.plot([row["live"] for row in plain], [row[value] for row in plain], marker="o")
        for row in rows:
            if row["ended"]:
                axis.plot(
                    [row["live"]], [row[value]], marker="s", linestyle="none", label=f"and {row['ended']:,} ended"
                )
                axis.legend(loc="lower left", fontsize=8)
        axis.set(xscale="log", title=title, xlabel="live sessions", ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
