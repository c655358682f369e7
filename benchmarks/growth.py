"""`python -m benchmarks.growth`: what a touch, an end, a delivery and a start cost as the tables grow.

Writes docs/growth.csv and docs/growth.svg. CPU time, for it is steadier than rates where other processes run.
"""

import argparse
import csv
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

from benchmarks.compare import Sample
from benchmarks.ends import DUE, WALLETS, make_due, settings, settled, until, wallet
from benchmarks.load import Load, session_id
from benchmarks.processes import ACME, ROOT, Daemon, Python, check_live, columns_of, operator, prefilled, scratch
from benchmarks.requests import loaded

SIZES = (10_000, 100_000, 1_000_000)
ENDED = 10_000_000
OLD = 100_000_000  # numbers of sessions that ended long ago
ROUNDS = 5
ENDS, DELIVERIES = 20_000, 4_000
PANELS = (("touch_us", "a touch, µs CPU"), ("end_us", "an end, µs CPU"), ("delivery_us", "a delivery, µs CPU"))
START = ("ready_s", "start until READY, s")
DATA, PLOT = ROOT / "docs" / "growth.csv", ROOT / "docs" / "growth.svg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__)
    parser.add_argument("--ended", type=int, default=0, help=f"also with so many ended rows, such as {ENDED}")
    arguments = parser.parse_args()
    rows = []
    for live, ended in [(size, 0) for size in SIZES] + [(SIZES[-1], arguments.ended)] * bool(arguments.ended):
        rows.append({"live": live, "ended": ended, **cost(Python(), live, ended)})
        print(rows[-1], flush=True)
    with DATA.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: round(value, 3 if value < 10 else None) for name, value in row.items()})
    plot(rows, PLOT)


def cost(python: Python, live: int, ended: int) -> Sample:
    """One file, one daemon after the other on it."""
    with wallet() as peers, scratch() as directory:
        toml = settings(WALLETS, peers.url, grace_s=0) + operator("crowd")
        daemon = Daemon(directory, python, toml)
        shutil.copyfile(prefilled(python, live), daemon.path)
        if ended:
            add_ended(daemon.path, ended)
        starts, touches, ends, deliveries = [], [], [], []
        try:
            for number in range(ROUNDS):
                daemon.start()
                starts.append(daemon.ready_s)
                if number == 0:
                    check_live(daemon, live)
                load = Load("touch", daemon.api, 64, 1.0, [ACME], population=live, seed=number)
                touches.append(loaded(daemon, load)["cpu_us"])
                daemon.stop()
                ends.append(_until_settled(daemon, ["crowd"], number * 2, ENDS))
                deliveries.append(_until_settled(daemon, WALLETS, number * 2 + 1, DELIVERIES))
        finally:
            daemon.kill()
    return {
        "touch_us": median(touches),
        "end_us": median(ends),
        "delivery_us": median(deliveries),
        "ready_s": min(starts),
    }


def _until_settled(daemon: Daemon, owners: list[str], number: int, count: int) -> float:
    """CPU time (µs) of each of so many sessions that are due when the daemon starts."""
    make_due(daemon.path, owners, DUE + number * 1_000_000, count)
    daemon.start()
    before = daemon.cpu_s
    until(lambda: settled(daemon, owners), 300, "all have ended and are delivered")
    used = daemon.cpu_s - before
    daemon.stop()
    return used / count * 1e6


def add_ended(path: Path, count: int) -> None:
    """Copies of a live session that ended one after the other, without deliveries."""
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA synchronous = OFF")
        sql.execute("PRAGMA cache_size = -1048576")
        columns = columns_of(sql)
        live = sql.execute("SELECT * FROM session WHERE reason IS NULL LIMIT 1").fetchone()
        template = dict(zip(columns, live, strict=True)) | {"id": None, "reason": "inactivity"}

        def rows() -> Iterator[list[object]]:
            for number in range(count):
                own = {"session_id": session_id(OLD + number), "ended_at": template["seen_at"] + number}
                row = template | own | {"player_id": f"p{number}"}
                yield [row[column] for column in columns]

        sql.execute("BEGIN")
        sql.executemany(f"INSERT INTO session VALUES ({', '.join('?' * len(columns))})", rows())
        sql.execute("COMMIT")
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def plot(rows: Sequence[Sample], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS) + 1, figsize=(12, 3), layout="constrained")
    for axis, (value, title) in zip(axes, (*PANELS, START), strict=True):
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
