"""The rule that says when an operator's touches count as stopped, and how long its ends wait then."""

import pytest

from lmdaemon.store import silence
from lmdaemon.store.silence import PAUSE_MAX_MS, Pause

GRACE_MS = 60_000
IDLE_MS = 90_000
BEGAN_MS = 1_000_000
PAUSE = Pause(BEGAN_MS, silence.silence_of(IDLE_MS))
AT_MOST_MS = BEGAN_MS + PAUSE_MAX_MS


def waits(pause: Pause, touched_ms: int, now_ms: int) -> int | None:
    return silence.waits_until(pause, touched_ms, now_ms, GRACE_MS)


class TestTheRule:
    def test_it_waits_for_ten_minutes_at_most(self) -> None:
        assert waits(PAUSE, 0, AT_MOST_MS - 1) == AT_MOST_MS
        assert waits(PAUSE, 0, AT_MOST_MS) is None

    def test_touches_that_come_again_leave_the_grace_to_the_others(self) -> None:
        touched_ms = BEGAN_MS + 30_000
        resumed = silence.touched(PAUSE, 0, touched_ms, GRACE_MS)
        assert resumed is not None
        assert waits(resumed, touched_ms, touched_ms) == touched_ms + GRACE_MS
        assert waits(resumed, touched_ms + GRACE_MS - 10, touched_ms + GRACE_MS) is None
        assert silence.touched(resumed, touched_ms + GRACE_MS - 10, touched_ms + GRACE_MS, GRACE_MS) is None

    def test_touches_that_stop_again_within_the_grace_let_it_go_on(self) -> None:
        touched_ms = BEGAN_MS + 30_000
        resumed = silence.touched(PAUSE, 0, touched_ms, GRACE_MS)
        assert resumed is not None
        silent_ms = touched_ms + PAUSE.silent_ms
        assert waits(resumed, touched_ms, silent_ms) == AT_MOST_MS
        again = silence.touched(resumed, touched_ms, silent_ms + 60_000, GRACE_MS)
        assert again is not None
        assert waits(again, silent_ms + 60_000, silent_ms + 60_000) == silent_ms + 60_000 + GRACE_MS

    def test_the_grace_does_not_make_it_longer_than_ten_minutes(self) -> None:
        touched_ms = AT_MOST_MS - 1000
        resumed = silence.touched(PAUSE, 0, touched_ms, GRACE_MS)
        assert resumed is not None
        assert waits(resumed, touched_ms, touched_ms) == AT_MOST_MS
        assert silence.touched(resumed, touched_ms, AT_MOST_MS, GRACE_MS) is None

    def test_once_released_it_is_over_until_touches_have_come(self) -> None:
        released = PAUSE._replace(released=True)
        assert waits(released, 0, BEGAN_MS + 1) is None
        assert silence.touched(released, 0, BEGAN_MS + 2, GRACE_MS) is None

    @pytest.mark.parametrize(
        ("grace_ms", "idle_ms", "left_ms", "after_ms"),
        [
            (30_000, 90_000, 500_000, 30_000),
            (0, 90_000, 500_000, silence.LOOK_AGAIN_MIN_MS),
            (300_000, 900_000, 500_000, silence.LOOK_AGAIN_MAX_MS),
            (30_000, 5_000, 500_000, 5_000),
            (30_000, 90_000, 7, 7),
        ],
    )
    def test_it_is_looked_at_again_before_a_touched_one_would_be_due(
        self, grace_ms: int, idle_ms: int, left_ms: int, after_ms: int
    ) -> None:
        assert silence.look_again_ms(100, 100 + left_ms, idle_ms, grace_ms) == 100 + after_ms
