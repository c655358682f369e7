"""`lmdaemon simulate provider`: plays game servers that use a running daemon, or a provider that sends notices to an
endpoint.
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lmdaemon.commands.arguments import (
    CLIENT_CERTIFICATE,
    JSON,
    PLAYER_TOKEN,
    argument,
    command,
    count,
    count_to,
    percent,
    seed,
)
from lmdaemon.commands.client import Client
from lmdaemon.commands.configured import configured
from lmdaemon.commands.recipient import RECIPIENT, checked_span, is_loopback, recipient
from lmdaemon.commands.shared import FAILED, STOPPED, Failed, Usage, line, player_token, print_json, quiet_libraries
from lmdaemon.model import counted
from lmdaemon.shapes import IDLE_MAX_S
from lmdaemon.workbench import players, storm
from lmdaemon.workbench.figures import Times
from lmdaemon.workbench.players import Load
from lmdaemon.workbench.storm import Mix

# Without these limits a mistyped number would use up the memory. For more players, run several processes
PLAYERS_MAX = 100_000
RATE_MAX = 10_000


@command(
    argument("operator", nargs="?", metavar="OPERATOR", help="play its game servers, against the running daemon"),
    argument("--url", metavar="URL", help="send notices to this endpoint instead"),
    argument(
        "--yes", action="store_true", help="confirm that other people's code may act on it (not needed on loopback)"
    ),
    argument("--seed", type=seed, default=0, metavar="N", help="runs with the same seed are the same (default 0)"),
    argument(
        "--players", type=count_to(PLAYERS_MAX), default=Load().players, metavar="N", help="at a time (default 200)"
    ),
    argument("--duration", default="30s", metavar="SPAN", help="how long they play (default 30s)"),
    argument("--play", default="10s", metavar="SPAN", help="a session's length on average (default 10s)"),
    argument("--heartbeat", default="1s", metavar="SPAN", help="between touches, 20%% either way (default 1s)"),
    argument("--abandon", type=percent, default=50, metavar="PERCENT", help="sessions that nobody closes (default 50)"),
    argument("--idle", default=f"{Load().idle_s}s", metavar="SPAN", help="their idle time, whole seconds (default 3s)"),
    argument("--late", default="1s", metavar="SPAN", help="how late an end may be (default 1s)"),
    argument(
        "--away",
        metavar="SPAN",
        help="the daemon may be away for so long at a time: calls are repeated, and it may end sessions later by that "
        "(default: never)",
    ),
    argument("--player", metavar="ID", help="a test player that the endpoint knows (default: made up)"),
    *PLAYER_TOKEN,
    *RECIPIENT,
    argument("--notices", type=count, default=Mix().notices, metavar="N", help="how many (default 200)"),
    argument("--rate", type=count_to(RATE_MAX), default=int(Mix().rate), metavar="N", help="a second (default 20)"),
    argument(
        "--mix", default="70,15,5,10", metavar="SHARES", help="good, repeated, racing, malformed (default 70,15,5,10)"
    ),
    *CLIENT_CERTIFICATE,
    JSON,
)
def provider(args: argparse.Namespace) -> int:
    """Plays game servers against the daemon, or a provider against an endpoint, and judges what the other side does."""
    if bool(args.operator) == bool(args.url):
        raise Usage("simulate provider: give either an operator of the running daemon, or --url of an endpoint")
    _need_histogram()
    quiet_libraries()
    report = asyncio.run(_before_endpoint(args) if args.url else _before_daemon(args))
    if args.json:
        print_json(report)
    else:
        _print_report(report, storm.PROMISES if args.url else players.PROMISES)
    return STOPPED if report["good"] and not report["counts"].get("interrupted") else FAILED


def _need_histogram() -> None:
    try:
        Times()
    except ImportError:
        raise Failed("simulate provider needs hdrhistogram: pip install 'lmdaemon[workbench]'") from None


async def _before_endpoint(args: argparse.Namespace) -> dict[str, Any]:
    operator = recipient(args, "simulate provider")
    if not args.yes and not is_loopback(operator):
        sent = counted(args.notices, "notice")
        raise Usage(f"simulate provider: this sends {sent} to {args.url}; say --yes if that is meant")
    if "hash" in operator.sends.required and operator.hash_key is None:
        raise Usage(f"simulate provider: dialect {operator.sends.name} needs --hash-key-file")
    shares = args.mix.split(",")
    if (
        len(shares) != len(storm.KINDS)
        or not all(re.fullmatch("[0-9]{1,9}", one) for one in shares)
        or not any(map(int, shares))
    ):
        raise Usage(f"--mix: must be four whole numbers such as 70,15,5,10, not all of them zero (got {args.mix!r})")
    good, repeated, racing, malformed = map(float, shares)
    mix = Mix(args.notices, args.rate, (good, repeated, racing, malformed))
    with _progress() as tell:
        run = storm.Storm(operator, mix, args.seed, token=player_token(args), player=args.player, tell=tell)
        return await run.run()


async def _before_daemon(args: argparse.Namespace) -> dict[str, Any]:
    settings = configured(args, "api", "database", "sessions", "delivery", "dialects", f"operators.{args.operator}")
    if args.operator not in settings.operators:
        raise Usage(f"simulate provider: {settings.file} has no operator {args.operator!r}")
    operator = settings.operators[args.operator]
    if operator.notify and not args.yes and not is_loopback(operator):
        raise Usage(
            f"simulate provider: the ends of its sessions are sent to {args.operator}'s URL; say --yes if that is meant"
        )
    load = Load(
        players=args.players,
        span_s=checked_span(args.duration, "--duration"),
        play_s=checked_span(args.play, "--play"),
        heartbeat_s=checked_span(args.heartbeat, "--heartbeat"),
        abandon=args.abandon / 100,
        idle_s=_idle_s(args.idle),
        late_s=checked_span(args.late, "--late"),
        away_s=checked_span(args.away, "--away") if args.away else 0.0,
        grace_s=settings.restart_grace_s,
    )
    async with Client(settings, args.client_cert, args.client_key) as client:

        async def call(method: str, *path: str, body: object = None) -> tuple[int, Any]:
            try:
                return await client.status_and_answer(method, *path, body=body)
            except Failed:
                return 0, None

        # Checks that the daemon runs and accepts the token
        await client.call("GET", "v1", "operators", shape={"items": [{}]})
        with _progress() as tell:
            return await players.Players(call, args.operator, load, args.seed, tell=tell).run()


def _idle_s(text: str) -> int:
    """The idle time in the API's unit, whole seconds. A number without a unit means seconds. Raises Usage."""
    span_s = checked_span(f"{text}s" if text.isascii() and text.isdigit() else text, "--idle")
    if span_s != int(span_s):
        raise Usage(f"--idle: must be whole seconds (got {text!r})")
    if span_s > IDLE_MAX_S:
        raise Usage(f"--idle: must be at most {IDLE_MAX_S // 86400}d (got {text!r})")
    return int(span_s)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows the progress on a terminal, in one line that is removed at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print_report(report: Mapping[str, Any], promises: Mapping[str, str]) -> None:
    print(
        f"{report['durationSeconds']:g} s: " + ", ".join(f"{n} {_words(name)}" for name, n in report["counts"].items())
    )
    for name, times in report["timesMs"].items():
        if times["count"]:
            shown = ", ".join(f"{one} {value:.1f}" for one, value in times.items() if one != "count")
            print(f"  {_words(name)}, ms: {shown} ({times['count']})")
    for promise, times_broken in report["broken"].items():
        if times_broken:
            print(f"{promise}: {times_broken} ({promises[promise]})")
    for one in report["evidence"]:
        print(f"  {line(one)}")
    verdict = "every promise was kept" if report["good"] else "a promise was BROKEN"
    print(f"Verdict{', of what was seen so far' if report['counts'].get('interrupted') else ''}: {verdict}")


def _words(name: str) -> str:
    return line(name.replace("_", " "))
