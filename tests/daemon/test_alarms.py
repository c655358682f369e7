"""Alarms for mass expiry and for touches that stopped: logged once, for each operator and for all together, also with
1,000 operators.
"""

from collections.abc import Sequence

import pytest
from clocks import HandClock
from support import hear

from lmdaemon.alarms import MASS_S, MASS_SHOWN_S, ExpiryAlarm, TouchAlarm
from lmdaemon.store.contract import Figures


def note(alarm: ExpiryAlarm, ended: int, live: int, operators: int = 1) -> None:
    """Tells the alarm that `ended` sessions of each operator have ended and that each has `live` left."""
    names = [f"op{number}" for number in range(operators)]
    alarm.note(dict.fromkeys(names, ended), lambda name: live, live * operators)


class TestMassExpiry:
    """More than a thousand sessions and a fifth of all ending at once is logged; what is normal is not."""

    @pytest.mark.parametrize(
        ("ends", "live", "raised"),
        [
            ([1001], 3000, True),
            ([1000], 0, False),
            ([1001], 5000, False),
            ([200] * 6, 2000, True),
            ([20] * 6, 0, False),
        ],
    )
    def test_it_is_raised_for_many_and_for_a_large_part(
        self, clock: HandClock, ends: Sequence[int], live: int, raised: bool
    ) -> None:
        alarm = ExpiryAlarm(clock.monotonic)
        for done, ended in enumerate(ends, 1):
            note(alarm, ended, live + sum(ends[done:]))
            clock.advance(0.1)
        assert alarm.active is raised

    def test_an_ordinary_end_before_it_does_not_hide_it(self, clock: HandClock) -> None:
        alarm = ExpiryAlarm(clock.monotonic)
        note(alarm, 1, 100_000)
        clock.advance(MASS_S / 2)
        for left in range(150):
            note(alarm, 200, 100_000 - left * 200)
            clock.advance(MASS_S / 160)
        assert alarm.active

    def test_many_ends_over_a_long_time_are_no_mass_expiry(self, clock: HandClock) -> None:
        alarm = ExpiryAlarm(clock.monotonic)
        for _ in range(100):
            note(alarm, 200, 900)
            clock.advance(MASS_S + 0.1)
        assert not alarm.active
        assert alarm.of_operators() == {}

    def test_one_that_goes_on_is_told_once_and_shown_for_a_while(self, clock: HandClock) -> None:
        alarm = ExpiryAlarm(clock.monotonic)
        with hear() as events:
            for left in range(500, 0, -1):
                note(alarm, 200, left * 200)
                clock.advance(0.04)
        assert [event.name for event in events] == ["operator.mass_expired", "sweeper.mass_expired"]
        assert alarm.active
        clock.advance(MASS_SHOWN_S)
        assert not alarm.active
        assert alarm.of_operators() == {}

    def test_that_of_one_operator_does_not_disappear_in_the_sum(self, clock: HandClock) -> None:
        """All 1,449 sessions of one operator were only 16 % of all sessions, and an earlier alarm logged nothing."""
        alarm = ExpiryAlarm(clock.monotonic)
        with hear() as events:
            for left in range(1400, -1, -100):
                alarm.note({"fir": 49 if left == 1400 else 100}, lambda name, left=left: left, 7850 + left)
                clock.advance(0.05)
        assert [(event.name, event.facts["operator"]) for event in events] == [("operator.mass_expired", "fir")]
        assert not alarm.active
        (mass,) = alarm.of_operators().values()
        assert mass == (1449, 1449, pytest.approx(0.6))

    def test_all_of_a_thousand_small_operators_are_told_as_one(self, clock: HandClock) -> None:
        """Once the mass expiry is over, the alarm forgets these operators."""
        alarm = ExpiryAlarm(clock.monotonic)
        with hear() as events:
            note(alarm, 60, 0, operators=1000)
        assert [event.name for event in events] == ["sweeper.mass_expired"]
        clock.advance(MASS_SHOWN_S)
        alarm.note({"other": 1}, lambda name: 1, 1)
        assert list(alarm._operators) == ["other"]


class TestTouchesThatStop:
    """An alarm is due after half an idle time without a touch, while a hundred sessions are live."""

    IDLE_MS = 60_000

    def look(self, alarm: TouchAlarm, now_ms: int, touched_ms: int | None, live: int) -> list[str]:
        with hear() as events:
            touched = {} if touched_ms is None else {"fir": touched_ms}
            alarm.look(now_ms, touched, {"fir": self.IDLE_MS, "elm": self.IDLE_MS}, {"fir": Figures(live=live)})
        return [event.name for event in events]

    def test_it_is_told_once_and_so_is_that_they_came_again(self) -> None:
        alarm = TouchAlarm()
        assert self.look(alarm, 39_999, 10_000, 100) == []
        assert self.look(alarm, 40_000, 10_000, 100) == ["operator.touches_stopped"]
        assert self.look(alarm, 41_000, 10_000, 100) == []
        assert list(alarm.silent) == ["fir"]
        assert self.look(alarm, 42_000, 41_900, 100) == ["operator.touches_resumed"]
        assert alarm.silent == {}

    def test_few_sessions_and_none_that_was_ever_touched_are_no_alarm(self) -> None:
        alarm = TouchAlarm()
        assert self.look(alarm, 100_000, 10_000, 99) == []
        assert self.look(alarm, 100_000, None, 5000) == []

    def test_it_is_over_when_all_have_ended_or_the_operator_is_removed(self) -> None:
        alarm = TouchAlarm()
        self.look(alarm, 40_000, 10_000, 100)
        assert self.look(alarm, 70_000, 10_000, 0) == []
        assert alarm.silent == {}
        self.look(alarm, 40_000, 10_000, 100)
        alarm.look(41_000, {"fir": 10_000}, {}, {"fir": Figures(live=100)})
        assert alarm.silent == {}
