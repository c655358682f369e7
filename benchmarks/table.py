"""The table of results: medians, spreads and verdicts, as Markdown that can also be read on a terminal."""

import importlib.metadata
import os
import platform
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks.compare import Result, Row, Sample
from benchmarks.processes import BUILD

HEADER = ("figure", "lmdaemon", "floor", "ratio", "spread", "CPU of one", "must", "goal", "met", "peers", "runs")
AGAINST = ("figure", "this tree", "the other", "ratio", "spread", "CPU of one", "runs")


def figure_of(result: Result, row: Row) -> float | None:
    """The value by which the row is judged, or None if it was not measured."""
    values = _judged(result, row)
    return median(values) if values else None


def _judged(result: Result, row: Row) -> list[float]:
    return result.ratios(row.value) if row.of == "ratio" else [sample[row.value] for sample in result.daemon]


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [_row(result, row) for result in results for row in result.figure.rows]


def _row(result: Result, row: Row) -> tuple[str, ...]:
    judged, values = figure_of(result, row), _judged(result, row)
    sign = "≥" if row.better == "higher" else "≤"
    peers = [f"{name} {_amount(samples, row)}" for name, samples in result.peers.items() if _amount(samples, row)]
    return (
        result.bench.titled(row.title),
        _amount(result.daemon, row),
        f"{_amount(result.floor, row)} {result.figure.floor_name}" if _amount(result.floor, row) else "",
        shown(judged) if row.of == "ratio" and judged is not None else "",
        _spread(values),
        _cpu(result, row),
        f"{sign} {shown(row.must)}",
        f"{sign} {shown(row.goal)}",
        "-" if judged is None else "goal" if row.meets(judged, row.goal) else _must(row, judged),
        "; ".join(peers + result.absent),
        str(len(result.daemon)),
    )


def _must(row: Row, judged: float) -> str:
    return "must" if row.meets(judged, row.must) else "NO"


def against(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The lines for a comparison of two source trees, with the ratio between them."""
    return [_against(result, row) for result in results for row in result.figure.rows]


def _against(result: Result, row: Row) -> tuple[str, ...]:
    ratios = result.ratios(row.value)
    return (
        result.bench.titled(row.title),
        _amount(result.daemon, row),
        _amount(result.floor, row),
        shown(median(ratios)) if ratios else "",
        _spread(ratios),
        _cpu(result, row),
        str(len(result.daemon)),
    )


def _cpu(result: Result, row: Row) -> str:
    """The CPU time of one request and its ratio to the floor. It varies less than rates while other processes run."""
    used = [sample["cpu_us"] for sample in result.daemon if "cpu_us" in sample]
    if row.value != "rate" or not used:
        return ""
    ratios = result.ratios("cpu_us")
    return f"{shown(median(used))} µs" + (f", {shown(median(ratios))} × floor" if ratios else "")


def _spread(values: Sequence[float]) -> str:
    return f"{shown(min(values))} to {shown(max(values))}" if len(values) > 1 else ""


def _amount(samples: Sequence[Sample], row: Row) -> str:
    values = [sample[row.value] for sample in samples if row.value in sample]
    return f"{shown(median(values))} {row.unit}".replace(" /s", "/s").strip() if values else ""


def shown(value: float) -> str:
    """The number with three digits, or with commas between thousands."""
    if abs(value) >= 100:
        return f"{round(value):,}"
    return f"{value:.3g}"


def markdown(lines: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([joined(header), rule, *map(joined, lines)])


def machine(*, uvloop: bool) -> str:
    """The machine and the versions with which it was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "aiosqlite", "orjson"))
    loop = f"uvloop {importlib.metadata.version('uvloop')}" if uvloop else "asyncio's loop"
    df = ["df", "--output=source,fstype", str(BUILD)]
    disk = subprocess.run(df, capture_output=True, text=True, check=False).stdout.split()[-2:]
    cores = f"{os.cpu_count()} cores (two at once run at {speed_of_two():.2f} of the speed of one)"
    return (
        f"{cores}, Python {platform.python_version()}, {loop}, {versions}, SQLite {sqlite3.sqlite_version}, "
        f"Linux {platform.release()}, databases on {' '.join(disk)}"
    )


SPIN = (
    "import time; began = time.perf_counter(); sum(i * i for i in range(3_000_000)); print(time.perf_counter() - began)"
)


def speed_of_two() -> float:
    """The speed of each of two busy processes at the same time, compared with one alone. A client keeps one core busy,
    and lmdaemon with its disk and its peer keeps two busy. If this speed is far below 1, the ratios are lower, too.
    """

    def spin(count: int) -> float:
        command = [sys.executable, "-c", SPIN]
        together = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return max(float(one.communicate()[0]) for one in together)

    turns = [(spin(1), spin(2)) for _ in range(3)]
    return median(alone for alone, _ in turns) / median(two for _, two in turns)
