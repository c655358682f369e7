"""`lmdaemon size`: what it measures on this machine, and what it computes from that for a number of sessions."""

import json
from functools import partial
from pathlib import Path

import forked
import pytest
from commands import environment, run
from support import LISTEN, load, serving

from lmdaemon.commands import size
from lmdaemon.store.contract import Opening
from lmdaemon.workbench.sizing import Costs

CONFIG = LISTEN + '[operators.acme]\nprovider_id = "p"\n'
COSTS = Costs(
    open_s=200e-6, touch_s=80e-6, bulk_touch_s=10e-6, end_s=300e-6, live_bytes=300, ended_bytes=582, memory_bytes=60e6
)


def of_300k(**changed: float) -> dict[str, object]:
    """What is needed for 300,000 sessions of 20 minutes, touched every 30 s and kept for 90 days, if these costs
    change.
    """
    return size.needed(COSTS._replace(**changed), 300_000, 30, 1200, 90 * 86_400)


def test_what_so_many_sessions_take_follows_from_the_costs() -> None:
    found = of_300k()
    assert (found["touchesPerSecond"], found["endsPerSecond"]) == (10_000, 250)
    assert found["core"] == {"single": 0.925, "bulk": 0.225}
    assert found["keptBytes"] == 250 * 90 * 86_400 * 582  # 1.13 TB
    assert found["liveBytes"] == 90_000_000


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"touch_s": 40e-6}, "This machine's processor is fast enough."),
        ({}, "This machine's processor is fast enough if game servers use the bulk touch."),
        ({"bulk_touch_s": 70e-6}, "This machine's processor is too slow"),
    ],
)
def test_the_verdict_leaves_room_for_peaks(changed: dict[str, float], verdict: str) -> None:
    said = size.sentences(of_300k(**changed) | {"freeBytes": 2e12}, 300_000, 30, 90 * 86_400, Path("/disk"))
    assert said[-2].startswith(verdict)
    assert said[-1] == "The disk is large enough for this."


def test_a_disk_that_is_too_small_is_said_with_the_days_that_fit() -> None:
    said = size.sentences(of_300k() | {"freeBytes": 113e9 + 90e6}, 300_000, 30, 90 * 86_400, Path("/disk"))
    assert said[-1] == "The disk is too small for this: keep_ended would have to be below 9.0 days."


def test_it_is_measured_beside_the_database_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    words = ["size", "--sessions", "1000", "--heartbeat", "10s", "--measure", "1s", "--json", "--config", "config.toml"]
    few = partial(forked.put, "lmdaemon.workbench.sizing", "BULK", 200)  # opens fewer sessions than usual
    done = forked.run(words, tmp_path, environment(), within_s=120, first=few)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    each = found["microseconds"]
    assert 0 < each["bulkTouch"] < each["touch"]
    assert 200 < found["endedBytesEach"] < 3000
    assert found["memoryBytes"] > 10_000_000
    assert "now" not in found  # no daemon runs there
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


async def test_a_running_daemon_is_asked_for_the_ends_of_the_last_hour(tmp_path: Path) -> None:
    async with serving(tmp_path, '[operators.acme]\nprovider_id = "p"\n') as daemon:
        for name in ("a", "b"):
            await daemon.store.open_session(Opening("acme", name, "p", "t", None, 60_000, 0))
            await daemon.store.end("acme", name)
        address = daemon.api.removeprefix("http://")
        settings = load(tmp_path / "asked.toml", f'[api]\nlisten = "{address}"\n')
        assert await size.ends_of_last_hour(settings) == 2
    assert await size.ends_of_last_hour(settings) is None


def test_a_place_that_cannot_be_judged_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    done = run("size", "--sessions", "10", "--heartbeat", "10s", "--directory", "/nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "lmdaemon: size: /nowhere: No such file or directory\n")
