"""Lanes: which deliveries of one operator and sink may begin now, and when to look at which lane again.

No I/O and no clock: times are arguments, in wall milliseconds.
"""

import heapq
from collections import deque
from itertools import count

from lmdaemon import retry
from lmdaemon.config.settings import Operator, Policy
from lmdaemon.delivery.pace import Pace
from lmdaemon.log import safe_url
from lmdaemon.model import Delivery, Gate
from lmdaemon.plugins import LoadedPlugin

LOOK_AGAIN_MS = 60_000  # how often a lane's next due time is read from the table, in case that a due row was missed


class Lane:
    """One operator and sink: its policy, its free slots, and the rows that were read ahead.

    `next_due_at` is when the earliest row that was not read yet is due (wall ms; None: there is none).
    """

    def __init__(self, operator: Operator, sink: str, policy: Policy, plugin: LoadedPlugin | None) -> None:
        self.operator = operator
        self.sink = sink
        self.policy = policy
        self.plugin = plugin
        self.is_owned = True  # whether this daemon owns the operator; it delivers only then
        self.term = 0  # how often `is_owned` has changed
        self.next_due_at: int | None = 0  # 0: to be read from the table
        self.reading_from_at: int | None = None  # what `next_due_at` was, while it is read again
        self.look_again_at = 0  # wall ms after which `next_due_at` is read from the table again
        self.in_flight: set[int] = set()  # ids of deliveries, until their results are stored
        self.delivered = 0  # how many in flight have succeeded and are not stored yet: they occupy no slot
        self.ahead: deque[Delivery] = deque()  # due rows that wait for a slot
        self.closing = 0  # answers that hold or delay the operator (410, Retry-After) and are not stored yet
        self.url = safe_url(operator.url) if plugin is None else None  # the operator's URL as it may be shown
        self.url_since_at = 0  # wall ms
        self.is_url_noted = False  # whether the gate has noted `url`
        self.pace = Pace()
        self.failed = 0  # failed attempts in a row
        self._gate = Gate()  # as of its last change
        self._open_since_at = 0  # wall ms: start of the lane, or the last end of a hold, Retry-After or open breaker

    def start_over(self, gate: Gate, now_at: int) -> None:
        """Is called when the lane begins to deliver, and after an outage: what is due already waits for a slot only
        from now on.
        """
        self._gate, self._open_since_at, self.pace = gate, now_at, Pace()

    def note_gate(self, gate: Gate, now_at: int) -> None:
        """Notes a change of the operator's gate: what has waited for the gate waits for a slot only from now on."""
        before, self._gate = self._gate, gate
        opened_at = self.open_since(before, now_at)
        self._open_since_at = now_at if opened_at is None else opened_at
        if self.open_since(gate, now_at) is None:
            self.pace.is_behind = False

    def note_set_back(self, now_at: int) -> None:
        """Notes that the wall clock was set back."""
        self._open_since_at = min(self._open_since_at, now_at)

    def own(self, is_owned: bool) -> bool:
        """Notes whether this daemon owns the operator. Returns whether that has changed. What another daemon has done
        in between is read from the table; attempts under way end by themselves.
        """
        if is_owned == self.is_owned:
            return False
        self.is_owned, self.term = is_owned, self.term + 1
        self.ahead.clear()
        self.next_due_at, self.reading_from_at = 0 if is_owned else None, None
        self.failed = 0
        return True

    def look_again(self, now_at: int) -> None:
        """Once a minute, has `next_due_at` read again, so that a row that was missed does not wait for ever."""
        if now_at >= self.look_again_at:
            self.reading_from_at = self.next_due_at or self.reading_from_at
            self.next_due_at, self.look_again_at = 0, now_at + LOOK_AGAIN_MS

    def begin_reading(self) -> None:
        """Is called before due rows are read. Rows that are committed from now on are noted by `note_due`; the read
        finds all others.
        """
        self.reading_from_at = self.next_due_at or self.reading_from_at
        self.next_due_at = None

    def end_reading(self) -> None:
        """Is called after due rows were read: they are in `ahead`, and `note_due` has the due time of the next one."""
        self.reading_from_at = None

    def note_due(self, due_at: int) -> None:
        """Notes that a row is due at `due_at`, which may be earlier than those known so far."""
        if not self.is_owned:
            return
        self.next_due_at = due_at if self.next_due_at is None else min(self.next_due_at, due_at)

    @property
    def gated(self) -> bool:
        """Whether hold, Retry-After and breaker apply: for a URL they do, for a plug-in they do not."""
        return self.plugin is None

    @property
    def attempting(self) -> int:
        """The number of attempts under way."""
        return len(self.in_flight) - self.delivered

    @property
    def slots(self) -> int:
        """The number of free slots. Successes that are not stored yet occupy none, as long as they are no more than the
        slots. A call of a plug-in that ignores its cancellation occupies one.
        """
        most = self.policy.concurrency
        stray = self.plugin.stray if self.plugin is not None else 0
        return max(0, most + min(most, self.delivered) - len(self.in_flight) - stray)

    def free(self, gate: Gate, now_at: int) -> int:
        """The number of attempts that may begin now."""
        opens_at = retry.opens_at(gate) if self.gated else 0
        return 0 if opens_at is None or opens_at > now_at else self._places(gate)

    def probes(self, gate: Gate) -> bool:
        """Whether the breaker allows only one attempt at a time."""
        return self.gated and gate.failures >= retry.BREAKER_OPENS_AT

    def _places(self, gate: Gate) -> int:
        """The number of attempts that may begin when the gate is open: one probe, or as many as there are free
        slots.
        """
        if self.closing:
            return 0
        if self.probes(gate):
            return 0 if self.in_flight else 1
        return self.slots

    @property
    def wanted(self) -> int:
        """The number of rows to read: for the free slots, and as many ahead as there are slots in all.

        So the next attempt can begin when one ends, without reading the table.
        """
        return max(0, self.slots + self.policy.concurrency - len(self.ahead))

    def open_since(self, gate: Gate, now_at: int) -> int | None:
        """Wall time (ms) since which neither hold nor Retry-After nor breaker has kept the lane back; None while one of
        them does.
        """
        if not self.gated:
            return self._open_since_at
        opens_at = retry.opens_at(gate)
        if opens_at is None or opens_at > now_at or self.probes(gate):
            return None
        return max(self._open_since_at, opens_at)

    def overdue_s(self, gate: Gate, now_at: int) -> float:
        """Seconds for which the earliest row has waited for a slot and for nothing else.

        It may be called on another thread, while the event loop takes that row.
        """
        open_since_at = self.open_since(gate, now_at)
        try:
            due_at = self._due_at or self.reading_from_at
        except IndexError:
            return 0.0
        if not due_at or open_since_at is None:  # 0: `next_due_at` was not read from the table yet
            return 0.0
        return max(0, now_at - max(due_at, open_since_at)) / 1000

    def pace_in_words(self, gate: Gate, now_at: int, now_s: float) -> str:
        """How fast deliveries are added and finished. `now_s` is monotonic time."""
        open_since_at = self.open_since(gate, now_at)
        open_s = 0.0 if open_since_at is None else (now_at - open_since_at) / 1000
        return self.pace.said(now_s, self.policy.concurrency, open_s)

    def ready_at(self, gate: Gate) -> int | None:
        """Wall time (ms) from which an attempt can begin; None if none can begin before something else happens, such as
        a release.
        """
        opens_at = retry.opens_at(gate) if self.gated else 0
        if self._due_at is None or opens_at is None:
            return None
        at = max(self._due_at, opens_at)
        return at if self._places(gate) else None

    @property
    def _due_at(self) -> int | None:
        """When the earliest row is due, whether it was read or not."""
        return self.ahead[0].due_at if self.ahead else self.next_due_at


