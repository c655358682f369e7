"""Sends one test notice to an operator, with the daemon's own sender. Request and answer are shown, and people often
paste them into tickets. Every secret in them is therefore masked, also where the answer repeats it.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import uuid4

from lmdaemon import masks
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sender import Sender, Unreachable, request_headers
from lmdaemon.delivery.shown import masked_body, own_headers
from lmdaemon.model import Session
from lmdaemon.retry import Outcome, judge
from lmdaemon.workbench import explain
from lmdaemon.workbench.exchanges import Answer, Asked, Exchange, shown

MADE_UP = "lmdaemon-test"  # made-up ids begin with this, so that people who find one know where it came from


class Sent(NamedTuple):
    """A request with its answer, and how the daemon would judge it."""

    exchange: Exchange
    outcome: Outcome


class _Moment(Clock):
    """A clock that stands still, so that the signature made for showing the request is the one that was sent."""

    def __init__(self) -> None:
        self._now_ms = time.time_ns() // 1_000_000

    def wall_ms(self) -> int:
        return self._now_ms


def made_up(
    operator: Operator, session_id: str | None = None, player_id: str | None = None, token: str | None = None
) -> Session:
    """The session of the notice: with the given values, and with recognisably made-up ones for the rest."""
    now_at = time.time_ns() // 1_000_000
    return Session(
        id=0,
        operator=operator.name,
        session_id=session_id or f"{MADE_UP}-{uuid4().hex}",
        player_id=player_id or f"{MADE_UP}-player",
        token=token or f"made-up-{uuid4().hex}",
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


async def send(operator: Operator, body: bytes) -> Sent:
    """Posts the body once to the operator, who must have a URL."""
    clock, webhook_id = _Moment(), f"test_{uuid4().hex}"
    sender = Sender(clock)
    now_s = clock.wall_ms() / 1000
    headers = own_headers(operator, body) | request_headers(operator, webhook_id, body, now_s)
    began = time.monotonic()
    answer = None
    try:
        answer = Answer(*await sender.post(operator, webhook_id, body))
        outcome = judge(
            answer.status,
            answer.body,
            complete=answer.complete,
            retry_after=answer.headers.get("Retry-After"),
            now_s=now_s,
            final=operator.sends.codes.final,
        )
    except Unreachable as error:
        outcome = Outcome("retry", error.cause, detail=error.detail)
    finally:
        await sender.close()
    cause = "" if answer else outcome.reason
    took_ms = round((time.monotonic() - began) * 1000)
    return Sent(Exchange(Asked("POST", operator.url, headers, body), answer, cause, outcome.detail, took_ms), outcome)


def as_shown(operator: Operator, session: Session, sent: Sent) -> dict[str, Any]:
    """Request, answer and verdict as they may be shown to anybody: token, hash, signatures and the URL's secrets are
    masked.
    """
    exchange, outcome = sent
    body = exchange.asked.body
    mask = masks.of_notice(operator, session.token, body)
    both = shown(exchange, mask, masked_body(operator, session.token, body))
    document = {
        "request": both["request"],
        "answer": both["answer"],
        "explanation": mask(explain.exchange(exchange, operator.sends)),
        "verdict": outcome.verdict,
        "reason": outcome.reason or None,
        "detail": both["detail"],
        "retryAfterSeconds": outcome.retry_after_s,
        "durationMs": exchange.duration_ms,
    }
    return document | {"meaning": _meaning(document)}


def _meaning(document: Mapping[str, Any]) -> str:
    """What the daemon would do after this answer to a delivery."""
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
