"""Whether a lane keeps up: how many deliveries are added and finished a second, and how long an answer takes. No I/O,
no clock.
"""

from collections import deque
from typing import NamedTuple

WINDOW_S = 60.0  # rates are worked out from the attempts of this time
ATTEMPTS_MAX = 512  # most attempts that are kept; those of a fast lane are of less than a minute
ATTEMPTS_MIN = 3  # with fewer attempts no rates are told
BEHIND_S = 30.0  # a lane is behind when a delivery has waited for so long for a slot and for nothing else
LOOK_EVERY_S = 5.0  # between two judgements of a lane


class _Ended(NamedTuple):
    at_s: float  # monotonic time
    took_s: float
    is_settled: bool
    pending: int  # pending deliveries of the operator when the attempt had ended


class Pace:
    """The attempts of the last minute. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._ended: deque[_Ended] = deque(maxlen=ATTEMPTS_MAX)
        self._looked_at_s = float("-inf")
        self.is_behind = False

    def note(self, now_s: float, took_s: float, pending: int, *, is_settled: bool) -> bool:
        """Notes that an attempt has ended. Returns whether it is time to judge whether the lane keeps up."""
        self._ended.append(_Ended(now_s, took_s, is_settled, pending))
        if now_s - self._looked_at_s < LOOK_EVERY_S:
            return False
        self._looked_at_s = now_s
        return True

    def turned(self, overdue_s: float) -> bool:
        """Judges the lane. Returns whether it has fallen behind or caught up since the last time. `overdue_s`: see
        Lane.overdue_s.
        """
        was_behind = self.is_behind
        self.is_behind = overdue_s > (1.0 if was_behind else BEHIND_S)
        return self.is_behind != was_behind

    def said(self, now_s: float, concurrency: int) -> str:
        """In words: how many deliveries a second are added and finished, and when none will wait any more."""
        lately = [one for one in self._ended if now_s - one.at_s <= WINDOW_S]
        if len(lately) < ATTEMPTS_MIN or lately[-1].at_s <= lately[0].at_s:
            return "too few attempts to tell how fast"
        first, last = lately[0], lately[-1]
        span_s = last.at_s - first.at_s
        gone = sum(one.is_settled for one in lately[1:]) / span_s
        come = max(0.0, gone + (last.pending - first.pending) / span_s)
        p50_s = sorted(one.took_s for one in lately)[len(lately) // 2]
        if gone > come:
            drained = f"drained in {_span((last.pending) / (gone - come))}"
        else:
            drained = f"never drained at this rate, concurrency {concurrency} is the limit"
        rates = f"{come:.2g} deliveries a second are added and {gone:.2g} finished (p50 {p50_s:.2g} s)"
        return f"{rates}, {last.pending} wait: {drained}"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
