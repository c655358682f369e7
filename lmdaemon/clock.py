"""The three times of the daemon: wall time for people, monotonic time for waits, service time for idleness.

Code that needs a time is given a `Clock`; the tests give it one that they move by hand. Because of `ServiceClock` no
session ends early: it must never run while the daemon cannot receive touches.
"""

import time

STALL_S = 1.5  # a longer gap between two readings is a stall: the daemon received nothing, so no service time passed
FREEZES = ("starting", "store", "listening", "stopping")  # the reasons for which the service clock is stopped
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
TICK_S = 1.0  # the service clock has to be read this often while sessions are live


class Clock:
    """The system's clocks. Wall time may step in either direction; monotonic time may not."""

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never decreases. On Linux it stops while the machine is suspended."""
        return time.monotonic()

    def elapsed(self) -> float:
        """As `monotonic`, but on Linux it goes on while the machine is suspended."""
        return time.clock_gettime(_ELAPSED)


class ServiceClock:
    """Service time: the milliseconds during which the daemon could receive touches, summed over all its runs.

    Each reading adds the monotonic time since the reading before. It adds nothing if that gap was a stall (SIGSTOP, a
    blocked event loop, a paused machine) or the clock was frozen. So neither a stalled daemon nor a step of the wall
    clock moves it, and a start from the persisted value does not count the downtime. While sessions are live the
    sweeper reads it every `TICK_S`; while none is, nobody reads it, and the gap counts for nothing.

    The price: up to `STALL_S` of running time just before a stall is not counted, so that sessions end that much later.
    """

    def __init__(self, clock: Clock, service_ms: int) -> None:
        self._clock = clock
        self._ms = float(service_ms)
        self._read_at = clock.monotonic()
        self.frozen: set[str] = set()  # those of FREEZES for which the clock is stopped now
        # The clock stops at this time until other daemons on the database have come far enough; None: it does not stop
        self.limit_ms: int | None = None
        self.stalled_s = 0.0  # sum of all gaps that were not counted

    def now_ms(self) -> int:
        """The service time now, in milliseconds; never decreases."""
        now = self._clock.monotonic()
        gap = now - self._read_at
        self._read_at = now
        if self.frozen or gap > STALL_S:
            self.stalled_s += gap
        else:
            further = self._ms + gap * 1000
            self._ms = further if self.limit_ms is None else max(self._ms, min(further, self.limit_ms))
        return int(self._ms)

    @property
    def last_ms(self) -> int:
        """Service time at the latest reading. It may be asked for on any thread."""
        return int(self._ms)

    def advance_to(self, at_least_ms: int) -> None:
        """Sets the clock to `at_least_ms`, unless it is further already."""
        self._ms = max(self._ms, at_least_ms)

    def freeze(self, reason: str) -> None:
        """Stops the clock because touches cannot be received or stored. Each reason is lifted by `thaw`."""
        self.now_ms()
        self.frozen.add(reason)

    def thaw(self, reason: str) -> None:
        """Lifts one reason; when none is left, the clock goes on from where it stopped."""
        self.now_ms()
        self.frozen.discard(reason)
