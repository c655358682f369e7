"""Ends the sessions that are due, and sleeps until the next deadline.

It must never end a session for inactivity whose touch may be under way: not before the restart grace is over, not right
after a stall, and not before requests that have already arrived are queued.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from lmdaemon.alarms import ExpiryAlarm, TouchAlarm
from lmdaemon.clock import STALL_S, TICK_S, Clock
from lmdaemon.log import Log
from lmdaemon.model import Session
from lmdaemon.pulse import Pulse, Rounds, WakeObserver
from lmdaemon.store.contract import SWEEP_ROWS, Store, StoreError, StoreObserver

# After a stall nothing ends for so long, so that touches that could not arrive meanwhile are heard first
QUIET_AFTER_STALL_S = 1.0
# Turns of the event loop that a touch takes from a client that waits to connect to the queue: accept, connect, read,
# parse, handle, queue
LOOP_TURNS = 8
# How often the service clock is stored. A crash loses the time since then, and sessions end that much later
PERSIST_S = 10.0
RETRY_S = 1.0  # pause while the store refuses
log = Log("sweeper")


class Sweeper(StoreObserver):
    """Ends sessions. `once` does all that is due now and returns how long to sleep; `run` is `once` for ever."""

    def __init__(
        self, store: Store, clock: Clock, restart_grace_s: float, observer: WakeObserver | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._service = store.service_clock
        self._grace_s = 0.0 if store.joined_others else restart_grace_s
        self._started = clock.monotonic()
        self._stalled_s = self._service.stalled_s
        self._stalled_before_s = self._service.stalled_s
        self._quiet_until = 0.0
        self._persisted = clock.monotonic()
        self._ticking = False
        self.lost_s = 0.0  # sum of the stalls that were logged
        self.pulse = Pulse(clock.monotonic, observer)
        self._rounds = Rounds(self.pulse)
        self.alarm = ExpiryAlarm(clock.monotonic)
        self.touch_alarm = TouchAlarm()
        self._idle_ms: Mapping[str, int] = {}
        self._foreign: set[str] = set()  # configured operators that another daemon owns
        self._looked = clock.monotonic()
        self.waiting: dict[str, int] = {}  # operators whose ends wait, with the service time at which that was noticed
        store.observe(self)

    def configure(self, idle_s: Mapping[str, float]) -> None:
        """Takes over the idle times (s) of all operators, from which follows when their touches have stopped."""
        self._idle_ms = {name: round(seconds * 1000) for name, seconds in idle_s.items()}
        self._foreign = {name for name in idle_s if not self._store.owns(name)}

    def ownership_changed(self, operator: str) -> None:
        """Begins or ceases to log the operator's touches and ends, which the daemon that owns it does
        (StoreObserver).
        """
        if operator not in self._idle_ms or self._store.owns(operator):
            self._foreign.discard(operator)
            self.wake()
        else:
            self._foreign.add(operator)
            self.waiting.pop(operator, None)

    def deadline_nearer(self) -> None:
        """Wakes the sweeper: a deadline may be earlier than the one that it waits for (StoreObserver)."""
        self.wake()

    def read_again(self) -> None:
        """Wakes the sweeper: the next deadline may have changed (StoreObserver)."""
        self.wake()

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Counts the sessions that ended by inactivity or maximum lifetime, for the alarm (StoreObserver)."""
        ended = Counter(one.operator for one in sessions if one.reason in ("inactivity", "max_lifetime"))
        if ended:
            self.alarm.note(ended, lambda name: self._store.figures_of(name).live, self._own_live)

    @property
    def _own_live(self) -> int:
        """The number of active sessions that this daemon ends when they are idle."""
        return self._store.live - sum(self._store.figures_of(name).live for name in self._foreign)

    def wake(self) -> None:
        """Has the next round begin at once, because a deadline may be earlier than the one that is waited for."""
        self._rounds.wake()

    @property
    def hold_s(self) -> float:
        """Seconds for which nothing ends for inactivity: the rest of the restart grace, the pause after a stall, or the
        grace after another daemon on the database was lost.

        The graces count running time only, so a stall does not use them up.
        """
        now = self._clock.monotonic()
        ran_s = now - self._started - (self._service.stalled_s - self._stalled_before_s)
        hold_ms = self._store.hold_until_ms
        held_s = (hold_ms - self._service.last_ms) / 1000 if hold_ms else 0.0
        return max(0.0, self._grace_s - ran_s, self._quiet_until - now, held_s)

    def expires_at(self, session: Session) -> int | None:
        """Wall time (ms) at which the session will end if it is not touched again; None once it has ended."""
        if session.reason is not None:
            return None
        left_ms = max(self._store.ends_at_ms(session) - self._service.now_ms(), round(self.hold_s * 1000), 0)
        idle_at = self._clock.wall_ms() + left_ms
        return idle_at if session.lifetime_at is None else min(idle_at, session.lifetime_at)

    async def run(self) -> None:
        """Sweeps for ever."""
        await self._rounds.run(self._once_if_possible)

    async def _once_if_possible(self) -> float | None:
        try:
            return await self.once()
        except StoreError:  # the writer counts or logs it; in an outage it also stops the service clock
            return RETRY_S

    async def once(self) -> float | None:
        """Ends everything that is due now, in batches.

        Returns the seconds to sleep; None: until it is woken. Raises StoreError.
        """
        crowd = False
        while True:
            self._tick()
            self.pulse.working()
            self._look_for_silence()
            crowd = self._due_in_s() == 0 and await self._end_some(crowd=crowd)
            if not crowd:
                break
        if self._store.live and self._clock.monotonic() - self._persisted >= self._persist_after_s:
            self._persisted = self._clock.monotonic()
            await self._store.probe()
        return self._next_wait_s()

    async def _end_some(self, *, crowd: bool) -> bool:
        """Ends one batch of due sessions, after requests that have already arrived were queued. Returns whether more
        may be due.
        """
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        swept = await self._store.end_due(idle=self.hold_s == 0, crowd=crowd)
        self._persisted = self._clock.monotonic()
        return swept.looked_at >= SWEEP_ROWS

    def _look_for_silence(self) -> None:
        """Looks for operators whose touches have stopped, at most once a second: with 1,000 operators it takes a third
        of a millisecond.
        """
        now = self._clock.monotonic()
        if now - self._looked >= TICK_S:
            self._looked = now
            now_ms = self._service.now_ms()
            own_idle_ms = self._idle_ms
            if self._foreign:
                own_idle_ms = {name: idle_ms for name, idle_ms in own_idle_ms.items() if name not in self._foreign}
            self.touch_alarm.look(now_ms, self._store.touched_ms, own_idle_ms, self._store.figures)
            self._look_who_waits(now_ms)

    def _look_who_waits(self, now_ms: int) -> None:
        """Logs for which operators the ends for inactivity have begun to wait, and for which they go on."""
        for name in (self._store.pausing - self._foreign) | self.waiting.keys():
            until_ms, live = self._store.waits_until_ms(name), self._store.figures_of(name).live
            if until_ms is not None and name not in self.waiting:
                self.waiting[name] = now_ms
                log.warning("operator.ends_wait", operator=name, live=live, at_most_s=round((until_ms - now_ms) / 1000))
            elif until_ms is None and name in self.waiting:
                waited_s = round((now_ms - self.waiting.pop(name)) / 1000)
                log.info("operator.ends_go_on", operator=name, live=live, waited_s=waited_s)

    @property
    def _persist_after_s(self) -> float:
        """After how many seconds the service clock is stored again: as many as the run had lasted when it was last
        stored, PERSIST_S at most.

        So a crash loses at most half of the run, and sessions grow older even in a daemon that crashes again and again.
        """
        return min(PERSIST_S, max(TICK_S, self._persisted - self._started))

    def _tick(self) -> None:
        """Reads the service clock. After a stall, nothing ends for QUIET_AFTER_STALL_S."""
        self._service.now_ms()
        gap_s = self._service.stalled_s - self._stalled_s
        self._stalled_s = self._service.stalled_s
        if self._ticking and gap_s > STALL_S:
            self._quiet_until = self._clock.monotonic() + QUIET_AFTER_STALL_S
            self.lost_s += gap_s
            log.warning("clock.stalled", stall_s=gap_s, live=self._store.live)
        self._ticking = self._must_tick()

    def _must_tick(self) -> bool:
        return self._store.live > 0 or self.hold_s > 0 or bool(self.touch_alarm.silent or self.waiting)

    def _due_in_s(self) -> float | None:
        """Seconds until something is due; None when nothing is."""
        waits = []
        if self._store.next_due_ms is not None:
            left_ms = self._store.next_due_ms - self._service.now_ms()
            waits.append(max(left_ms / 1000, self.hold_s, 0.0))
        if self._store.next_lifetime_at is not None:
            waits.append(max(self._store.next_lifetime_at - self._clock.wall_ms(), 0) / 1000)
        return min(waits, default=None)

    def _next_wait_s(self) -> float | None:
        due_in_s = self._due_in_s()
        if not self._must_tick():
            return due_in_s
        return TICK_S if due_in_s is None else min(due_in_s, TICK_S)
