"""Says of an operator's gate, for people, since when, why and until when it keeps deliveries back; and logs its
changes.

What is said is worked out from the stored gate. So it is the same after a restart, and in the API, in `/health` and in
the log.
"""

import json
from dataclasses import replace
from typing import Any

from lmdaemon import retry
from lmdaemon.log import Log
from lmdaemon.model import Gate, rfc3339

URLS_MAX = 20  # how many URLs are remembered for an operator
_DAY_MS = 86_400_000
# Reasons of holds that were not made by hand, in words
_HELD = {
    "gone": "it answered 410 (gone)",
    "failing_for_days": f"for {retry.HOLD_AFTER_S / 86400:g} days every attempt failed (failing_for_days)",
}

log = Log("delivery")


def outlook(gate: Gate, now_at: int, *, pending: int, dies_at: int | None = None) -> str | None:
    """What will happen by itself, and when; None where nothing keeps the operator back. `dies_at`: when the first of
    its deliveries is given up as too old (wall ms).
    """
    if gate.held_at is not None:
        if gate.held_until_at is not None:
            return f"released by itself at {_time(gate.held_until_at)}; its deliveries do not age until then"
        return "held until somebody releases it; its deliveries do not age meanwhile"
    breaker = retry.breaker(gate, now_at)
    at = retry.opens_at(gate) or 0
    if breaker == "closed" and at <= now_at:
        return None
    if breaker != "closed" and not pending:
        return f"nothing waits for it: the breaker closes by itself at {_time(at)}"
    again = "tried again" if breaker != "closed" else "sent again"
    when = f"at {_time(at)}" if at > now_at else "now"
    dies = "" if dies_at is None else f"; the first notice dies at {_time(dies_at)}"
    return f"{again} {when}{dies}"


def because(gate: Gate, now_at: int) -> str | None:
    """What keeps the operator's deliveries back, since when and why, as a part of a sentence; None if nothing does."""
    if gate.held_at is not None:
        by = f" by {gate.held_by}" if gate.held_by else ""
        note = f" ({gate.held_note})" if gate.held_note else ""
        reason = _HELD.get(gate.held_reason or "", gate.held_reason)
        return f"held since {_time(gate.held_at)}{by}: {reason}{note}"
    if retry.breaker(gate, now_at) != "closed":
        failed = f"{gate.failures} attempts failed in a row since {_time(gate.failing_since_at)}{failure(gate)}"
        since = _time(gate.opened_at or gate.failing_since_at)
        return f"breaker open since {since}: {mismatch(gate) or failed}"
    if gate.not_before_at > now_at:
        return f"a Retry-After of {_time(gate.paused_at)} asks for no attempt before {_time(gate.not_before_at)}"
    return None


def not_configured(operator: str, live: int, pending: int) -> str:
    """A sentence about an operator that is not in the file, though sessions or deliveries of it remain."""
    return f"{operator} is not in the file, so its sessions and deliveries wait: {live} live, {pending} pending"


def failure(gate: Gate) -> str:
    """`: reason (detail)` of the last failure; empty if none is known."""
    if gate.failed_reason is None:
        return ""
    return f": {gate.failed_reason}" + (f" ({gate.failed_detail})" if gate.failed_detail else "")


def mismatch(gate: Gate) -> str | None:
    """A sentence if every answer since some time was the same refusal, and the day before there was none: then the
    operator is not down, but one of the two sides has changed what it expects. None otherwise.
    """
    since, reason = gate.failing_since_at, gate.failed_reason or ""
    if since is None or gate.failures < retry.BREAKER_OPENS_AT or gate.alike_since_at != since:
        return None
    if not reason.startswith("code_") and reason != "bad_answer":
        return None
    if gate.failed_before_at is not None and since - gate.failed_before_at < _DAY_MS:
        return None
    before = "none is known before" if gate.failed_before_at is None else "before that none for a day"
    said = f" ({gate.failed_detail})" if gate.failed_detail else ""
    who = "something else answers in its place, or " if reason == "bad_answer" else ""
    return f"every answer since {_time(since)} is {reason}{said}, {before}: {who}one side has changed what it expects"


def with_url(gate: Gate, url: str, since_at: int) -> Gate:
    """The gate with a note that `url` is used since `since_at` (wall ms); the same gate if that URL was the last one
    noted.
    """
    known: list[list[Any]] = json.loads(gate.urls or "[]")
    if known and known[-1][1] == url:
        return gate
    return replace(gate, urls=json.dumps([*known, [since_at, url]][-URLS_MAX:]))


def url_at(gate: Gate, at: int) -> str | None:
    """The URL to which an attempt that began at `at` (wall ms) was sent, without user info and query; None if it is not
    known.
    """
    known: list[list[Any]] = json.loads(gate.urls or "[]")
    return next((url for since_at, url in reversed(known) if since_at <= at), None)


def log_change(
    operator: str,
    before: Gate,
    gate: Gate,
    now_at: int,
    *,
    pending: int,
    cause: str,
    url: str | None = None,
    by: str | None = None,
    request_id: str | None = None,
) -> None:
    """Logs what begins or ends by the change of a gate: a hold, an open breaker, a Retry-After. Other changes are not
    logged. `cause`: `answer`, `by_hand`, or `time`; `pending`: how many deliveries wait; `by` and `request_id`: of the
    call that made the change.
    """
    if gate == before:
        return
    asked = {"by": by, "request_id": request_id}
    if gate.held_at is not None and before.held_at is None:
        facts = {"operator": operator, "reason": gate.held_reason, "pending": pending}
        if cause == "by_hand":
            log.warning("operator.held", **facts, **asked, note=gate.held_note, until=rfc3339(gate.held_until_at))
        else:
            log.error("operator.held", **facts, detail=gate.failed_detail, url=url)
    if gate.held_at is None and before.held_at is not None:
        held = {"held_reason": before.held_reason, "held_by": before.held_by, "note": before.held_note}
        held_s = _since_s(before.held_at, now_at)
        log.info("operator.released", operator=operator, reason=cause, **asked, held_s=held_s, **held, pending=pending)
    was_open, is_open = (one.failures >= retry.BREAKER_OPENS_AT for one in (before, gate))
    if is_open and not was_open:
        why = {"reason": gate.failed_reason, "detail": gate.failed_detail}
        times = {"since": rfc3339(gate.failing_since_at), "next": rfc3339(gate.probe_at)}
        pause_s = gate.pause_ms / 1000
        log.warning(
            "breaker.opened",
            operator=operator,
            **why,
            failures=gate.failures,
            **times,
            pause_s=pause_s,
            pending=pending,
            url=url,
        )
    if was_open and not is_open:
        open_s = _since_s(before.opened_at or before.failing_since_at, now_at)
        about: dict[str, object] = {"open_s": open_s, "failed_attempts": before.failures, "pending": pending}
        log.info("breaker.closed", operator=operator, reason=cause, **asked, **about, url=url)
    if gate.not_before_at > before.not_before_at:
        until = rfc3339(gate.not_before_at)
        log.warning("operator.paused", operator=operator, reason="retry_after", until=until, pending=pending)
    if cause == "by_hand" and before.not_before_at > now_at >= gate.not_before_at:
        log.info("operator.resumed", operator=operator, reason=cause, **asked, pending=pending)


def _since_s(at: int | None, now_at: int) -> float | None:
    return None if at is None else max(0, now_at - at) / 1000


def _time(at: int | None) -> str:
    """A wall time (ms) to the second, UTC; `?` if it is None."""
    return "?" if at is None else f"{rfc3339(at)[:19]}Z"
