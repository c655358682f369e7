"""A daemon process on a PostgreSQL database under load: killed, stopped and expelled, and its server crashed."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest
from postgres import OwnServer, own_server
from processes import Process, wait_for
from simulated import Simulated, simulated_beside
from support import operator_table

from lmdaemon.store.writer import PROBE_S
from lmdaemon.workbench.journal import missed


class Load:
    """Game servers that open sessions and close every second one, and note what was acknowledged."""

    def __init__(self, daemon: Process) -> None:
        self.daemon = daemon
        self.opened: set[str] = set()
        self.closed: set[str] = set()
        self.refused = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._play, args=(number,)) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def _play(self, player: int) -> None:
        base = f"{self.daemon.api}/v1/operators/acme/sessions"
        number = 0
        while not self._stopping.wait(0.001):
            number += 1
            name = f"p{player}-{number}"
            with suppress(OSError):  # nobody answers, so nothing was acknowledged
                status, _ = self.daemon.call("PUT", f"{base}/{name}", {"playerId": "p", "token": "tok-3n"})
                assert status in (201, 503)
                self.refused += status == 503
                if status == 201:
                    self.opened.add(name)
                    if number % 2 and self.daemon.call("POST", f"{base}/{name}/close")[0] == 200:
                        self.closed.add(name)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


@pytest.fixture
def wallet() -> Iterator[Simulated]:
    with simulated_beside() as opened:
        yield opened


def daemon_on(server: OwnServer, wallet: Simulated, directory: Path) -> Process:
    directory.mkdir()
    toml = f'[database]\nurl = "{server.url}"\n[log]\nformat = "json"\n' + operator_table("acme", wallet.url)
    return Process(directory, toml)


def rows(server: OwnServer, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.url, autocommit=True) as sql:
        return sql.execute(statement).fetchall()  # type: ignore[arg-type]


def assert_nothing_lost(server: OwnServer, wallet: Simulated, load: Load) -> None:
    """What was acknowledged is stored. Each ended session has one delivery, and its notice has one id."""
    wait_for(lambda: not rows(server, "SELECT 1 FROM lmdaemon.delivery WHERE state = 'pending' LIMIT 1"))
    assert len(load.opened) > 50
    reasons = dict(rows(server, "SELECT session_id, reason FROM lmdaemon.session"))
    assert load.opened <= reasons.keys()
    assert {reasons[name] for name in load.closed} <= {"closed"}
    ended = {name for name, reason in reasons.items() if reason}
    deliveries = rows(
        server,
        "SELECT s.session_id, count(*) FROM lmdaemon.delivery d JOIN lmdaemon.session s ON s.id = d.session GROUP BY 1",
    )
    assert dict(deliveries) == dict.fromkeys(ended, 1)
    assert wallet.journal.sessions.keys() == ended
    assert missed(wallet.journal.tally, {}) == [], wallet.journal.evidence
    counted = "SELECT sum(live)::int, sum(pending)::int, sum(dead)::int FROM lmdaemon.figure"
    assert rows(server, counted) == [(len(reasons) - len(ended), 0, 0)]


def test_kills_under_load_lose_nothing_and_double_no_end(server: OwnServer, wallet: Simulated, tmp_path: Path) -> None:
    random = Random(7)
    daemon = daemon_on(server, wallet, tmp_path / "a")
    daemon.start()
    load = Load(daemon)
    try:
        for _ in range(3):
            before = len(load.opened)
            wait_for(lambda before=before: len(load.opened) > before + random.randrange(20, 60))  # type: ignore[misc]
            daemon.kill()
            daemon.start()
    finally:
        load.stop()
    assert_nothing_lost(server, wallet, load)
    assert daemon.stop() == 0


def test_crashes_of_the_server_under_load_lose_nothing(server: OwnServer, wallet: Simulated, tmp_path: Path) -> None:
    daemon = daemon_on(server, wallet, tmp_path / "a")
    daemon.start()
    load = Load(daemon)
    try:
        for _ in range(3):
            before = len(load.opened)
            wait_for(lambda before=before: len(load.opened) > before + 40)  # type: ignore[misc]
            server.stop("immediate")
            wait_for(lambda: daemon.events("store.failing"))
            server.start()
            daemon.wait_until_serving()
    finally:
        load.stop()
    assert_nothing_lost(server, wallet, load)
    assert daemon.stop() == 0


def test_one_that_was_stopped_and_replaced_ends_and_sends_nothing_more(
    server: OwnServer, wallet: Simulated, tmp_path: Path
) -> None:
    """To the other daemons, SIGSTOP looks like a machine that is suspended."""
    first, second = (daemon_on(server, wallet, tmp_path / name) for name in "ab")
    first.start()
    load = Load(first)
    wait_for(lambda: len(load.closed) > 40)
    load.stop()
    first.popen.send_signal(signal.SIGSTOP)
    second.start()
    base = f"{second.api}/v1/operators/acme/sessions"
    left = sorted(load.opened - load.closed)
    assert len(left) > 5
    for name in left:
        assert second.call("POST", f"{base}/{name}/close")[0] == 200
        load.closed.add(name)
    first.popen.send_signal(signal.SIGCONT)
    # The daemon that was stopped has joined again by itself
    wait_for(lambda: len(rows(server, "SELECT name FROM lmdaemon.member")) == 2)
    assert_nothing_lost(server, wallet, load)
    assert [first.stop(), second.stop()] == [0, 0]


def no_room(server: OwnServer) -> Path:
    """Fills the server's disk. Returns the file that must be deleted to free it."""
    ballast = server.directory / "data" / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    return ballast


def test_a_full_disk_of_the_server_refuses_and_loses_nothing(wallet: Simulated, tmp_path: Path) -> None:
    """First there is no space for new rows. They are answered with 503 and the reason is named, although small writes
    still fit. Then there is no space for the write-ahead log, and the server ends itself. Each time, work goes on once
    there is space again.
    """
    with own_server(disk_mib=160) as server:
        daemon = daemon_on(server, wallet, tmp_path / "a")
        daemon.start()
        load = Load(daemon)
        try:
            wait_for(lambda: len(load.opened) > 50)
            ballast = no_room(server)
            (failing,) = wait_for(lambda: daemon.events("store.failing"))
            assert "No space left on device" in failing["reason"]
            status, health = daemon.call("GET", f"{daemon.api}/health")
            assert (status, "No space left on device" in health["checks"]["store"][0]["output"]) == (503, True)
            refused = load.refused
            wait_for(lambda: load.refused > refused + 100)
            time.sleep(2 * PROBE_S)  # in this time the daemon has tried small writes
            assert daemon.events("store.recovered") == []
            ballast.unlink()
            wait_for(lambda: daemon.events("store.recovered"))
            opened = len(load.opened)
            wait_for(lambda: len(load.opened) > opened + 20)

            ballast = no_room(server)
            with suppress(psycopg.Error), psycopg.connect(server.url, autocommit=True) as sql:
                while True:  # begins new files of the log until there is no space for another
                    sql.execute("SELECT pg_logical_emit_message(false, '', 'x'), pg_switch_wal()")
            wait_for(server.is_down)
            ballast.unlink()
            server.start()
            wait_for(lambda: len(daemon.events("store.recovered")) == 2)
            load.stop()
            assert_nothing_lost(server, wallet, load)
            assert daemon.stop() == 0
        finally:
            load.stop()
            daemon.kill()
