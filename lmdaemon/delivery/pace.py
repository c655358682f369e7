"""Whether a lane keeps up: how many deliveries are added and finished a second, and how long an answer takes. No I/O,
no clock.
"""

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 60.0  # rates are worked out from the attempts of this time
SPAN_MIN_S = 10.0  # rates of less time are not told, because one batch of attempts would decide them
ATTEMPTS_MIN = 3  # with fewer attempts no rates are told
TIMED_MAX = 10  # attempts of a second whose duration is kept
BEHIND_S = 30.0  # a lane is behind when a delivery has waited for so long for a slot and for nothing else
LOOK_EVERY_S = 5.0  # between two judgements of a lane


@dataclass(slots=True)
class _Second:
    """The attempts that ended within a second. `pending` is how many deliveries of the operator were pending when the
    last of them had ended, at `ended_s` (monotonic time).
    """

    began_s: float
    ended_s: float = 0.0
    pending: int = 0
    attempts: int = 0
    settled: int = 0
    took_s: list[float] = field(default_factory=list)


class Pace:
    """The attempts of the last minute. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=int(WINDOW_S) + 1)
        self._looked_at_s = float("-inf")
        self.is_behind = False

    def note(self, now_s: float, took_s: float, pending: int, *, is_settled: bool) -> bool:
        """Notes that an attempt has ended. Returns whether it is time to judge whether the lane keeps up."""
        if not self._seconds or now_s - self._seconds[-1].began_s >= 1:
            self._seconds.append(_Second(now_s))
        last = self._seconds[-1]
        last.ended_s, last.pending = now_s, pending
        last.attempts += 1
        last.settled += is_settled
        if len(last.took_s) < TIMED_MAX:
            last.took_s.append(took_s)
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

    def said(self, now_s: float, concurrency: int, open_s: float = WINDOW_S) -> str:
        """In words: how many deliveries a second are added and finished, and when none will wait any more. Of attempts
        before the last `open_s` seconds nothing is told, because the operator was kept back then.
        """
        lately = [one for one in self._seconds if now_s - one.began_s <= min(open_s, WINDOW_S)]
        span_s = lately[-1].ended_s - lately[0].ended_s if lately else 0.0
        if span_s < SPAN_MIN_S or sum(one.attempts for one in lately) < ATTEMPTS_MIN:
            return "too few attempts to tell how fast"
        # Attempts that ended together are stored together, and none of them is pending any more when the first is noted
        # here. So everything is counted from the end of the first second on, when all of them were noted
        first, last = lately[0], lately[-1]
        gone = sum(one.settled for one in lately[1:]) / span_s
        come = max(0.0, gone + (last.pending - first.pending) / span_s)
        took_s = sorted(took_s for one in lately for took_s in one.took_s)
        p50_s = took_s[len(took_s) // 2]
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
