"""The rules by which several daemons on one database share one service time. Pure: nothing here reads a clock or a row.

Each daemon has a service clock of its own, and publishes in every transaction how far it has heard: everything that it
had received by that service time is stored. A session ends only when every daemon has heard past its deadline. So a
touch that any daemon has received in time keeps the session alive, also while that daemon is stalled.

The service clocks differ by at most AHEAD_MS. A touch is stamped with the furthest time that any of them may have
reached, so that no other clock makes its session seem idle for longer than it is. The hosts' wall clocks are not used.
The database's own clock is used only to measure how much time has passed, within bounds.

A simulation in the tests checks these rules.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

AHEAD_MS = 1500  # how far a daemon's clock may run ahead of the slowest
SURELY_MS = 900  # how much of a second surely passes by the database's clock, which may be slowed down to be set right


class Heard(NamedTuple):
    """What a daemon's row says: its service time when its last batch began, and the latest time of the database (wall
    ms) that had surely passed by then.
    """

    heard_ms: int
    known_at: int


def followed_ms(own_ms: int, others: Collection[Heard], told_ms: int) -> int:
    """The service time from which a daemon's clock goes on when it learns of the others: that of the furthest clock,
    but at most AHEAD_MS ahead of the slowest, and never less than its own. `own_ms` must be read at this moment,
    because the time until now has passed in the others' clocks, too.
    """
    if not others:
        return own_ms
    furthest = max(own_ms, *(one.heard_ms for one in others))
    return max(own_ms, min(furthest, limit_ms(others, told_ms)))


def limit_ms(others: Collection[Heard], told_ms: int) -> int:
    """The furthest that this daemon's clock may go: AHEAD_MS beyond the slowest of the others and of what this daemon
    has told of itself (`told_ms`). The others work out from `told_ms` how far this daemon may have come.
    """
    return min(told_ms, *(one.heard_ms for one in others)) + AHEAD_MS


def stamp_ms(arrival_ms: int, own_ms: int, others: Collection[Heard], database_at: int, kept_ms: int = 0) -> int:
    """The stamp of a touch that arrived at `arrival_ms` of this daemon's clock, which now shows `own_ms`. It is not
    below any daemon's clock at this moment: since its last transaction, another daemon's clock may have advanced by as
    much as the database's clock has. Nor is it below `kept_ms`, the furthest clock of the daemons that are gone,
    because others may have followed that one.

    If the database's clock was set back since that transaction, but by less than the time that has passed, the stamp is
    too low by as much, AHEAD_MS at most.
    """
    furthest = max(arrival_ms, kept_ms)
    for one in others:
        passed_ms = database_at - one.known_at if database_at >= one.known_at else AHEAD_MS
        furthest = max(furthest, one.heard_ms + min(passed_ms, AHEAD_MS))
    return max(arrival_ms, min(furthest, own_ms + AHEAD_MS))


def passed_at(known_at: int, since_s: float) -> int:
    """The latest time of the database (wall ms) that has surely passed `since_s` seconds, by this daemon's clock, after
    it has learned of the time `known_at`.
    """
    return known_at + int(max(0.0, since_s) * SURELY_MS)


def may_end(seen_ms: int, idle_ms: int, members: Collection[Heard], hold_until_ms: int) -> bool:
    """Whether a session may end for inactivity: every daemon has heard past its deadline, and past `hold_until_ms`."""
    slowest_ms = min(one.heard_ms for one in members)
    return slowest_ms >= hold_until_ms and seen_ms + idle_ms <= slowest_ms


def hold_until_ms(members: Collection[Heard], grace_ms: int) -> int:
    """Until when (service time) nothing ends for inactivity after one of these daemons was expelled: its clients need
    time to reach another daemon.
    """
    return max(one.heard_ms for one in members) + grace_ms


class Watch:
    """Finds daemons that are gone: their rows have not changed for a lease by the clock of the daemon that watches, and
    it has looked at them often enough all that time.
    """

    def __init__(self, lease_s: float, gap_s: float = 1.0) -> None:
        """`lease_s` is the lease in seconds. If more than `gap_s` seconds lie between two looks, the watch begins anew:
        the database could not be reached, or the watching daemon was stopped itself.
        """
        self._lease_s = lease_s
        self._gap_s = gap_s
        # By daemon: the number of its last transaction, and since when that is the last one
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked_at = float("-inf")
        self._longest_s = 0.0

    @property
    def still_s(self) -> float:
        """The longest time (s) for which any row had not changed at the last look."""
        return self._longest_s

    def gone(self, batches: Mapping[int, int], now_s: float) -> set[int]:
        """Takes a look, at the monotonic time `now_s`. `batches` has the number of each daemon's last transaction.
        Returns the daemons that are gone.
        """
        if now_s - self._looked_at > self._gap_s:
            self._seen.clear()
        self._looked_at = now_s
        self._seen = {
            member: (batch, self._seen[member][1] if self._seen.get(member, (None, 0))[0] == batch else now_s)
            for member, batch in batches.items()
        }
        self._longest_s = max((now_s - since_s for _, since_s in self._seen.values()), default=0.0)
        return {member for member, (_, since_s) in self._seen.items() if now_s - since_s >= self._lease_s}
