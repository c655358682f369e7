"""`/health`: each check fails or warns when a test really causes the fault that the check looks for."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from clocks import HandClock
from documented import complaints
from faults import locked, no_room
from support import LISTEN, Commits, Serving, hear, load, open_store, serving, until

from lmdaemon import health, retry
from lmdaemon.alarms import ExpiryAlarm, TouchAlarm
from lmdaemon.clock import TICK_S
from lmdaemon.config.settings import Settings
from lmdaemon.disk import DiskWatch
from lmdaemon.health import ASK_EVERY_S, OLD_BACKLOG_S, Health
from lmdaemon.limits import Limits, StoreLimits
from lmdaemon.model import Gate, Member, rfc3339
from lmdaemon.pulse import LATE_S, Pulse
from lmdaemon.store.contract import Figures, NewDelivery, Opening, Settlement, StoreError
from lmdaemon.store.sqlite.store import Store
from lmdaemon.version import __version__

NOTIFY = 'notify = true\nurl = "http://127.0.0.1:1/"\nallow_private_network = true\n'
CONFIG = '[sessions]\nrestart_grace = "0s"\n[operators.acme]\nprovider_id = "p"\n'


class AmongOthers(Store):
    """A store that has other daemons beside it, if a test says so."""

    found: Sequence[Member] | StoreError | None = None

    async def daemons(self) -> Sequence[Member]:
        if isinstance(self.found, StoreError):
            raise self.found
        return self.found or await super().daemons()


@pytest.fixture
async def store(tmp_path: Path, clock: HandClock) -> AsyncIterator[AmongOthers]:
    async with open_store(tmp_path / "test.sqlite3", clock, kind=AmongOthers) as opened:
        opened.configured = frozenset({"acme"})
        opened.sinks_of = lambda session: [NewDelivery("http", b"{}")]
        yield opened


@pytest.fixture
def pulses(clock: HandClock) -> dict[str, Pulse]:
    """The pulses of two loops that sleep until they are woken."""
    made = {name: Pulse(clock.monotonic) for name in ("sweeper", "dispatcher")}
    for pulse in made.values():
        pulse.sleeping(None)
    return made


def health_of(
    directory: Path,
    store: Store,
    clock: HandClock,
    pulses: dict[str, Pulse],
    behind: Any = dict,
    settings: Callable[[], Settings] | None = None,
    **limits: float,
) -> Health:
    known = load(directory / "config.toml", CONFIG)
    return Health(
        store,
        clock,
        pulses,
        settings or (lambda: known),
        lambda: None,
        ExpiryAlarm(clock.monotonic),
        TouchAlarm(),
        {},
        DiskWatch(store, clock.monotonic, low_share=0.0),
        behind,
        **limits,
    )


@pytest.fixture
def checked(tmp_path: Path, store: Store, clock: HandClock, pulses: dict[str, Pulse]) -> Health:
    return health_of(tmp_path, store, clock, pulses)


async def check(checked: Health, name: str) -> dict[str, Any]:
    """The result of one check. Asserts that it decides the status of the whole report and that all other checks
    pass.
    """
    report: Any = await checked.report()
    (found,) = report["checks"][name]
    assert report["status"] == found["status"] == await checked.status()
    others = {other for other, (one,) in report["checks"].items() if one["status"] != "pass" and other != name}
    assert others == set()
    assert complaints("Health", report) == []
    return found


async def end_session(store: Store, session_id: str = "s1") -> None:
    await store.open_session(Opening("acme", session_id, "p", "t", None, 1000, 0))
    await store.end("acme", session_id)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Somebody else is in the middle of a query."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM session").fetchall()
        yield


async def get(daemon: Serving, base: str) -> tuple[int, dict[str, Any]]:
    async with daemon.client.get(base + "/health") as answer:
        assert answer.headers["Content-Type"] == "application/health+json"
        report = await answer.json(content_type=None)
        assert complaints("Health", report) == []
        return answer.status, report


# -- all is well


async def test_a_sound_daemon_passes_with_every_check_and_its_figures(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, CONFIG, clock) as daemon:
        status, report = await get(daemon, daemon.api)
    time = "2026-09-21T14:13:20.000Z"
    loop = [{"status": "pass", "observedValue": 0.0, "observedUnit": "s late", "time": time}]
    assert status == 200
    assert report["checks"]["store"][0].pop("walBytes") > 0
    assert 0 < report["checks"]["disk"][0].pop("freeBytes") <= report["checks"]["disk"][0].pop("sizeBytes")
    assert report == {
        "status": "pass",
        "version": __version__,
        "description": "lmdaemon",
        "checks": {
            "store": [{"status": "pass", "sessions": 0, "waiting": 0, "time": time}],
            "daemons": [{"status": "pass", "daemons": 1, "time": time}],
            "sweeper": loop,
            "dispatcher": loop,
            "disk": [{"status": "pass", "growthBytesPerDay": None, "daysLeft": None, "time": time}],
            "listeners": [{"status": "pass", "time": time}],
            "expiry": [{"status": "pass", "massExpired": [], "touchesStopped": [], "time": time}],
            "deliveries": [{"status": "pass", "pending": 0, "dead": 0, "oldestPendingSeconds": 0.0, "time": time}],
            "operators": [{"status": "pass", "held": [], "broken": [], "time": time}],
            "config": [{"status": "pass", "time": time}],
            "certificates": [{"status": "pass", "time": time}],
        },
    }


async def test_the_public_side_tells_only_the_status(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG) as daemon:
        assert await get(daemon, daemon.server) == (200, {"status": "pass"})
        await daemon.store.set_gate("acme", lambda gate: retry.hold(gate, 1, "by_hand"))
        assert await get(daemon, daemon.server) == (200, {"status": "warn"})


# -- several daemons on one database


def alike(**facts: Any) -> Member:
    known = {"name": "a:1", "version": __version__, "address": "", "since_at": 0, "heard_at": 0, "lag_ms": 0}
    return Member(**known | {"operators": (), "digest": "d", "is_self": False} | facts)  # type: ignore[arg-type]


async def test_daemons_whose_settings_differ_are_a_warning_with_their_names(
    checked: Health, store: AmongOthers, clock: HandClock
) -> None:
    members = [alike(is_self=True), alike(name="b:2", digest="e"), alike(name="c:3")]
    store.found = members
    found = await check(checked, "daemons")
    assert (found["status"], found["daemons"]) == ("warn", 3)
    assert found["output"] == "the settings of operators differ: a:1 has others than b:2"
    assert checked.members == members
    members[1] = alike(name="b:2")
    clock.advance(ASK_EVERY_S)
    assert (await check(checked, "daemons"))["status"] == "pass"


async def test_a_clock_that_keeps_all_ends_waiting_is_a_warning(
    checked: Health, store: AmongOthers, clock: HandClock
) -> None:
    members = [alike(is_self=True), alike(name="b:2", lag_ms=1399)]
    store.found = members
    found = await check(checked, "daemons")
    assert (found["status"], found["slowest"], found["slowestLagMs"]) == ("pass", "b:2", 1399)
    members[1] = alike(name="b:2", lag_ms=1400)
    clock.advance(ASK_EVERY_S)
    assert (await check(checked, "daemons"))["status"] == "pass"  # no session is live, so no end can wait
    await store.open_session(Opening("acme", "s1", "p", "t", None, 1000, 0))
    clock.advance(ASK_EVERY_S)
    found = await check(checked, "daemons")
    assert found["output"] == "the service clock of b:2 is 1400 ms behind; all ends wait for it"


async def test_daemons_that_cannot_be_asked_for_are_a_warning(checked: Health, store: AmongOthers) -> None:
    store.found = StoreError("reading failed: gone")
    assert (await check(checked, "daemons"))["output"] == "reading failed: gone"


# -- the store


async def test_a_store_that_cannot_write_fails_until_it_can(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG, limits=Limits(store=StoreLimits(busy_timeout_s=0.05))) as daemon:

        async def failing() -> bool:
            return (await get(daemon, daemon.server))[0] == 503

        with locked(tmp_path / "lmdaemon.sqlite3"):
            await until(failing)
            status, report = await get(daemon, daemon.api)
            assert (status, report["status"]) == (503, "fail")
            assert "locked" in report["checks"]["store"][0]["output"]
            assert (await get(daemon, daemon.server))[1] == {"status": "fail"}
            await check_refusals(daemon)

        async def passing() -> bool:
            return (await get(daemon, daemon.api))[1]["status"] == "pass"

        await until(passing)
        assert (await get(daemon, daemon.server))[0] == 200


async def check_refusals(daemon: Serving) -> None:
    """While nothing can be stored, both listeners answer 503 and say when to try again."""
    opening = {"playerId": "p", "token": "t"}
    async with daemon.client.put(daemon.api + "/v1/operators/acme/sessions/s", json=opening) as answer:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.headers["Content-Type"] == "application/problem+json"
    notice = {"providerId": "p", "sessionId": "s", "externalPlayerId": "p", "token": "t"}
    async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=notice) as answer:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert (await answer.json())["error"] == 100


async def test_a_disk_without_room_fails_and_is_no_reason_to_be_restarted(
    store: Store, checked: Health, clock: HandClock
) -> None:
    await end_session(store)
    clock.advance(1)  # otherwise the probe writes the same time again, which SQLite does not write to the file
    with no_room(store.path):
        assert (await check(checked, "store"))["status"] == "fail"
        assert not checked.stuck
    clock.advance(ASK_EVERY_S)
    assert (await check(checked, "store"))["status"] == "pass"


async def test_a_write_that_hangs_fails_and_withholds_the_watchdog(
    tmp_path: Path,
    store: Store,
    checked: Health,
    clock: HandClock,
    pulses: dict[str, Pulse],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hasty = health_of(tmp_path, store, clock, pulses, answer_within_s=0.02)
    assert not hasty.stuck
    with locked(tmp_path / "test.sqlite3"):  # the writer waits two seconds for the lock
        found = await check(hasty, "store")
        assert found["status"] == "fail"
        assert "took longer" in found["output"]
        assert not hasty.stuck
        monkeypatch.setattr(health, "LATE_S", 0.01)
        assert hasty.stuck

    async def idle() -> bool:
        return store.writing_since is None

    await until(idle)
    monkeypatch.undo()
    assert (await check(checked, "store"))["status"] == "pass"  # a sound disk may be slow on a busy machine
    assert not checked.stuck


async def test_asking_often_writes_once_a_second(store: Store, checked: Health, clock: HandClock) -> None:
    commits = Commits(store)
    for _ in range(5):
        await checked.report()
    assert commits.made == 1
    clock.advance(ASK_EVERY_S)
    await checked.report()
    assert commits.made == 2


async def test_a_table_that_cannot_be_read_fails(tmp_path: Path, store: Store, checked: Health) -> None:
    await end_session(store)
    with contextlib.closing(sqlite3.connect(tmp_path / "test.sqlite3")) as other:
        other.execute("DROP TABLE delivery")
    report: Any = await checked.report()
    assert {name for name, (one,) in report["checks"].items() if one["status"] == "fail"} == {"deliveries"}


# -- the loops


@pytest.mark.parametrize("name", ["sweeper", "dispatcher"])
@pytest.mark.parametrize(
    "event",
    [
        pytest.param(lambda pulse: pulse.working(), id="works on one step for ever"),
        pytest.param(lambda pulse: pulse.sleeping(0.0), id="sleeps past its time"),
        pytest.param(lambda pulse: pulse.woken(), id="does not hear its alarm"),
    ],
)
async def test_a_loop_that_has_not_run_when_it_should_have_fails(
    checked: Health, pulses: dict[str, Pulse], clock: HandClock, name: str, event: Callable[[Pulse], None]
) -> None:
    event(pulses[name])
    clock.advance(LATE_S)
    assert (await check(checked, name))["status"] == "pass"
    assert not checked.stuck
    clock.advance(0.5)
    found = await check(checked, name)
    assert (found["status"], found["observedValue"], found["observedUnit"]) == ("fail", LATE_S + 0.5, "s late")
    assert checked.stuck
    pulses[name].working()
    assert (await check(checked, name))["status"] == "pass"


async def test_a_loop_with_nothing_to_do_may_sleep_for_ever(checked: Health, clock: HandClock) -> None:
    clock.advance(30 * 86400)
    assert (await checked.report())["status"] == "pass"
    assert not checked.stuck


async def test_a_daemon_whose_sweeper_is_stuck_fails(
    tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, CONFIG, clock) as daemon:
        released = asyncio.Event()
        entered = asyncio.Event()
        once = daemon.sweeper.once

        async def stuck() -> float | None:
            entered.set()
            await released.wait()
            return await once()

        monkeypatch.setattr(daemon.sweeper, "once", stuck)
        daemon.sweeper.wake()
        await asyncio.wait_for(entered.wait(), 10)
        clock.advance(LATE_S + 1)
        status, report = await get(daemon, daemon.api)
        assert (status, report["status"], report["checks"]["sweeper"][0]["status"]) == (503, "fail", "fail")
        assert report["checks"]["dispatcher"][0]["status"] == "pass"
        released.set()

        async def passing() -> bool:
            return (await get(daemon, daemon.api))[0] == 200

        await until(passing)


# -- warnings for people


async def test_a_dead_delivery_warns(store: Store, checked: Health) -> None:
    store.sinks_of = lambda session: [NewDelivery("http", b"", "cannot be composed")]
    await end_session(store)
    found = await check(checked, "deliveries")
    assert (found["status"], found["dead"], found["pending"]) == ("warn", 1, 0)


async def test_an_old_backlog_warns(store: Store, checked: Health, clock: HandClock) -> None:
    await end_session(store)
    clock.advance(OLD_BACKLOG_S)
    await end_session(store, "newer")
    assert (await check(checked, "deliveries"))["status"] == "pass"
    clock.advance(1)
    found = await check(checked, "deliveries")
    assert (found["status"], found["pending"], found["oldestPendingSeconds"]) == ("warn", 2, OLD_BACKLOG_S + 1)


async def test_an_old_backlog_tells_whose_it_is_and_what_comes_next(
    tmp_path: Path, store: Store, clock: HandClock, pulses: dict[str, Pulse]
) -> None:
    silent, notified = (load(tmp_path / "config.toml", toml) for toml in (CONFIG, CONFIG + NOTIFY))
    in_force = notified
    health = health_of(tmp_path, store, clock, pulses, settings=lambda: in_force)
    await end_session(store)
    clock.advance(OLD_BACKLOG_S + 1)

    async def told() -> str:
        clock.advance(ASK_EVERY_S)
        report: Any = await health.report()
        found = report["checks"]["deliveries"][0]
        assert found["status"] == "warn"
        return str(found["output"])

    assert await told() == "acme (http): the oldest of 1 pending is 15 min old, due now, not tried yet"
    found = await store.session("acme", "s1")
    assert found is not None
    await store.settle(Settlement(found[1][0], "pending", 7_200_000, 1, {"at": 0, "error": "code_100"}))
    tried = f"tried next at {rfc3339(clock.wall_ms() + 7_200_000)[:19]}Z"
    assert await told() == f"acme (http): the oldest of 1 pending is 15 min old, {tried}, last error code_100"
    later_at = clock.wall_ms() + 9_000_000
    await store.set_gate("acme", lambda gate: replace(gate, not_before_at=later_at))
    assert f", tried next at {rfc3339(later_at)[:19]}Z, " in await told()
    await store.set_gate("acme", lambda gate: retry.hold(gate, clock.wall_ms(), "by_hand"))
    assert ", not tried while the operator is held, " in await told()
    in_force = silent
    assert ", not tried, because the file does not ask for it, " in await told()


@pytest.mark.parametrize(
    ("gate", "held", "broken"),
    [
        (Gate(held_at=1, held_reason="by_hand"), ["acme"], []),
        (Gate(failures=5, probe_at=2**42), [], ["acme"]),
        (Gate(failures=5), [], ["acme"]),
    ],
    ids=["held", "open", "half-open"],
)
async def test_an_operator_that_is_held_or_broken_warns(
    store: Store, checked: Health, gate: Gate, held: list[str], broken: list[str]
) -> None:
    await store.set_gate("acme", lambda known: gate)
    found = await check(checked, "operators")
    assert (found["status"], found["held"], found["broken"]) == ("warn", held, broken)
    await store.set_gate("acme", lambda known: replace(gate, held_at=None, failures=4))
    assert (await check(checked, "operators"))["status"] == "pass"


async def test_an_operator_that_left_the_file_warns_while_something_waits(
    store: Store, checked: Health, pulses: dict[str, Pulse]
) -> None:
    store.configured = frozenset({"acme", "old"})
    await store.open_session(Opening("old", "s1", "p", "t", None, 1000, 0))
    await store.open_session(Opening("old", "s2", "p", "t", None, 1000, 0))
    await store.end("old", "s2")
    found = await check(checked, "operators")
    assert (found["status"], found["held"], found["broken"]) == ("warn", [], [])
    assert found["notConfigured"] == [{"operator": "old", "live": 1, "pending": 1}]
    assert found["output"] == "old is not in the file, so its sessions and deliveries wait: 1 live, 1 pending"
    await store.set_gate("acme", lambda known: Gate(held_at=1, held_reason="by_hand"))
    found = await check(checked, "operators")
    assert found["output"].startswith(
        "old is not in the file, so its sessions and deliveries wait: 1 live, 1 pending; acme"
    )
    store.figures["old"] = Figures()
    await store.set_gate("acme", lambda known: Gate())
    assert (await check(checked, "operators"))["status"] == "pass"


async def test_a_lane_that_falls_behind_warns_by_name_with_its_figures(
    tmp_path: Path, store: Store, clock: HandClock, pulses: dict[str, Pulse]
) -> None:
    behind = {("acme", "http"): "2 a second come and 0.4 go"}
    health = health_of(tmp_path, store, clock, pulses, lambda: behind)
    found = await check(health, "deliveries")
    assert (found["status"], found["output"]) == ("warn", "acme (http) falls behind: 2 a second come and 0.4 go")
    behind.clear()
    assert (await check(health, "deliveries"))["status"] == "pass"


async def test_a_failed_reload_warns_until_one_succeeds(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG) as daemon:
        (tmp_path / "config.toml").write_text(LISTEN + CONFIG + "notify = 5\n")
        await daemon.daemon.reload_once()
        status, report = await get(daemon, daemon.api)
        assert (status, report["status"]) == (200, "warn")
        assert "operators.acme.notify" in report["checks"]["config"][0]["output"]
        (tmp_path / "config.toml").write_text(LISTEN + CONFIG)
        await daemon.daemon.reload_once()
        assert (await get(daemon, daemon.api))[1]["status"] == "pass"


async def test_the_worst_check_is_the_status(
    store: Store, checked: Health, pulses: dict[str, Pulse], clock: HandClock
) -> None:
    await store.set_gate("acme", lambda known: Gate(held_at=1))
    assert await checked.status() == "warn"
    pulses["sweeper"].working()
    clock.advance(LATE_S + 1)
    assert await checked.status() == "fail"


async def test_head_answers_like_get_without_a_body(tmp_path: Path) -> None:
    async with serving(tmp_path, CONFIG) as daemon, aiohttp.ClientSession() as client:
        for base in (daemon.api, daemon.server):
            async with client.head(base + "/health") as answer:
                assert (answer.status, await answer.read()) == (200, b"")


# -- the whole daemon: a part stalls, and /health and /metrics report it


async def metric(daemon: Serving, name: str) -> float:
    async with daemon.client.get(daemon.api + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")]
    return float(value)


@pytest.mark.parametrize(("loop", "verb"), [("sweeper", "end_due"), ("dispatcher", "claimable")])
async def test_a_loop_that_hangs_in_its_work_is_told(
    tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch, loop: str, verb: str
) -> None:
    """The call of the store that the loop awaits never returns, as after a bug or a lost wake-up."""
    entered = asyncio.Event()

    async def never(*_: Any, **__: Any) -> Any:
        entered.set()
        await asyncio.Event().wait()

    async with serving(tmp_path, CONFIG + NOTIFY, clock) as daemon:
        store = daemon.store
        monkeypatch.setattr(store, verb, never)
        await store.open_session(Opening("acme", "s", "p", "t", None, 1000, 0))
        if loop == "dispatcher":
            await store.end("acme", "s")
        else:
            for _ in range(3):
                clock.advance(1)
                store.service_clock.now_ms()
            daemon.sweeper.wake()
        await asyncio.wait_for(entered.wait(), 10)
        clock.advance(LATE_S + 1)
        status, report = await get(daemon, daemon.api)
        assert (status, report["checks"][loop][0]["status"]) == (503, "fail")
        assert await metric(daemon, f'lmdaemon_loop_late_seconds{{loop="{loop}"}}') > LATE_S
        assert daemon.parts.health.stuck  # the watchdog of systemd gets no sign of life


async def test_a_writer_that_hangs_is_told_and_asked_no_more_meanwhile(tmp_path: Path) -> None:
    limits = Limits(answer_within_s=0.2, store=StoreLimits(busy_timeout_s=60))
    async with serving(tmp_path, CONFIG, limits=limits) as daemon:
        store = daemon.store
        with locked(tmp_path / "lmdaemon.sqlite3"):
            writing = asyncio.ensure_future(store.probe())
            await until(lambda: store.writing_since)
            for _ in range(3):
                status, report = await get(daemon, daemon.api)
                assert (status, report["checks"]["store"][0]["status"]) == (503, "fail")
            assert report["checks"]["store"][0]["waiting"] <= 2
            assert await metric(daemon, "lmdaemon_store_transaction_seconds") > 0.1
        await writing

        async def passing() -> bool:
            return (await get(daemon, daemon.api))[0] == 200

        await until(passing)


async def test_who_asks_is_answered_though_the_next_question_comes_at_once(clock: HandClock) -> None:
    """Both questions come in the same turn of the event loop."""
    asked: list[asyncio.Future[int]] = []

    async def ask() -> int:
        asked.append(asyncio.get_running_loop().create_future())
        return await asked[-1]

    question = health.Question("it", ask, clock.monotonic)
    first = asyncio.create_task(question.answer())
    await until(lambda: asked)
    clock.advance(ASK_EVERY_S)
    asked[0].set_result(1)
    await until(lambda: question._task is not None and question._task.done())
    second = asyncio.create_task(question.answer())
    assert await first == 1
    await until(lambda: len(asked) == 2)
    asked[1].set_result(2)
    assert await second == 2


async def test_a_mass_expiry_is_told(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, CONFIG, clock) as daemon:
        store = daemon.store
        await asyncio.gather(
            *(store.open_session(Opening("acme", f"s{number}", "p", "t", None, 1000, 0)) for number in range(1200))
        )
        for _ in range(3):
            clock.advance(1)
            store.service_clock.now_ms()
        daemon.sweeper.wake()
        await until(lambda: store.live == 0)
        report = (await get(daemon, daemon.api))[1]
        expiry = report["checks"]["expiry"][0]
        assert (report["status"], expiry["status"], expiry["of"]) == ("warn", "warn", 1200)
        assert expiry["ended"] > 1000
        assert await metric(daemon, "lmdaemon_mass_expiry") == 1
        assert expiry["massExpired"] == ["acme"]
        assert expiry["output"].startswith("many sessions ended at once, at 2026-09-21T14:13:23Z; acme: ")
        assert await metric(daemon, 'lmdaemon_operator_mass_expiry{operator="acme"}') == 1


async def test_a_disk_that_will_soon_be_full_is_told(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, CONFIG, clock, Limits(low_share=2.0)) as daemon:
        report = (await get(daemon, daemon.api))[1]
        disk = report["checks"]["disk"][0]
        assert (report["status"], disk["status"]) == ("warn", "warn")
        assert disk["output"].endswith("B are free")
        assert await metric(daemon, "lmdaemon_disk_free_bytes") <= await metric(daemon, "lmdaemon_disk_size_bytes")


async def test_touches_that_stop_are_told_before_the_sessions_end(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, CONFIG, clock) as daemon:
        store = daemon.store
        names = [f"s{number}" for number in range(100)]
        await asyncio.gather(
            *(store.open_session(Opening("acme", name, "p", "t", None, 3_600_000, 0)) for name in names)
        )
        await store.touch("acme", names)
        idle_s = daemon.daemon.settings.operators["acme"].idle_s
        for _ in range(int(idle_s / 2) + 2):
            clock.advance(1)
            store.service_clock.now_ms()
        daemon.sweeper.wake()
        await until(lambda: daemon.sweeper.touch_alarm.silent)
        report = (await get(daemon, daemon.api))[1]
        expiry = report["checks"]["expiry"][0]
        assert (expiry["status"], expiry["touchesStopped"], expiry["massExpired"]) == ("warn", ["acme"], [])
        assert expiry["output"].startswith("acme: 100 sessions live, none touched for ")
        assert await metric(daemon, 'lmdaemon_operator_touches_stopped{operator="acme"}') == 1
        for name in names:
            await store.end("acme", name)
        expiry = (await get(daemon, daemon.api))[1]["checks"]["expiry"][0]
        assert (expiry["touchesStopped"], "output" in expiry) == ([], False)
        # The sweeper looks again although no session is live any more
        assert (await daemon.sweeper.once() or 60) <= TICK_S
        clock.advance(1)
        assert (await daemon.sweeper.once() or 60) > TICK_S
        assert daemon.sweeper.touch_alarm.silent == {}


async def test_ends_that_wait_for_touches_are_told_and_can_be_released(tmp_path: Path, clock: HandClock) -> None:
    config = CONFIG + 'idle_timeout = "10s"\nmass_expiry = "pause"\n'
    async with serving(tmp_path, config, clock) as daemon:
        store, sweeper = daemon.store, daemon.sweeper
        names = [f"s{number}" for number in range(100)]
        await asyncio.gather(*(store.open_session(Opening("acme", name, "p", "t", None, 10_000, 0)) for name in names))
        await store.touch("acme", names)
        with hear() as events:
            for _ in range(int(daemon.daemon.settings.restart_grace_s) + 12):
                clock.advance(1)
                store.service_clock.now_ms()
            sweeper.wake()
            await until(lambda: store.waits_until_ms("acme"))
            clock.advance(1)
            sweeper.wake()
            await until(lambda: sweeper.waiting)
            assert store.live == 100
            assert await metric(daemon, 'lmdaemon_operator_ends_waiting{operator="acme"}') == 1
            output = (await get(daemon, daemon.api))[1]["checks"]["expiry"][0]["output"]
            assert "their ends wait for " in output
            known = await store.session("acme", "s0")
            assert known is not None
            assert (sweeper.expires_at(known[0]) or 0) > clock.wall_ms() + 500_000
            for changed in (True, False):
                async with daemon.client.post(daemon.api + "/v1/operators/acme/release") as answer:
                    assert (await answer.json())["changed"] is changed
            for _ in range(61):
                clock.advance(1)
                store.service_clock.now_ms()
            sweeper.wake()
            await until(lambda: store.live == 0)
        named = [event.name for event in events]
        told = ["operator.touches_stopped", "operator.ends_wait", "operator.ends_released", "operator.mass_expired"]
        assert [name for name in named if name in told] == told[:3] + told[3:] * named.count(told[3])


async def test_a_backlog_that_grows_old_is_told(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, CONFIG, clock) as daemon:
        daemon.store.sinks_of = lambda session: [NewDelivery("http", b"{}")]
        await end_session(daemon.store)
        clock.advance(OLD_BACKLOG_S + 1)
        report = (await get(daemon, daemon.api))[1]
        assert report["checks"]["deliveries"][0]["status"] == "warn"
        name = 'lmdaemon_deliveries_oldest_pending_seconds{operator="acme"}'
        assert await metric(daemon, name) > OLD_BACKLOG_S


async def test_a_wal_that_cannot_start_over_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lmdaemon.sqlite3"
    async with serving(tmp_path, CONFIG, limits=Limits(store=StoreLimits(wal_max=50))) as daemon:
        with reading(path):
            await end_session(daemon.store)
            await daemon.store.probe()
            report = (await get(daemon, daemon.api))[1]
            assert (report["status"], report["checks"]["store"][0]["status"]) == ("warn", "warn")
            assert await metric(daemon, "lmdaemon_store_wal_bytes") > 100
