"""`/metrics`: each event is counted by the part that it happens in, and the number of series is limited."""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from clocks import HandClock
from faults import unreachable
from support import LISTEN, Serving, load, operator_table, scrape, scripted_operator, serving, until

from lmdaemon.delivery.lanes import Lane
from lmdaemon.limits import Limits, StoreLimits
from lmdaemon.metrics import Metrics, _Process
from lmdaemon.model import HTTP_SINK, Gate
from lmdaemon.store.contract import Opening, StoreError

ACME = """
[operators.acme]
provider_id = "luckymonaco"
"""
NOTIFY = 'notify = true\nurl = "{url}"\nallow_private_network = true\nschedule = ["1h"]\n'
NO_GRACE = '[sessions]\nrestart_grace = "0s"\n'
SESSION = {"playerId": "p", "token": "tok-3n"}
NOTICE = {"providerId": "luckymonaco", "sessionId": "told", "externalPlayerId": "p", "token": "tok-3n"}


async def call(daemon: Serving, method: str, path: str, **options: object) -> int:
    async with daemon.client.request(method, daemon.api + path, **options) as answer:  # type: ignore[arg-type]
        await answer.read()
        return answer.status


async def notify(daemon: Serving, **fields: str) -> int:
    async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=NOTICE | fields) as answer:
        await answer.read()
        return answer.status


async def test_opens_touches_and_ends_are_counted_by_operator(tmp_path: Path) -> None:
    async with serving(tmp_path, ACME) as d:
        path = "/v1/operators/acme/sessions"
        before = await scrape(d)
        # A series exists from the start, so that its first event shows as an increase
        assert before['lmdaemon_sessions_opened_total{operator="acme"}'] == 0
        assert before['lmdaemon_sessions_ended_total{operator="acme",reason="inactivity"}'] == 0
        for name in ("s-1", "s-2"):
            assert await call(d, "PUT", f"{path}/{name}", json=SESSION) == 201
        assert await call(d, "PUT", f"{path}/s-1", json=SESSION) == 200  # a touch
        assert await call(d, "POST", f"{path}/s-1/touch") == 204
        assert await call(d, "POST", f"{path}/touch", json={"sessionIds": ["s-1", "s-2", "none"]}) == 200
        assert await call(d, "POST", f"{path}/s-1/close") == 200
        assert await call(d, "POST", f"{path}/s-1/touch") == 410
        assert await notify(d, sessionId="s-2") == 200
        after = await scrape(d)
    assert after['lmdaemon_sessions_opened_total{operator="acme"}'] == 2
    assert after['lmdaemon_touches_total{operator="acme"}'] == 4
    assert after['lmdaemon_sessions_ended_total{operator="acme",reason="closed"}'] == 1
    assert after['lmdaemon_sessions_ended_total{operator="acme",reason="reported"}'] == 1
    assert after['lmdaemon_api_errors_total{status="410"}'] == 1


async def test_the_lag_of_an_expiry_is_measured(tmp_path: Path) -> None:
    async with serving(tmp_path, NO_GRACE + ACME) as d:
        body = SESSION | {"idleTimeoutSeconds": 1}
        assert await call(d, "PUT", "/v1/operators/acme/sessions/s", json=body) == 201
        await until(lambda: d.store.live == 0)
        after = await scrape(d)
    assert after["lmdaemon_expiry_lag_seconds_count"] == 1
    assert after["lmdaemon_event_loop_lag_seconds_count"] >= 1


