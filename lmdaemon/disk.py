"""Watches the file system of the database: how much is free, and when it will be full if it goes on as lately."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from lmdaemon.limits import LIMITS
from lmdaemon.store.contract import Room, Store, StoreObserver

LOW_DAYS = 3.0  # a disk that will be full within so many days is a warning, too
EVERY_S = 600.0  # between two samples of the growth
SAMPLES = 145  # samples that are kept: those of a day
# Growth is told only after this time, because the growth of a shorter one says little about a day
KNOWN_AFTER_S = 3600.0
DAY_S = 86_400.0


class Outlook(NamedTuple):
    """The space of the file system, by how many bytes the free space shrinks in a day (None: not known yet), in how
    many days it will be used up (None: not known, or it does not shrink).
    """

    room: Room
    growth: float | None
    days_left: float | None
    low: bool  # whether too little space is free, or will be soon


class DiskWatch(StoreObserver):
    """Keeps the free space of the last day. What other programs write counts too: they fill the same disk.

    Nothing is sampled while nothing is committed. `monotonic` is the clock's. If the free share is smaller than
    `low_share`, the space counts as low, however slowly it shrinks.
    """

    def __init__(self, store: Store, monotonic: Callable[[], float], low_share: float = LIMITS.low_share) -> None:
        self._store = store
        self._low_share = low_share
        self._monotonic = monotonic
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES)  # (time, free bytes)

    def committed(self, operations: int, took_s: float) -> None:
        """Takes a sample, if the last one is old enough (StoreObserver)."""
        room, now = self._store.room, self._monotonic()
        if room is not None and (not self._samples or now - self._samples[-1][0] >= EVERY_S):
            self._samples.append((now, room.free))

    def outlook(self) -> Outlook | None:
        """How the free space develops; None if the disk is another machine's, or nothing has been written yet."""
        room, now = self._store.room, self._monotonic()
        if room is None:
            return None
        is_small = room.free < room.size * self._low_share
        lately = [one for one in self._samples.copy() if now - one[0] <= DAY_S]
        if not lately or now - lately[0][0] < KNOWN_AFTER_S:
            return Outlook(room, None, None, is_small)
        since, free = lately[0]
        growth = (free - room.free) * DAY_S / (now - since)
        days_left = room.free / growth if growth > 0 else None
        return Outlook(room, growth, days_left, is_small or (days_left is not None and days_left < LOW_DAYS))