class Agenda:
    """Which lanes to look at now and which later. So the cost of a round depends on the lanes that have changed, and
    not on all that are configured.
    """

    def __init__(self) -> None:
        self._now: dict[Lane, None] = {}
        self._planned: dict[Lane, int] = {}
        self._heap: list[tuple[int, int, Lane]] = []  # (time, number, lane); entries not in `_planned` are out of date
        self._number = count()  # gives entries with the same time an order

    def now(self, lane: Lane) -> None:
        """Puts the lane on the agenda of the next round."""
        self._now[lane] = None

    def plan(self, lane: Lane, at: int | None) -> None:
        """Plans the lane for a wall time (ms), which replaces an earlier plan; None: without a new one."""
        if at is None:
            self._planned.pop(lane, None)
        elif self._planned.get(lane) != at:
            self._planned[lane] = at
            heapq.heappush(self._heap, (at, next(self._number), lane))

    def drop(self, lane: Lane) -> None:
        """Removes the lane from the agenda."""
        self._now.pop(lane, None)
        self._planned.pop(lane, None)

    def take(self, now_at: int) -> list[Lane]:
        """Removes and returns the lanes whose time has come."""
        while (at := self._planned_at()) is not None and at <= now_at:
            self.now(self._heap[0][2])
            del self._planned[self._heap[0][2]]
        lanes = list(self._now)
        self._now.clear()
        return lanes

    def next_at(self, now_at: int) -> int | None:
        """Wall time (ms) of the next round; None: nothing is planned."""
        return now_at if self._now else self._planned_at()

    def _planned_at(self) -> int | None:
        while self._heap and self._planned.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