async def test_attempts_are_counted_and_timed_by_operator_and_sink(tmp_path: Path) -> None:
    refused = {"error": 100, "description": "later"}
    async with scripted_operator(refused) as operator:
        async with serving(tmp_path, ACME + NOTIFY.format(url=operator.url)) as d:
            for session in ("a", "b"):
                assert await notify(d, sessionId=session) == 200
                await operator.wait_for(1 if session == "a" else 2)
            await until(lambda: d.store.figures["acme"].pending == 1)
            after = await scrape(d)
    lane = 'operator="acme",'
    assert after[f'lmdaemon_delivery_attempts_total{{{lane}outcome="delivered",sink="http"}}'] == 1
    assert after[f'lmdaemon_delivery_attempts_total{{{lane}outcome="retry",sink="http"}}'] == 1
    assert after[f'lmdaemon_delivery_attempts_total{{{lane}outcome="final",sink="http"}}'] == 0
    assert after[f'lmdaemon_delivery_attempt_duration_seconds_count{{{lane}sink="http"}}'] == 2
    assert after[f'lmdaemon_deliveries_overdue_seconds{{{lane}sink="http"}}'] == 0


async def test_a_delivery_that_waits_for_a_slot_is_overdue(tmp_path: Path, clock: HandClock) -> None:
    """A delivery whose operator is held or paused is not overdue."""
    go_on = asyncio.Event()

    async def slow(_: object) -> dict[str, int]:
        await go_on.wait()
        return {"error": 0}

    async with scripted_operator(slow) as operator:
        toml = ACME + NOTIFY.format(url=operator.url) + "concurrency = 1\n"
        async with serving(tmp_path, toml, clock) as d:
            lane = '{operator="acme",sink="http"}'
            assert await notify(d, sessionId="a") == 200
            await operator.wait_for(1)
            assert await notify(d, sessionId="b") == 200
            clock.advance(7)
            waits = await scrape(d)
            assert waits[f"lmdaemon_deliveries_in_flight{lane}"] == 1
            assert waits[f"lmdaemon_deliveries_overdue_seconds{lane}"] == 7
            assert await call(d, "POST", "/v1/operators/acme/hold") == 200
            held = await scrape(d)
            assert held[f"lmdaemon_deliveries_overdue_seconds{lane}"] == 0
            assert held['lmdaemon_operator_held{operator="acme"}'] == 1
            go_on.set()


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    """The lane of an operator's URL."""
    operator = load(tmp_path / "config.toml", LISTEN + operator_table("acme", "http://127.0.0.1:1/")).operators["acme"]
    return Lane(operator, HTTP_SINK, operator.policy, None)


def test_the_time_for_which_an_operator_was_kept_back_is_not_overdue(lane: Lane, clock: HandClock) -> None:
    now_at = clock.wall_ms()
    lane.next_due_at = now_at - 60_000
    assert lane.overdue_s(Gate(), now_at) == 60
    assert lane.overdue_s(Gate(not_before_at=now_at - 1000), now_at) == 1
    assert lane.overdue_s(Gate(not_before_at=now_at + 1000), now_at) == 0
    lane.next_due_at = 0  # the lane does not know yet when its next delivery is due
    assert lane.overdue_s(Gate(), now_at) == 0


def test_a_wait_is_told_also_while_the_next_rows_are_read(lane: Lane, clock: HandClock) -> None:
    now_at = clock.wall_ms()
    lane.next_due_at = now_at - 60_000
    lane.look_again(now_at)
    assert (lane.next_due_at, lane.overdue_s(Gate(), now_at)) == (0, 60)
    lane.begin_reading()
    assert (lane.next_due_at, lane.overdue_s(Gate(), now_at)) == (None, 60)
    lane.end_reading()
    assert lane.overdue_s(Gate(), now_at) == 0


