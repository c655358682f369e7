"""`lmdaemon deliveries retry` and `discard`: make dead deliveries due again, or mark them as wanted by nobody."""

import argparse
import asyncio
from typing import Any

from lmdaemon.clock import Clock
from lmdaemon.commands import times
from lmdaemon.commands.admin import DELIVERY_SHAPE, asking
from lmdaemon.commands.arguments import JSON, argument, filled
from lmdaemon.commands.client import Client
from lmdaemon.commands.progress import progress
from lmdaemon.commands.shared import STOPPED, Usage, cell, say, show
from lmdaemon.model import rfc3339

STEP = 50  # deliveries made due in one step with --follow; at most so many are still sent after an interruption

_FILTERS = ("since", "until", "ended_since", "ended_until")
_FOUND = {"found": int, "canBeSent": int, "oldestSettledAt": (str, type(None)), "reasons": {}, "seconds": (int, float)}
_WHICH = (
    argument("delivery", type=filled, nargs="?", metavar="ID", help="its webhook-id"),
    argument("--operator", type=filled, metavar="OPERATOR", help="all dead ones of this operator"),
    times.since("those that were given up"),
    argument("--until", metavar="TIME", help="those that were given up before then"),
    argument("--ended-since", metavar="TIME", help="those whose session ended then or later"),
    argument("--ended-until", metavar="TIME", help="those whose session ended before then"),
    argument("--reason", type=filled, metavar="WORD", help='those with this lastError, such as "timeout"'),
    argument(
        "--dry-run", action="store_true", help="change nothing, but print how many there are, and for which reasons"
    ),
)


@asking(
    *_WHICH,
    argument("--follow", action="store_true", help="make them due step by step; Ctrl-C leaves the rest dead"),
    JSON,
)
async def retry(client: Client, args: argparse.Namespace) -> int:
    """Makes one dead delivery, or those of an operator, due again."""
    which = _which(args, "retry")
    if args.follow and (args.delivery or args.dry_run):
        raise Usage("deliveries retry: --follow goes with --operator, and not with --dry-run")
    if args.delivery:
        return show(args, await client.call("POST", "v1", "deliveries", args.delivery, "retry", shape=DELIVERY_SHAPE))
    if args.follow:
        return await _follow(client, args, which)
    return await _of_operator(client, args, "retry", "retried", which)


async def _follow(client: Client, args: argparse.Namespace, which: dict[str, Any]) -> int:
    """Retries STEP deliveries at a time. After each step it waits for the time over which the daemon spreads the
    sending of these. Deliveries that become dead after the start stay dead, unless `--until` is later than the start.
    """
    path = ("v1", "operators", args.operator, "deliveries", "retry")
    which.setdefault("until", rfc3339(Clock().wall_ms() + 1))
    found = await client.call("POST", *path, shape={"dryRun": _FOUND}, body=which | {"dryRun": True})
    per_s = found["dryRun"]["canBeSent"] / found["dryRun"]["seconds"] if found["dryRun"]["seconds"] else 1.0
    done = 0
    try:
        with progress("retrying", " deliveries", found["dryRun"]["canBeSent"]) as tell:
            while retried := (await client.call("POST", *path, shape={"retried": int}, body=which | {"limit": STEP}))[
                "retried"
            ]:
                done += retried
                tell(done)
                await asyncio.sleep(retried / per_s)
    except asyncio.CancelledError:
        say(f"lmdaemon: interrupted: {done} are due again, the others stay dead", "WARNING")
        raise
    return show(args, {"retried": done})


@asking(*_WHICH, argument("--note", type=filled, required=True, metavar="TEXT", help="why nobody wants them"), JSON)
async def discard(client: Client, args: argparse.Namespace) -> int:
    """Marks one dead delivery, or those of an operator, as wanted by nobody."""
    which = _which(args, "discard") | {"note": args.note}
    if args.delivery:
        answer = await client.call(
            "POST", "v1", "deliveries", args.delivery, "discard", shape=DELIVERY_SHAPE, body={"note": args.note}
        )
        return show(args, answer)
    return await _of_operator(client, args, "discard", "discarded", which)


def _which(args: argparse.Namespace, verb: str) -> dict[str, Any]:
    """The filters as the API takes them. Raises Usage."""
    filtered = args.reason or args.dry_run or any(getattr(args, name) for name in _FILTERS)
    if bool(args.delivery) == bool(args.operator) or (filtered and not args.operator):
        raise Usage(
            f"deliveries {verb}: give either the ID of a delivery or --operator; --since, --until, --reason, the "
            "other filters and --dry-run go only with --operator"
        )
    now_at = Clock().wall_ms()
    options = {name: "--" + name.replace("_", "-") for name in _FILTERS}
    read = {name: times.read(getattr(args, name), option, now_at) for name, option in options.items()}
    for since, until in (("since", "until"), ("ended_since", "ended_until")):
        first, last = read[since], read[until]
        if first is not None and last is not None and first > last:
            raise Usage(f"{options[since]}: must not be later than {options[until]}")
    names = {"since": "since", "until": "until", "ended_since": "endedSince", "ended_until": "endedUntil"}
    which: dict[str, Any] = {names[name]: rfc3339(at) for name, at in read.items() if at is not None}
    return which | ({"reason": args.reason} if args.reason else {})


async def _of_operator(client: Client, args: argparse.Namespace, verb: str, member: str, which: dict[str, Any]) -> int:
    path = ("v1", "operators", args.operator, "deliveries", verb)
    shape: dict[str, Any] = {member: int, **({"dryRun": _FOUND} if args.dry_run else {})}
    answer = await client.call("POST", *path, shape=shape, body=which | ({"dryRun": True} if args.dry_run else {}))
    if not args.dry_run:
        return show(args, {member: answer[member]})
    found = answer["dryRun"]
    if not args.json:
        reasons = sorted(found["reasons"].items(), key=lambda one: -one[1])
        found = found | {"reasons": ", ".join(f"{count} {cell(reason)}" for reason, count in reasons)}
        if verb == "discard":
            del found["seconds"], found["canBeSent"]
    show(args, found)
    return STOPPED
