"""`lmdaemon send`: one SessionExpired to an operator or URL, through the very code the daemon sends with.

Called by `cli`. What was sent and answered is printed for a ticket, so every secret in it is masked, also where the
answer repeats it.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode
from uuid import uuid4

from lmdaemon import config, masks
from lmdaemon.clock import Clock
from lmdaemon.commands.shared import (
    FAILED,
    STOPPED,
    Usage,
    line,
    player_token,
    print_json,
    quiet_libraries,
    secret_file,
)
from lmdaemon.config import ConfigError, DeliveryTable, Operator, Policy, Settings, duration, target
from lmdaemon.config.target import Target
from lmdaemon.delivery.dispatcher import compose
from lmdaemon.delivery.sender import Sender, Unreachable, request_headers
from lmdaemon.dialects import SHIPPED, CannotEncode
from lmdaemon.log import NOT_A_URL, safe_url
from lmdaemon.masks import MASK, fields_of, query_of
from lmdaemon.model import Session, id_problem
from lmdaemon.retry import Outcome, judge
from lmdaemon.tls import Profile

_Struct = TypeVar("_Struct", Operator, Policy)
ANSWER_HEADERS = (
    "Allow",
    "Content-Encoding",
    "Content-Length",
    "Content-Type",
    "Date",
    "Location",
    "Retry-After",
    "Server",
    "Via",
    "WWW-Authenticate",
    "X-Request-Id",
)


class Exchange(NamedTuple):
    """One SessionExpired and what came back: `answer` is status, headers, body, and whether that was all of it; None
    when there was none.
    """

    headers: Mapping[str, str]
    answer: tuple[int, Mapping[str, str], bytes, bool] | None
    outcome: Outcome


def send(args: argparse.Namespace) -> int:
    operator = _recipient(args)
    session = _test_session(args, operator)
    try:
        body = compose(operator, session)
    except CannotEncode as error:
        raise Usage(f"send: {error}") from None
    quiet_libraries()
    exchange = asyncio.run(_exchange(operator, body))
    shown = _shown_exchange(operator, session, body, exchange)
    if args.json:
        print_json(shown)
    else:
        _print_exchange(shown)
    return STOPPED if exchange.outcome.verdict == "delivered" else FAILED


def _recipient(args: argparse.Namespace) -> Operator:
    """The operator of the configuration with what the options change, or one made of the options. Raises Usage."""
    dialects = dict(SHIPPED)
    operator = _stranger()
    if args.operator or args.config or args.dialect not in (None, *SHIPPED):
        settings = config.of_command(args.config, secrets="optional")
        # An own dialect is known here once some operator of the file uses it
        for one in settings.operators.values():
            dialects |= {dialect.name: dialect for dialect in (one.sends, *one.receives)}
        if args.operator:
            operator = _configured(settings, args.operator)
    changes: dict[str, Any] = {}
    if args.url:
        changes |= {"url": args.url, "target": _checked_url(args.url), "allow_private_network": True}
    if args.dialect:
        if args.dialect not in dialects:
            raise Usage(f"--dialect: must be one of {', '.join(dialects)} (got {args.dialect!r})")
        changes["sends"] = dialects[args.dialect]
    if args.provider_id:
        changes["provider_id"] = _checked_id(args.provider_id, "--provider-id")
    if args.hash_key_file:
        changes["hash_key"] = secret_file(args.hash_key_file, "--hash-key-file")
    if args.timeout:
        changes["policy"] = _changed(operator.policy, timeout_s=_checked_span(args.timeout))
    operator = _changed(operator, **changes)
    if not operator.url:
        raise Usage("send: give --url, or an operator of the configuration that has a url")
    return operator


def _changed(struct: _Struct, **changes: Any) -> _Struct:
    return type(struct)(**{name: getattr(struct, name) for name in struct.__struct_fields__} | changes)


def _stranger() -> Operator:
    """The operator of `send --url`, as a file that says nothing else would make it; the options change it."""
    return Operator(
        name="(none)",
        provider_id="luckymonaco",
        sends=SHIPPED["v4"],
        receives=(),
        paths=(),
        accept_unknown=True,
        token_check="present",  # noqa: S106 - a mode, not a token
        partner_tokens=(),
        hash_key=None,
        allow_from=(),
        auth_none=False,
        notify=True,
        url="",
        target=None,
        idle_s=0,
        lifetime_s=0,
        policy=Policy(DeliveryTable().timeout, (), 0, 1),
        allow_private_network=True,
        ca_file=None,
        client_cert_file=None,
        client_key_file=None,
        tls=Profile(None, None, None),
        signing_keys=(),
    )


def _configured(settings: Settings, name: str) -> Operator:
    if name not in settings.operators:
        known = ", ".join(settings.operators) or "none"
        raise Usage(f"send: {settings.file} has no operator {name!r}; known are {known}")
    at = f"operators.{name}."
    # What the daemon sends is hashed, signed and encrypted with these; without them the verdict would be another one.
    sending = tuple(at + key for key in ("hash_key_", "signing_secret_", "ca_file", "client_"))
    missing = [warning for warning in settings.warnings if warning.startswith(sending) and ": unchecked: " in warning]
    if missing:
        raise ConfigError([f"{settings.file}: {finding.replace(' unchecked:', '', 1)}" for finding in missing])
    return settings.operators[name]


def _checked_url(text: str) -> Target:
    try:
        return target.read(text)
    except ValueError as error:
        shown = safe_url(text)
        got = "" if shown == NOT_A_URL else f" (got {shown!r})"
        raise Usage(f"--url: {error}{got}") from None


def _checked_id(text: str, option: str) -> str:
    problem = id_problem(text)
    if problem:
        raise Usage(f"{option}: {problem}")
    return text


def _checked_span(text: str) -> float:
    try:
        span = duration(text)
    except ValueError as error:
        raise Usage(f"--timeout: {error} (got {text!r})") from None
    if span <= 0:
        raise Usage("--timeout: must not be zero")
    return span


def _test_session(args: argparse.Namespace, operator: Operator) -> Session:
    """The session to tell of: ids and token as given, else values that nobody takes for real ones."""
    now_at = time.time_ns() // 1_000_000
    return Session(
        id=0,
        operator=operator.name,
        session_id=_checked_id(args.session or f"test-{uuid4().hex}", "--session"),
        player_id=_checked_id(args.player or "test-player", "--player"),
        token=player_token(args) or f"test-{uuid4().hex}",
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


async def _exchange(operator: Operator, body: bytes) -> Exchange:
    """Sends it once, through the very code the daemon sends with."""

    class Moment(Clock):
        """Stands still, so that the headers printed are signed as those sent."""

        now_ms = time.time_ns() // 1_000_000

        def wall_ms(self) -> int:
            return self.now_ms

    clock, webhook_id = Moment(), f"test_{uuid4().hex}"
    sender = Sender(clock)
    headers = _headers_of_aiohttp(operator, body) | request_headers(operator, webhook_id, body, clock.now_ms / 1000)
    began = time.monotonic()
    answer = None
    try:
        answer = await sender.post(operator, webhook_id, body)
        status, received, content, complete = answer
        outcome = judge(
            status,
            content,
            complete=complete,
            retry_after=received.get("Retry-After"),
            now_s=clock.now_ms / 1000,
            final=operator.sends.codes.final,
        )
    except Unreachable as error:
        outcome = Outcome("retry", error.cause, detail=error.detail)
    finally:
        await sender.close()
    return Exchange(headers, answer, _timed(outcome, began))


def _timed(outcome: Outcome, began: float) -> Outcome:
    return outcome._replace(duration_ms=round((time.monotonic() - began) * 1000))


def _headers_of_aiohttp(operator: Operator, body: bytes) -> dict[str, str]:
    """The headers aiohttp adds by itself; a test compares them with what a server gets."""
    assert operator.target is not None  # noqa: S101 - _recipient has refused an operator without a URL
    host = operator.target.url.host_port_subcomponent or ""
    return {"Host": host, "Accept": "*/*", "Content-Length": str(len(body))}


def _shown_exchange(operator: Operator, session: Session, body: bytes, exchange: Exchange) -> dict[str, Any]:
    """Both sides as they may be shown to anybody: with token, hash, signatures and the URL's secrets masked."""
    outcome = exchange.outcome
    mask = masks.of_notice(operator, session.token, body)
    answer = None
    if exchange.answer is not None:
        status, received, content, complete = exchange.answer
        answer = {
            "status": status,
            "headers": {
                name: mask(_shown_url(received[name]) if name == "Location" else received[name])
                for name in ANSWER_HEADERS
                if name in received
            },
            "body": mask.text_of(content, complete=complete),
            "complete": complete,
        }
    return {
        "request": {
            "method": "POST",
            "url": _shown_url(operator.url),
            "headers": {name: _shown_header(name, value, mask) for name, value in exchange.headers.items()},
            "body": _masked_body(operator, fields_of(operator, body)),
        },
        "answer": answer,
        "verdict": outcome.verdict,
        "reason": outcome.reason or None,
        "detail": mask(outcome.detail) or None,
        "retryAfterSeconds": outcome.retry_after_s,
        "durationMs": outcome.duration_ms,
    }


