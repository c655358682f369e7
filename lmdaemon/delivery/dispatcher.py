"""Delivers ends: reads due rows, sends them, judges the answers and stores the results. The table is the queue.

A lane is one operator and sink. It has its own slots (places for attempts under way), its own schedule and, for a URL,
its own gate (hold, Retry-After, breaker), so that no lane delays another. Of several daemons on one database, the one
that owns the operator delivers; the others have its lanes, too, and start nothing in them. This module must never hold
more rows of a lane than three times its slots (under way, read ahead, not stored yet), and never send inside a
transaction.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random

from lmdaemon import retry
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Settings
from lmdaemon.delivery.attempts import AttemptObserver, Attempts
from lmdaemon.delivery.lane_set import LaneSet
from lmdaemon.delivery.lanes import Agenda, Lane
from lmdaemon.delivery.running import STORE_RETRY_S, RunningAttempts
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.timed_gates import TimedGates
from lmdaemon.delivery.underway import Underway, tell_interrupted
from lmdaemon.log import Log
from lmdaemon.model import HTTP_SINK, Delivery
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.pulse import Pulse, Rounds
from lmdaemon.store.contract import Claim, Store, StoreError, StoreObserver

DRAIN_EXTRA_S = 5.0  # how much longer than the longest time-out a stop waits for attempts
# Besides the time-out: for another daemon to begin the probe that it was asked for, and for its answer to arrive
ASK_EXTRA_S = 5.0

log = Log("delivery")


class Dispatcher(StoreObserver):
    """Delivers what is due. `once` starts it and returns how long to sleep; `run` is `once` for ever."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        sender: Sender,
        rng: Random,
        observer: AttemptObserver | None = None,
        underway: Underway | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._underway = underway or Underway(None)
        attempts = Attempts(store, clock, sender, rng, observer)
        self._attempts = RunningAttempts(store, clock, attempts, observer, self._underway, self)
        self._timed_gates = TimedGates(store, clock)
        self._agenda = Agenda()
        self.lanes = LaneSet(store, clock, self._agenda)
        self._answers: set[asyncio.Task[None]] = set()  # tasks that answer other daemons
        self._crash: BaseException | None = None
        self._running = False
        self.pulse = Pulse(clock.monotonic, observer)
        self._rounds = Rounds(self.pulse)
        self._store_failure: str | None = None  # the error of the store that was logged last
        store.observe(self)

    def configure(self, settings: Settings, plugins: Mapping[str, LoadedPlugin]) -> None:
        """Takes over new settings. Lanes that stay keep their attempts; rows of lanes that were removed wait."""
        self.lanes.configure(settings, plugins)
        self._rounds.wake()

    # -- called by the store and by attempts

    def ownership_changed(self, operator: str) -> None:
        """Begins to deliver for the operator if this daemon owns it now; otherwise starts no more attempts for it
        (StoreObserver).
        """
        self.lanes.own(operator)
        self._rounds.wake()
        self._let_go(operator)

    def _let_go(self, operator: str) -> None:
        """Lets another daemon have the operator, if this one owns it no longer and none of its attempts is under
        way.
        """
        if not self._store.owns(operator) and not self.lanes.is_under_way(operator):
            self._store.let_go(operator)

    def wake(self) -> None:
        """Has the next round look at all lanes: in any of them a row may be due or a slot may be free."""
        for lane in self.lanes:
            self._agenda.now(lane)
        self._rounds.wake()

    def slot_freed(self, operator: str, sink: str) -> None:
        """Starts attempts for rows of the lane that were read ahead, and has the next round look at the lane."""
        lane = self.lanes.get(operator, sink)  # looked up again, because a reload may have replaced it
        if lane is None or not lane.is_owned:
            return
        if self._running:
            self._start(lane)
        self._agenda.now(lane)
        self._rounds.wake()

    def gate_changed(self, operator: str) -> None:
        """Starts what the changed gate allows in the lane of the operator's URL (StoreObserver)."""
        lane = self.lanes.get(operator, HTTP_SINK)
        if lane is not None:
            lane.note_gate(self._store.gate(operator), self._clock.wall_ms())
        self.slot_freed(operator, HTTP_SINK)

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        """Notes when a row of the lane is due (StoreObserver)."""
        lane = self.lanes.get(operator, sink)
        if lane is not None and lane.is_owned:
            lane.note_due(due_at)
            self._agenda.now(lane)
            self._rounds.wake()

    def wall_clock_set_back(self) -> None:
        """Has all due times read again, because the store has moved them with the wall clock (StoreObserver)."""
        now_at = self._clock.wall_ms()
        for lane in self.lanes:
            lane.look_again_at = 0
            lane.note_set_back(now_at)
        self.wake()

    def read_again(self) -> None:
        """Has all due times read again (StoreObserver): the table may have deliveries that this daemon was not
        told of.
        """
        self.lanes.start_over()
        self.wall_clock_set_back()

    def attempt_ended(self, lane: Lane, row: Delivery) -> None:
        """Starts the lane's next attempts. Lets another daemon have the operator if that one waits for this attempt to
        end.
        """
        self.slot_freed(row.operator, row.sink)
        if not lane.is_owned or self.lanes.get(row.operator, row.sink) is not lane:
            self._let_go(row.operator)

    def crashed(self, error: Exception) -> None:
        """Has `run` raise the error."""
        self._crash = error
        self._rounds.wake()

    # -- rounds

    async def run(self) -> None:
        """Delivers for ever. Raises what an attempt raised, because that is a bug that must be seen."""
        self._running = True
        try:
            await self._rounds.run(self._once_if_possible)
        finally:
            self._running = False  # when an attempt ends, no row that was read ahead is started any more

    async def _once_if_possible(self) -> float | None:
        try:
            await tell_interrupted(self._store, self._underway)
            wait_s = await self.once()
            self._store_failure = None
        except StoreError as error:
            if str(error) != self._store_failure:  # logged once, and again if the text changes; not in every round
                self._store_failure = str(error)
                log.warning("delivery.waiting_for_store", reason=self._store_failure)
            wait_s = STORE_RETRY_S
        if self._crash is not None:
            raise self._crash
        return wait_s

    async def once(self) -> float | None:
        """Starts an attempt for every due row for which a slot is free, and reads further rows ahead.

        Returns the seconds to sleep; None: until it is woken. Raises StoreError.
        """
        if self._store.set_back_ms:
            await self._store.probe()  # a transaction corrects the stored waits
        now_at = self._clock.wall_ms()
        lanes = [lane for lane in self._agenda.take(now_at) if lane.is_owned]
        try:
            if lanes and not self._store.is_sure:
                await self._store.probe()  # a transaction finds out whether other daemons have expelled this one
                lanes = [lane for lane in lanes if lane.is_owned]
            for lane in lanes:
                self._start(lane)
            await self._timed_gates.let_time_pass([lane for lane in lanes if lane.gated], now_at)
            await self._read([lane for lane in lanes if self._is_ready(lane, now_at)], now_at)
        except StoreError:
            for lane in lanes:
                self._agenda.now(lane)
            raise
        for lane in lanes:
            if lane.is_owned:
                self._plan(lane, now_at)
        next_at = self._agenda.next_at(now_at)
        return None if next_at is None else max(0.0, (next_at - self._clock.wall_ms()) / 1000)

    async def _read(self, ready: Sequence[Lane], now_at: int) -> None:
        """Reads as many due rows as each lane wants, and starts attempts for those for which a slot is free. Raises
        StoreError.
        """
        if not ready:
            return
        claims, terms = [self._claim(lane) for lane in ready], [lane.term for lane in ready]
        for lane in ready:
            lane.begin_reading()
        try:
            found = await self._store.claimable(claims)
        except StoreError:
            for lane in ready:
                lane.note_due(lane.reading_from_at or now_at)
            raise
        for lane, claim, term, rows in zip(ready, claims, terms, found, strict=True):
            if self.lanes.get(lane.operator.name, lane.sink) is not lane:
                continue  # a reload has replaced the lane; the new one reads for itself
            if lane.term != term:
                continue  # another daemon delivers now, or has done so meanwhile
            due = [row for row in rows[: claim.limit - 1] if row.due_at <= now_at]
            lane.ahead += due
            if len(due) < len(rows):
                lane.note_due(rows[len(due)].due_at)
            lane.end_reading()
            self._start(lane)

    def _plan(self, lane: Lane, now_at: int) -> None:
        """Plans when to look at the lane again, if it is not woken before."""
        gate = self._store.gate(lane.operator.name)
        is_waiting = self._store.figures_of(lane.operator.name).pending > 0
        if not is_waiting or (lane.gated and gate.held_at is not None):
            self._agenda.plan(lane, retry.changes_by_time_at(gate, is_waiting=is_waiting) if lane.gated else None)
            return
        ready_at = lane.ready_at(gate)
        self._agenda.plan(lane, lane.look_again_at if ready_at is None else min(ready_at, lane.look_again_at))

    @staticmethod
    def _is_ready(lane: Lane, now_at: int) -> bool:
        if not lane.is_owned:
            return False
        lane.look_again(now_at)
        return lane.next_due_at is not None and lane.next_due_at <= now_at and lane.wanted > 0

    @staticmethod
    def _claim(lane: Lane) -> Claim:
        # Rows in flight or read ahead are still pending in the table, so they are left out. One row more than wanted is
        # read, because its due time tells when to read again.
        taken = [*lane.in_flight, *(row.id for row in lane.ahead)]
        return Claim(lane.operator.name, lane.sink, taken, lane.wanted + 1)

    def _start(self, lane: Lane) -> None:
        """Starts attempts for rows that were read ahead, as far as there are free slots."""
        if not lane.ahead or not lane.slots or not lane.is_owned:
            return
        if not self._store.is_sure:
            self._agenda.now(lane)
            self._rounds.wake()
            return
        gate = self._store.gate(lane.operator.name)
        for _ in range(min(lane.free(gate, self._clock.wall_ms()), len(lane.ahead))):
            self._attempts.start(lane, lane.ahead.popleft(), probe=lane.probes(gate))

    # -- probes by hand

    async def probe(self, operator: str) -> str | None:
        """Attempts the earliest pending delivery to the operator's URL now, whatever keeps it back, and stores the
        result. Returns its public id; None if every pending delivery is under way already, or none is pending. Raises
        StoreError.

        If another daemon owns the operator, that daemon makes the attempt.
        """
        lane = self.lanes.get(operator, HTTP_SINK)
        if lane is None:
            return None
        if not lane.is_owned:
            return await self._store.ask_owner(operator, "probe", lane.policy.timeout_s + ASK_EXTRA_S) or None
        if not self._store.is_sure:
            await self._store.probe()
            if not lane.is_owned:
                return None
        if not lane.slots:
            return None
        if not lane.ahead:
            (found,) = await self._store.claimable([Claim(operator, HTTP_SINK, [*lane.in_flight], 1)])
            lane.ahead += (row for row in found if row.id not in lane.in_flight and not lane.ahead)
        if not lane.ahead:
            return None
        row = lane.ahead.popleft()
        # The attempt goes on if the caller is cancelled
        await asyncio.shield(self._attempts.start(lane, row, probe=True))
        return row.webhook_id

    def probe_asked(self, number: int, operator: str) -> None:
        """Probes an operator because another daemon, which does not own it, was asked to (StoreObserver)."""
        task = asyncio.create_task(self._answer_probe(number, operator))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer_probe(self, number: int, operator: str) -> None:
        with suppress(StoreError):  # the daemon that has asked gets no answer, and tells its caller so
            lane = self.lanes.get(operator, HTTP_SINK)
            found = await self.probe(operator) if lane is not None and lane.is_owned else None
            await self._store.answer_probe(number, found or "")

    # -- attempts under way

    def under_way_since(self, delivery: int) -> int | None:
        """When the attempt of a delivery that is under way began (wall ms); None if no attempt is."""
        return self._underway.since.get(delivery)

    @property
    def in_flight(self) -> int:
        """The number of attempts whose results are not stored yet."""
        return len(self._attempts)

    async def drain(self, within_s: float) -> None:
        """Waits for attempts in flight, for `within_s` at most. Those that have not ended by then are cancelled and
        sent again later.
        """
        for answer in self._answers:
            answer.cancel()
        await self._attempts.drain(within_s)
