"""`python -m benchmarks`: measures, prints one table, and writes RESULTS.md after a full run."""

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks import table
from benchmarks.figures import FIGURES, Bench, Figure, Result, measure
from benchmarks.processes import ROOT, Broken, Python

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
QUICK = Bench(live=100_000, seconds=0.5, rounds=2, quick=True)


def main() -> int:
    arguments = _arguments()
    bench = QUICK if arguments.quick else Bench()
    changes = {"rounds": arguments.repeat, "live": arguments.live, "seconds": arguments.seconds}
    bench = Bench(**{**bench.__dict__, **{name: value for name, value in changes.items() if value}})
    uvloop = arguments.loop == "uvloop"
    python = Python(ROOT, uvloop)
    reference = Python(arguments.against.resolve(), uvloop) if arguments.against else None
    began = time.monotonic()
    results = []
    for figure in _chosen(arguments.only):
        try:
            results.append(measure(figure, bench, python, reference))
        except Broken as broken:
            print(f"{figure.key}: broken: {broken}", file=sys.stderr)
            return 1
        print(_progress(results[-1]), file=sys.stderr, flush=True)
    took = f"{bench.live:,} live sessions; {time.monotonic() - began:.0f} s"
    text = f"{table.markdown(table.lines(results))}\n\n{table.machine(uvloop=uvloop)}; {took}\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps([_raw(result) for result in results], indent=1))
    if not (arguments.quick or arguments.only or arguments.against):
        RESULTS.write_text(f"# Results of `make bench`\n\nHow to read it: docs/performance.md.\n\n{text}")
    insane = (
        []
        if reference
        else [
            f"{row.title}: {table.shown(table.figure_of(result, row))}, must be {table.shown(row.must)}"
            for result in results
            for row in result.figure.rows
            if not row.sane(table.figure_of(result, row))
        ]
    )
    for finding in insane:
        print(f"not sane: {finding}", file=sys.stderr)
    return bool(insane)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Figures beside their floors and peers.")
    parser.add_argument("--quick", action="store_true", help="small and short, and RESULTS.md stays as it is")
    parser.add_argument("--only", default="", help="figures, with commas: " + ", ".join(one.key for one in FIGURES))
    parser.add_argument("--repeat", type=int, help="slices of each side")
    parser.add_argument("--seconds", type=float, help="of one slice of load")
    parser.add_argument("--live", type=int, help="live sessions")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in the place of the floor")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="for daemon and floors alike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    return parser.parse_args()


def _chosen(only: str) -> list[Figure]:
    keys = only.split(",") if only else [figure.key for figure in FIGURES]
    unknown = set(keys) - {figure.key for figure in FIGURES}
    if unknown:
        sys.exit(f"no such figure: {', '.join(sorted(unknown))}")
    return [figure for figure in FIGURES if figure.key in keys]


def _progress(result: Result) -> str:
    return "\n".join(f"{result.figure.key}: {' | '.join(line)}" for line in table.lines([result]))


def _raw(result: Result) -> dict[str, object]:
    return {"figure": result.figure.key, "lmdaemon": result.daemon, "floor": result.floor, "peers": result.peers}


if __name__ == "__main__":
    sys.exit(main())
