"""What a daemon knows of the others on its database: how far they have heard, and who of them is gone.

It moves this daemon's service clock along with theirs, by the rules of `cluster`. It does no I/O.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from lmdaemon.clock import ServiceClock
from lmdaemon.store.postgres.cluster import Heard, Watch, followed_ms, limit_ms, passed_at

GAP_S = 1.5  # after a longer time between two looks, the watch for rows that stand still begins anew
# What was read is ignored if it is older than the latest by less than this. If by more, the server's clock was set back
LATE_MS = 5000

# The time of the server's clock, in wall ms.
NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
# Every daemon but this one, as JSON: its number, then the fields of Other. And the service time before which nothing
# ends for inactivity.
OTHERS = (
    "(SELECT json_agg(json_build_array(id, heard_ms, coalesce(known_at, 0), batch, next_due_ms)) "
    "FROM lmdaemon.member WHERE id <> %s), (SELECT hold_until_ms FROM lmdaemon.clock)"
)


class Other(NamedTuple):
    """Another daemon's row: its clock, the number of its last transaction, and its operators' next deadline."""

    heard_ms: int
    known_at: int
    batch: int
    next_due_ms: int | None


class Seen(NamedTuple):
    """What was read of the other daemons; `at` is when, by the server's clock (wall ms)."""

    at: int
    others: dict[int, Other]
    hold_until_ms: int


def seen(at: int, others: Any, hold_until_ms: int) -> Seen:
    """Makes a Seen of the columns NOW and OTHERS of a row."""
    found = orjson.loads(others) if isinstance(others, str | bytes) else others
    return Seen(at, {one[0]: Other(*one[1:]) for one in found or ()}, hold_until_ms)


class Company:
    """The other daemons, as of the latest look at them."""

    def __init__(self, clock: ServiceClock, lease_s: float) -> None:
        """Without a transaction for `lease_s`, another daemon counts as gone."""
        self._clock = clock
        self._lease_s = lease_s
        self.others: dict[int, Other] = {}
        self.hold_until_ms = 0
        self.told_ms = 0  # how far this daemon has heard, by its last transaction
        self.known_at = 0  # when the others were last read, by the server's clock (wall ms)
        self._learned_s: float | None = None  # when that was learned (monotonic s); None: at a time that is not known
        self._watch = Watch(self._lease_s, GAP_S)
        self.gone: dict[int, int] = {}  # daemons to be expelled, each with the number of its last transaction

    def begin(self, at_least_ms: int, found: Seen) -> None:
        """Begins anew after this daemon has joined, or joined again, at the service time `at_least_ms` or later."""
        self._clock.limit_ms = None
        self._clock.now_ms()
        self._clock.advance_to(at_least_ms)
        self.known_at, self.told_ms = 0, at_least_ms
        self.learn(found, 0.0, watch=False)
        self._learned_s = None

    def learn(self, found: Seen, now_s: float, *, watch: bool, follow: bool = True) -> bool:
        """Takes over what was read. Returns whether a daemon has come or gone. With `watch` it notes whose row stands
        still, at the monotonic time `now_s`. Without it, a row that stands still proves nothing: nothing is live or
        pending, or this daemon can store nothing itself. Without `follow` this daemon's clock stays where it is, and
        the others' clocks wait for it.
        """
        if self.known_at - LATE_MS < found.at < self.known_at:
            return False
        before = self.others.keys()
        self.known_at, self.others, self.hold_until_ms = found.at, found.others, found.hold_until_ms
        self._learned_s = now_s
        if not watch:
            self._watch = Watch(self._lease_s, GAP_S)
        batches = {member: one.batch for member, one in self.others.items()}
        self.gone = {member: batches[member] for member in self._watch.gone(batches, now_s)}
        # Read before this clock follows the others: the time since its last reading has passed in their clocks, too
        own_ms = self._clock.now_ms()
        heard = self.heard
        self._clock.limit_ms = limit_ms(heard, self.told_ms) if heard else None
        if follow:
            self._clock.advance_to(followed_ms(own_ms, heard, self.told_ms))
        return before != self.others.keys()

    def passed_at(self, now_s: float) -> int:
        """The latest time of the server (wall ms) that has surely passed at the monotonic time `now_s`."""
        return self.known_at if self._learned_s is None else passed_at(self.known_at, now_s - self._learned_s)

    @property
    def still_s(self) -> float:
        """The longest time (s) for which the row of another daemon has stood still."""
        return self._watch.still_s

    @property
    def heard(self) -> Sequence[Heard]:
        """How far each of the others has heard, as their rows say."""
        return [Heard(one.heard_ms, one.known_at) for one in self.others.values()]

    @property
    def slowest_ms(self) -> int | None:
        """Up to which service time the slowest of the others has stored what it received; None without others."""
        return min((one.heard_ms for one in self.others.values()), default=None)

    @property
    def next_due_ms(self) -> int | None:
        """The next deadline of the others' operators."""
        return min((one.next_due_ms for one in self.others.values() if one.next_due_ms is not None), default=None)

    @property
    def waiting(self) -> tuple[int | None, int]:
        """The next deadline of the others' operators, and the number of the last transaction of the daemon that owns
        that operator.
        """
        due = [(one.next_due_ms, one.batch) for one in self.others.values() if one.next_due_ms is not None]
        return min(due, default=(None, 0))
