"""The three times of the daemon: wall time for people, monotonic time for waits, service time for idleness.

`Clock` is handed to everybody who needs a time, and replaced by one moved by hand in the tests; no other module asks
the system for the time. `ServiceClock` is what promise 4 stands on. It must never run while touches cannot be heard.
"""

import time

STALL_S = 1.5  # a gap between two readings longer than this is a stall: nobody was listening, so no time has passed
FREEZES = ("starting", "store", "listening", "stopping")  # why the service clock may stand still
TICK_S = 1.0  # how often somebody has to read the service clock while sessions are live


class Clock:
    """The system's clocks. Wall time may step in either direction; monotonic time may not."""

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds, from anywhere, never backwards. Linux stops it while the machine is suspended."""
        return time.monotonic()


class ServiceClock:
    """Milliseconds during which the daemon could hear touches, counted over all its runs.

    It runs from reading to reading: each adds the monotonic time since the one before, unless that gap was a stall
    (SIGSTOP, a blocked loop, a paused machine) or the clock was frozen, and then adds nothing. So a stalled daemon
    stops the clock by construction, wall-clock steps do not exist for it, and whoever starts from the persisted value
    does not count the downtime. While sessions are live the sweeper reads it once a second (`TICK_S`); while none is,
    nobody need, and the gap counts for nothing.

    The price: up to `STALL_S` of true running time before a stall is forgotten with it, to the later side.
    """

    def __init__(self, clock: Clock, service_ms: int) -> None:
        self._clock = clock
        self._ms = float(service_ms)
        self._read_at = clock.monotonic()
        self.frozen: set[str] = set()  # for these reasons
        self.stalled_s = 0.0  # sum of all gaps that did not count

    def now_ms(self) -> int:
        """The service time now. Never decreases."""
        now = self._clock.monotonic()
        gap = now - self._read_at
        self._read_at = now
        if self.frozen or gap > STALL_S:
            self.stalled_s += gap
        else:
            self._ms += gap * 1000
        return int(self._ms)

    def freeze(self, reason: str) -> None:
        """Stops the clock: touches cannot be heard, or cannot be stored. Each reason has to be lifted by `thaw`."""
        self.now_ms()
        self.frozen.add(reason)

    def thaw(self, reason: str) -> None:
        """Lifts one reason; once none is left, the clock runs on from where it stood."""
        self.now_ms()
        self.frozen.discard(reason)
