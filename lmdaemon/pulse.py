"""Signs of life of a loop: what `/health` and the watchdog judge by. A loop that should have run and has not, shows.

Each loop owns one `Pulse` and says when it starts working and until when it sleeps; nobody else writes it.
"""

from collections.abc import Callable

LATE_S = 5.0  # a loop later than this, or working on one step for longer, is stuck


class Pulse:
    """`monotonic` is the clock's; all times are its seconds. `on_awake(late_s)` is told of every wake-up and how late
    the event loop came to it.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since = monotonic()
        self._until: float | None = self._since  # None: asleep until woken
        self._asleep = False
        self.on_awake: Callable[[float], None] = lambda late_s: None

    def working(self) -> None:
        """A step begins."""
        now = self._monotonic()
        if self._asleep and self._until is not None:
            self.on_awake(max(0.0, now - self._until))
        self._asleep = False
        self._since = self._until = now

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
