"""Judges the daemon's health for `/health` and the watchdog: store, loops, listeners, deliveries, operators, reload,
and the other daemons on its database.

It reads figures kept in memory and single rows found by an index; it must never scan a table. It also writes one small
row, at most once a second, because only a write shows that the disk is full.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Generic, TypeVar

from lmdaemon import gates, retry, shapes, tls
from lmdaemon.agreement import SLOW_MS, disagreement, slowest
from lmdaemon.alarms import ExpiryAlarm, TouchAlarm
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Settings
from lmdaemon.disk import DiskWatch
from lmdaemon.limits import LIMITS
from lmdaemon.model import Gate, Member, in_bytes, in_time, rfc3339
from lmdaemon.pulse import LATE_S, Pulse
from lmdaemon.store.contract import Figures, Oldest, Store, StoreError
from lmdaemon.version import __version__

ASK_EVERY_S = 1.0
OLD_BACKLOG_S = 900.0  # a delivery that is pending for longer is a warning

TOLD_MAX = 10  # most operators that the text of one check describes

_ORDER = ("pass", "warn", "fail")
_Answer = TypeVar("_Answer")
Check = dict[str, Any]


class Question(Generic[_Answer]):
    """A question to the store that is asked once at a time and at most once in ASK_EVERY_S, however many callers wait.

    So questions do not pile up while a disk hangs. No answer within `within_s` is an error for every caller.
    """

    def __init__(
        self,
        what: str,
        ask: Callable[[], Coroutine[Any, Any, _Answer]],
        monotonic: Callable[[], float],
        within_s: float = LIMITS.answer_within_s,
    ) -> None:
        self._what = what
        self._within_s = within_s
        self._ask = ask
        self._monotonic = monotonic
        self._task: asyncio.Task[_Answer] | None = None
        self._asked = float("-inf")
        self._asked_loop = 0.0

    async def answer(self) -> _Answer:
        """The latest answer. Raises StoreError."""
        loop, now = asyncio.get_running_loop(), self._monotonic()
        task = self._task
        if task is None or (task.done() and now - self._asked >= ASK_EVERY_S):
            self._asked, self._asked_loop = now, loop.time()
            task = self._task = asyncio.create_task(self._ask())
            # Marks an exception as seen, because perhaps no caller is left to look at it. The next caller asks again
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        left_s = max(0.0, self._asked_loop + self._within_s - loop.time())
        done, _ = await asyncio.wait({task}, timeout=left_s)
        if not done:
            raise StoreError(f"{self._what} took longer than {self._within_s:g} s")
        return task.result()


class Health:
    """The state of one daemon.

    `settings` returns those in force, `reload_error` what was wrong with the last reload, or None. `deaf` has the
    listeners that cannot accept connections, each with the reason. `behind` returns the lanes that do not keep up, in
    words. The store counts as failing if it does not answer within `answer_within_s`.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        pulses: dict[str, Pulse],
        settings: Callable[[], Settings],
        reload_error: Callable[[], str | None],
        mass_expiry: ExpiryAlarm,
        touches: TouchAlarm,
        deaf: Mapping[str, str],
        disk: DiskWatch,
        behind: Callable[[], Mapping[tuple[str, str], str]] = dict,
        *,
        answer_within_s: float = LIMITS.answer_within_s,
    ) -> None:
        self._store = store
        self._clock = clock
        self._pulses = pulses
        self._settings = settings
        self._reload_error = reload_error
        self._mass_expiry = mass_expiry
        self._touches = touches
        self._deaf = deaf
        self._disk = disk
        self._behind = behind
        self._probe = Question("a write", store.probe, clock.monotonic, answer_within_s)
        self._oldest = Question("a reading", self._oldest_pending, clock.monotonic, answer_within_s)
        self._old = Question("a reading", self._old_backlog, clock.monotonic, answer_within_s)
        self._daemons = Question("a reading", store.daemons, clock.monotonic, answer_within_s)
        self.members: Sequence[Member] = ()  # the daemons on the database, as they were last read

    @property
    def stuck(self) -> list[str]:
        """The loops that do not run when they should, and "writer" for a write that hangs.

        The watchdog is fed while this list is empty. A disk that refuses writes is not in the list, because a restart
        would not help.
        """
        loops = [name for name, pulse in self._pulses.items() if pulse.stuck]
        return loops if self.writing_s <= LATE_S else [*loops, "writer"]

    async def status(self) -> str:
        """The worst status of all checks: pass, warn or fail."""
        return (await self.report())["status"]

    async def report(self) -> shapes.Health:
        """Every check with its figures, as `application/health+json` (docs/operating.md, "Health checks")."""
        checks = {
            "store": await self._check_store(),
            "daemons": await self._check_daemons(),
            **{name: self._check_pulse(pulse) for name, pulse in self._pulses.items()},
            "disk": self._check_disk(),
            "listeners": self._check_listeners(),
            "expiry": self._check_expiry(),
            "deliveries": await self._check_deliveries(),
            "operators": self._check_operators(),
            "config": self._check_config(),
            "certificates": self._check_certificates(),
        }
        status = max((check["status"] for check in checks.values()), key=_ORDER.index)
        time = rfc3339(self._clock.wall_ms())
        timed: Any = {name: [check | {"time": time}] for name, check in checks.items()}
        return {
            "status": status,
            "version": __version__,
            "description": "lmdaemon",
            "checks": timed,
        }

    @property
    def writing_s(self) -> float:
        """Seconds since the current transaction began; 0 while there is none."""
        since = self._store.writing_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def late_s(self) -> dict[str, float]:
        """For each loop, the seconds since it should have run."""
        return {name: pulse.late_s for name, pulse in self._pulses.items()}

    async def look_for_daemons(self) -> Sequence[Member]:
        """Reads which daemons are on the database, and keeps them in `members`. The answer may be a second old. Raises
        StoreError.
        """
        self.members = await self._daemons.answer()
        return self.members

    async def oldest_pending_s(self) -> dict[str, float]:
        """The age of the oldest pending delivery, for each operator that has one. It may be a second old.

        Raises StoreError.
        """
        now_at = self._clock.wall_ms()
        return {name: max(0, now_at - at) / 1000 for name, at in (await self._oldest.answer()).items()}

    async def _oldest_pending(self) -> dict[str, int]:
        waiting = [name for name, figures in self._store.figures.items() if figures.pending]
        found = await self._store.oldest_pending(waiting) if waiting else {}
        return {name: at for name, at in found.items() if at is not None}

    async def _old_backlog(self) -> dict[str, Oldest]:
        """The oldest pending deliveries of the operators with an old backlog, TOLD_MAX at most, the oldest first."""
        before_at = self._clock.wall_ms() - OLD_BACKLOG_S * 1000
        old = sorted((at, name) for name, at in (await self._oldest.answer()).items() if at < before_at)
        return await self._store.oldest_waiting([name for _, name in old[:TOLD_MAX]])

    async def _check_store(self) -> Check:
        failure = None
        try:
            await self._probe.answer()
        except StoreError as error:
            failure = str(error)
        failure = self._store.failure or failure
        check: Check = {
            "status": "fail" if failure else "pass",
            "sessions": self._store.live,
            "waiting": self._store.waiting,
            "walBytes": self._store.wal_bytes,
        }
        if failure:
            began = self._store.failing_since
            since = "" if began is None else f", since {self._time(time.monotonic() - began)}"
            return check | {"output": failure + since}
        if self._store.strained:
            return check | {"status": "warn", "output": self._store.strained}
        return check

    async def _check_daemons(self) -> Check:
        """Warns of daemons on the same database whose settings differ, and of a clock that keeps the others waiting."""
        try:
            members = await self.look_for_daemons()
        except StoreError as error:
            return {"status": "warn", "output": str(error)}
        check: Check = {"status": "pass", "daemons": len(members)}
        last = slowest(members)
        said = [found] if (found := disagreement(members)) else []
        if last is not None:
            check |= {"slowest": last.name, "slowestLagMs": last.lag_ms}
            if last.lag_ms >= SLOW_MS and self._store.live:
                said.append(f"the service clock of {last.name} is {last.lag_ms} ms behind; all ends wait for it")
        return check | {"status": "warn", "output": "; ".join(said)} if said else check

    def _time(self, ago_s: float) -> str:
        """The wall time so many seconds ago, to the second: `2026-01-31T03:00:00Z`."""
        at = self._clock.wall_ms() - int(ago_s * 1000)
        return f"{rfc3339(at)[:19]}Z"

    def _check_disk(self) -> Check:
        """Warns of a disk that will soon be full; there are no figures if the disk is another machine's."""
        outlook = self._disk.outlook()
        if outlook is None:
            return {"status": "pass"}
        check: Check = {
            "status": "warn" if outlook.low else "pass",
            "freeBytes": outlook.room.free,
            "sizeBytes": outlook.room.size,
            "growthBytesPerDay": None if outlook.growth is None else round(outlook.growth),
            "daysLeft": None if outlook.days_left is None else round(outlook.days_left, 1),
        }
        if outlook.low:
            left = "" if outlook.days_left is None else f", used up in {outlook.days_left:.1f} days"
            check["output"] = f"{in_bytes(outlook.room.free)} of {in_bytes(outlook.room.size)} are free{left}"
        return check

    def _check_listeners(self) -> Check:
        if not self._deaf:
            return {"status": "pass"}
        output = "; ".join(f"{listener} cannot accept connections: {reason}" for listener, reason in self._deaf.items())
        return {"status": "fail", "output": output}

    def _check_expiry(self) -> Check:
        """Warns of sessions that ended at once and of touches that stopped; each operator is named, TOLD_MAX in
        words.
        """
        alarm, mass = self._mass_expiry, self._mass_expiry.of_operators()
        # The alarm looks again within a second after the last session of an operator has ended
        silent = {name: one for name, one in self._touches.silent.items() if self._store.figures_of(name).live}
        check: Check = {
            "status": "warn" if alarm.active or mass or silent else "pass",
            "massExpired": sorted(mass),
            "touchesStopped": sorted(silent),
        }
        said = [f"many sessions ended at once, at {self._time(alarm.mass.ago_s)}"] if alarm.active else []
        now_ms = self._store.service_clock.now_ms()
        for name, one in [*silent.items()][:TOLD_MAX]:
            for_s = (now_ms - one.touched_ms) // 1000
            waits_ms = self._store.waits_until_ms(name)
            waits = "" if waits_ms is None else f", their ends wait for {(waits_ms - now_ms) // 1000} s at most"
            live = self._store.figures_of(name).live
            said.append(f"{name}: {live} sessions live, none touched for {for_s} s, since {self._time(for_s)}{waits}")
        for name, (ended, of, ago_s) in [*mass.items()][:TOLD_MAX]:
            said.append(f"{name}: {ended} of {of} sessions ended at once, at {self._time(ago_s)}")
        if said:
            check["output"] = "; ".join(said)
        return check | {"ended": alarm.mass.ended, "of": alarm.mass.of} if alarm.active else check

    @staticmethod
    def _check_pulse(pulse: Pulse) -> Check:
        late_s = round(pulse.late_s, 3)
        return {"status": "fail" if pulse.stuck else "pass", "observedValue": late_s, "observedUnit": "s late"}

    async def _check_deliveries(self) -> Check:
        figures = self._store.figures
        pending = sum(one.pending for one in figures.values())
        dead = sum(one.dead for one in figures.values())
        try:
            oldest_s = max((await self.oldest_pending_s()).values(), default=0.0)
            old = await self._old.answer() if oldest_s > OLD_BACKLOG_S else {}
        except StoreError as error:
            return {"status": "fail", "output": str(error), "pending": pending, "dead": dead}
        behind = [f"{name} ({sink}) falls behind: {said}" for (name, sink), said in self._behind().items()]
        said = [*behind[:TOLD_MAX], *(self._told_of_oldest(name, one) for name, one in old.items())]
        warn = dead > 0 or oldest_s > OLD_BACKLOG_S or behind
        told: Check = {"output": "; ".join(said)} if said else {}
        return told | {
            "status": "warn" if warn else "pass",
            "pending": pending,
            "dead": dead,
            "oldestPendingSeconds": oldest_s,
        }

    def _told_of_oldest(self, operator: str, oldest: Oldest) -> str:
        """A sentence about an operator's oldest pending delivery: when it is tried again, and what happened last."""
        now_at, pending = self._clock.wall_ms(), self._store.figures_of(operator).pending
        age = in_time(max(0, now_at - oldest.created_at) / 1000)
        at = retry.tried_at(oldest.sink, oldest.due_at, self._store.gate(operator))
        if not self._settings().delivers(operator, oldest.sink):
            again = "not tried, because the file does not ask for it"
        elif at is None:
            again = "not tried while the operator is held"
        else:
            again = f"tried next at {rfc3339(at)[:19]}Z" if at > now_at else "due now"
        last = f"last error {oldest.last_error}" if oldest.last_error else "not tried yet"
        return f"{operator} ({oldest.sink}): the oldest of {pending} pending is {age} old, {again}, {last}"

    @property
    def not_configured(self) -> Mapping[str, Figures]:
        """The operators that are not in the file, though sessions of them are live or deliveries pending."""
        known, figures = self._settings().operators, self._store.figures
        return {name: one for name, one in figures.items() if name not in known and (one.live or one.pending)}

    def _check_operators(self) -> Check:
        now_at = self._clock.wall_ms()
        found = {name: self._store.gate(name) for name in self._settings().operators}
        held = [name for name, gate in found.items() if gate.held_at is not None]
        broken = [name for name, gate in found.items() if retry.breaker(gate, now_at) != "closed"]
        gone = self.not_configured
        check: Check = {"status": "warn" if held or broken or gone else "pass", "held": held, "broken": broken}
        if gone:
            shown = [{"operator": name, "live": one.live, "pending": one.pending} for name, one in gone.items()]
            check["notConfigured"] = shown
        said = [gates.not_configured(name, one.live, one.pending) for name, one in islice(gone.items(), TOLD_MAX)]
        said += self._told_of(found, now_at)
        return check | {"output": "; ".join(said)} if said else check

    def _told_of(self, operators: Mapping[str, Gate], now_at: int) -> Iterator[str]:
        """A sentence for each operator that is kept back, TOLD_MAX at most: since when, why, and what will happen."""
        kept_back = ((name, gate, gates.because(gate, now_at)) for name, gate in operators.items())
        for name, gate, because in islice((one for one in kept_back if one[2] is not None), TOLD_MAX):
            outlook = gates.outlook(gate, now_at, pending=self._store.figures_of(name).pending)
            yield f"{name}: {because}; {outlook}"

    def _check_config(self) -> Check:
        error = self._reload_error()
        return {"status": "warn", "output": error} if error else {"status": "pass"}

    def _check_certificates(self) -> Check:
        """Warns of certificates that are not valid now or expire within three weeks."""
        ending = [*tls.endings(self._settings().pems, datetime.fromtimestamp(self._clock.wall_ms() / 1000, UTC))]
        return {"status": "warn", "output": "; ".join(ending)} if ending else {"status": "pass"}
