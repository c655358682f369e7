"""Three daemons on one PostgreSQL database. Each is killed, stopped, cut off and asked to leave, and so is the server.
Nothing acknowledged is lost, each session ends once and never early, and each operator is told once.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from chance import FULL
from cluster import Cluster, cluster
from postgres import OwnServer, own_server
from processes import AS_USERS_DO, Process, free_ports, wait_for
from simulated import Simulated, simulated_operator
from support import until
from witness import ANSWER_MS, OPERATOR, Witness, check, game_server, settled

# The promised time, in seconds, after which the operators of a killed daemon are served by another one
TAKEOVER_S = 20.0
IN_FLIGHT = 4  # the concurrency of a lane
MOODS = {"calm": "ok", "moody": "10%: error 100", "ill": "30%: error 100", "slow": "delay 50ms"}


def _served() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


database = pytest.fixture(_served, scope="module", name="database")
own_database = pytest.fixture(_served, name="own_database")


# -- an operator's server that counts requests


class Counting(ThreadingHTTPServer):
    """Answers after `takes_s` seconds. Notes how many requests it had at the same time, and the session of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Counted)
        self.url = f"http://127.0.0.1:{self.server_port}/V4/SessionExpired"
        self.takes_s = 0.0
        self.answer = b'{"error":0}'
        self.at_once = self.most = 0
        self.sessions: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Counted(BaseHTTPRequestHandler):
    server: Counting

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        session = body.partition('"sessionId":"')[2].partition('"')[0]
        with self.server.lock:
            self.server.sessions.append(session)
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        time.sleep(self.server.takes_s)
        with self.server.lock:
            self.server.at_once -= 1
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.answer)

    def log_message(self, *_: Any) -> None:
        pass


HOOK = """
import asyncio, json, urllib.request

class Lobby:
    def __init__(self, options):
        self.url = options["url"]

    async def session_ended(self, event):
        body = json.dumps({"sessionId": event.session_id}, separators=(",", ":")).encode()
        await asyncio.to_thread(lambda: urllib.request.urlopen(self.url, body).read())
"""
PLUGIN = """
[plugins.lobby]
use = "told_lobby:Lobby"
operators = ["delta"]
concurrency = 2
options = {{ url = "{url}" }}
"""
NAMES = ("acme", "bravo", "charlie", "delta")


@pytest.fixture(scope="module")
def wallet() -> Iterator[Counting]:
    with Counting() as opened:
        yield opened
        opened.shutdown()


@pytest.fixture(scope="module")
def lobby() -> Iterator[Counting]:
    """The server that delta's plug-in calls."""
    with Counting() as opened:
        yield opened
        opened.shutdown()


