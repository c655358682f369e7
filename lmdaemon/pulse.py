"""Signs of life of a loop: what `/health` and the watchdog judge by. A loop that should have run and has not, shows.

Each loop owns one `Pulse` and says when it starts working and until when it sleeps; nobody else writes it. `Rounds` is
the loop that sleeps as long as its last round said, or until it is woken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

LATE_S = 5.0  # a loop later than this, or working on one step for longer, is stuck


class WakeObserver(Protocol):
    """Told of every wake-up of a loop whose time had come."""

    def awoke(self, late_s: float) -> None:
        """The event loop came to it so many seconds late."""


class Pulse:
    """`monotonic` is the clock's; all times are its seconds."""

    def __init__(self, monotonic: Callable[[], float], observer: WakeObserver | None = None) -> None:
        self._monotonic = monotonic
        self._until: float | None = None  # asleep until woken; as long as the loop has not begun, too
        self._asleep = False
        self._observer = observer

    def working(self) -> None:
        """A step begins."""
        now = self._monotonic()
        if self._asleep and self._until is not None and self._observer is not None:
            self._observer.awoke(max(0.0, now - self._until))
        self._asleep = False
        self._until = now

    def sleeping(self, wait_s: float | None) -> None:
        """The step is over; the next comes in `wait_s` seconds, or when somebody wakes the loop."""
        self._asleep = True
        self._until = None if wait_s is None else self._monotonic() + wait_s

    def woken(self) -> None:
        """Somebody has set the loop's alarm: it has to run now."""
        if self._until is None or self._until > self._monotonic():
            self._until = self._monotonic()

    @property
    def late_s(self) -> float:
        """Seconds since the loop should have come round; 0 while all is well."""
        return 0.0 if self._until is None else max(0.0, self._monotonic() - self._until)

    @property
    def stuck(self) -> bool:
        return self.late_s > LATE_S


class Rounds:
    """Calls `once` for ever: after the seconds that it returned (None: no time limit), or when `wake` was called."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._alarm = asyncio.Event()

    def wake(self) -> None:
        """The next round comes at once."""
        if not self._alarm.is_set():
            self._pulse.woken()
            self._alarm.set()

    async def run(self, once: Callable[[], Awaitable[float | None]]) -> None:
        """Raises what a round raises."""
        while True:
            self._pulse.working()
            wait_s = await once()
            self._pulse.sleeping(wait_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._alarm.wait()
            self._alarm.clear()
