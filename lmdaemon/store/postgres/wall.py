"""The wall time of a daemon that shares a database: that of the server's clock, which is the same for all of them."""

from lmdaemon.clock import Clock


class ServerClock(Clock):
    """The server's wall clock, as known from the exchanges with it: what has passed since is measured here. The
    machine's own wall clock counts only until the first one.

    An exchange tells the server's time at some moment between question and answer. So a slow one changes nothing, and
    the time known here is never ahead of the server's, and behind it by the quickest answer's way at most. If the
    server's clock is set, this one follows with the next exchange.
    """

    def __init__(self, machine: Clock) -> None:
        self._machine = machine
        self._known: tuple[float, float] | None = None  # the server's wall time (ms), and when that was (elapsed s)

    def monotonic(self) -> float:
        """That of the machine (Clock)."""
        return self._machine.monotonic()

    def elapsed(self) -> float:
        """That of the machine (Clock)."""
        return self._machine.elapsed()

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC, by the server's clock."""
        return self._machine.wall_ms() if self._known is None else round(self._at(self._known, self.elapsed()))

    def told(self, at: int, asked_s: float) -> None:
        """The server's clock stood at `at` (wall ms) at a moment since `asked_s`, a time of `elapsed`."""
        now_s = self.elapsed()
        supposed = at if self._known is None else self._at(self._known, now_s)
        self._known = (min(max(supposed, at), at + (now_s - asked_s) * 1000), now_s)

    @staticmethod
    def _at(known: tuple[float, float], now_s: float) -> float:
        at, then_s = known
        return at + (now_s - then_s) * 1000
