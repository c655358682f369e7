"""The rules by which several daemons on one database share one service time. Pure: nothing here reads a clock or a row.

Each daemon has a service clock of its own, and publishes in every transaction how far it has heard: whatever it had
received by then is stored. A session ends only when every daemon has heard past its deadline, so a touch that any of
them has in hand wins, also while that one is stalled. Daemons differ by at most AHEAD_MS; a touch is stamped as far as
any of them may have come, so that no other clock makes its session older than it is. Wall clocks of hosts appear
nowhere; the database's own clock only as a time that has passed, within bounds.

A simulation in the tests holds them.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

LEASE_S = 5.0  # a daemon without a transaction for this long is gone, by the clock of whoever watches it
AHEAD_MS = 1500  # how far a daemon's clock may run ahead of the slowest


class Heard(NamedTuple):
    """What a daemon's row says: its service time when it closed its last batch, and the latest time of the database
    (ms) that it knew of then.
    """

    heard_ms: int
    known_at: int


def followed_ms(own_ms: int, others: Collection[Heard], told_ms: int) -> int:
    """Where a clock goes on from when it learns of the others: it falls behind nobody for good, and never ahead of the
    slowest by more than AHEAD_MS, unless it is there already. `own_ms` is read at this moment: what has passed is in
    the others' clocks, too.
    """
    if not others:
        return own_ms
    furthest = max(own_ms, *(one.heard_ms for one in others))
    return max(own_ms, min(furthest, limit_ms(others, told_ms)))


def limit_ms(others: Collection[Heard], told_ms: int) -> int:
    """The furthest that this daemon's clock may go: AHEAD_MS beyond the slowest of the others, and beyond what it has
    told of itself (`told_ms`), because from that the others work out how far it may have come.
    """
    return min(told_ms, *(one.heard_ms for one in others)) + AHEAD_MS


def stamp_ms(arrival_ms: int, own_ms: int, others: Collection[Heard], database_at: int, kept_ms: int = 0) -> int:
    """The stamp of a touch that arrived at `arrival_ms` of this daemon's clock, which now stands at `own_ms`. It is not
    below any daemon's clock at this moment, nor below `kept_ms`, the furthest clock of those that have gone, for others
    may have followed it. Since its last transaction, another daemon's clock may have advanced by as much as the
    database's clock has.

    A database clock that is set back by less than that time makes it too low by as much, at most AHEAD_MS.
    """
    furthest = max(arrival_ms, kept_ms)
    for one in others:
        passed_ms = database_at - one.known_at if database_at >= one.known_at else AHEAD_MS
        furthest = max(furthest, one.heard_ms + min(passed_ms, AHEAD_MS))
    return max(arrival_ms, min(furthest, own_ms + AHEAD_MS))


def may_end(seen_ms: int, idle_ms: int, members: Collection[Heard], hold_until_ms: int) -> bool:
    """Whether a session may end for inactivity: every daemon has heard past its deadline, and no hold is on."""
    slowest_ms = min(one.heard_ms for one in members)
    return slowest_ms >= hold_until_ms and seen_ms + idle_ms <= slowest_ms


def hold_until_ms(members: Collection[Heard], grace_ms: int) -> int:
    """Until when nothing ends for inactivity after one of these daemons was expelled: its clients need time to arrive
    at another.
    """
    return max(one.heard_ms for one in members) + grace_ms


class Watch:
    """Finds daemons that are gone: their rows have stood still for LEASE_S, by the clock of whoever watches, and he has
    been able to see it all the while.
    """

    def __init__(self, gap_s: float = 1.0) -> None:
        """`gap_s`: a longer time between two looks is no watching. The database was away, or the watcher itself."""
        self._gap_s = gap_s
        self._seen: dict[int, tuple[int, float]] = {}  # batch of a daemon, and since when it is that
        self._looked_at = float("-inf")
        self._longest_s = 0.0

    @property
    def still_s(self) -> float:
        """The longest time (s) for which any of their rows had stood still at the last look."""
        return self._longest_s

    def gone(self, batches: Mapping[int, int], now_s: float) -> set[int]:
        """Takes a look: number of the last transaction by daemon, at a monotonic time in seconds. Returns who is
        gone.
        """
        if now_s - self._looked_at > self._gap_s:
            self._seen.clear()
        self._looked_at = now_s
        self._seen = {
            member: (batch, self._seen[member][1] if self._seen.get(member, (None, 0))[0] == batch else now_s)
            for member, batch in batches.items()
        }
        self._longest_s = max((now_s - since_s for _, since_s in self._seen.values()), default=0.0)
        return {member for member, (_, since_s) in self._seen.items() if now_s - since_s >= LEASE_S}
