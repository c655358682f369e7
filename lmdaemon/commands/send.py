"""`lmdaemon send`: sends one SessionExpired to an operator or a URL, with the same code as the daemon.

What was sent and answered is printed, to be pasted into a ticket. So every secret in it is masked, also where the
answer repeats it.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import uuid4

from lmdaemon import masks
from lmdaemon.clock import Clock
from lmdaemon.commands.arguments import JSON, PLAYER_TOKEN, argument, command, file
from lmdaemon.commands.recipient import checked_id, is_loopback, recipient
from lmdaemon.commands.shared import FAILED, STOPPED, Usage, line, player_token, print_json, quiet_libraries
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sender import Sender, Unreachable, request_headers
from lmdaemon.delivery.sinks import compose
from lmdaemon.dialects import CannotEncode
from lmdaemon.masks import MASK, fields_of
from lmdaemon.model import Session
from lmdaemon.retry import Outcome, judge
from lmdaemon.workbench import explain
from lmdaemon.workbench.exchanges import Answer, Asked, Exchange, shown

MADE_UP = "lmdaemon-test"  # made-up ids begin with this, so that whoever finds one knows where it came from


class Sent(NamedTuple):
    """A request with its answer, and how the daemon would judge it."""

    exchange: Exchange
    outcome: Outcome


@command(
    argument("operator", nargs="?", metavar="OPERATOR", help="send as the daemon would to this operator"),
    argument("--url", metavar="URL", help="send here instead; private addresses are allowed, you chose it"),
    argument("--yes", action="store_true", help="the operator's code may act on it (not asked on loopback)"),
    argument("--dialect", metavar="NAME", help="instead of the operator's (without one: v4)"),
    argument("--provider-id", metavar="ID", help="instead of the operator's (without one: luckymonaco)"),
    argument("--session", metavar="ID", help="session id (default: a test value)"),
    argument("--player", metavar="ID", help="player id (default: a test value)"),
    *PLAYER_TOKEN,
    argument("--hash-key-file", type=file, metavar="FILE", help="file with the hash key, if any"),
    argument("--timeout", metavar="SPAN", help='such as "500ms" or "10s" (default: the operator\'s, or 10s)'),
    JSON,
)
def send(args: argparse.Namespace) -> int:
    """Sends one notice and prints both sides of it. Exit code 0 only if it counts as delivered."""
    operator = recipient(args, "send")
    session = _test_session(args, operator)
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
    sent = asyncio.run(_send(operator, body))
    document = _shown(operator, session, sent)
    if args.json:
        print_json(document)
    else:
        _print_exchange(document)
    return STOPPED if sent.outcome.verdict == "delivered" else FAILED


def _test_session(args: argparse.Namespace, operator: Operator) -> Session:
    """The session of the notice: ids and token of the options, or else values that are recognisably made up."""
    now_at = time.time_ns() // 1_000_000
    return Session(
        id=0,
        operator=operator.name,
        session_id=checked_id(args.session or f"{MADE_UP}-{uuid4().hex}", "--session"),
        player_id=checked_id(args.player or f"{MADE_UP}-player", "--player"),
        token=player_token(args) or f"made-up-{uuid4().hex}",
        attributes=None,
        extra=None,
        idle_ms=0,
        opened_at=now_at,
        seen_ms=0,
        seen_at=now_at,
        lifetime_at=None,
        ended_at=now_at,
        reason="closed",
    )


async def _send(operator: Operator, body: bytes) -> Sent:
    """Posts the body once, with the daemon's own sender."""

    class Moment(Clock):
        """A clock that does not move, so that the signature printed is the one that was sent."""

        now_ms = time.time_ns() // 1_000_000

        def wall_ms(self) -> int:
            return self.now_ms

    clock, webhook_id = Moment(), f"test_{uuid4().hex}"
    sender = Sender(clock)
    headers = _headers_of_aiohttp(operator, body) | request_headers(operator, webhook_id, body, clock.now_ms / 1000)
    began = time.monotonic()
    answer = None
    try:
        answer = Answer(*await sender.post(operator, webhook_id, body))
        outcome = judge(
            answer.status,
            answer.body,
            complete=answer.complete,
            retry_after=answer.headers.get("Retry-After"),
            now_s=clock.now_ms / 1000,
            final=operator.sends.codes.final,
        )
    except Unreachable as error:
        outcome = Outcome("retry", error.cause, detail=error.detail)
    finally:
        await sender.close()
    cause = "" if answer else outcome.reason
    took_ms = round((time.monotonic() - began) * 1000)
    return Sent(Exchange(Asked("POST", operator.url, headers, body), answer, cause, outcome.detail, took_ms), outcome)


def _headers_of_aiohttp(operator: Operator, body: bytes) -> dict[str, str]:
    """The headers that aiohttp adds by itself; a test compares them with those that a server receives."""
    assert operator.target is not None  # noqa: S101 - `recipient` has refused an operator without a URL
    host = operator.target.url.host_port_subcomponent or ""
    return {"Host": host, "Accept": "*/*", "Content-Length": str(len(body))}


def _shown(operator: Operator, session: Session, sent: Sent) -> dict[str, Any]:
    """Request and answer as they may be shown to anybody: token, hash, signatures and the URL's secrets are masked."""
    exchange, outcome = sent
    body = exchange.asked.body
    mask = masks.of_notice(operator, session.token, body)
    both = shown(exchange, mask, _masked_body(operator, fields_of(operator, body)))
    return {
        "request": both["request"],
        "answer": both["answer"],
        "explanation": mask(explain.exchange(exchange, operator.sends)),
        "verdict": outcome.verdict,
        "reason": outcome.reason or None,
        "detail": both["detail"],
        "retryAfterSeconds": outcome.retry_after_s,
        "durationMs": exchange.duration_ms,
    }


def _masked_body(operator: Operator, fields: Mapping[str, str]) -> str:
    """The body as sent, with token and hash masked. By field, because a short token may also be part of an id."""
    secret = {operator.sends.fields.get("token"), operator.sends.fields.get("hash")}
    masked = {name: MASK if name in secret else value for name, value in fields.items()}
    if operator.sends.content == "json":
        return json.dumps(masked, ensure_ascii=False, separators=(",", ":"))
    return urlencode(masked, safe="*")


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
    print(f"Verdict: {line(_verdict(document))}")


def _print_message(message: Mapping[str, Any]) -> None:
    for name, value in message["headers"].items():
        print(f"{name}: {line(value)}")
    print()
    for text in message["body"].splitlines():
        print(line(text))
    print()


def _verdict(document: Mapping[str, Any]) -> str:
    reason = (
        document["reason"] + (f" ({document['detail']})" if document["detail"] else "") if document["reason"] else ""
    )
    text = {
        "delivered": "delivered",
        "final": f"final, never sent again because {reason}",
        "retry": f"would be retried because {reason}",
        "hold": f"would hold the operator because {reason}",
    }[document["verdict"]]
    wait_s = document["retryAfterSeconds"]
    return text + (f"; nothing would be sent to this operator for {wait_s:g} s (Retry-After)" if wait_s else "")
