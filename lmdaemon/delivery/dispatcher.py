"""Delivers ends: reads due rows, sends them, judges the answers and stores the results. The table is the queue.

A lane is one operator and sink. It has its own slots and schedule and, for a URL, its own gate (hold, Retry-After,
breaker), so that no lane delays another. Of several daemons on one database, the one that owns the operator delivers;
the others have its lanes, too, and start nothing in them. This module must never hold more rows of a lane than three
times its slots (under way, read ahead, not stored yet), and never send inside a transaction.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from lmdaemon import gates, retry
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator, Policy, Settings
from lmdaemon.delivery.attempts import AttemptObserver, Attempts
from lmdaemon.delivery.lanes import Agenda, Lane
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.underway import Underway
from lmdaemon.log import Log, safe_url
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX, Delivery, Gate, in_time
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.pulse import Pulse, Rounds
from lmdaemon.store.contract import Claim, Settled, Settlement, Store, StoreError, StoreObserver

STORE_RETRY_S = 1.0
INTERRUPTED = "the daemon ended before it had the answer; the operator may have received this"
DRAIN_EXTRA_S = 5.0
ASK_EXTRA_S = 5.0  # for a probe by another daemon to begin, and for its answer to arrive

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
        self._attempts = Attempts(store, clock, sender, rng, observer)
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._sinks: set[str] = set()  # all that there ever were
        self._in_flight: dict[tuple[str, str], set[int]] = {}
        self._agenda = Agenda()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: set[asyncio.Task[None]] = set()  # to other daemons
        self._crash: BaseException | None = None
        self._running = False
        self.pulse = Pulse(clock.monotonic, observer)
        self._rounds = Rounds(self.pulse)
        self._observer = observer
        self._underway = underway or Underway(None)
        self._store_failure: str | None = None  # the last one that was logged
        store.observe(self)

    def configure(self, settings: Settings, plugins: Mapping[str, LoadedPlugin]) -> None:
        """Takes over new settings. Lanes that stay keep their attempts; rows of lanes that were removed wait."""
        lanes: dict[tuple[str, str], Lane] = {}
        for operator in settings.operators.values():
            sinks: list[tuple[str, Policy, LoadedPlugin | None]] = []
            if operator.notify:
                sinks.append((HTTP_SINK, operator.policy, None))
            sinks += [
                (PLUGIN_PREFIX + plugin.name, plugin.settings.policy, plugin)
                for plugin in plugins.values()
                if plugin.settings.listens_to(operator.name)
            ]
            for sink, policy, plugin in sinks:
                lanes[operator.name, sink] = self._lane(operator, sink, policy, plugin)
        for key, lane in self._lanes.items():
            if lanes.get(key) is not lane:
                self._agenda.drop(lane)
        self._lanes = lanes
        self._sinks.update(sink for _, sink in lanes)
        self._rounds.wake()

    def _lane(self, operator: Operator, sink: str, policy: Policy, plugin: LoadedPlugin | None) -> Lane:
        """The existing lane with its new settings, or a new one.

        New lanes, and those whose slots, schedule or plug-in have changed, are put on the agenda; others are not.
        """
        key = (operator.name, sink)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(operator, sink, policy, plugin)
            # A lane that was removed while attempts were under way may come back: they still count
            lane.in_flight = self._in_flight.setdefault(key, lane.in_flight)
            self._agenda.now(lane)
        elif lane.policy != policy or lane.plugin is not plugin:
            self._agenda.now(lane)
        lane.operator, lane.policy, lane.plugin = operator, policy, plugin
        lane.own(self._store.owns(operator.name))
        url = safe_url(operator.url) if plugin is None else None
        if lane.url != url or not lane.url_since_at:
            lane.url, lane.url_since_at, lane.is_url_noted = url, self._clock.wall_ms(), False
            self._agenda.now(lane)
        return lane

    def ownership_changed(self, operator: str) -> None:
        """Takes up the operator's lanes, or starts nothing in them any more (StoreObserver)."""
        is_owned = self._store.owns(operator)
        for sink in self._sinks:
            lane = self._lanes.get((operator, sink))
            if lane is None or not lane.own(is_owned):
                continue
            if is_owned:
                self._agenda.now(lane)
            else:
                self._agenda.drop(lane)
        self._rounds.wake()
        self._let_go(operator)

    def _let_go(self, operator: str) -> None:
        """Hands the operator over to the daemon that owns it from now on, once nothing of it is under way here."""
        if not self._store.owns(operator) and not any(self._in_flight.get((operator, sink)) for sink in self._sinks):
            self._store.let_go(operator)

    def wake(self) -> None:
        """Looks at all lanes: in any of them something may be due or a slot may be free."""
        for lane in self._lanes.values():
            self._agenda.now(lane)
        self._rounds.wake()

    def _look_at(self, operator: str, sink: str) -> None:
        lane = self._lanes.get((operator, sink))  # looked up again, because a reload may have replaced it
        if lane is None or not lane.is_owned:
            return
        if self._running:
            self._start(lane)
        self._agenda.now(lane)
        self._rounds.wake()

    def gate_changed(self, operator: str) -> None:
        """Looks at the operator's lane for its URL (StoreObserver)."""
        self._look_at(operator, HTTP_SINK)

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        """Notes when a row of the lane is due (StoreObserver)."""
        lane = self._lanes.get((operator, sink))
        if lane is not None and lane.is_owned:
            lane.note_due(due_at)
            self._agenda.now(lane)
            self._rounds.wake()

    def wall_clock_set_back(self) -> None:
        """Reads all due times again (StoreObserver)."""
        for lane in self._lanes.values():
            lane.look_again_at = 0
        self.wake()

    def read_again(self) -> None:
        """Reads all due times again (StoreObserver): deliveries may have been made without our knowing."""
        self.wall_clock_set_back()

    @property
    def in_flight(self) -> int:
        """The number of attempts whose results are not stored yet."""
        return len(self._tasks)

    @property
    def attempting(self) -> dict[tuple[str, str], int]:
        """The number of attempts under way, by operator and sink."""
        return {pair: lane.attempting for pair, lane in self._lanes.items()}

    @property
    def attempts_max(self) -> int:
        """The number of attempts that may be under way at the same time."""
        return sum(lane.policy.concurrency for lane in self._lanes.values())

    @property
    def overdue_s(self) -> dict[tuple[str, str], float]:
        """How long (s) the earliest due delivery has waited for a slot, by operator and sink.

        0 while hold, Retry-After or breaker stop it.
        """
        now_at = self._clock.wall_ms()
        return {pair: lane.overdue_s(self._store.gate(pair[0]), now_at) for pair, lane in self._lanes.items()}

    async def run(self) -> None:
        """Delivers for ever. Raises what an attempt raised, because that is a bug that must be seen."""
        self._running = True
        try:
            await self._rounds.run(self._once_if_possible)
        finally:
            self._running = False  # when an attempt ends, no row that was read ahead is started any more

    async def _once_if_possible(self) -> float | None:
        try:
            await self._tell_interrupted()
            wait_s = await self.once()
            self._store_failure = None
        except StoreError as error:
            if str(error) != self._store_failure:  # the first failure and each change are logged, not every attempt
                self._store_failure = str(error)
                log.warning("delivery.waiting_for_store", reason=self._store_failure)
            wait_s = STORE_RETRY_S
        if self._crash is not None:
            raise self._crash
        return wait_s

    async def _tell_interrupted(self) -> None:
        """Adds to the histories what an earlier run had begun and has no result for. Raises StoreError."""
        told = 0
        for one in self._underway.lost[:]:
            found = await self._store.delivery(one.webhook_id)
            known = [] if found is None else json.loads(found.history)
            if found is not None and found.state == "pending" and one.began_at not in [it["at"] for it in known]:
                attempt: dict[str, Any] = {"at": one.began_at, "durationMs": None, "status": None, "code": None}
                attempt |= {"error": "interrupted", "detail": INTERRUPTED, "answer": None}
                await self._store.settle(Settlement(found, "pending", 0, found.step, attempt))
                told += 1
            self._underway.lost.remove(one)
            self._underway.forget(one.delivery)
        if told:
            log.warning("delivery.interrupted", count=told, note=INTERRUPTED)

    def _note_pace(self, lane: Lane, settlement: Settlement) -> None:
        """Tells when a lane falls behind with nothing but its slots keeping it back, and when it has caught up."""
        name, now_s = lane.operator.name, self._clock.monotonic()
        pending, took_s = self._store.figures_of(name).pending, (settlement.attempt or {}).get("durationMs", 0) / 1000
        if not lane.pace.note(now_s, took_s, pending, is_settled=settlement.state != "pending"):
            return
        overdue_s = lane.overdue_s(self._store.gate(name), self._clock.wall_ms())
        if lane.pace.turned(overdue_s):
            facts = {"operator": name, "sink": lane.sink, "pending": pending}
            if lane.pace.is_behind:
                said = lane.pace.said(now_s, lane.policy.concurrency)
                log.warning("delivery.behind", **facts, overdue_s=overdue_s, pace=said)
            else:
                log.info("delivery.caught_up", **facts)

    @property
    def behind(self) -> dict[tuple[str, str], str]:
        """Lanes (operator, sink) whose deliveries wait for nothing but a slot for long, with what comes and goes."""
        now_at, now_s = self._clock.wall_ms(), self._clock.monotonic()
        found = {}
        for pair, lane in self._lanes.items():
            if lane.pace.is_behind and (waited_s := lane.overdue_s(self._store.gate(pair[0]), now_at)) > 0:
                said = lane.pace.said(now_s, lane.policy.concurrency)
                found[pair] = f"the first has waited for a slot for {in_time(waited_s)}, {said}"
        return found

    def under_way_since(self, delivery: int) -> int | None:
        """When the attempt of a delivery began that is under way (wall ms); None without one."""
        return self._underway.since.get(delivery)

    async def once(self) -> float | None:
        """Starts an attempt for every due row that has a free slot, and reads further rows ahead.

        Returns the seconds to sleep; None: until it is woken. Raises StoreError.
        """
        if self._store.set_back_ms:
            await self._store.probe()  # a transaction corrects the stored waits
        now_at = self._clock.wall_ms()
        lanes = [lane for lane in self._agenda.take(now_at) if lane.is_owned]
        for lane in lanes:
            self._start(lane)
        try:
            await self._let_time_pass([lane for lane in lanes if lane.gated], now_at)
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

    async def _let_time_pass(self, lanes: Sequence[Lane], now_at: int) -> None:
        """Ends holds whose time is over, closes the breaker of an operator for which nothing waits any more, and
        notes a new URL. Raises StoreError.
        """
        changing = [lane for lane in lanes if not lane.is_url_noted or self._is_changed_by_time(lane, now_at)]
        if changing:
            await asyncio.gather(*(self._let_time_pass_for(lane, now_at) for lane in changing))

    def _is_changed_by_time(self, lane: Lane, now_at: int) -> bool:
        gate = self._store.gate(lane.operator.name)
        if gate.held_until_at is None and gate.failures < retry.BREAKER_OPENS_AT:
            return False  # the usual case, asked at every round
        is_waiting = self._store.figures_of(lane.operator.name).pending > 0
        return retry.settled_by_time(gate, now_at, is_waiting=is_waiting) is not gate

    async def _let_time_pass_for(self, lane: Lane, now_at: int) -> None:
        name, url, since_at = lane.operator.name, lane.url or "", lane.url_since_at

        def alter(gate: Gate) -> Gate:
            is_waiting = self._store.figures_of(name).pending > 0
            return gates.with_url(retry.settled_by_time(gate, now_at, is_waiting=is_waiting), url, since_at)

        before = self._store.gate(name)
        if alter(before) is not before:
            self._log_gate(lane.operator, before, await self._store.set_gate(name, alter), cause="time")
        lane.is_url_noted = lane.url_since_at == since_at

    async def probe(self, operator: str) -> str | None:
        """Attempts the earliest pending delivery to the operator's URL now, whatever keeps it back, and stores the
        result. Returns its public id; None when there is none that is not under way already. Raises StoreError.

        For an operator that another daemon owns, that one does it.
        """
        lane = self._lanes.get((operator, HTTP_SINK))
        if lane is None:
            return None
        if not lane.is_owned:
            return await self._store.ask_owner(operator, "probe", lane.policy.timeout_s + ASK_EXTRA_S) or None
        if not lane.slots:
            return None
        if not lane.ahead:
            (found,) = await self._store.claimable([Claim(operator, HTTP_SINK, [*lane.in_flight], 1)])
            lane.ahead += (row for row in found if row.id not in lane.in_flight and not lane.ahead)
        if not lane.ahead:
            return None
        row = lane.ahead.popleft()
        lane.in_flight.add(row.id)
        task = asyncio.create_task(self._deliver(lane, row, probe=True))
        self._tasks.add(task)
        await asyncio.shield(task)  # whoever asked may leave
        return row.webhook_id

    def probe_asked(self, number: int, operator: str) -> None:
        """Probes an operator for another daemon (StoreObserver)."""
        task = asyncio.create_task(self._answer_probe(number, operator))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer_probe(self, number: int, operator: str) -> None:
        with suppress(StoreError):  # whoever asked is told that nobody answers
            lane = self._lanes.get((operator, HTTP_SINK))
            found = await self.probe(operator) if lane is not None and lane.is_owned else None
            await self._store.answer_probe(number, found or "")

    async def _read(self, ready: Sequence[Lane], now_at: int) -> None:
        """Reads as many due rows as each lane wants, and starts those that have a slot. Raises StoreError."""
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
            if self._lanes.get((lane.operator.name, lane.sink)) is not lane:
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
        # read, for when it is due.
        taken = [*lane.in_flight, *(row.id for row in lane.ahead)]
        return Claim(lane.operator.name, lane.sink, taken, lane.wanted + 1)

    def _start(self, lane: Lane) -> None:
        """Starts attempts for rows that were read ahead, as far as there are free slots."""
        if not lane.ahead or not lane.slots:
            return
        gate = self._store.gate(lane.operator.name)
        for _ in range(min(lane.free(gate, self._clock.wall_ms()), len(lane.ahead))):
            row = lane.ahead.popleft()
            lane.in_flight.add(row.id)
            task = asyncio.create_task(self._deliver(lane, row, probe=lane.probes(gate)))
            self._tasks.add(task)

    async def _deliver(self, lane: Lane, row: Delivery, *, probe: bool) -> None:
        """Delivers one row, from taking a slot to storing the result.

        After an answer that holds or delays the operator, no attempt of the lane begins until it is stored.
        """
        closing = False
        try:
            gate = self._store.gate(lane.operator.name)
            now_at = self._clock.wall_ms()
            if retry.age_ms(row.aged_from_at, row.held_base_ms, gate, now_at) > lane.policy.max_age_s * 1000:
                settlement = self._attempts.too_old(lane, row)
            else:
                self._underway.begin(row, now_at)
                outcome = await self._attempts.make(lane, row)
                closing = lane.gated and (outcome.verdict == "hold" or bool(outcome.retry_after_s))
                lane.closing += closing
                settlement = self._attempts.settlement(lane, row, outcome, now_at, probe=probe)
            settled = await self._record(lane, settlement)
            self._underway.end(row.id)
            self._note_pace(lane, settlement)
            due_at = settled.due_at if settlement.state == "pending" else None
        except StoreError:  # the session for a plug-in could not be read: nothing was tried, no attempt is counted
            self._underway.end(row.id)
            await asyncio.sleep(STORE_RETRY_S)
            due_at = row.due_at
        except Exception as error:  # a bug, which `run` raises
            self._crash, due_at = error, None
            self._rounds.wake()
        finally:
            self._tasks.discard(asyncio.current_task())
            lane.in_flight.discard(row.id)
            lane.closing -= closing
            self._look_at(row.operator, row.sink)
            if not lane.is_owned or self._lanes.get((row.operator, row.sink)) is not lane:
                self._let_go(row.operator)
        # A round between the commit and this line may have left out the row, because it was still in flight
        if due_at is not None:
            self.delivery_due(row.operator, row.sink, due_at)

    async def _record(self, lane: Lane, settlement: Settlement) -> Settled:
        """Stores a result.

        A success frees its slot before that, so that the next attempt need not wait for the disk. A failure keeps its
        slot until it is stored, because it may close the gate.
        """
        if settlement.state != "delivered":
            return await self._settle(lane, settlement)
        lane.delivered += 1
        self._look_at(lane.operator.name, lane.sink)
        try:
            return await self._settle(lane, settlement)
        finally:
            lane.delivered -= 1

    async def _settle(self, lane: Lane, settlement: Settlement) -> Settled:
        """Stores a result. While the store refuses, the row stays in flight, so that it is not sent again."""
        while True:
            try:
                settled = await self._store.settle(settlement)
            except StoreError:
                await asyncio.sleep(STORE_RETRY_S)
            else:
                self._log_gate(lane.operator, settled.before, settled.after, cause="answer")
                if self._observer is not None:
                    self._observer.settled(settlement, settled)
                return settled

    def _log_gate(self, operator: Operator, before: Gate, gate: Gate, *, cause: str) -> None:
        if gate is not before:
            pending, now_at = self._store.figures_of(operator.name).pending, self._clock.wall_ms()
            url = safe_url(operator.url)
            gates.log_change(operator.name, before, gate, now_at, pending=pending, cause=cause, url=url)

    async def drain(self, within_s: float) -> None:
        """Waits for attempts in flight, for `within_s` at most. The others are cancelled and sent again later."""
        for answer in self._answers:
            answer.cancel()
        if not self._tasks:
            return
        log.info("delivery.draining", in_flight=len(self._tasks))
        _, late = await asyncio.wait(set(self._tasks), timeout=within_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("delivery.given_back", count=len(late))
            await asyncio.wait(late)
