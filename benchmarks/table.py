"""The table: medians, spreads and verdicts of the results, as Markdown that also reads well on a terminal."""

import importlib.metadata
import os
import platform
import sqlite3
import subprocess
from collections.abc import Sequence
from statistics import median

from benchmarks.figures import Result, Row, Sample
from benchmarks.processes import BUILD

HEADER = ("figure", "lmdaemon", "floor", "ratio", "spread", "must", "goal", "met", "peers", "runs")


def figure_of(result: Result, row: Row) -> float:
    """What the row is judged by."""
    if row.of == "ratio":
        return median(result.ratios(row.value))
    return median(sample[row.value] for sample in result.daemon)


def lines(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [_line(result, row) for result in results for row in result.figure.rows]


def _line(result: Result, row: Row) -> tuple[str, ...]:
    judged = figure_of(result, row)
    samples = result.ratios(row.value) if row.of == "ratio" else [sample[row.value] for sample in result.daemon]
    met = "goal" if row.meets(judged, row.goal) else "must" if row.meets(judged, row.must) else "NO"
    sign = "≥" if row.better == "higher" else "≤"
    return (
        row.title,
        _amount(result.daemon, row),
        _amount(result.floor, row),
        shown(judged) if row.of == "ratio" else "",
        f"{shown(min(samples))}-{shown(max(samples))}",
        f"{sign} {shown(row.must)}",
        f"{sign} {shown(row.goal)}",
        met,
        "; ".join(f"{name} {_amount(samples, row)}" for name, samples in result.peers.items() if samples),
        str(len(result.daemon)),
    )


def _amount(samples: Sequence[Sample], row: Row) -> str:
    values = [sample[row.value] for sample in samples if row.value in sample]
    return f"{shown(median(values))} {row.unit}".replace(" /s", "/s").strip() if values else ""


def shown(value: float) -> str:
    """Three digits, thousands apart."""
    if abs(value) >= 100:
        return f"{round(value):,}"
    return f"{value:.3g}"


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([joined(header), rule, *map(joined, rows)])


def machine(*, uvloop: bool) -> str:
    """Where it was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "aiosqlite", "orjson"))
    loop = f"uvloop {importlib.metadata.version('uvloop')}" if uvloop else "asyncio's loop"
    disk = subprocess.run(
        ["df", "--output=source,fstype", str(BUILD)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()[-2:]
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {loop}, {versions}, "
        f"SQLite {sqlite3.sqlite_version}, Linux {platform.release()}, databases on {' '.join(disk)}"
    )