@pytest.fixture(scope="module")
def lasting(
    database: OwnServer, wallet: Counting, lobby: Counting, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three daemons that all tests of this file use."""
    directory = tmp_path_factory.mktemp("lasting")
    (directory / "told_lobby.py").write_text(HOOK)
    toml = "".join(OPERATOR.format(name=name, url=wallet.url) + "concurrency = 2\n" for name in NAMES)
    toml += PLUGIN.format(url=lobby.url)
    environment = {"PYTHONPATH": f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with cluster(database, directory, toml, environment=environment) as made:
        yield made


@pytest.fixture
def c(lasting: Cluster) -> Iterator[Cluster]:
    """The three daemons. All of them run at the beginning of a test, and are made to run again at its end."""
    lasting.wait_for(*lasting.daemons)
    yield lasting
    for name, daemon in lasting.daemons.items():
        daemon.popen.send_signal(signal.SIGCONT)
        if daemon.popen.poll() is not None:
            lasting.start(name)


@pytest.fixture
def counting(wallet: Counting) -> Counting:
    """The operators' server, with nothing received yet."""
    wallet.takes_s, wallet.answer, wallet.most = 0.0, b'{"error":0}', 0
    wallet.sessions.clear()
    return wallet


def opened(one: Any, operator: str, session: str, idle_s: int = 600) -> str:
    """Opens a session through a daemon. Returns the session's URL at that daemon."""
    url = f"{one.api}/v1/operators/{operator}/sessions/{session}"
    body = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": idle_s}
    assert one.call("PUT", url, body)[0] == 201
    return url


def ended(one: Any, operator: str, session: str) -> None:
    assert one.call("POST", opened(one, operator, session) + "/close")[0] == 200


# -- requests that any daemon takes


def test_what_is_asked_of_one_daemon_binds_at_the_owner(
    c: Cluster, counting: Counting, measured: Callable[..., None]
) -> None:
    """Hold, release, retry and probe are each sent to a daemon that does not own the operator."""
    owner = c.owner("acme", "a")
    one, two = (daemon for name, daemon in c.daemons.items() if name != owner)
    acme = "/v1/operators/acme"

    def held_at_owner() -> bool:
        items = c.daemons[owner].call("GET", f"{c.daemons[owner].api}/v1/operators")[1]["items"]
        return bool(next(one["held"] for one in items if one["operator"] == "acme"))

    assert one.call("POST", f"{one.api}{acme}/hold")[0] == 200
    began_s = time.monotonic()
    wait_for(held_at_owner, 10)
    bound_s = time.monotonic() - began_s
    ended(two, "acme", "s1")
    time.sleep(1)  # without the hold, it would be sent in this time
    assert counting.sessions == []
    status, probed = two.call("POST", f"{two.api}{acme}/probe")
    assert (status, probed["state"], counting.sessions) == (200, "delivered", ["s1"])
    assert two.call("POST", f"{two.api}{acme}/probe")[0] == 409
    ended(one, "acme", "s2")
    assert two.call("POST", f"{two.api}{acme}/release")[0] == 200
    wait_for(lambda: counting.sessions == ["s1", "s2"], 10)
    counting.answer = b'{"error":120}'
    ended(one, "acme", "s3")
    (dead,) = wait_for(lambda: two.call("GET", f"{two.api}/v1/deliveries?state=dead")[1]["items"], 10)
    counting.answer = b'{"error":0}'
    assert two.call("POST", f"{two.api}/v1/deliveries/{dead['id']}/retry")[0] == 202
    wait_for(lambda: one.call("GET", f"{one.api}/v1/deliveries/{dead['id']}")[1]["state"] == "delivered", 10)
    measured(hold_bound_s=round(bound_s, 3))


def test_each_daemon_tells_of_all_of_them(c: Cluster, counting: Counting) -> None:
    """Each daemon tells of all daemons in `/health`, in `lmdaemon status` and in the metrics. An operator's metrics
    come from its owner alone.
    """
    opened(c.any(), "acme", "told")

    def is_told() -> bool:
        found = [figures(daemon) for daemon in all_of(c)]
        owned = [sum(f'lmdaemon_operator_held{{operator="{name}"}}' in one for one in found) for name in NAMES]
        live = sum(one.get('lmdaemon_sessions_live{operator="acme"}', 0) for one in found)
        counts = [one["lmdaemon_operators_owned"] for one in found]
        return (
            [one["lmdaemon_daemons"] for one in found] == [3] * 3 and owned == [1] * 4 and live > 0 and sum(counts) == 4
        )

    wait_for(is_told, 20, lambda: str([figures(daemon) for daemon in all_of(c)]))
    for daemon in all_of(c):
        (check,) = daemon.call("GET", f"{daemon.api}/health")[1]["checks"]["daemons"]
        assert check["daemons"] == 3
        assert "settings" not in check.get("output", "")
    names = {one["name"] for one in c.members("a").values()}
    done = subprocess.run(
        [*AS_USERS_DO, "--config", str(c.daemons["a"].config), "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in names]
    assert len(lines) == 3
    assert sum("(asked)" in line for line in lines) == 1


def all_of(c: Cluster) -> list[Process]:
    return list(c.daemons.values())


def figures(daemon: Process) -> dict[str, float]:
    """Reads `/metrics`: values by series."""
    with urllib.request.urlopen(f"{daemon.api}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_concurrency_is_that_of_the_operator_however_many_daemons(
    c: Cluster, counting: Counting, lobby: Counting
) -> None:
    """Tried are the operator's URL and a plug-in that listens to the operator."""
    counting.takes_s = lobby.takes_s = 0.1
    lobby.sessions.clear()
    lobby.most = 0
    names = [f"many-{number}" for number in range(24)]
    for number, name in enumerate(names):
        ended(all_of(c)[number % 3], "delta", name)
    for told in (counting, lobby):
        wait_for(lambda told=told: len(told.sessions) == len(names), 30)  # type: ignore[misc]
        assert sorted(told.sessions) == sorted(names)
        assert told.most == 2
    lobby.takes_s = 0.0


# -- a daemon that goes away


def test_a_daemon_that_leaves_makes_nobody_wait_and_repeats_nothing(c: Cluster, counting: Counting) -> None:
    """While the daemon waits for the answer to its last attempt, sessions of all operators end. After that, the others
    deliver.
    """
    leaving = c.owner("acme", "a")
    other = next(daemon for name, daemon in c.daemons.items() if name != leaving)
    counting.takes_s = 4.0
    ended(other, "acme", "slow")
    wait_for(lambda: counting.sessions == ["slow"], 10)
    c.daemons[leaving].popen.send_signal(signal.SIGTERM)
    counting.takes_s = 0.0
    urls = [opened(other, name, f"last-{name}", idle_s=1) for name in NAMES]
    for url in urls:
        wait_for(lambda url=url: other.call("GET", url)[1]["state"] == "ended", 10)  # type: ignore[misc]
    assert c.daemons[leaving].popen.wait(30) == 0
    wait_for(lambda: not c.rows("SELECT 1 FROM delivery WHERE state <> 'delivered'"), 10)
    assert sorted(counting.sessions) == sorted(["slow", *(f"last-{name}" for name in NAMES)])


async def test_operators_of_daemons_that_are_lost_go_on_at_the_one_left(
    c: Cluster, counting: Counting, measured: Callable[..., None]
) -> None:
    """One daemon is killed and one is stopped. The third answers all the time, ends sessions and delivers. When the
    stopped one wakes up, it does nothing by its old knowledge and joins again. The requests that waited in its sockets
    are carried out if they still can be.
    """
    killed = c.owner("acme", "a")
    stopped, left = (name for name in c.daemons if name != killed)
    other = c.daemons[left]
    touched = opened(other, "acme", "touched")
    for name in NAMES:
        opened(other, name, f"idle-{name}", idle_s=1)
    c.daemons[killed].kill()
    c.daemons[stopped].popen.send_signal(signal.SIGSTOP)
    began_s = time.monotonic()
    sessions = f"{c.daemons[stopped].api}/v1/operators/acme/sessions"
    waiting = [
        asyncio.create_task(asyncio.to_thread(c.daemons[stopped].call, "POST", f"{sessions}/{name}/touch"))
        for name in ("idle-acme", "touched")
    ]
    ended(other, "acme", "closed")
    expected = sorted(["closed", *(f"idle-{name}" for name in NAMES)])
    while sorted(counting.sessions) != expected:
        assert (await asyncio.to_thread(other.call, "POST", f"{touched}/touch"))[0] == 204
        assert time.monotonic() - began_s < 3 * TAKEOVER_S  # TAKEOVER_S is for a machine that does nothing else
        await asyncio.sleep(0.05)
    measured(takeover_s=round(time.monotonic() - began_s, 1))
    c.daemons[stopped].popen.send_signal(signal.SIGCONT)
    assert [status for status, _ in await asyncio.gather(*waiting)] == [410, 204]
    await asyncio.to_thread(c.wait_for, left, stopped)
    assert sorted(counting.sessions) == expected
    assert c.daemons[stopped].popen.poll() is None
    assert len(other.events("daemon.expelled")) == 2
    assert c.daemons[stopped].events("daemon.joined_again")


async def test_a_touch_in_the_hands_of_a_stopped_daemon_wins(c: Cluster, counting: Counting) -> None:
    """The stop lasts 3 s, and a daemon is expelled after 5 s. So the touch that waits there is in time."""
    owner = c.owner("acme", "a")
    stopped = next(daemon for name, daemon in c.daemons.items() if name != owner)
    opened(c.daemons[owner], "acme", "held", idle_s=1)
    stopped.popen.send_signal(signal.SIGSTOP)
    url = f"{stopped.api}/v1/operators/acme/sessions/held/touch"
    waiting = asyncio.create_task(asyncio.to_thread(stopped.call, "POST", url))
    await asyncio.sleep(3)
    stopped.popen.send_signal(signal.SIGCONT)
    assert (await waiting)[0] == 204
    of_it = "SELECT seen_ms FROM session WHERE session_id = 'held'"
    ((seen_ms,),) = c.rows(of_it)
    await asyncio.to_thread(wait_for, lambda: counting.sessions == ["held"], 30)
    assert c.rows(f"{of_it} AND reason = 'inactivity'") == [(seen_ms,)]


# -- behind a load balancer


EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BALANCERS = {
    "haproxy": ("haproxy.cfg", ["haproxy", "-db", "-f"]),
    "nginx": ("balancer.conf", ["nginx", "-g", "daemon off;", "-p", ".", "-c"]),
}


@contextlib.contextmanager
def balancer(kind: str, c: Cluster, directory: Path) -> Iterator[tuple[str, str]]:
    """Runs a load balancer with the example's configuration and the addresses of these daemons. Yields its addresses
    for the public and the private side.
    """
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed")
    file, command = BALANCERS[kind]
    text = (EXAMPLES / file).read_text()
    public, private = free_ports(2)
    for number, daemon in enumerate(c.daemons.values(), 11):
        text = text.replace(f"192.0.2.{number}:8080", daemon.server.removeprefix("http://"))
        text = text.replace(f"192.0.2.{number}:8081", daemon.api.removeprefix("http://"))
    # The time-out for an answer can be short, because the database is there all the time
    text = text.replace("12s", "3s")
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{public}").replace("127.0.0.1:8081", f"127.0.0.1:{private}")
    assert "192.0.2." not in text
    (directory / file).write_text(text)
    running = subprocess.Popen([*command, str(directory / file)], cwd=directory)
    try:
        for port in (public, private):
            wait_for(lambda port=port: _listens(port), 20)  # type: ignore[misc]
        yield f"http://127.0.0.1:{public}", f"http://127.0.0.1:{private}"
    finally:
        running.terminate()
        running.wait(20)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.parametrize("kind", BALANCERS)
def test_behind_a_balancer_no_call_fails_while_daemons_do(
    kind: str, c: Cluster, counting: Counting, tmp_path: Path
) -> None:
    """One daemon is stopped (in the full run, for longer than it takes to be expelled), and one is killed."""
    with balancer(kind, c, tmp_path) as (public, private):
        one, two, three = c.daemons.values()
        began_s, number = time.monotonic(), 0
        two.popen.send_signal(signal.SIGSTOP)
        while time.monotonic() - began_s < (12 if FULL else 3) or number < 20:
            if number == 10:
                one.kill()
            number += 1
            url = f"{private}/v1/operators/acme/sessions/{kind}-{number}"
            assert three.call("PUT", url, {"playerId": "p", "token": "tok-3n"})[0] in (200, 201)
            assert three.call("POST", f"{url}/touch")[0] == 204
            notice = {"providerId": "acme", "externalPlayerId": "p", "token": "tok-3n"}
            status, answer = three.call("POST", f"{public}/acme", notice | {"sessionId": f"{kind}-{number}"})
            assert (status, answer["error"]) == (200, 0)
        two.popen.send_signal(signal.SIGCONT)
        wait_for(lambda: set(counting.sessions) == {f"{kind}-{one}" for one in range(1, number + 1)}, 60)


# -- random faults


class Faults:
    """Faults of the daemons and of their database. Each method causes one, and returns once it is over and all daemons
    run.
    """

    def __init__(self, c: Cluster, rng: Random) -> None:
        self._c = c
        self._rng = rng
        self.happened: list[str] = []

    async def _sleep(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self._rng.uniform(low_s, high_s))

    def _one(self, what: str) -> str:
        name = self._rng.choice(sorted(self._c.daemons))
        self.happened.append(f"{what} {name}")
        return name

    async def kill(self) -> None:
        name = self._one("kill")
        self._c.daemons[name].kill()
        await self._sleep(0, 8)
        await asyncio.to_thread(self._c.start, name)

    async def stop(self) -> None:
        name = self._one("stop")
        popen = self._c.daemons[name].popen
        popen.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._rng.choice((3, 8, 15) if FULL else (3, 8)))
        popen.send_signal(signal.SIGCONT)

    async def leave(self) -> None:
        name = self._one("leave")
        assert await asyncio.to_thread(self._c.daemons[name].stop) == 0
        await asyncio.to_thread(self._c.start, name)

    async def cut_off(self) -> None:
        name = self._one("cut off")
        self._c.proxies[name].mode = "swallow"
        await self._sleep(1, 8)
        self._c.proxies[name].mode = "pass"

    async def cut(self) -> None:
        name = self._one("cut")
        for mode in ("cut requests", "cut answers", "cut answers"):
            self._c.proxies[name].mode = mode  # type: ignore[assignment]
            await self._sleep(0.2, 1)
        self._c.proxies[name].mode = "pass"

    async def delay(self) -> None:
        name = self._one("delay")
        self._c.proxies[name].delay_s = 0.2
        await self._sleep(1, 4)
        self._c.proxies[name].delay_s = 0.0

    async def terminate(self) -> None:
        self.happened.append("terminate")
        await asyncio.to_thread(
            self._c.rows,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'lmdaemon%%'",
        )

    async def crash(self) -> None:
        self.happened.append("crash")
        await asyncio.to_thread(self._c.database.stop, "immediate")
        await self._sleep(0, 4)
        await asyncio.to_thread(self._c.database.start)

    async def happen(self, kinds: list[str]) -> None:
        for kind in kinds:
            await getattr(self, kind)()
            await self._sleep(0.3, 2)


KINDS = ["kill", "stop", "leave", "cut_off", "cut", "delay", "terminate", "crash"]


@contextlib.asynccontextmanager
async def wallets(rng: Random) -> AsyncIterator[dict[str, Simulated]]:
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(simulated_operator(script, seed=rng.randrange(1000)))
            for name, script in MOODS.items()
        }


async def test_faults_at_random_under_load_lose_and_double_nothing(
    own_database: OwnServer, tmp_path: Path, rng: Random, measured: Callable[..., None]
) -> None:
    """Game servers use any daemon, and another one if it does not answer."""
    clients, rounds, kinds = (60, 34, len(KINDS)) if FULL else (24, 1, 5)
    async with wallets(rng) as simulated:
        toml = "".join(OPERATOR.format(name=name, url=one.url) for name, one in simulated.items())
        with cluster(own_database, tmp_path, toml) as c:
            timeout = aiohttp.ClientTimeout(total=3)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
                witness, over = Witness(c, http), asyncio.Event()  # type: ignore[arg-type]
                faults = Faults(c, rng)
                async with asyncio.TaskGroup() as group:
                    for number in range(clients):
                        chance = Random(rng.random())
                        group.create_task(game_server(witness, f"c{number}", list(simulated), chance, over))
                    for _ in range(rounds):
                        await faults.happen(rng.sample(KINDS, kinds))
                    over.set()
                await asyncio.to_thread(c.wait_for, *c.daemons)
                await settled(c, until)  # type: ignore[arg-type]
            figures = check(
                witness,
                simulated,
                sinks=1,
                may_repeat=len(faults.happened) * IN_FLIGHT * len(simulated),
                within_ms=ANSWER_MS,
            )  # type: ignore[arg-type]
            for daemon in c.daemons.values():
                assert await asyncio.to_thread(daemon.stop) == 0
    acknowledged = sum(times for (_, status), times in witness.answers.items() if status < 300)
    assert acknowledged > 100
    measured(faults=len(faults.happened), acknowledged=acknowledged, unanswered=witness.gone, **figures, lost=0)
