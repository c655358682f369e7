"""The wall time of a daemon on PostgreSQL: that of the server's clock, so that all daemons on the database have the
same.
"""

from typing import NamedTuple

from lmdaemon.clock import Clock


class Asked(NamedTuple):
    """When the server was asked (a time of `elapsed`, s), and the number of the question."""

    at_s: float
    number: int


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
        self._questions = 0
        self._answered = 0  # the number of the latest question that was answered

    def monotonic(self) -> float:
        """Monotonic time of this machine (Clock)."""
        return self._machine.monotonic()

    def elapsed(self) -> float:
        """Elapsed time of this machine (Clock)."""
        return self._machine.elapsed()

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, UTC, by the server's clock."""
        return self._machine.wall_ms() if self._known is None else round(self._at(self._known, self.elapsed()))

    def ask(self) -> Asked:
        """Is called when the server is asked something, and its time with it."""
        self._questions += 1
        return Asked(self.elapsed(), self._questions)

    def told(self, at: int, asked: Asked) -> None:
        """Takes over that the server's clock showed `at` (wall ms) at some moment after it was asked. An answer that is
        overtaken by that to a later question is ignored: the clock may have been set in between.
        """
        if asked.number < self._answered:
            return
        self._answered = asked.number
        now_s = self.elapsed()
        supposed = at if self._known is None else self._at(self._known, now_s)
        self._known = (min(max(supposed, at), at + (now_s - asked.at_s) * 1000), now_s)

    @staticmethod
    def _at(known: tuple[float, float], now_s: float) -> float:
        at, then_s = known
        return at + (now_s - then_s) * 1000
