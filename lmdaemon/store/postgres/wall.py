"""The wall time of a daemon on PostgreSQL: that of the server's clock, so that all daemons on the database have the
same.
"""

from lmdaemon.clock import Clock


class ServerClock(Clock):
    """The server's wall clock, as known from exchanges with it. The time since the last exchange is measured on this
    machine. Until the first one, this machine's wall clock is used.

    An exchange tells the server's time at some moment between question and answer. The time known here is corrected
    only as far as it contradicts that, so a slow exchange changes little. It is never ahead of the server's, and behind
    it by no more than the answer of the quickest exchange took to arrive. If the server's clock is set, this one
    follows with the next exchange.
    """

    def __init__(self, machine: Clock) -> None:
        self._machine = machine
        # The server's wall time (ms) at a time of `elapsed` (s); None before the first exchange
        self._known: tuple[float, float] | None = None

    def monotonic(self) -> float:
        """Monotonic time of this machine (Clock)."""
        return self._machine.monotonic()

    def elapsed(self) -> float:
        """Elapsed time of this machine (Clock)."""
        return self._machine.elapsed()

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC, by the server's clock."""
        return self._machine.wall_ms() if self._known is None else round(self._at(self._known, self.elapsed()))

    def told(self, at: int, asked_s: float) -> None:
        """Takes over that the server's clock showed `at` (wall ms) at some moment after `asked_s`, a time of
        `elapsed`.
        """
        now_s = self.elapsed()
        supposed = at if self._known is None else self._at(self._known, now_s)
        self._known = (min(max(supposed, at), at + (now_s - asked_s) * 1000), now_s)

    @staticmethod
    def _at(known: tuple[float, float], now_s: float) -> float:
        at, then_s = known
        return at + (now_s - then_s) * 1000
