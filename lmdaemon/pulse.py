"""Shows whether a loop of the daemon runs when it should; `/health` and the watchdog read it.

Each loop has one `Pulse`. Only the loop itself writes to it: when it begins to work, and until when it sleeps. `Rounds`
is a loop that sleeps for as long as its last round returned, or until it is woken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

LATE_S = 5.0  # a loop that is later than this, or works longer on one step, is stuck


class WakeObserver(Protocol):
    """Is told how late a loop runs, each time it wakes up."""

    def awoke(self, late_s: float) -> None:
        """A loop was run this many seconds after it was due."""


class Pulse:
    """Until when a loop sleeps, or since when it works. `monotonic` is the clock's; all times are seconds of that
    clock.
    """

    def __init__(self, monotonic: Callable[[], float], observer: WakeObserver | None = None) -> None:
        self._monotonic = monotonic
        self._until: float | None = None  # None: the loop sleeps until it is woken, or has not begun
        self._asleep = False
        self._observer = observer

    def working(self) -> None:
        """Notes that a step begins."""
        now = self._monotonic()
        if self._asleep and self._until is not None and self._observer is not None:
            self._observer.awoke(max(0.0, now - self._until))
        self._asleep = False
        self._until = now

    def sleeping(self, wait_s: float | None) -> None:
        """Notes that a step is over; the next begins in `wait_s` seconds (None: not by itself), or when the loop is
        woken.
        """
        self._asleep = True
        self._until = None if wait_s is None else self._monotonic() + wait_s

    def woken(self) -> None:
        """Notes that the loop was woken and is due now."""
        if self._until is None or self._until > self._monotonic():
            self._until = self._monotonic()

    @property
    def late_s(self) -> float:
        """Seconds since the loop should have run, or since it began to work; 0 while it sleeps."""
        return 0.0 if self._until is None else max(0.0, self._monotonic() - self._until)

    @property
    def stuck(self) -> bool:
        """Whether the loop is later than LATE_S."""
        return self.late_s > LATE_S


class Rounds:
    """Calls `once` for ever: each time after the seconds that it returned (None: no time limit), or when `wake` was
    called.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._alarm = asyncio.Event()

    def wake(self) -> None:
        """Has the next round begin at once."""
        if not self._alarm.is_set():
            self._pulse.woken()
            self._alarm.set()

    async def run(self, once: Callable[[], Awaitable[float | None]]) -> None:
        """Runs for ever. Raises what a round raises."""
        while True:
            self._pulse.working()
            wait_s = await once()
            self._pulse.sleeping(wait_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._alarm.wait()
            self._alarm.clear()
