"""Three daemons lose the primary of their PostgreSQL under load, and its standby takes over. Nothing acknowledged is
lost.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import aiohttp
import psycopg
import pytest
from chance import FULL
from cluster import Cluster, cluster
from postgres import OwnServer, own_server
from processes import wait_for
from simulated import simulated_operator
from support import until
from witness import ANSWER_MS, OPERATOR, Witness, check, game_server, settled

SESSIONS = "SELECT id, reason FROM lmdaemon.session ORDER BY id"
IN_FLIGHT = 4  # the concurrency of a lane


@pytest.fixture
def primary() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


@pytest.fixture
def standby(primary: OwnServer) -> Iterator[OwnServer]:
    with own_server(of=primary) as own:
        yield own


def confirmed_by_standby(primary: OwnServer) -> None:
    """Makes every commit of the primary wait for the standby."""
    with psycopg.connect(primary.url, autocommit=True) as sql:
        sql.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        sql.execute("SELECT pg_reload_conf()")
        states = "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'standby'"
        wait_for(lambda: sql.execute(states).fetchall() == [("sync",)])


def strains(c: Cluster, name: str) -> str:
    """What the check `store` says in a daemon's `/health`."""
    return str(c.daemons[name].call("GET", f"{c.daemons[name].api}/health")[1]["checks"]["store"][0].get("output", ""))


@pytest.mark.parametrize(
    "is_silent", [False, True] if FULL else [True], ids=lambda silent: "silent" if silent else "refuses"
)
async def test_a_standby_takes_over_under_load_and_nothing_is_lost(
    primary: OwnServer,
    standby: OwnServer,
    tmp_path: Path,
    rng: Random,
    measured: Callable[..., None],
    is_silent: bool,
) -> None:
    """The primary is killed. Afterwards its machine refuses connections, or does not answer at all. The running daemons
    find the standby by themselves, and so does a daemon that starts then. If the old primary comes back as a primary,
    it acknowledges nothing, because no standby confirms its commits.
    """
    async with simulated_operator() as calm, simulated_operator("10%: error 100", seed=7) as moody:
        wallets = {"calm": calm, "moody": moody}
        toml = "".join(OPERATOR.format(name=name, url=one.url) for name, one in wallets.items())
        with cluster(primary, tmp_path, toml, standby=standby) as c:
            await asyncio.to_thread(wait_for, lambda: "a failover could lose" in strains(c, "a"))
            await asyncio.to_thread(confirmed_by_standby, primary)
            timeout = aiohttp.ClientTimeout(total=3)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
                witness, over = Witness(c, http), asyncio.Event()  # type: ignore[arg-type]

                async def acknowledged(more: int) -> None:
                    before = so_far(witness)
                    await until(lambda: so_far(witness) >= before + more, 60)

                async with asyncio.TaskGroup() as group:
                    for number in range(60 if FULL else 20):
                        chance = Random(rng.random())
                        group.create_task(game_server(witness, f"c{number}", list(wallets), chance, over))
                    await acknowledged(1000 if FULL else 200)
                    if is_silent:
                        for proxy in c.proxies.values():
                            proxy.mode = "swallow"
                    await asyncio.to_thread(primary.kill)
                    lost_s = asyncio.get_running_loop().time()
                    await asyncio.to_thread(standby.promote)
                    c.database = standby
                    await acknowledged(1)
                    back_s = asyncio.get_running_loop().time() - lost_s
                    await acknowledged(1000 if FULL else 200)
                    await asyncio.to_thread(c.daemons["a"].stop)
                    await asyncio.to_thread(c.start, "a")
                    assert "a failover could lose" not in await asyncio.to_thread(strains, c, "a")
                    over.set()
                await asyncio.to_thread(c.wait_for, *c.daemons)
                await settled(c, until)  # type: ignore[arg-type]
            if FULL:
                await asyncio.to_thread(assert_nothing_is_acknowledged_by, primary, c)
            figures = check(witness, wallets, sinks=1, may_repeat=2 * IN_FLIGHT * len(wallets), within_ms=ANSWER_MS)  # type: ignore[arg-type]
            for daemon in c.daemons.values():
                assert not daemon.events("daemon.expelled")
                assert await asyncio.to_thread(daemon.stop) == 0
    measured(back_s=round(back_s, 1), acknowledged=so_far(witness), unanswered=witness.gone, **figures, lost=0)


def assert_nothing_is_acknowledged_by(old: OwnServer, c: Cluster) -> None:
    """The old primary comes back as a primary by mistake. A daemon that starts on it acknowledges nothing."""
    for proxy in c.proxies.values():
        proxy.mode = "pass"
    old.start()
    with psycopg.connect(old.url, autocommit=True) as sql:
        before = sql.execute(SESSIONS).fetchall()
        assert c.daemons["a"].stop() == 0
        c.daemons["a"].spawn()  # the daemon tries the old primary first, which accepts writes
        assert c.daemons["a"].popen.wait(60) == 1
        (told,) = c.daemons["a"].events("daemon.failed")
        assert "no answer within" in told["reason"]
        url = f"{c.daemons['b'].api}/v1/operators/calm/sessions/meanwhile"
        assert c.daemons["b"].call("PUT", url, {"playerId": "p", "token": "tok-3n"})[0] == 201
        assert c.daemons["c"].call("POST", f"{url}/close")[0] == 200
        assert sql.execute(SESSIONS).fetchall() == before
    old.stop("immediate")
    c.start("a")
    wait_for(lambda: not c.rows("SELECT 1 FROM delivery WHERE state <> 'delivered'"))


def so_far(witness: Witness) -> int:
    """The number of answers that acknowledged something."""
    return sum(times for (_, status), times in witness.answers.items() if status < 300)
