"""Watches the file system of the database: how much is free, and when it will be full if it goes on as lately."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from lmdaemon.store.contract import Room, Store, StoreObserver

LOW_SHARE = 0.15  # a smaller share of free space is a warning
LOW_DAYS = 3.0  # a disk that will be full within so many days is a warning, too
EVERY_S = 600.0  # between two samples of the growth
SAMPLES = 145  # samples that are kept: those of a day
KNOWN_AFTER_S = 3600.0  # the growth is told after this time: that of a shorter one says little about a day
DAY_S = 86_400.0


class Outlook(NamedTuple):
    """The space of the file system, by how many bytes the free space shrinks in a day (None: not known yet), and in how
    many days it will be used up (None: not known, or it does not shrink).
    """

    room: Room
    growth: float | None
    days_left: float | None

    @property
    def low(self) -> bool:
        """Whether too little space is free, or will be soon."""
        days_left = self.days_left
        return self.room.free < self.room.size * LOW_SHARE or (days_left is not None and days_left < LOW_DAYS)


class DiskWatch(StoreObserver):
    """Keeps the free space of the last day. What other programs write counts too: they fill the same disk.

    Nothing is sampled while nothing is committed. `monotonic` is the clock's.
    """

    def __init__(self, store: Store, monotonic: Callable[[], float]) -> None:
        self._store = store
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
        lately = [one for one in self._samples.copy() if now - one[0] <= DAY_S]
        if not lately or now - lately[0][0] < KNOWN_AFTER_S:
            return Outlook(room, None, None)
        since, free = lately[0]
        growth = (free - room.free) * DAY_S / (now - since)
        return Outlook(room, growth, room.free / growth if growth > 0 else None)
