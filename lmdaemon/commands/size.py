"""`lmdaemon size`: measures how much of this machine a number of sessions would use, and how much disk space
`keep_ended` needs.
"""

import argparse
import asyncio
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmdaemon.commands.arguments import JSON, argument, command, count, file, seconds
from lmdaemon.commands.client import Client
from lmdaemon.commands.configured import administered
from lmdaemon.commands.shared import STOPPED, Failed, print_json, reason, say
from lmdaemon.config.settings import Settings
from lmdaemon.model import in_bytes
from lmdaemon.workbench import sizing
from lmdaemon.workbench.sizing import Costs, SizingError

DAY_S = 86_400
FITS_BELOW = 0.7  # share of one core that may be used; the rest is for peaks, and for operators that fail
FIGURES_SHAPE = {"spans": [{"stepSeconds": int, "series": [{"operator": (str, type(None)), "ends": [int]}]}]}


@command(
    argument("--sessions", type=count, required=True, metavar="N", help="sessions that are live at the same time"),
    argument(
        "--heartbeat", type=seconds, required=True, metavar="TIME", help="between two touches of a session, as in 30s"
    ),
    argument("--length", type=seconds, default=1200, metavar="TIME", help="how long a session lasts (default 20m)"),
    argument("--keep-ended", type=seconds, metavar="TIME", help="default: as in the configuration"),
    argument("--measure", type=seconds, default=40, metavar="TIME", help="how long to measure touches (default 40s)"),
    argument("--directory", type=file, metavar="DIR", help="on the disk to judge (default: the database's)"),
    JSON,
)
def size(args: argparse.Namespace) -> int:
    """Measures with a daemon of its own; a running one is only asked how many sessions ended in the last hour."""
    settings = administered(args)
    directory = (args.directory or settings.database.parent).resolve()
    return asyncio.run(_size(args, settings, directory))


async def _size(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    try:
        free_bytes = shutil.disk_usage(directory).free
        costs = await sizing.measure(directory, args.measure, lambda step: say(step, "INFO"))
    except (SizingError, OSError) as error:
        raise Failed(f"size: {directory}: {reason(error)}") from error
    keep_s = args.keep_ended or int(settings.keep_ended_s)
    found = needed(costs, args.sessions, args.heartbeat, args.length, keep_s) | {"freeBytes": free_bytes}
    ends = await ends_of_last_hour(settings)
    if ends is not None:
        found["now"] = {"endsPerHour": ends, "keptBytes": round(ends / 3600 * keep_s * costs.ended_bytes)}
    if args.json:
        print_json(found)
    else:
        print("\n".join(sentences(found, args.sessions, args.heartbeat, keep_s, directory)))
    return STOPPED


def needed(costs: Costs, sessions: int, heartbeat_s: int, length_s: int, keep_s: int) -> dict[str, Any]:
    """What a number of live sessions needs: shares of one core, bytes of memory and disk."""
    touches, ends = sessions / heartbeat_s, sessions / length_s
    rest = ends * (costs.open_s + costs.end_s)
    return {
        "touchesPerSecond": round(touches, 1),
        "endsPerSecond": round(ends, 1),
        "microseconds": {
            "open": round(costs.open_s * 1e6, 1),
            "touch": round(costs.touch_s * 1e6, 1),
            "bulkTouch": round(costs.bulk_touch_s * 1e6, 2),
            "end": round(costs.end_s * 1e6, 1),
        },
        "core": {
            "single": round(touches * costs.touch_s + rest, 3),
            "bulk": round(touches * costs.bulk_touch_s + rest, 3),
        },
        "liveBytes": round(sessions * costs.live_bytes),
        "endedBytesEach": round(costs.ended_bytes),
        "keptBytes": round(ends * keep_s * costs.ended_bytes),
        "memoryBytes": round(costs.memory_bytes),
    }


def sentences(found: Mapping[str, Any], sessions: int, heartbeat_s: int, keep_s: int, directory: Path) -> list[str]:
    """The result of `needed` as sentences for people."""
    core, kept, days = found["core"], found["keptBytes"] + found["liveBytes"], keep_s / DAY_S
    each = found["microseconds"]
    said = [
        (
            f"{sessions:,} sessions touched every {heartbeat_s} s: {found['touchesPerSecond']:,.0f} touches and "
            f"{found['endsPerSecond']:,.1f} ends a second."
        ),
        (
            f"CPU, of one core: {_percent(core['single'])} with a request for each touch ({each['touch']:g} µs), "
            f"{_percent(core['bulk'])} with {sizing.BULK} in a request ({each['bulkTouch']:g} µs each)."
        ),
        (
            f"Disk at {directory}: {in_bytes(kept)} after {days:g} days of keep_ended, {found['endedBytesEach']} bytes "
            f"for each ended session with its delivery; {in_bytes(found['freeBytes'])} are free."
        ),
        f"Memory of the daemon: {in_bytes(found['memoryBytes'])}; live sessions are on the disk, not in memory.",
        _verdict(core),
    ]
    if kept > found["freeBytes"]:
        fitting_days = max(0.0, (found["freeBytes"] - found["liveBytes"]) / kept * days)
        said.append(f"The disk is too small for this: keep_ended would have to be below {fitting_days:.1f} days.")
    else:
        said.append("The disk is large enough for this.")
    if now := found.get("now"):
        said.append(
            f"The running daemon had {now['endsPerHour']:,} ends in the last hour: at that rate keep_ended = "
            f"{days:g} days takes {in_bytes(now['keptBytes'])}."
        )
    return said


def _verdict(core: Mapping[str, float]) -> str:
    if core["single"] <= FITS_BELOW:
        return "This machine's processor is fast enough."
    if core["bulk"] <= FITS_BELOW:
        return "This machine's processor is fast enough if game servers use the bulk touch."
    return "This machine's processor is too slow: touch less often, or use a faster one."


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.01 else "less than 1 %"


async def ends_of_last_hour(settings: Settings) -> int | None:
    """How many sessions ended in the last hour at the running daemon; None if no daemon can be asked."""
    with suppress(Failed, asyncio.TimeoutError):
        async with Client(settings) as client:
            figures = await client.call("GET", "v1", "figures", shape=FIGURES_SHAPE)
            minutes = max(figures["spans"], key=lambda span: span["stepSeconds"])
            return sum(sum(one["ends"]) for one in minutes["series"] if one["operator"] is None)
    return None