async def test_an_operator_that_leaves_the_file_takes_its_series_along(tmp_path: Path) -> None:
    """The series disappear once no delivery of the operator waits."""
    async with serving(tmp_path, ACME + NOTIFY.format(url="http://127.0.0.1:1/")) as d:
        path = "/v1/operators/acme"
        assert await call(d, "POST", path + "/hold") == 200
        assert await call(d, "PUT", path + "/sessions/s", json=SESSION) == 201
        assert await call(d, "POST", path + "/sessions/s/close") == 200
        assert await notify(d, sessionId="s") == 200
        (tmp_path / "config.toml").write_text(LISTEN + ACME.replace("acme", "other"))
        await d.daemon.reload_once()
        after = await scrape(d)
        kept = {series.partition("{")[0] for series in after if 'operator="acme"' in series}
        assert kept == {
            "lmdaemon_sessions_live",
            "lmdaemon_deliveries_pending",
            "lmdaemon_deliveries_dead",
            "lmdaemon_deliveries_oldest_pending_seconds",
            "lmdaemon_operator_held",
            "lmdaemon_operator_held_since_timestamp_seconds",
            "lmdaemon_operator_breaker_state",
            "lmdaemon_operator_breaker_since_timestamp_seconds",
            "lmdaemon_operator_mass_expiry",
            "lmdaemon_operator_touches_stopped",
            "lmdaemon_operator_ends_waiting",
            "lmdaemon_operator_not_before_timestamp_seconds",
        }
        assert 'lmdaemon_touches_total{operator="other"}' in after
        d.metrics.touched("acme", 1)  # a request that had begun before the reload still counts
        d.store.figures["acme"].pending = 0

        async def gone() -> bool:  # the lane asks for the age of its oldest delivery once a second
            return not [series for series in await scrape(d) if 'operator="acme"' in series]

        await until(gone)


def test_a_sink_that_leaves_the_file_takes_its_series_along() -> None:
    metrics = Metrics()
    metrics.configure(["acme"], [("acme", "http"), ("acme", "plugin:x")], ["closed"])
    metrics.attempted("acme", "plugin:x", "delivered", 0.1)
    assert b"plugin:x" in metrics.text()
    metrics.configure(["acme"], [("acme", "http")], ["closed"])
    metrics.attempted("acme", "plugin:x", "delivered", 0.1)
    assert b"plugin:x" not in metrics.text()


async def test_refusals_are_counted_by_their_reason(tmp_path: Path) -> None:
    limits = Limits(store=StoreLimits(queue_max=0, looks_max=0, reads_max=1))
    async with serving(tmp_path, ACME, limits=limits) as d:
        store = d.store
        before = await scrape(d)
        assert await notify(d) == 503
        assert await call(d, "PUT", "/v1/operators/acme/sessions/s", json=SESSION) == 503
        assert await call(d, "GET", "/v1/operators/acme/sessions/s") == 503
        read = [store.oldest_pending(["acme"]) for _ in range(2)]
        assert [type(result) for result in await asyncio.gather(*read, return_exceptions=True)] == [dict, StoreError]
        with pytest.raises(StoreError):
            await store.db.reads.read(lambda sql: sql.execute("SELECT * FROM nothing"))
        after = await scrape(d)
    queue_full = 'lmdaemon_store_refused_operations_total{reason="queue_full"}'
    assert after[queue_full] - before[queue_full] == 2
    assert after['lmdaemon_store_refused_operations_total{reason="readers_full"}'] == 2
    assert after['lmdaemon_store_refused_operations_total{reason="reading_failed"}'] == 1
    assert after['lmdaemon_store_refused_operations_total{reason="writing_failed"}'] == 0
    assert after['lmdaemon_notices_not_taken_total{status="503"}'] == 1
    assert after['lmdaemon_api_errors_total{status="503"}'] == 2


async def test_a_disk_that_refuses_shows_in_the_counters_and_in_the_clock(tmp_path: Path) -> None:
    async with serving(tmp_path, ACME) as d:
        with unreachable(tmp_path):
            assert await notify(d) == 503
            failing = await scrape(d)
        assert failing["lmdaemon_store_writable"] == 0
        assert failing['lmdaemon_service_clock_frozen{reason="store"}'] == 1
        assert failing['lmdaemon_store_refused_operations_total{reason="writing_failed"}'] >= 1
        assert await notify(d) == 200
        works = await scrape(d)
        assert works['lmdaemon_service_clock_frozen{reason="store"}'] == 0
        assert works["lmdaemon_store_writable"] == 1


