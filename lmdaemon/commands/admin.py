"""The commands that administer the running daemon over its private API."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from lmdaemon.commands import outlook, times
from lmdaemon.commands.arguments import (
    CLIENT_CERTIFICATE,
    JSON,
    OF_OPERATOR,
    OPERATOR,
    PLAYER_TOKEN,
    ROWS,
    SESSION,
    Argument,
    Command,
    argument,
    count,
    filled,
    seconds,
)
from lmdaemon.commands.client import ANY, Client, Unreachable
from lmdaemon.commands.configured import administered, tell_unknown, unknown
from lmdaemon.commands.shared import (
    FAILED,
    STOPPED,
    Failed,
    Usage,
    cell,
    player_token,
    print_json,
    print_pages,
    print_table,
    quiet_libraries,
    say,
    show,
)
from lmdaemon.model import DELIVERY_STATES
from lmdaemon.web.documents import read_time

AGAIN_FIRST_S, AGAIN_MAX_S = 0.5, 10.0  # waits between attempts to reach a daemon that has stopped
TOUCH_MAX = 10_000  # ids in one bulk touch

SESSION_COLUMNS = ("sessionId", "playerId", "state", "reason", "openedAt", "lastSeenAt", "expiresAt", "endedAt")
DELIVERY_COLUMNS = (
    "id",
    "operator",
    "sessionId",
    "sink",
    "state",
    "attempts",
    "nextAttemptAt",
    "settledAt",
    "lastError",
)
ATTEMPT_COLUMNS = ("at", "durationMs", "url", "address", "status", "code", "error", "detail", "answer")
DAEMON_COLUMNS = ("daemon", "version", "address", "since", "operators", "serviceLagMs")
OPERATOR_COLUMNS = ("operator", "live", "pending", "dead", "held", "breaker", "notBefore", "oldestPendingSeconds")

EVENT_FIGURES = ("touches", "ends", "delivered", "failed")
EVENT_FACTS = (
    *("operator", "sessionId", "reason", "sink", "state", "attempts", "status", "code", "error", "dueAt", "durationMs"),
    *("breaker", "held", "heldReason", "notBefore", "live", "pending", "dead", *EVENT_FIGURES, "lagMs"),
)

# What an answer must contain, as described at `client.fits`
HEALTH_SHAPE = {"status": str, "checks?": {ANY: [{"status": str}]}}
SESSION_SHAPE = {"sessionId": str, "state": str}
DELIVERY_SHAPE = {"id": str, "state": str}
OPERATOR_SHAPE = {"operator": str, "held": bool}
DAEMON_SHAPE = {"name": str, "operators": [str], "serviceLagMs": int}
CHANGED_SHAPE = OPERATOR_SHAPE | {"changed": bool}

FOR_EVER = 2**63
# Lists are sorted by the time at which their items began, except where the wall clock was set back. It is assumed that
# it was never set back by more than this
SET_BACK_MAX_MS = 24 * 3600 * 1000

WATCH_S = 2
CHECKED = {"pass": STOPPED, "warn": 3, "fail": 4}  # exit codes of `status --check`, for monitoring
# Control codes: cursor to the top, clear the screen, clear what has scrolled away. Source: console_codes(4)
CLEAR = "\x1b[H\x1b[2J\x1b[3J"

Ask = Callable[[Client, argparse.Namespace], Awaitable[int]]


def asking(*arguments: Argument) -> Callable[[Ask], Command]:
    """Makes a function a command, which calls it with a client of the running daemon."""

    def made(ask: Ask) -> Command:
        def run(args: argparse.Namespace) -> int:
            settings = administered(args)
            quiet_libraries()

            async def talk() -> int:
                async with Client(settings, args.client_cert, args.client_key) as client:
                    return await ask(client, args)

            return asyncio.run(talk())

        return Command(run, (*CLIENT_CERTIFICATE, *arguments))

    return made


@asking(
    argument(
        "--watch", type=count, nargs="?", const=WATCH_S, metavar="S", help="print again every S seconds (default 2)"
    ),
    OF_OPERATOR,
    argument("--check", action="store_true", help="exit code by health: 0 pass, 3 warn, 4 fail; 1 unreachable"),
    JSON,
)
async def status(client: Client, args: argparse.Namespace) -> int:
    """Prints the daemon's health, a line for each daemon where there are several, and one for each operator.

    Exit code 1 if the health is `fail`; with --check, one of CHECKED.
    """
    if args.watch and args.check:
        raise Usage("status: give either --watch or --check")
    if not args.watch:
        return await _print_status(client, args)
    while True:  # until it is interrupted
        if sys.stdout.isatty() and not args.json:
            print(CLEAR, end="")
        try:
            await _print_status(client, args)
        except Unreachable as error:
            say(f"lmdaemon: {error}", "WARNING")
        sys.stdout.flush()
        await asyncio.sleep(args.watch)


async def _print_status(client: Client, args: argparse.Namespace) -> int:
    health = await client.call("GET", "health", shape=HEALTH_SHAPE)
    operators: list[Any] = []
    daemons: list[Any] = []
    try:
        operators = (await client.call("GET", "v1", "operators", shape={"items": [OPERATOR_SHAPE]}))["items"]
        daemons = (await client.call("GET", "v1", "daemons", shape={"items": [DAEMON_SHAPE]}))["items"]
    except Failed as error:
        if health["status"] != "fail":
            raise
        say(f"lmdaemon: {error}")  # a daemon that cannot read its store still answers /health
    if args.operator is not None and operators:
        operators = _only(args.operator, operators)
    if args.json:
        print_json({"health": health, "operators": operators, "daemons": daemons})
    else:
        print(f"status: {health['status']} (lmdaemon {health.get('version', '?')})")
        for told in outlook.of_health(health, is_each_told=bool(operators)):
            print(told)
        print()
        if len(daemons) > 1:
            print_table(DAEMON_COLUMNS, [one | _told_of_daemon(one) for one in daemons])
            print()
        others = outlook.rows_of(health) if args.operator is None else []
        print_table(OPERATOR_COLUMNS, [*map(outlook.row_of, operators), *others])
        for operator in operators:
            for number, told in enumerate(outlook.of_operator(operator)):
                print(told if number else f"\n{told}")
    if args.check:
        return CHECKED.get(health["status"], FAILED)
    return FAILED if health["status"] == "fail" else STOPPED


def _only(name: str, operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A list with the operator of this name alone. Raises Failed if there is none."""
    found = [one for one in operators if one["operator"] == name]
    if not found:
        raise Failed(unknown(name, [one["operator"] for one in operators]))
    return found


