"""The sweeper: on time, never early, idle while nothing can be due; the restart grace and stalls."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from clocks import HandClock
from faults import locked
from support import Commits, live, open_store, until

from lmdaemon.clock import TICK_S
from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.model import Session
from lmdaemon.store.contract import SWEEP_ROWS, Opening, StoreObserver, Touched
from lmdaemon.store.sqlite.store import Store
from lmdaemon.sweeper import QUIET_AFTER_STALL_S, Sweeper

GRACE_S = 60.0


@pytest.fixture
def limits() -> StoreLimits:
    return LIMITS.store


@pytest.fixture
async def db(tmp_path: Path, clock: HandClock, limits: StoreLimits) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "test.sqlite3", clock, limits=limits) as opened:
        opened.configured = frozenset({"acme"})
        yield opened


@pytest.fixture
def sweeper(db: Store, clock: HandClock) -> Sweeper:
    return Sweeper(db, clock, 0.0)


async def open_session(db: Store, session_id: str = "s", idle_s: float = 10, lifetime_s: float = 0) -> None:
    await db.open_session(Opening("acme", session_id, "p", "t", None, int(idle_s * 1000), int(lifetime_s * 1000)))


async def reason(db: Store, session_id: str = "s") -> str | None:
    known = await db.session("acme", session_id)
    assert known is not None
    return known[0].reason


async def test_nothing_live_means_no_wake_up_at_all(sweeper: Sweeper) -> None:
    assert await sweeper.once() is None


async def test_it_ticks_each_second_while_sessions_live_and_at_deadlines(
    db: Store, clock: HandClock, sweeper: Sweeper
) -> None:
    await open_session(db, idle_s=2.5)
    assert await sweeper.once() == TICK_S
    clock.advance(1)
    assert await sweeper.once() == TICK_S
    clock.advance(1)
    wait_s = await sweeper.once()
    assert wait_s == pytest.approx(0.501)
    clock.advance(wait_s + 0.001)
    assert await sweeper.once() is None
    assert await reason(db) == "inactivity"


async def test_ticks_do_not_write(db: Store, clock: HandClock, sweeper: Sweeper) -> None:
    await open_session(db, idle_s=600)
    written: list[int] = []
    commits = Commits(db)
    for second in range(1, 47):
        clock.advance(1)
        before = commits.made
        await sweeper.once()
        if commits.made > before:
            written.append(second)
    # The clock is stored every ten seconds, and more often after a start: a crash loses at most half of a short run's
    # time
    assert written == [1, 2, 4, 8, 16, 26, 36, 46]


@pytest.mark.parametrize("limits", [StoreLimits(busy_timeout_s=60, hung_s=60)])
async def test_a_touch_that_was_queued_before_its_deadline_wins(db: Store, clock: HandClock) -> None:
    """However long the disk takes, such a touch is stored before the end is decided."""
    await open_session(db, idle_s=10)
    live(clock, db, 9.9)
    with locked(db.path):
        first = asyncio.create_task(db.probe())
        await until(lambda: db.writing_since)
        swept = asyncio.create_task(db.end_due(idle=True))  # perhaps because another session is due
        await until(lambda: db.waiting)
        touched = asyncio.create_task(db.touch("acme", ["s"]))
        await until(lambda: db.waiting == 2)
        live(clock, db, 1.0)
    await asyncio.gather(first, swept)
    assert (await touched).touched == 1
    assert await reason(db) is None


async def test_an_open_wakes_a_sleeping_sweeper_and_the_end_comes_by_itself(
    tmp_path: Path,
) -> None:
    from lmdaemon.clock import Clock

    async with open_store(tmp_path / "real.sqlite3", Clock()) as db:
        db.configured = frozenset({"acme"})
        sweeper = Sweeper(db, Clock(), 0.0)
        running = asyncio.create_task(sweeper.run())
        await open_session(db, idle_s=1)
        await until(lambda: db.live == 0)
        known = await db.session("acme", "s")
        assert known is not None
        assert known[0].ended_at is not None
        assert known[0].ended_at - known[0].seen_at >= 1000
        running.cancel()


async def test_the_first_session_after_a_quiet_time_sets_the_clock_going(db: Store, clock: HandClock) -> None:
    """The new deadline is later than the last one, and a later deadline wakes nobody. But the sweeper must wake up,
    because until then nobody reads the clock.
    """
    live_in_rounds = []

    class Counting(Sweeper):
        async def once(self) -> float | None:
            live_in_rounds.append(db.live)
            return None

    sweeper = Counting(db, clock, 0.0)
    running = asyncio.create_task(sweeper.run())
    await open_session(db, "first", idle_s=1)
    await db.end("acme", "first")
    await db.probe()  # when it returns, the sweeper has followed every wake-up so far
    live_in_rounds.clear()
    await open_session(db, "second", idle_s=600)
    await until(lambda: live_in_rounds == [1])
    running.cancel()


async def test_everything_due_goes_in_bounded_batches(db: Store, clock: HandClock, sweeper: Sweeper) -> None:
    ended: list[int] = []

    class Ends(StoreObserver):
        def sessions_ended(self, sessions: Sequence[Session]) -> None:
            ended.append(len(sessions))

    db.observe(Ends())
    await asyncio.gather(*(open_session(db, str(number)) for number in range(2 * SWEEP_ROWS + 2)))
    live(clock, db, 10.1)
    await sweeper.once()
    assert ended == [SWEEP_ROWS, SWEEP_ROWS, 2]


async def test_nothing_ends_for_inactivity_during_the_restart_grace(db: Store, clock: HandClock) -> None:
    await open_session(db)
    live(clock, db, 11)
    sweeper = Sweeper(db, clock, GRACE_S)
    for _ in range(59):
        assert await sweeper.once() is not None
        clock.advance(1)
    await db.touch("acme", ["s"])  # the client came back before the grace ended
    clock.advance(1.001)
    await sweeper.once()
    assert await reason(db) is None
    live(clock, db, 10)
    await sweeper.once()
    assert await reason(db) == "inactivity"


async def test_the_grace_is_exact_and_then_the_backlog_goes(db: Store, clock: HandClock) -> None:
    await open_session(db)
    live(clock, db, 11)
    sweeper = Sweeper(db, clock, 0.75)
    assert await sweeper.once() == pytest.approx(0.75)
    clock.advance(0.751)
    await sweeper.once()
    assert await reason(db) == "inactivity"


async def test_max_lifetime_waits_for_no_grace(db: Store, clock: HandClock) -> None:
    await open_session(db, lifetime_s=5)
    sweeper = Sweeper(db, clock, GRACE_S)
    clock.advance(5)
    await sweeper.once()
    assert await reason(db) == "max_lifetime"


async def test_a_stall_does_not_use_up_the_grace(db: Store, clock: HandClock) -> None:
    await open_session(db)
    live(clock, db, 11)
    sweeper = Sweeper(db, clock, 10.0)
    await sweeper.once()
    clock.advance(3600)
    for _ in range(9):
        assert await sweeper.once() is not None
        clock.advance(1)
        assert await reason(db) is None
    await sweeper.once()
    clock.advance(1.001)
    await sweeper.once()
    assert await reason(db) == "inactivity"


async def test_after_a_stall_those_who_could_not_reach_us_are_heard_first(
    db: Store, clock: HandClock, sweeper: Sweeper
) -> None:
    await open_session(db)
    for _ in range(9):
        clock.advance(1)
        await sweeper.once()
    clock.advance(1.2)  # due now, and ...
    clock.advance(60)  # ... stopped before the sweeper looked
    wait_s = await sweeper.once()
    assert wait_s == QUIET_AFTER_STALL_S
    assert await reason(db) is None
    await db.touch("acme", ["s"])
    live(clock, db, 9.9)
    await sweeper.once()
    assert await reason(db) is None


async def test_a_session_that_nobody_touches_still_ends_after_a_stall(
    db: Store, clock: HandClock, sweeper: Sweeper
) -> None:
    await open_session(db)
    await sweeper.once()
    clock.advance(3600)
    for _ in range(11):
        await sweeper.once()
        assert await reason(db) is None
        clock.advance(1)
    await sweeper.once()
    assert await reason(db) == "inactivity"


async def test_an_idle_daemon_that_slept_without_sessions_has_not_stalled(
    db: Store, clock: HandClock, sweeper: Sweeper, caplog: pytest.LogCaptureFixture
) -> None:
    assert await sweeper.once() is None
    clock.advance(3600)
    await open_session(db)
    assert await sweeper.once() == TICK_S
    assert sweeper.hold_s == 0
    assert "clock.stalled" not in caplog.text


async def test_a_request_that_is_already_readable_beats_the_sweep(
    db: Store, clock: HandClock, sweeper: Sweeper
) -> None:
    """The touch needs a few turns of the loop until it is queued, as in a handler. The sweep has begun before that, and
    still the touch wins.
    """
    await open_session(db)
    live(clock, db, 11)

    async def handler() -> Touched:
        for _ in range(3):
            await asyncio.sleep(0)
        return await db.touch("acme", ["s"])

    sweeping = asyncio.create_task(sweeper.once())
    touched = await handler()
    await sweeping
    assert touched.touched == 1
    assert await reason(db) is None


async def test_a_wall_clock_step_ends_nothing_and_delays_nothing(db: Store, clock: HandClock, sweeper: Sweeper) -> None:
    await open_session(db)
    for step_s in (3600, -7200, 86400):
        clock.step_wall(step_s)
        clock.advance(1)
        await sweeper.once()
        assert await reason(db) is None
    for _ in range(7):
        clock.advance(1)
        await sweeper.once()
    assert await reason(db) is None
    clock.advance(0.002)
    await sweeper.once()
    assert await reason(db) == "inactivity"


async def test_expires_at_is_what_happens_if_nothing_is_heard(db: Store, clock: HandClock) -> None:
    await open_session(db, "idle", idle_s=10)
    await open_session(db, "short life", idle_s=10, lifetime_s=3)
    sweeper = Sweeper(db, clock, 4.0)
    idle, short = [(await db.session("acme", name))[0] for name in ("idle", "short life")]  # type: ignore[index]
    assert sweeper.expires_at(idle) == pytest.approx(clock.wall_ms() + 10_000, abs=2)
    assert sweeper.expires_at(short) == clock.wall_ms() + 3000
    live(clock, db, 1)
    clock.advance(3600)  # a stall moves the expiry as it moves the end
    assert sweeper.expires_at(idle) == pytest.approx(clock.wall_ms() + 9000, abs=2)
    await db.end("acme", "idle")
    assert sweeper.expires_at((await db.session("acme", "idle"))[0]) is None  # type: ignore[index]


async def test_a_sweeper_that_does_not_come_round_shows(db: Store, clock: HandClock, sweeper: Sweeper) -> None:
    await open_session(db)
    sweeper.pulse.working()
    sweeper.pulse.sleeping(await sweeper.once())
    clock.advance(3)
    assert not sweeper.pulse.stuck
    clock.advance(4)
    assert sweeper.pulse.stuck
