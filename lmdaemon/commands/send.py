"""`lmdaemon send`: sends one SessionExpired to an operator or a URL, with the same code as the daemon.

It prints request and answer, which people often paste into tickets. Every secret in them is therefore masked, also
where the answer repeats it.
"""

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

from lmdaemon.commands.arguments import JSON, PLAYER_TOKEN, argument, command
from lmdaemon.commands.recipient import RECIPIENT, checked_id, is_loopback, recipient
from lmdaemon.commands.shared import FAILED, STOPPED, Usage, line, player_token, print_json, quiet_libraries
from lmdaemon.delivery.sinks import compose
from lmdaemon.dialects import CannotEncode
from lmdaemon.workbench import trial


@command(
    argument("operator", nargs="?", metavar="OPERATOR", help="send as the daemon would to this operator"),
    argument("--url", metavar="URL", help="send to this URL instead; private addresses are allowed"),
    argument(
        "--yes", action="store_true", help="confirm that the operator's code may act on it (not needed on loopback)"
    ),
    argument("--session", metavar="ID", help="session id (default: a test value)"),
    argument("--player", metavar="ID", help="player id (default: a test value)"),
    *PLAYER_TOKEN,
    *RECIPIENT,
    JSON,
)
def send(args: argparse.Namespace) -> int:
    """Sends one notice and prints both sides of it. Exit code 0 only if it counts as delivered."""
    operator = recipient(args, "send")
    session = trial.made_up(
        operator,
        checked_id(args.session, "--session") if args.session else None,
        checked_id(args.player, "--player") if args.player else None,
        player_token(args),
    )
    try:
        body = compose(operator, session)
    except CannotEncode as error:
        raise Usage(f"send: {error}") from None
    if not args.yes and not is_loopback(operator):
        host = operator.target.url.host if operator.target else ""
        raise Usage(
            f"send: this tells {host} that session {session.session_id!r} of player {session.player_id!r} has ended, "
            "and its code will act on it; say --yes if that is meant"
        )
    quiet_libraries()
    sent = asyncio.run(trial.send(operator, body))
    document = trial.as_shown(operator, session, sent)
    if args.json:
        print_json(document)
    else:
        _print_exchange(document)
    return STOPPED if sent.outcome.verdict == "delivered" else FAILED


def _print_exchange(document: Mapping[str, Any]) -> None:
    """Prints request and answer as they were on the wire, and the verdict."""
    request, answer = document["request"], document["answer"]
    print(f"{request['method']} {line(request['url'])}")
    _print_message(request)
    if answer is None:
        print(f"No answer ({document['durationMs']} ms)")
        print()
    else:
        print(f"HTTP {answer['status']} ({document['durationMs']} ms)")
        _print_message(answer)
        if not answer["complete"]:
            print("(the answer is longer; the rest was not read)")
            print()
    print(f"In words: {line(document['explanation'])}")
    print(f"Verdict: {line(document['meaning'])}")


def _print_message(message: Mapping[str, Any]) -> None:
    for name, value in message["headers"].items():
        print(f"{name}: {line(value)}")
    print()
    for text in message["body"].splitlines():
        print(line(text))
    print()
