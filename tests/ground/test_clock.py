"""The service clock runs only while the daemon can hear touches (promise 4)."""

import time

import pytest
from chance import examples
from clocks import HandClock
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdaemon.clock import STALL_S, TICK_S, Clock, ServiceClock


@pytest.fixture
def service(clock: HandClock) -> ServiceClock:
    return ServiceClock(clock, 10_000)


def test_it_starts_where_it_was_persisted(service: ServiceClock) -> None:
    assert service.now_ms() == 10_000


def test_it_runs_from_reading_to_reading(clock: HandClock, service: ServiceClock) -> None:
    for _ in range(3):
        clock.advance(1)
        service.now_ms()
    assert service.now_ms() == 13_000
    assert service.stalled_s == 0


@pytest.mark.parametrize(
    ("gap_s", "passed_ms"),
    [(0, 0), (0.001, 1), (TICK_S, 1000), (1.499, 1499), (STALL_S, 1500), (1.501, 0), (2, 0), (86_400, 0)],
)
def test_a_gap_longer_than_a_stall_counts_for_nothing(
    clock: HandClock, service: ServiceClock, gap_s: float, passed_ms: int
) -> None:
    clock.advance(gap_s)
    assert service.now_ms() - 10_000 == pytest.approx(passed_ms, abs=1)
    assert service.stalled_s == pytest.approx(0 if passed_ms or not gap_s else gap_s)


def test_it_runs_on_after_a_stall(clock: HandClock, service: ServiceClock) -> None:
    clock.advance(3600)
    service.now_ms()
    clock.advance(1)
    assert service.now_ms() == 11_000


def test_wall_clock_steps_do_not_exist_for_it(clock: HandClock, service: ServiceClock) -> None:
    for step_s in (-86_400, 3600, 365 * 86_400, -1):
        clock.step_wall(step_s)
        assert service.now_ms() == 10_000
    clock.advance(1)
    clock.step_wall(-3600)
    assert service.now_ms() == 11_000


def test_a_frozen_clock_stands_still_and_thaws_where_it_stood(clock: HandClock, service: ServiceClock) -> None:
    clock.advance(0.5)
    service.freeze("store")
    for _ in range(5):
        clock.advance(1)
        assert service.now_ms() == 10_500
    clock.advance(1)
    service.thaw("store")
    assert service.now_ms() == 10_500
    assert service.stalled_s == 6
    clock.advance(1)
    assert service.now_ms() == 11_500


def test_it_stands_still_until_every_reason_is_lifted(clock: HandClock, service: ServiceClock) -> None:
    """A store that recovers while the daemon is stopping must not start the clock again."""
    service.freeze("stopping")
    service.freeze("store")
    service.thaw("store")
    clock.advance(1)
    assert service.now_ms() == 10_000
    service.thaw("stopping")
    clock.advance(1)
    assert service.now_ms() == 11_000


def test_a_tick_is_shorter_than_a_stall() -> None:
    assert 2 * TICK_S > STALL_S > TICK_S


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("advance"), st.floats(0, 5)),
        st.tuples(st.just("step_wall"), st.floats(-1e6, 1e6)),
        st.tuples(st.sampled_from(["read", "freeze", "thaw"]), st.just(0.0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=examples(200))
@given(STEPS)
def test_service_time_is_the_sum_of_the_heard_gaps_and_never_decreases(steps: list[tuple[str, float]]) -> None:
    clock = HandClock()
    service = ServiceClock(clock, 0)
    heard_s, read_at = 0.0, clock.mono
    frozen = False
    before = 0
    for what, seconds in steps:
        match what:
            case "advance":
                clock.advance(seconds)
                continue
            case "step_wall":
                clock.step_wall(seconds)
                continue
            case "read":
                service.now_ms()
            case "freeze":
                service.freeze("store")
            case "thaw":
                service.thaw("store")
        gap_s, read_at = clock.mono - read_at, clock.mono
        if not frozen and gap_s <= STALL_S:
            heard_s += gap_s
        frozen = what == "freeze" or (frozen and what != "thaw")
        now = service.now_ms()
        assert now >= before
        assert now == pytest.approx(heard_s * 1000, abs=1.001)
        before = now


def test_the_system_clock_tells_wall_milliseconds_and_monotonic_seconds() -> None:
    clock = Clock()
    before, wall, after = time.time() * 1000, clock.wall_ms(), time.time() * 1000
    assert before - 1 <= wall <= after
    first = clock.monotonic()
    assert first <= time.monotonic()
    assert clock.monotonic() >= first