def _shown_header(name: str, value: str, mask: Callable[[str], str]) -> str:
    if name == "Authorization":  # also where user and password are too short to be told from other text
        return f"Basic {MASK}"
    return value if name == "Host" else mask(value)


def _masked_body(operator: Operator, fields: Mapping[str, str]) -> str:
    """The body as sent, but for the masked fields. By field: a short token may also stand in an id by chance."""
    secret = {operator.sends.fields.get("token"), operator.sends.fields.get("hash")}
    masked = {name: MASK if name in secret else value for name, value in fields.items()}
    if operator.sends.content == "json":
        return json.dumps(masked, ensure_ascii=False, separators=(",", ":"))
    return urlencode(masked, safe="*")


def _shown_url(url: str) -> str:
    """Without user info and fragment, the query's values masked: its names tell an integrator enough. Also a path
    alone, as a Location may be.
    """
    path = url.partition("#")[0].partition("?")[0]
    shown = path if path.startswith("/") and not path.startswith("//") else safe_url(url)
    query = "&".join(f"{name}={MASK}" if name else MASK for name, _ in query_of(url))
    return f"{shown}?{query}" if "?" in url.partition("#")[0] else shown


def _print_exchange(shown: Mapping[str, Any]) -> None:
    """Both sides as they stand on the wire, and the verdict: for pasting into a ticket."""
    request, answer = shown["request"], shown["answer"]
    print(f"{request['method']} {line(request['url'])}")
    _print_message(request)
    if answer is None:
        print(f"No answer ({shown['durationMs']} ms)")
        print()
    else:
        print(f"HTTP {answer['status']} ({shown['durationMs']} ms)")
        _print_message(answer)
        if not answer["complete"]:
            print("(the answer is longer; the rest was not read)")
            print()
    print(f"Verdict: {line(_verdict(shown))}")


def _print_message(message: Mapping[str, Any]) -> None:
    for name, value in message["headers"].items():
        print(f"{name}: {line(value)}")
    print()
    for text in message["body"].splitlines():
        print(line(text))
    print()


def _verdict(shown: Mapping[str, Any]) -> str:
    reason = shown["reason"] + (f" ({shown['detail']})" if shown["detail"] else "") if shown["reason"] else ""
    text = {
        "delivered": "delivered",
        "final": f"final, never sent again because {reason}",
        "retry": f"would be retried because {reason}",
        "hold": f"would hold the operator because {reason}",
    }[shown["verdict"]]
    wait_s = shown["retryAfterSeconds"]
    return text + (f"; nothing would be sent to this operator for {wait_s:g} s (Retry-After)" if wait_s else "")
