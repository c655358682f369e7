"""The figures of the last hour, in memory: touches, ends, deliveries and lag, by second and by minute.

They are differences of the counters in `metrics`, which are read once in each second in which something was committed,
and not at all otherwise. They are kept for all operators together and for the `charted_max` busiest ones, so that they
take less than 1 MiB in any case.
"""

import heapq
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lmdaemon.clock import Clock
from lmdaemon.limits import LIMITS
from lmdaemon.model import Session
from lmdaemon.store.contract import StoreObserver

SLOTS = 60
STEPS_S = (1, 60)


class Counts(NamedTuple):
    """Counts of one operator or of all: touches, ends, attempts that succeeded and that failed.

    `lag_ms` is the longest time from a session's deadline to the commit of its end, among the ends for inactivity.
    """

    touches: int = 0
    ends: int = 0
    delivered: int = 0
    failed: int = 0
    lag_ms: int = 0


Totals = Callable[[], Mapping[str, tuple[int, int, int, int]]]


class Since(StoreObserver):
    """Counts what has happened since the previous call of `take`. `totals()` returns touches, ends, deliveries and
    failures since the start, by operator; `service_ms()` the service time.
    """

    def __init__(self, totals: Totals, service_ms: Callable[[], float]) -> None:
        self._totals = totals
        self._service_ms = service_ms
        self._before: Mapping[str, tuple[int, int, int, int]] = totals()
        self._lag_ms: dict[str, int] = {}

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Notes the lag of ends (StoreObserver)."""
        now_ms = self._service_ms()
        for one in sessions:
            if one.reason == "inactivity":
                lag_ms = int(now_ms - one.deadline_ms)
                if lag_ms > self._lag_ms.get(one.operator, 0):
                    self._lag_ms[one.operator] = lag_ms

    def take(self) -> dict[str, Counts]:
        """What was counted since the previous call, by operator. Operators with nothing new are left out."""
        totals, lag_ms, none = self._totals(), self._lag_ms, (0, 0, 0, 0)
        found = {}
        for operator, counts in totals.items():
            before = self._before.get(operator, none)
            if counts != before or operator in lag_ms:
                (touches, ends, delivered, failed), (touched, ended, sent, missed) = counts, before
                grown = (touches - touched, ends - ended, delivered - sent, failed - missed)
                if min(grown) < 0:  # an operator that has left the configuration and come back begins at 0 again
                    grown = none
                found[operator] = Counts(*grown, lag_ms.get(operator, 0))
        self._before, self._lag_ms = totals, {}
        return found


def together(counts: Mapping[str, Counts]) -> Counts:
    """The counts of all operators together: sums, and the greatest lag."""
    if not counts:
        return Counts()
    touches, ends, delivered, failed, lag_ms = zip(*counts.values(), strict=True)
    return Counts(sum(touches), sum(ends), sum(delivered), sum(failed), max(lag_ms))


class Ring:
    """Counts of the last SLOTS steps. A step is a second or a minute.

    Each slot notes the step for which it was last used; a slot of an older step counts as empty.
    """

    def __init__(self) -> None:
        self._steps = array("q", [-1]) * SLOTS
        self._values = tuple(array("I", [0]) * SLOTS for _ in Counts._fields)

    def add(self, step: int, counts: Counts) -> None:
        """Adds counts to the slot of a step."""
        slot = step % SLOTS
        is_new = self._steps[slot] != step
        self._steps[slot] = step
        for name, values, value in zip(Counts._fields, self._values, counts, strict=True):
            before = 0 if is_new else values[slot]
            values[slot] = min(2**32 - 1, max(before, value) if name == "lag_ms" else before + value)

    def until(self, step: int) -> list[list[int]]:
        """The last SLOTS steps up to this one, the oldest first, as one list for each count."""
        steps = range(step - SLOTS + 1, step + 1)
        return [
            [values[one % SLOTS] if self._steps[one % SLOTS] == one else 0 for one in steps] for values in self._values
        ]


class Recent(StoreObserver):
    """The figures of the last hour: rings for all operators together, and for each operator that is kept. The first
    commit of each second updates them.
    """

    def __init__(
        self,
        totals: Totals,
        service_ms: Callable[[], float],
        clock: Clock,
        charted_max: int = LIMITS.charted_max,
    ) -> None:
        self._since = Since(totals, service_ms)
        self._totals = totals
        self._charted_max = charted_max
        self._clock = clock
        self._second = self._now()
        self._all = self._rings()
        self._kept: dict[str, tuple[Ring, ...]] = {}

    @staticmethod
    def _rings() -> tuple[Ring, ...]:
        return tuple(Ring() for _ in STEPS_S)

    def _now(self) -> int:
        return int(self._clock.monotonic())

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Notes the lag of ends (StoreObserver)."""
        self._since.sessions_ended(sessions)

    def committed(self, operations: int, took_s: float) -> None:
        """Looks at the counters once a second while something is committed (StoreObserver)."""
        if self._now() != self._second:
            self.look()

    def look(self) -> None:
        """Adds what was counted since the last call. It belongs to the second of that call, because the first commit in
        any later second calls this again.
        """
        second, self._second = self._second, self._now()
        counts = self._since.take()
        if counts:
            self._make_room(counts, new_minute=second // 60 != self._second // 60)
            for name, rings in self._kept.items():
                if name in counts:
                    self._add(rings, second, counts[name])
            self._add(self._all, second, together(counts))

    @staticmethod
    def _add(rings: tuple[Ring, ...], second: int, counts: Counts) -> None:
        for ring, step_s in zip(rings, STEPS_S, strict=True):
            ring.add(second // step_s, counts)

    def _make_room(self, counts: Mapping[str, Counts], *, new_minute: bool) -> None:
        """Adds rings for new operators while fewer than `charted_max` are kept. Once a minute, the busiest operators
        take the places of others.
        """
        new = [name for name in counts if name not in self._kept]
        if len(self._kept) + len(new) > self._charted_max:
            if not new_minute:
                new = new[: self._charted_max - len(self._kept)]
            else:
                totals = self._totals()
                most = set(heapq.nlargest(self._charted_max, totals, key=lambda name: sum(totals[name])))
                self._kept = {name: rings for name, rings in self._kept.items() if name in most}
                new = [name for name in new if name in most]
        self._kept |= {name: self._rings() for name in new}

    def series(self) -> tuple[int, dict[str | None, list[list[list[int]]]]]:
        """The monotonic second of the last slot, and the figures by operator (None: of all operators together).

        The figures of an operator are a list for each step length in STEPS_S. It has a list for each field of `Counts`,
        with a number for each of the last SLOTS steps.
        """
        self.look()
        rings: list[tuple[str | None, tuple[Ring, ...]]] = [(None, self._all), *self._kept.items()]
        return self._second, {
            name: [ring.until(self._second // step_s) for ring, step_s in zip(own, STEPS_S, strict=True)]
            for name, own in rings
        }