def _told_of_daemon(daemon: dict[str, Any]) -> dict[str, Any]:
    """Two cells of a daemon's row: its name, marked if it is the one that was asked, and how many operators it owns."""
    name = f"{daemon['name']} (asked)" if daemon.get("self") else daemon["name"]
    return {"daemon": name, "operators": len(daemon["operators"])}


@asking(OF_OPERATOR, JSON)
async def events(client: Client, args: argparse.Namespace) -> int:
    """Prints events until it is interrupted. If the daemon stops later, says so once and waits until it is back; at the
    beginning, the daemon must be running.
    """
    heard, is_away, waits_s = False, False, AGAIN_FIRST_S
    await _tell_unknown(client, args)
    while True:
        try:
            async for name, data in client.events("v1", "events", query={"operator": args.operator}):
                if is_away:
                    say("lmdaemon: the daemon is back", "INFO")
                heard, is_away, waits_s = True, False, AGAIN_FIRST_S
                _print_event(name, data, args)
            why = "the daemon has ended the stream"
        except Unreachable as error:
            if not heard:
                raise
            why = str(error)
        if not is_away:
            say(f"lmdaemon: {why}; waiting for it", "WARNING")
        is_away = True
        await asyncio.sleep(waits_s)
        waits_s = min(waits_s * 2, AGAIN_MAX_S)


