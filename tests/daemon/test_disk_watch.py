"""The free space on the disk: when it is low, and how its decrease becomes an estimate in days."""

from types import SimpleNamespace
from typing import Any

import pytest
from clocks import HandClock

from lmdaemon.disk import DAY_S, DiskWatch, Outlook
from lmdaemon.store.contract import Room

GB = 10**9


class Disk:
    """A watch over a disk of 100 GB. The test sets the free space, which the watch reads when something is
    committed.
    """

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.store: Any = SimpleNamespace(room=None)
        self.watch = DiskWatch(self.store, clock.monotonic)

    def passes(self, hours: float, free: float) -> None:
        """That many hours pass, and `free` bytes are left at the end; something is committed every ten minutes."""
        before = free if self.store.room is None else self.store.room.free
        steps = round(hours * 6)
        for step in range(1, steps + 1):
            self.clock.advance(600)
            self.store.room = Room(int(before + (free - before) * step / steps), 100 * GB)
            self.watch.committed(1, 0.001)

    def outlook(self) -> Outlook:
        found = self.watch.outlook()
        assert found is not None
        return found


@pytest.fixture
def disk(clock: HandClock) -> Disk:
    return Disk(clock)


def test_nothing_is_known_of_another_machines_disk(disk: Disk) -> None:
    disk.watch.committed(1, 0.001)
    assert disk.watch.outlook() is None


@pytest.mark.parametrize(("free", "low"), [(15 * GB, False), (15 * GB - 1, True)])
def test_less_than_15_percent_is_low(disk: Disk, free: int, low: bool) -> None:
    disk.store.room = Room(free, 100 * GB)
    assert disk.outlook() == (disk.store.room, None, None, low)


def test_three_days_are_low_whatever_is_free(disk: Disk) -> None:
    disk.passes(0.2, 80 * GB)
    disk.passes(12, 65 * GB)
    assert disk.outlook().growth == pytest.approx(30 * GB, rel=0.01)
    assert disk.outlook().days_left == pytest.approx(65 / 30, rel=0.01)
    assert disk.outlook().low


def test_a_slow_growth_is_not(disk: Disk) -> None:
    disk.passes(0.2, 80 * GB)
    disk.passes(12, 75 * GB)
    assert disk.outlook().days_left == pytest.approx(7.5, rel=0.01)
    assert not disk.outlook().low


def test_within_the_first_hour_the_growth_is_not_known(disk: Disk) -> None:
    disk.passes(0.2, 80 * GB)
    disk.passes(0.8, 40 * GB)
    assert disk.outlook().growth is None
    assert not disk.outlook().low


def test_only_the_last_day_counts_and_freed_space_is_no_growth(disk: Disk) -> None:
    disk.passes(0.2, 80 * GB)
    disk.passes(10, 40 * GB)
    disk.passes(DAY_S / 3600, 41 * GB)
    _, growth, days_left, _ = disk.outlook()
    assert growth == pytest.approx(-1 * GB, rel=0.02)
    assert days_left is None
    assert len(disk.watch._samples) <= 145