async def test_batches_and_commits_are_measured_and_the_files_have_their_sizes(tmp_path: Path) -> None:
    # No checkpoint in this test: it would make the file grow between the scrape and the look at its size
    limits = Limits(store=StoreLimits(checkpoint_s=3600))
    async with serving(tmp_path, ACME, limits=limits) as d:
        store = d.store
        before = await scrape(d)
        opened = [store.open_session(Opening("acme", f"s{n}", "p", "t", None, 60_000, 0)) for n in range(30)]
        await asyncio.gather(*opened)
        await store.probe()
        made = store.db.writer.commits
        after = await scrape(d)
        commits = after["lmdaemon_store_commit_duration_seconds_count"]
        assert commits > before["lmdaemon_store_commit_duration_seconds_count"]
        assert commits == after["lmdaemon_store_batch_operations_count"]
        assert made <= commits <= store.db.writer.commits  # the daemon also commits for itself, as for the clock
        operations = after["lmdaemon_store_batch_operations_sum"] - before["lmdaemon_store_batch_operations_sum"]
        assert operations >= 31
        assert after["lmdaemon_store_file_bytes"] == (tmp_path / "lmdaemon.sqlite3").stat().st_size
        assert 0 < after["lmdaemon_store_wal_bytes"] <= (tmp_path / "lmdaemon.sqlite3-wal").stat().st_size


async def test_connections_and_those_turned_away_are_counted_by_listener(tmp_path: Path) -> None:
    async with serving(tmp_path, ACME) as d:
        before = await scrape(d)
        assert before['lmdaemon_http_connections{listener="api"}'] >= 1
        d.sites["server"].most = 0
        host, port = d.server.removeprefix("http://").split(":")

        def knock() -> bytes:
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                return connection.recv(64)

        assert (await asyncio.to_thread(knock)).startswith(b"HTTP/1.1 503")
        after = await scrape(d)
    assert after['lmdaemon_http_connections_refused_total{limit="listener",listener="server"}'] == 1
    assert after['lmdaemon_http_connections_refused_total{limit="address",listener="server"}'] == 0
    assert after['lmdaemon_http_connections_refused_total{limit="listener",listener="api"}'] == 0


async def test_a_failed_reload_leaves_the_time_of_the_last_good_one(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, ACME, clock) as d:
        started_at = clock.wall_ms() / 1000
        clock.advance(60)
        (tmp_path / "config.toml").write_text("nonsense = 1")
        await d.daemon.reload_once()
        failed = await scrape(d)
        assert failed["lmdaemon_config_last_reload_successful"] == 0
        assert failed["lmdaemon_config_last_reload_success_timestamp_seconds"] == started_at
        (tmp_path / "config.toml").write_text(LISTEN + ACME)
        await d.daemon.reload_once()
        good = await scrape(d)
        assert good["lmdaemon_config_last_reload_successful"] == 1
        assert good["lmdaemon_config_last_reload_success_timestamp_seconds"] == started_at + 60


async def test_a_stall_is_counted_in_seconds(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, ACME, clock) as d:
        assert await call(d, "PUT", "/v1/operators/acme/sessions/s", json=SESSION) == 201
        await until(lambda: d.sweeper._ticking)
        clock.advance(30)
        d.sweeper.wake()
        await until(lambda: d.sweeper.lost_s)
        assert (await scrape(d))["lmdaemon_stalled_seconds_total"] == 30


def test_the_process_is_measured_where_most_of_proc_is_hidden(tmp_path: Path) -> None:
    """The systemd unit hides everything in /proc except processes."""
    (tmp_path / "self").symlink_to(f"/proc/{os.getpid()}")
    values = {
        sample.name: sample.value
        for metric in _Process(proc=str(tmp_path), registry=None).collect()
        for sample in metric.samples
    }
    stat = Path("/proc/stat").read_text()
    booted_at = int(stat.partition("\nbtime ")[2].split()[0])
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert values["process_start_time_seconds"] == pytest.approx(booted_at + ticks / os.sysconf("SC_CLK_TCK"), abs=10)
    assert values["process_resident_memory_bytes"] > 1e6
    assert values["process_open_fds"] > 2
