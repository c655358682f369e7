"""Daemons of two versions on one database: they run side by side through a migration, and a migration that older
programs cannot use keeps the older ones out.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import aiohttp
import psycopg
import pytest
from chance import FULL
from cluster import cluster
from postgres import OwnServer, own_server
from processes import AS_USERS_DO, Process, wait_for
from simulated import simulated_operator
from support import until
from witness import ANSWER_MS, OPERATOR, Witness, check, game_server, settled

from lmdaemon.limits import LIMITS
from lmdaemon.store.postgres.versions import MIGRATIONS

NEWER = (sys.executable, str(Path(__file__).parent / "newer.py"))
KNOWN = len(MIGRATIONS)
# A change of the schema that older versions need not know of, so that they can still use the database.
ADDS = """
ALTER TABLE session ADD COLUMN of_the_next text; ALTER TABLE member ADD COLUMN of_the_next bigint NOT NULL DEFAULT 0;
CREATE TABLE of_the_next (x int); CREATE INDEX session_of_the_next ON session (of_the_next)"""
VERSION = "SELECT current, oldest FROM lmdaemon.version"


@pytest.fixture
def database() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


async def test_one_after_the_other_is_upgraded_under_load(
    database: OwnServer, tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    """The first daemon of the new version adds to the schema. Daemons of the old version go on, and can be restarted.
    No notice is sent twice, and no daemon is expelled.
    """
    async with simulated_operator() as calm, simulated_operator("10%: error 100", seed=3) as moody:
        wallets = {"calm": calm, "moody": moody}
        toml = "".join(OPERATOR.format(name=name, url=one.url) for name, one in wallets.items())
        with cluster(database, tmp_path, toml) as c:
            timeout = aiohttp.ClientTimeout(total=3)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
                witness, over = Witness(c, http), asyncio.Event()  # type: ignore[arg-type]

                async def again(name: str) -> None:
                    assert await asyncio.to_thread(c.daemons[name].stop) == 0
                    await asyncio.to_thread(c.start, name)
                    before = sum(witness.answers.values())
                    await until(lambda: sum(witness.answers.values()) > before + 100, 60)

                async with asyncio.TaskGroup() as group:
                    for number in range(60 if FULL else 16):
                        chance = Random(rng.random())
                        group.create_task(game_server(witness, f"c{number}", list(wallets), chance, over))
                    for number, name in enumerate("abc"):
                        c.daemons[name].command = NEWER
                        c.daemons[name].environment["MORE"] = ADDS
                        await again(name)
                        if number == 0:
                            assert c.rows(VERSION)[0][0] == KNOWN + 1
                            await again("b")  # of the old version
                    over.set()
                await asyncio.to_thread(c.wait_for, *c.daemons)
                await settled(c, until)  # type: ignore[arg-type]
            figures = check(witness, wallets, sinks=1, may_repeat=0, within_ms=ANSWER_MS)  # type: ignore[arg-type]
            assert [len(c.events(name)) for name in ("store.migrated", "daemon.expelled")] == [1, 0]
            for daemon in c.daemons.values():
                assert await asyncio.to_thread(daemon.stop) == 0
    measured(unanswered=witness.gone, **figures, lost=0)


def of_version(directory: Path, database: OwnServer, *, newer: bool) -> Process:
    """A daemon of this version, or one of the next version, whose schema older ones cannot use."""
    directory.mkdir()
    more = {"MORE": "CREATE TABLE of_the_next (x int)", "OLDEST": str(KNOWN + 1)}
    toml = f'[database]\nurl = "{database.url}"\n[log]\nformat = "json"\n{OPERATOR.format(name="acme", url="http://127.0.0.1:9")}'
    return Process(directory, toml, more, NEWER) if newer else Process(directory, toml)


def failed(daemon: Process) -> str:
    """The reason for which a daemon has ended with exit code 1."""
    assert daemon.popen.wait(60) == 1
    return str(daemon.events("daemon.failed")[-1]["reason"])


def test_a_migration_that_excludes_older_daemons_keeps_them_out(database: OwnServer, tmp_path: Path) -> None:
    """The migration is refused while an older daemon runs. An older daemon that was suspended during it does not join
    again, and none can start.
    """
    older, newer = (of_version(tmp_path / name, database, newer=name == "newer") for name in ("older", "newer"))
    older.start()
    url = f"{older.api}/v1/operators/acme/sessions/s"
    try:
        assert older.call("PUT", url, {"playerId": "p", "token": "tok-3n"})[0] == 201
        newer.spawn()
        assert "is in use by an older lmdaemon (" in failed(newer)
        older.popen.send_signal(signal.SIGSTOP)
        newer.start()
        older.popen.send_signal(signal.SIGCONT)
        kept_out = f"was set up by a newer lmdaemon (schema {KNOWN + 1}; this one knows {KNOWN})"
        assert kept_out in failed(older)
        older.spawn()
        assert kept_out in failed(older)
        assert newer.call("POST", f"{newer.api}/v1/operators/acme/sessions/s/touch")[0] == 204
        assert newer.stop() == 0
    finally:
        older.kill()
        newer.kill()


def test_a_migration_that_is_killed_halfway_is_done_by_the_next(database: OwnServer, tmp_path: Path) -> None:
    """Two programs migrate at the same moment. One of them does it, and the other waits and finds it done."""
    config = tmp_path / "config.toml"
    config.write_text(f'[database]\nurl = "{database.url}"\n')

    def migrating(*command: str) -> "subprocess.Popen[str]":
        more = f"CREATE TABLE of_the_next (x int); SELECT pg_sleep({LIMITS.store.lease_s / 2})"
        environment = os.environ | {"MORE": more}
        started = [*command, "--config", str(config), "migrate"]
        return subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, text=True)

    migrating(*AS_USERS_DO).communicate(timeout=60)
    with psycopg.connect(database.url, autocommit=True) as sql:
        killed = migrating(*NEWER)
        sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        wait_for(lambda: sql.execute(sleeping).fetchall())
        killed.kill()
        killed.communicate()
        assert sql.execute(VERSION).fetchall()[0][0] == KNOWN
        both = [migrating(*NEWER) for _ in range(2)]
        said = sorted(one.communicate(timeout=60)[0].rpartition(": ")[2].strip() for one in both)
        assert said == ["nothing to do", f"schema {KNOWN + 1}"]
        assert sql.execute(VERSION).fetchall()[0][0] == KNOWN + 1
