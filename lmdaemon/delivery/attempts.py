"""One attempt at a delivery: what is sent to a URL or a plug-in, what the answer means, and what is to be stored of it.

This module must never store anything itself, and never decide when to send.
"""

from random import Random
from typing import Any, Protocol

from lmdaemon import gates, masks, retry
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.delivery import phrases
from lmdaemon.delivery.lanes import Lane
from lmdaemon.delivery.sender import Sender, Unreachable
from lmdaemon.delivery.sinks import event_of
from lmdaemon.log import Log, place, safe_url
from lmdaemon.model import Delivery, Gate, rfc3339
from lmdaemon.plugins import PluginFailed
from lmdaemon.pulse import WakeObserver
from lmdaemon.store.contract import Settled, Settlement, Store, StoreError

log = Log("delivery")


class AttemptObserver(WakeObserver, Protocol):
    """Is called for each wake-up of the dispatcher's loop and for every attempt."""

    def attempted(self, operator: str, sink: str, verdict: retry.Verdict, took_s: float) -> None:
        """An attempt has ended after `took_s` seconds."""

    def settled(self, settlement: Settlement, settled: Settled) -> None:
        """A result was stored."""


class Attempts:
    """Makes attempts, and says what each means for its delivery."""

    def __init__(
        self, store: Store, clock: Clock, sender: Sender, rng: Random, observer: AttemptObserver | None
    ) -> None:
        self._store = store
        self._clock = clock
        self._sender = sender
        self._rng = rng
        self._observer = observer

    @staticmethod
    def too_old(lane: Lane, row: Delivery) -> Settlement:
        """The settlement that gives up a delivery older than `max_age`; logs it."""
        detail = f"the last attempt: {row.last_error}" if row.last_error else "never tried"
        _log_dead(lane, row, row.attempts, "max_age", detail)
        return Settlement(row._replace(last_error="max_age"), "dead", 0, row.step)

    async def make(self, lane: Lane, row: Delivery) -> retry.Outcome:
        """Sends the delivery once and judges the answer.

        Raises StoreError when the session for a plug-in could not be read: then nothing was tried.
        """
        began = self._clock.monotonic()
        addresses: list[str] = []  # the address of the connection, once there is a connection
        try:
            outcome = await (self._post(lane, row, addresses) if lane.plugin is None else self._call(lane, row))
        except StoreError:
            raise
        except Exception as error:  # a bug that some answer triggers must not stop the deliveries of other operators
            log.error(
                "delivery.attempt_failed",
                operator=row.operator,
                sink=row.sink,
                id=row.webhook_id,
                error=type(error).__name__,
                where=place(error),
            )
            outcome = retry.Outcome("retry", "internal_error")
        duration_ms = int((self._clock.monotonic() - began) * 1000)
        outcome = outcome._replace(duration_ms=duration_ms, address=addresses[0] if addresses else None)
        if self._observer is not None:
            self._observer.attempted(lane.operator.name, lane.sink, outcome.verdict, outcome.duration_ms / 1000)
        return outcome

    async def _post(self, lane: Lane, row: Delivery, addresses: list[str]) -> retry.Outcome:
        operator = lane.operator
        try:
            status, headers, body, complete = await self._sender.post(
                operator, row.webhook_id, row.body, addresses.append
            )
        except Unreachable as error:
            detail = error.detail
            if error.cause == "timeout":
                how = f"connected to {addresses[0]}, no whole answer" if addresses else "no connection"
                detail = f"{how} within {operator.policy.timeout_s:g} s"
            return retry.Outcome("retry", error.cause, detail=detail)
        outcome = retry.judge(
            status,
            body,
            complete=complete,
            retry_after=headers.get("Retry-After"),
            now_s=self._clock.wall_ms() / 1000,
            final=operator.sends.codes.final,
        )
        if outcome.verdict == "delivered":
            return outcome
        mask = masks.of_notice(operator, row.token, row.body)
        said = phrases.of_body(body, operator.sends, complete=complete, quoted_max=len(body))
        return outcome._replace(
            detail=mask.beginning_of(said.encode(errors="replace"), complete=True),
            answer=mask.beginning_of(body, complete=complete),
        )

    async def _call(self, lane: Lane, row: Delivery) -> retry.Outcome:
        assert lane.plugin is not None  # noqa: S101 - a lane without one posts
        found = await self._store.session(row.operator, row.session_id)
        if found is None:
            return retry.Outcome("final", "session_gone")
        try:
            await lane.plugin.session_ended(event_of(lane.operator, found[0], row.webhook_id))
        except PluginFailed as error:
            return retry.Outcome("retry", str(error))
        return retry.Outcome("delivered")

    def settlement(
        self, lane: Lane, row: Delivery, outcome: retry.Outcome, began_at: int, *, probe: bool
    ) -> Settlement:
        """What the outcome means for the row and for its operator's gate; logs it."""
        facts = {"operator": row.operator, "session": row.session_id, "sink": row.sink, "id": row.webhook_id}
        attempt = entry(outcome, began_at)

        def alter(gate: Gate, now_at: int) -> Gate:
            return retry.after(gate, outcome, now_at, lane.policy.schedule_s[0], probe=probe, rng=self._rng)

        gate = alter if lane.gated else None
        if outcome.verdict == "delivered":
            _log_recovery(lane)
            log.info("delivery.delivered", **facts, attempt=row.attempts + 1, duration_ms=outcome.duration_ms)
            return Settlement(row, "delivered", 0, row.step, attempt, gate=gate)
        if outcome.verdict == "hold":
            return Settlement(row, "pending", 0, row.step, attempt, spent=False, gate=gate)
        lane.failed += 1
        wait_s = None if outcome.verdict == "final" else retry.delay_s(row.step, lane.policy.schedule_s, self._rng)
        if wait_s is None:
            _log_dead(lane, row, row.attempts + 1, outcome.reason, outcome.detail)
            return Settlement(row, "dead", 0, row.step, attempt, gate=gate)
        facts |= {"reason": outcome.reason}
        if outcome.detail:
            facts["detail"] = outcome.detail
        log.warning("delivery.retry", **facts, attempt=row.attempts + 1, wait_s=round(wait_s, 3))
        return Settlement(row, "pending", round(wait_s * 1000), row.step + 1, attempt, gate=gate)


