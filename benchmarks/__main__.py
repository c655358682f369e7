"""`python -m benchmarks`: measures, prints one table, and writes RESULTS.md after a full run.

Exit codes: 0, even if a figure misses its bound, because other work on the machine disturbs measurements; 1 if
something is broken, or so far off that it does not measure what it should.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import table
from benchmarks.compare import Bench, Figure, Result, measure
from benchmarks.figures import FIGURES
from benchmarks.processes import ROOT, Broken, Python

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
QUICK = Bench(live=100_000, seconds=0.5, rounds=2, quick=True)


def main() -> int:
    arguments = _arguments()
    wanted = {"rounds": arguments.repeat, "live": arguments.live, "seconds": arguments.seconds}
    bench = replace(QUICK if arguments.quick else Bench(), **{key: value for key, value in wanted.items() if value})
    uvloop = arguments.loop == "uvloop"
    reference = Python(arguments.against.resolve(), uvloop) if arguments.against else None
    began, busy = time.monotonic(), os.getloadavg()[0]
    results = []
    for figure in _chosen(arguments.only, quick=arguments.quick):
        try:
            results.append(measure(figure, bench, Python(ROOT, uvloop), reference))
        except Broken as broken:
            print(f"{figure.key}: broken: {broken}", file=sys.stderr)
            return 1
        print(f"{figure.key}: done after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    where = f"{table.machine(uvloop=uvloop)}; {bench.live:,} live sessions; {time.monotonic() - began:.0f} s"
    where += f"; load average {busy:.1f} before"
    lines = table.markdown(table.against(results), table.AGAINST) if reference else table.markdown(table.rows(results))
    print(f"{lines}\n\n{where}")
    if arguments.json:
        arguments.json.write_text(json.dumps([_raw(result) for result in results], indent=1))
    if not (arguments.quick or arguments.only or reference):
        RESULTS.write_text(f"# Results of `make bench`\n\nHow to read it: docs/performance.md.\n\n{lines}\n\n{where}\n")
    return 0 if reference else _judge(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Figures beside their floors and peers.")
    parser.add_argument("--quick", action="store_true", help="small and short; RESULTS.md stays as it is")
    parser.add_argument("--only", default="", help="figures, with commas: " + ", ".join(one.key for one in FIGURES))
    parser.add_argument("--repeat", type=int, help="slices of each side")
    parser.add_argument("--seconds", type=float, help="of one slice of load")
    parser.add_argument("--live", type=int, help="live sessions")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in the place of the floor")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="uvloop", help="of daemon and floors alike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples")
    return parser.parse_args()


def _chosen(only: str, *, quick: bool) -> list[Figure]:
    keys = only.split(",") if only else [figure.key for figure in FIGURES if figure.in_quick or not quick]
    if unknown := set(keys) - {figure.key for figure in FIGURES}:
        sys.exit(f"no such figure: {', '.join(sorted(unknown))}")
    return [figure for figure in FIGURES if figure.key in keys]


def _judge(results: Sequence[Result]) -> int:
    insane = 0
    for result in results:
        for row in result.figure.rows:
            figure = table.figure_of(result, row)
            if figure is not None and not row.sane(figure):
                print(f"not sane: {row.title}: {figure:.3g}, must be {row.must:.3g}", file=sys.stderr)
                insane = 1
    return insane


def _raw(result: Result) -> dict[str, object]:
    return {"figure": result.figure.key, "lmdaemon": result.daemon, "floor": result.floor, "peers": result.peers}


if __name__ == "__main__":
    sys.exit(main())