def _print_event(name: str, data: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints an event as one line, or as JSON. Figures are printed as a line only if something has happened."""
    if args.json:
        print(json.dumps({"event": name, "data": data}, ensure_ascii=False, separators=(",", ":")), flush=True)
        return
    if name == "figures" and not data.get("snapshot") and not any(data.get(one) for one in EVENT_FIGURES):
        return
    facts = (f"{one}={cell(data[one])}" for one in EVENT_FACTS if data.get(one) not in (None, False, 0))
    print(f"{time.strftime('%H:%M:%S')}  {name:16}  {' '.join(facts)}".rstrip(), flush=True)


@asking(argument("id", type=filled, metavar="ID", help="of a session or a player"), *ROWS)
async def find(client: Client, args: argparse.Namespace) -> int:
    """Prints the sessions with this id, then those of the player with this id. Exit code 1 if there are none."""
    found = False

    async def pages() -> AsyncIterator[list[Any]]:
        nonlocal found
        for name in ("sessionId", "playerId"):
            async for page in client.pages(_wanted(args), "v1", "sessions", query={name: args.id}):
                if page:
                    found = True
                    yield page

    await print_pages(("operator", *SESSION_COLUMNS), pages(), as_json=args.json)
    if not found:
        say("lmdaemon: no session and no player has this id")
    return STOPPED if found else FAILED


@asking(
    OPERATOR,
    argument("--state", choices=("active", "ended")),
    argument("--player", type=filled, metavar="ID", help="of this player only"),
    times.since("those that were opened"),
    times.until("those that were opened"),
    *ROWS,
)
async def list_sessions(client: Client, args: argparse.Namespace) -> int:
    """Prints an operator's sessions, newest first."""
    query = {"state": args.state, "playerId": args.player}
    path = ("v1", "operators", args.operator, "sessions")
    return await print_pages(SESSION_COLUMNS, _of_period(client, args, "openedAt", *path, **query), as_json=args.json)


@asking(OPERATOR, SESSION, JSON)
async def show_session(client: Client, args: argparse.Namespace) -> int:
    """Prints one session with its deliveries."""
    shape: dict[str, Any] = SESSION_SHAPE | {"deliveries": [DELIVERY_SHAPE]}
    found = await client.call("GET", *_session_path(args), shape=shape)
    if not args.json:
        found["deliveries"] = list(map(in_words, found["deliveries"]))
    return show(args, found, deliveries=DELIVERY_COLUMNS)


@asking(
    OPERATOR,
    SESSION,
    argument("--player", type=filled, required=True, metavar="ID", help="the player's id"),
    *PLAYER_TOKEN,
    argument("--idle-timeout", type=count, metavar="S", help="seconds (default: the operator's)"),
    JSON,
)
async def open_session(client: Client, args: argparse.Namespace) -> int:
    """Opens a session and prints it."""
    facts = {"playerId": args.player, "token": player_token(args), "idleTimeoutSeconds": args.idle_timeout}
    body = {name: value for name, value in facts.items() if value is not None}
    return show(args, await client.call("PUT", *_session_path(args), shape=SESSION_SHAPE, body=body))


@asking(OPERATOR, argument("sessions", type=filled, nargs="+", metavar="ID", help="the sessions' ids"), JSON)
async def touch_sessions(client: Client, args: argparse.Namespace) -> int:
    """Touches sessions, TOUCH_MAX a call. Exit code 1 if one of them is unknown or has ended."""
    total: dict[str, Any] = {"touched": 0, "unknown": [], "ended": []}
    shape = {"touched": int, "unknown": [str], "ended": [str]}
    for start in range(0, len(args.sessions), TOUCH_MAX):
        body = {"sessionIds": args.sessions[start : start + TOUCH_MAX]}
        answer = await client.call(
            "POST", "v1", "operators", args.operator, "sessions", "touch", shape=shape, body=body
        )
        total = {name: total[name] + answer[name] for name in total}
    if args.json:
        print_json(total)
    else:
        print(f"touched: {total['touched']}")
        for name in ("unknown", "ended"):
            for session_id in total[name]:
                print(f"{name}: {cell(session_id)}")
    return FAILED if total["unknown"] or total["ended"] else STOPPED


@asking(OPERATOR, SESSION, JSON)
async def close_session(client: Client, args: argparse.Namespace) -> int:
    """Ends a session because its game was closed, and prints it."""
    return show(args, await client.call("POST", *_session_path(args), "close", shape=SESSION_SHAPE))


@asking(
    OF_OPERATOR,
    argument("--sink", type=filled, metavar="SINK", help='"http" or "plugin:NAME"'),
    argument("--state", choices=DELIVERY_STATES),
    times.since("those whose session ended"),
    times.until("those whose session ended"),
    *ROWS,
)
async def list_deliveries(client: Client, args: argparse.Namespace) -> int:
    """Prints deliveries, newest first."""
    query = {"operator": args.operator, "sink": args.sink, "state": args.state}
    found = 0

    async def shown() -> AsyncIterator[list[Any]]:
        nonlocal found
        async for page in _of_period(client, args, "createdAt", "v1", "deliveries", **query):
            found += len(page)
            yield page if args.json else list(map(in_words, page))

    await print_pages(DELIVERY_COLUMNS, shown(), as_json=args.json)
    if not found:
        await _tell_unknown(client, args)
    return STOPPED


async def _tell_unknown(client: Client, args: argparse.Namespace) -> None:
    """Warns if --operator names an operator that is not configured."""
    if args.operator is not None:
        items = (await client.call("GET", "v1", "operators", shape={"items": [OPERATOR_SHAPE]}))["items"]
        tell_unknown(args.operator, [one["operator"] for one in items])


async def _of_period(
    client: Client, args: argparse.Namespace, member: str, *path: str, **query: object
) -> AsyncIterator[list[Any]]:
    """Pages of items whose time is within --since and --until; `member` has that time. Raises Failed and Usage."""
    since_at, until_at = times.period(args)
    wanted = _wanted(args)
    if since_at is None and until_at is None:
        async for page in client.pages(wanted, *path, query=query):
            yield page
        return
    first, last = since_at or 0, FOR_EVER if until_at is None else until_at
    async for page in client.pages(None, *path, query=query):
        begun = [(read_time(item[member]), item) for item in page]
        kept = [item for at, item in begun if first <= at < last]
        yield kept[:wanted]
        if wanted is not None and len(kept) >= wanted:
            say(f"lmdaemon: {args.limit} shown, there may be more: --limit N or --all")
            return
        wanted = None if wanted is None else wanted - len(kept)
        if max((at for at, _ in begun), default=0) < first - SET_BACK_MAX_MS:
            return


@asking(argument("delivery", type=filled, metavar="ID", help="its webhook-id"), JSON)
async def show_delivery(client: Client, args: argparse.Namespace) -> int:
    """Prints one delivery with its attempts."""
    shape: dict[str, Any] = DELIVERY_SHAPE | {"history": [{}]}
    found = await client.call("GET", "v1", "deliveries", args.delivery, shape=shape)
    return show(args, found if args.json else in_words(found), history=ATTEMPT_COLUMNS)


def in_words(delivery: dict[str, Any]) -> dict[str, Any]:
    """A delivery for people: the state says whether and why it was discarded, and the request is a command line."""
    if "request" in delivery:  # shown as a curl command that can be copied
        delivery = delivery | {"request": delivery["request"] and delivery["request"]["curl"]}
    discarded = delivery.get("discarded")
    if not discarded:
        return delivery
    by = f" by {discarded['by']}" if discarded["by"] else ""
    return delivery | {
        "state": f"discarded ({discarded['note']})",
        "discarded": f"{discarded['at']}{by}: {discarded['note']}",
    }


@asking(
    OPERATOR,
    argument("--note", type=filled, metavar="TEXT", help="why, for others who find the operator held"),
    argument(
        "--for",
        dest="seconds",
        type=seconds,
        metavar="TIME",
        help='end the hold by itself after this time, such as "2h"',
    ),
    JSON,
)
async def hold(client: Client, args: argparse.Namespace) -> int:
    """Stops sending to an operator."""
    facts = {"note": args.note, "forSeconds": args.seconds}
    body = {name: value for name, value in facts.items() if value is not None}
    return _changed(
        args,
        await client.call("POST", "v1", "operators", args.operator, "hold", shape=CHANGED_SHAPE, body=body),
        "was held already, and stays held",
    )


@asking(OPERATOR, JSON)
async def release(client: Client, args: argparse.Namespace) -> int:
    """Resumes sending to an operator, whatever keeps it back."""
    return _changed(
        args,
        await client.call("POST", "v1", "operators", args.operator, "release", shape=CHANGED_SHAPE),
        "was not kept back",
    )


def _changed(args: argparse.Namespace, operator: dict[str, Any], otherwise: str) -> int:
    """Prints an operator; as text, without members that do not apply to it. Says so if nothing has changed."""
    facts = _flat(operator)
    code = show(args, facts if args.json else {name: value for name, value in facts.items() if value is not None})
    sys.stdout.flush()  # raises before the warning is printed, if the result cannot be written
    if not operator["changed"]:
        say(f"{args.operator} {otherwise}: nothing has changed", "WARNING")
    return code


def _flat(operator: dict[str, Any]) -> dict[str, Any]:
    """An operator with its last failure as one line."""
    failure = operator.get("lastFailure")
    if failure is None:
        return operator
    said = f"{failure['at']} {failure['reason']}" + (f": {failure['detail']}" if failure.get("detail") else "")
    return operator | {"lastFailure": said}


@asking(OPERATOR, JSON)
async def probe(client: Client, args: argparse.Namespace) -> int:
    """Tries an operator's next delivery now; exit code 0 only when it is delivered."""
    shape: dict[str, Any] = DELIVERY_SHAPE | {"history": [{}]}
    delivery = await client.call("POST", "v1", "operators", args.operator, "probe", shape=shape)
    show(args, delivery, history=ATTEMPT_COLUMNS)
    return STOPPED if delivery["state"] == "delivered" else FAILED


def _session_path(args: argparse.Namespace) -> tuple[str, ...]:
    return "v1", "operators", args.operator, "sessions", args.session


def _wanted(args: argparse.Namespace) -> int | None:
    limit: int = args.limit
    return None if args.all else limit
