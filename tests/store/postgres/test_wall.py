"""The wall time of a daemon on a PostgreSQL database is the server's."""

import pytest
from clocks import HandClock

from lmdaemon.store.postgres.wall import ServerClock

START = HandClock().wall_ms()


@pytest.fixture
def machine() -> HandClock:
    """A host clock that is ten minutes wrong."""
    machine = HandClock()
    machine.step_wall(600)
    return machine


@pytest.fixture
def clock(machine: HandClock) -> ServerClock:
    clock = ServerClock(machine)
    assert clock.wall_ms() == START + 600_000
    clock.told(START, clock.ask())
    return clock


def test_it_goes_on_from_what_the_server_said_whatever_the_machine_says(clock: ServerClock, machine: HandClock) -> None:
    assert clock.wall_ms() == START
    machine.advance(2.5)
    machine.step_wall(-7200)
    assert clock.wall_ms() == START + 2500
    assert clock.monotonic() == machine.monotonic()


def test_a_slow_answer_changes_nothing(clock: ServerClock, machine: HandClock) -> None:
    asked = clock.ask()
    machine.advance(3)
    clock.told(START + 100, asked)
    assert clock.wall_ms() == START + 3000


@pytest.mark.parametrize("by_ms", [-3_600_000, -50, 50, 3_600_000])
def test_it_follows_a_clock_that_is_set(clock: ServerClock, machine: HandClock, by_ms: int) -> None:
    machine.advance(10)
    clock.told(START + 10_000 + by_ms, clock.ask())
    machine.advance(1)
    assert clock.wall_ms() == START + 11_000 + by_ms


def test_an_answer_that_took_its_time_sets_it_as_little_as_it_must(clock: ServerClock, machine: HandClock) -> None:
    """The server's clock was set back by a minute. Its reading may be from the beginning of the exchange or from its
    end; the one that changes the clock less is used.
    """
    asked = clock.ask()
    machine.advance(2)
    clock.told(START - 60_000, asked)
    assert clock.wall_ms() == START - 58_000


def test_a_machine_that_was_suspended_is_at_the_right_time_at_once(clock: ServerClock, machine: HandClock) -> None:
    machine.suspend(3600)
    assert clock.wall_ms() == START + 3_600_000


def test_an_answer_overtaken_by_a_later_one_is_ignored(clock: ServerClock, machine: HandClock) -> None:
    """The server's clock was set back between the two questions, and the first answer came last."""
    first, second = clock.ask(), clock.ask()
    clock.told(START - 3_600_000, second)
    clock.told(START, first)
    assert clock.wall_ms() == START - 3_600_000
    clock.told(START - 3_599_000, clock.ask())
    assert clock.wall_ms() == START - 3_599_000
