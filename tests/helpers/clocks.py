"""A clock that a test moves by hand."""

from collections.abc import Callable

from lmdaemon.clock import Clock


class HandClock(Clock):
    """A clock that stands still until it is moved: `wall` in milliseconds since the epoch, `mono` in seconds."""

    def __init__(self) -> None:
        self.wall = 1_790_000_000_000
        self.mono = 1000.0
        self.suspended_s = 0.0
        self.follow: list[Callable[[float], None]] = []  # called with the wall time (ms) whenever it has moved

    def wall_ms(self) -> int:
        return int(self.wall)

    def monotonic(self) -> float:
        return self.mono

    def elapsed(self) -> float:
        return self.mono + self.suspended_s

    def suspend(self, seconds: float) -> None:
        """The machine is suspended for so long: the monotonic clock stands still, and this wall clock with it."""
        self.suspended_s += seconds

    def advance(self, seconds: float) -> None:
        """Moves both clocks forward, as passing time does."""
        self.mono += seconds
        self.step_wall(seconds)

    def step_wall(self, seconds: float) -> None:
        """Moves the wall clock only, as an administrator does who sets it."""
        self.wall += round(seconds * 1000)
        for follower in self.follow:
            follower(self.wall)
