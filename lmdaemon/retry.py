"""What an operator's answer means, when to try again, and the state of its breaker.

Pure functions: the time, the random generator and the policy are arguments. They must never do I/O, read a clock or
log.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from random import Random
from typing import Literal, NamedTuple

from lmdaemon.causes import code_of, status_of
from lmdaemon.dialects import answered_code, unreadable
from lmdaemon.model import HTTP_SINK, Delivery, Gate

JITTER = 0.2  # each wait varies by ±20 %, so that deliveries that failed together are not all repeated together
RETRY_AFTER_MAX_S = 3600.0  # an operator may delay its notices, but not stop them
FINAL_CODES = frozenset({120, 999})  # "internal error, do not retry" in the shipped dialects
BREAKER_OPENS_AT = 5  # failures in a row
PROBE_PAUSE_MAX_S = 300.0
HOLD_AFTER_S = 5 * 86400.0  # an operator is held after nothing but failures for this long

Verdict = Literal["delivered", "final", "retry", "hold"]


class Outcome(NamedTuple):
    """The result of one attempt.

    `reason` is a word of `causes`, `code` the `error` in the answer, `detail` more about the reason for people,
    `answer` the beginning of the answer with secrets masked.
    """

    verdict: Verdict
    reason: str = ""
    status: int | None = None
    code: int | float | None = None
    retry_after_s: float | None = None
    duration_ms: int = 0
    detail: str = ""
    answer: str | None = None
    address: str | None = None


def judge(
    status: int, body: bytes, *, complete: bool = True, retry_after: str | None = None, now_s: float, final: int = 120
) -> Outcome:
    """What an answer means. `complete` is False when the body was longer than the 16 KiB that are read.

    `final` is the dialect's own code for "do not retry"; 120 and 999 always mean that. `now_s` is the wall time
    (epoch), from which a Retry-After with a date is counted.
    """
    code = answered_code(body) if complete else None
    wait_s = retry_after_s(retry_after, now_s)
    verdict, reason = _verdict(status, code, complete=complete, final=final)
    detail = unreadable(body) if reason == "bad_answer" else ""
    return Outcome(verdict, reason, status, code, wait_s, detail=detail)


def _verdict(status: int, code: int | float | None, *, complete: bool, final: int) -> tuple[Verdict, str]:
    if status == 200 and code == 0:
        return "delivered", ""
    if status == 410:
        return "hold", "gone"
    if code is not None and code in FINAL_CODES | {final}:
        return "final", code_of(code)
    if 300 <= status < 400:
        return "retry", "redirect"
    if status != 200:
        return "retry", status_of(status)
    if not complete:
        return "retry", "answer_too_long"
    return "retry", "bad_answer" if code is None else code_of(code)


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """The seconds of a Retry-After header, 0 to 3600; None when it is absent or invalid. Source: RFC 9110 §10.2.3."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text.lstrip("0")[:9] or "0"), RETRY_AFTER_MAX_S)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max(at.timestamp() - now_s, 0.0), RETRY_AFTER_MAX_S)


def delay_s(step: int, schedule: Sequence[float], rng: Random) -> float | None:
    """Seconds to wait after failure number `step` + 1; None when the schedule is used up.

    It is the wait of the schedule (seconds) times a random factor of 0.8 to 1.2.
    """
    if step >= len(schedule):
        return None
    return schedule[step] * rng.uniform(1 - JITTER, 1 + JITTER)


def breaker(gate: Gate, now_at: int) -> Literal["closed", "open", "half-open"]:
    """The breaker's state at `now_at` (wall ms): half-open once its pause is over, so that one probe may be sent."""
    if gate.failures < BREAKER_OPENS_AT:
        return "closed"
    return "half-open" if now_at >= gate.probe_at else "open"


def opens_at(gate: Gate) -> int | None:
    """Wall time (ms) from which something may be sent, by Retry-After and breaker; None while the operator is held."""
    if gate.held_at is not None:
        return None
    probe_at = gate.probe_at if gate.failures >= BREAKER_OPENS_AT else 0
    return max(gate.not_before_at, probe_at)


def not_before(gate: Gate, now_at: int) -> int | None:
    """Wall time (ms) before which Retry-After or the breaker allows no attempt; None where neither does so now."""
    at = opens_at(gate)
    return None if at is None or at <= now_at else at


def next_attempt_at(delivery: Delivery, gate: Gate, *, is_tried: bool = True) -> int | None:
    """Wall time (ms) at which a pending delivery can be tried: when it is due and its operator's gate is open.

    A plug-in has no gate. None while the operator is held, once the delivery is settled, and if the settings say that
    it is not tried (not `is_tried`, see Settings.delivers).
    """
    return tried_at(delivery.sink, delivery.due_at, gate) if delivery.state == "pending" and is_tried else None


def tried_at(sink: str, due_at: int, gate: Gate) -> int | None:
    """Wall time (ms) at which a delivery that is due at `due_at` can be tried; None while its operator is held."""
    if sink != HTTP_SINK:
        return due_at
    at = opens_at(gate)
    return None if at is None else max(due_at, at)