def _log_dead(lane: Lane, row: Delivery, attempts: int, reason: str, detail: str = "") -> None:
    facts = {"operator": row.operator, "session": row.session_id, "sink": row.sink, "id": row.webhook_id}
    if detail:
        facts["detail"] = detail
    facts["since"] = rfc3339(row.created_at)
    log.error("delivery.dead", **facts, attempts=attempts, reason=reason, url=lane.url)


def _log_recovery(lane: Lane) -> None:
    """Logs that a plug-in works again. For a URL, the closing of its breaker is logged instead."""
    if not lane.gated and lane.failed >= retry.BREAKER_OPENS_AT:
        log.info("delivery.recovered", operator=lane.operator.name, sink=lane.sink, failed=lane.failed)
    lane.failed = 0


def entry(outcome: retry.Outcome, began_at: int) -> dict[str, Any]:
    """The entry of an attempt for the history. The entry of a failed one has the beginning of the answer; None if there
    was no answer.
    """
    attempt = {
        "at": began_at,
        "durationMs": outcome.duration_ms,
        "status": outcome.status,
        "code": outcome.code,
        "error": outcome.reason or None,
    }
    if outcome.address is not None:
        attempt["address"] = outcome.address
    if outcome.verdict == "delivered":
        return attempt
    return attempt | ({"detail": outcome.detail} if outcome.detail else {}) | {"answer": outcome.answer}


def log_gate(store: Store, clock: Clock, operator: Operator, before: Gate, gate: Gate, *, cause: str) -> None:
    """Logs what has changed of an operator's gate, if anything has."""
    if gate is not before:
        pending, url = store.figures_of(operator.name).pending, safe_url(operator.url)
        gates.log_change(operator.name, before, gate, clock.wall_ms(), pending=pending, cause=cause, url=url)
