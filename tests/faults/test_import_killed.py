"""`lmdaemon import`, killed at any of its statements, several times. The same command continues the import and doubles
nothing.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from random import Random

import psycopg
import pytest
from chance import FULL
from clocks import HandClock
from engines import PostgresEngine, SqliteEngine
from operations import BODY, opening
from postgres import OwnServer, own_server

from lmdaemon.store.contract import NewDelivery
from lmdaemon.store.postgres.importing import ROWS

STATEMENTS = 34  # how many statements an import of this file takes
KILLED = Path(__file__).parent / "killed.py"


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


async def fill(file: SqliteEngine, clock: HandClock) -> None:
    """Makes a file whose import takes three steps for sessions and two for deliveries."""
    async with file.open(clock) as db:
        db.configured, db.sinks_of = frozenset({"acme"}), lambda session: [NewDelivery("http", BODY)]
        names = [f"s{number}" for number in range(2 * ROWS + 100)]
        await asyncio.gather(*(db.open_session(opening(name)) for name in names))
        await asyncio.gather(*(db.end("acme", name) for name in names[: ROWS + 100]))


async def test_an_import_killed_at_any_statement_is_finished_by_the_next(
    server: OwnServer, tmp_path: Path, clock: HandClock, rng: Random, measured: Callable[..., None]
) -> None:
    await fill(file := SqliteEngine(tmp_path), clock)
    config = tmp_path / "config.toml"

    def moved(kill_at: int) -> int:
        command = [sys.executable, str(KILLED), "--config", str(config), "import", str(file.path)]
        environment = os.environ | {"KILL_AT": str(kill_at)}
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode

    kills = 0
    for database in (f"d{number}" for number in range(12 if FULL else 1)):
        url = f"postgresql://postgres@127.0.0.1:{server.port}/{database}"
        config.write_text(f'[database]\nurl = "{url}"\n')
        with psycopg.connect(server.url, autocommit=True) as sql:
            sql.execute(f"CREATE DATABASE {database}")
        ended = [moved(place) for place in rng.sample(range(1, STATEMENTS), 3)]
        assert set(ended) <= {0, -signal.SIGKILL}  # exit code 0: the import had fewer statements left to do
        kills += ended.count(-signal.SIGKILL)
        assert moved(0) == 0
        with closing(PostgresEngine(url)) as engine:
            for table in ("session", "delivery"):
                old, new = (one.rows(table) for one in (file, engine))  # type: ignore[arg-type]
                assert sorted(new, key=itemgetter("id")) == sorted(old, key=itemgetter("id"))
    assert kills > 0
    measured(kills=kills, lost=0, doubled=0)
