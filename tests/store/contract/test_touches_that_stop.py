"""`mass_expiry = "pause"`: while an operator's touches have stopped, its ends for inactivity wait."""

import asyncio

import pytest
from clocks import HandClock
from operations import IDLE_MS, found, opening
from support import live

from lmdaemon.store.contract import Store
from lmdaemon.store.silence import LOOK_AGAIN_MAX_MS, MANY_SESSIONS, PAUSE_MAX_MS

IDLE_S = IDLE_MS / 1000
GRACE_S = 5.0
NAMES = [f"s{number}" for number in range(MANY_SESSIONS)]


@pytest.fixture
async def silent(db: Store, clock: HandClock) -> Store:
    """A store in which a hundred sessions of acme were touched and then not touched for longer than their idle time."""
    db.pausing, db.grace_ms = frozenset({"acme"}), int(GRACE_S * 1000)
    await asyncio.gather(*(db.open_session(opening(name)) for name in NAMES))
    await db.touch("acme", NAMES)
    live(clock, db, IDLE_S + 0.1)
    return db


async def ended(db: Store) -> int:
    """Runs sweeps until nothing is due. Returns how many sessions have ended."""
    count = 0
    while (swept := await db.end_due(idle=True)).looked_at:
        count += swept.ended
    return count


async def test_nobody_is_cut_off_and_other_operators_end_as_ever(silent: Store, clock: HandClock) -> None:
    await silent.open_session(opening("s0", operator="other"))
    live(clock, silent, IDLE_S + 0.1)
    assert await ended(silent) == 1
    assert (await found(silent, "s0", operator="other")).reason == "inactivity"
    assert silent.figures_of("acme").live == MANY_SESSIONS
    assert silent.waits_until_ms("acme") is not None
    assert silent.waits_until_ms("other") is None


async def test_when_touches_come_again_the_others_have_the_grace(silent: Store, clock: HandClock) -> None:
    assert await ended(silent) == 0
    live(clock, silent, 1)
    await silent.touch("acme", NAMES[:1])
    live(clock, silent, 1)
    await silent.touch("acme", NAMES[1:10])
    live(clock, silent, GRACE_S - 1.1)
    await silent.touch("acme", NAMES[:10])
    assert await ended(silent) == 0
    live(clock, silent, 0.2)
    await silent.touch("acme", NAMES[:10])
    live(clock, silent, IDLE_S / 2 - 1)  # each session that waited has been looked at again by now
    assert await ended(silent) == MANY_SESSIONS - 10
    assert silent.waits_until_ms("acme") is None


async def test_after_ten_minutes_they_end(silent: Store, clock: HandClock) -> None:
    assert await ended(silent) == 0
    for _ in range(int(PAUSE_MAX_MS / 1000 / 60)):
        live(clock, silent, 59.5)
        assert await ended(silent) == 0
    live(clock, silent, 5.1)
    assert await ended(silent) == MANY_SESSIONS


async def test_once_released_they_end_within_a_minute(silent: Store, clock: HandClock) -> None:
    assert not await silent.release_ends("acme")
    assert await ended(silent) == 0
    assert await silent.release_ends("acme")
    assert not await silent.release_ends("acme")
    live(clock, silent, LOOK_AGAIN_MAX_MS / 1000)
    assert await ended(silent) == MANY_SESSIONS


async def test_a_close_is_not_put_off(silent: Store) -> None:
    assert await ended(silent) == 0
    closed = await silent.end("acme", "s0")
    assert closed is not None
    assert closed.reason == "closed"
