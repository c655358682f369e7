"""Lanes: the deliveries of one operator and sink, how many may begin, and when to look at which lane again.

No I/O and no clock: times are given as wall milliseconds.
"""

import heapq
from collections import deque
from itertools import count

from lmdaemon import retry
from lmdaemon.config.settings import Operator, Policy
from lmdaemon.model import Delivery, Gate
from lmdaemon.plugins import LoadedPlugin

LOOK_AGAIN_MS = 60_000


class Lane:
    """One operator and sink: its policy, its free slots, the rows read ahead, and when the next of those that were not
    is due (wall ms; None: nothing is).
    """

    def __init__(self, operator: Operator, sink: str, policy: Policy, plugin: LoadedPlugin | None) -> None:
        self.operator = operator
        self.sink = sink
        self.policy = policy
        self.plugin = plugin
        self.next_due_at: int | None = 0  # looked up at the first round
        self.look_again_at = 0  # wall ms from which what is believed above is looked up again
        self.in_flight: set[int] = set()  # ids of deliveries, until their results are stored
        self.delivered = 0  # of them, those that were answered with success: they hold no slot
        self.ahead: deque[Delivery] = deque()  # due, and read before there was a slot
        self.closing = 0  # answers that keep the operator back (Retry-After, 410) and are not stored yet
        self.failed = 0  # attempts in a row

    def look_again(self, now_at: int) -> None:
        """Once a minute whatever is believed is looked up: an overlooked row would wait for ever."""
        if now_at >= self.look_again_at:
            self.next_due_at, self.look_again_at = 0, now_at + LOOK_AGAIN_MS

    def note_due(self, due_at: int) -> None:
        """A row is due then, perhaps before those known so far."""
        self.next_due_at = due_at if self.next_due_at is None else min(self.next_due_at, due_at)

    @property
    def gated(self) -> bool:
        """Hold, Retry-After and breaker are for URLs; a plug-in has its schedule."""
        return self.plugin is None

    @property
    def attempting(self) -> int:
        """Attempts under way."""
        return len(self.in_flight) - self.delivered

    @property
    def slots(self) -> int:
        """Attempts that may be added to those under way. As many successes again may wait to be stored."""
        most = self.policy.concurrency
        stray = self.plugin.stray if self.plugin is not None else 0
        return max(0, most + min(most, self.delivered) - len(self.in_flight) - stray)

    def free(self, gate: Gate, now_at: int) -> int:
        """How many attempts may begin now."""
        opens_at = retry.opens_at(gate) if self.gated else 0
        return 0 if opens_at is None or opens_at > now_at else self._places(gate)

    def probes(self, gate: Gate) -> bool:
        """Whether no more than one attempt at a time is let through."""
        return self.gated and gate.failures >= retry.BREAKER_OPENS_AT

    def _places(self, gate: Gate) -> int:
        """Attempts that may be added once the gate lets something through: one probe, or as many as there are slots."""
        if self.closing:
            return 0
        if self.probes(gate):
            return 0 if self.in_flight else 1
        return self.slots

    @property
    def wanted(self) -> int:
        """How many rows to read: for the free slots, and as many ahead as there are slots in all, so that an attempt's
        end is followed by the next without a look into the table.
        """
        return max(0, self.slots + self.policy.concurrency - len(self.ahead))

    def overdue_s(self, gate: Gate, now_at: int) -> float:
        """Seconds for which its earliest row could have been sent but for the slots. Also called beside the event loop,
        which may take that row meanwhile.
        """
        opens_at = retry.opens_at(gate) if self.gated else 0
        try:
            due_at = self._due_at
        except IndexError:
            return 0.0
        if not due_at or opens_at is None:  # 0: about to be looked up
            return 0.0
        return max(0, now_at - max(due_at, opens_at)) / 1000

    def ready_at(self, gate: Gate) -> int | None:
        """Wall time from which attempts can begin; None while only a wake-up can change that."""
        opens_at = retry.opens_at(gate) if self.gated else 0
        if self._due_at is None or opens_at is None:
            return None
        at = max(self._due_at, opens_at)
        return at if self._places(gate) else None

    @property
    def _due_at(self) -> int | None:
        """When its earliest row is due, read or not."""
        return self.ahead[0].due_at if self.ahead else self.next_due_at


class Agenda:
    """The lanes to look at now, and those to look at later: a round costs what has changed, not what is configured."""

    def __init__(self) -> None:
        self._now: dict[Lane, None] = {}
        self._planned: dict[Lane, int] = {}
        self._heap: list[tuple[int, int, Lane]] = []  # also of times that were planned once and are no longer
        self._number = count()  # two lanes of one time have an order

    def now(self, lane: Lane) -> None:
        self._now[lane] = None

    def plan(self, lane: Lane, at: int | None) -> None:
        """At that wall time (ms), or not before somebody says so. Takes the place of what was planned."""
        if at is None:
            self._planned.pop(lane, None)
        elif self._planned.get(lane) != at:
            self._planned[lane] = at
            heapq.heappush(self._heap, (at, next(self._number), lane))

    def drop(self, lane: Lane) -> None:
        """It is not looked at any more."""
        self._now.pop(lane, None)
        self._planned.pop(lane, None)

    def take(self, now_at: int) -> list[Lane]:
        """Those whose time has come; they are off the agenda."""
        while (at := self._planned_at()) is not None and at <= now_at:
            self.now(self._heap[0][2])
            del self._planned[self._heap[0][2]]
        lanes = list(self._now)
        self._now.clear()
        return lanes

    def next_at(self, now_at: int) -> int | None:
        return now_at if self._now else self._planned_at()

    def _planned_at(self) -> int | None:
        while self._heap and self._planned.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