def after(gate: Gate, outcome: Outcome, now_at: int, first_wait_s: float, *, probe: bool, rng: Random) -> Gate:
    """The gate after one attempt: with its Retry-After, failures in a row, breaker pause and hold.

    `probe` says that the attempt was sent while the breaker was open. Only the failure of a probe doubles the pause,
    not that of an attempt that was under way when the breaker opened. `first_wait_s` is the schedule's first wait.
    """
    if outcome.retry_after_s:
        # Jitter only upward: Retry-After is the earliest time.
        wait_ms = int(outcome.retry_after_s * rng.uniform(1, 1 + JITTER) * 1000)
        until_at = now_at + min(wait_ms, int(RETRY_AFTER_MAX_S * 1000))
        if until_at > gate.not_before_at:
            paused_at = gate.paused_at if gate.not_before_at > now_at else now_at
            gate = replace(gate, not_before_at=until_at, paused_at=paused_at)
    if outcome.verdict == "hold":
        return hold(_failed(gate, outcome, now_at), now_at, outcome.reason)
    if outcome.verdict != "retry":
        if not gate.failures and gate.failing_since_at is None:
            return gate  # the usual case
        return replace(_closed(gate), failing_since_at=None, alike_since_at=None)
    return _after_failure(_failed(gate, outcome, now_at), now_at, first_wait_s, probe=probe)


def _failed(gate: Gate, outcome: Outcome, now_at: int) -> Gate:
    """The gate with the facts of this failure."""
    is_first, is_alike = gate.failing_since_at is None, gate.failed_reason == outcome.reason
    return replace(
        gate,
        failed_at=now_at,
        failed_reason=outcome.reason,
        failed_detail=outcome.detail or None,
        alike_since_at=gate.alike_since_at if is_alike and not is_first else now_at,
        failed_before_at=gate.failed_at if is_first else gate.failed_before_at,
    )


def _after_failure(gate: Gate, now_at: int, first_wait_s: float, *, probe: bool) -> Gate:
    gate = replace(gate, failures=gate.failures + 1, failing_since_at=gate.failing_since_at or now_at)
    assert gate.failing_since_at is not None  # noqa: S101 - for the type checker; set on the line above
    if now_at - gate.failing_since_at >= HOLD_AFTER_S * 1000:
        return hold(gate, now_at, "failing_for_days")
    if gate.failures == BREAKER_OPENS_AT:
        pause_ms = round(min(first_wait_s, PROBE_PAUSE_MAX_S) * 1000)
        return replace(gate, pause_ms=pause_ms, probe_at=now_at + pause_ms, opened_at=now_at)
    if probe and gate.failures > BREAKER_OPENS_AT:
        pause_ms = min(max(gate.pause_ms, 1) * 2, int(PROBE_PAUSE_MAX_S * 1000))
        return replace(gate, pause_ms=pause_ms, probe_at=now_at + pause_ms)
    return gate


def _closed(gate: Gate) -> Gate:
    return replace(gate, failures=0, pause_ms=0, probe_at=0, opened_at=None)


def hold(
    gate: Gate,
    now_at: int,
    reason: str,
    *,
    by: str | None = None,
    note: str | None = None,
    until_at: int | None = None,
) -> Gate:
    """The gate, held from now on until somebody releases it, or until `until_at` (wall ms).

    A gate that is held already keeps its start, its reason and who held it; a note or an end that is given replaces the
    one that it had.
    """
    if gate.held_at is None:
        return replace(gate, held_at=now_at, held_reason=reason, held_by=by, held_note=note, held_until_at=until_at)
    return replace(
        gate,
        held_note=gate.held_note if note is None else note,
        held_until_at=gate.held_until_at if until_at is None else until_at,
    )


def release(gate: Gate, now_at: int) -> Gate:
    """The gate without hold, breaker and Retry-After. The time on hold is added to `held_total_ms`, which no delivery's
    age includes.
    """
    return replace(
        _closed(_not_held(gate, now_at)), failing_since_at=None, alike_since_at=None, not_before_at=0, paused_at=None
    )


def _not_held(gate: Gate, now_at: int) -> Gate:
    return replace(
        gate,
        held_at=None,
        held_reason=None,
        held_by=None,
        held_note=None,
        held_until_at=None,
        held_total_ms=held_ms(gate, now_at),
    )


def settled_by_time(gate: Gate, now_at: int, *, is_waiting: bool) -> Gate:
    """What time does to a gate: a hold whose end has come is over, and a breaker closes after its pause if nothing is
    waiting (not `is_waiting`), because then no probe would close it. `failing_since_at` stays: nothing has succeeded.
    """
    if gate.held_until_at is not None and gate.held_until_at <= now_at:
        gate = _not_held(gate, now_at)
    if not is_waiting and gate.held_at is None and gate.failures >= BREAKER_OPENS_AT and gate.probe_at <= now_at:
        gate = _closed(gate)
    return gate


def changes_by_time_at(gate: Gate, *, is_waiting: bool) -> int | None:
    """Wall time (ms) at which `settled_by_time` changes the gate; None if it does not."""
    if gate.held_at is not None:
        return gate.held_until_at
    return gate.probe_at if gate.failures >= BREAKER_OPENS_AT and not is_waiting else None


def held_ms(gate: Gate, now_at: int) -> int:
    """How long the operator has been on hold so far (ms), including a hold that is in force."""
    return gate.held_total_ms + (0 if gate.held_at is None else max(0, now_at - gate.held_at))


def age_ms(aged_from_at: int, held_base_ms: int, gate: Gate, now_at: int) -> int:
    """Age of a delivery (ms): wall time since it was created or retried by hand, without the time on hold since then.

    `held_base_ms` is what `held_ms` was at that moment.
    """
    return now_at - aged_from_at - (held_ms(gate, now_at) - held_base_ms)
