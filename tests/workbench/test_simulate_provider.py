"""The simulated provider: a correct daemon and a correct endpoint pass, and each broken promise is found."""

import asyncio
import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, environment, run
from endpoints import PROVIDER, TOKEN, Endpoint, served, to
from processes import FORKED, process
from simulated import simulated_operator
from support import operator_table, serving, until

from lmdaemon.workbench import players, storm
from lmdaemon.workbench.figures import EVIDENCE_MAX, Figures, Times
from lmdaemon.workbench.journal import missed
from lmdaemon.workbench.players import Load, Players
from lmdaemon.workbench.storm import Mix, Storm

LOAD = Load(players=8, span_s=0.6, play_s=0.3, heartbeat_s=0.1, idle_s=1, late_s=30, deliver_within_s=30)


async def test_a_daemon_keeps_every_promise_to_its_players(tmp_path: Path) -> None:
    async with simulated_operator() as peer:
        toml = '[sessions]\nrestart_grace = "0s"\n' + operator_table("acme", peer.url)
        async with serving(tmp_path, toml) as daemon:

            async def call(method: str, *path: str, body: object = None) -> tuple[int, Any]:
                async with daemon.client.request(method, "/".join((daemon.api, *path)), json=body) as answer:
                    return answer.status, await answer.json() if answer.status != 204 else None

            game = Players(call, "acme", LOAD, seed=7)
            report = await game.run()
    assert report["good"], report["evidence"]
    counts = report["counts"]
    assert counts["opened"] == len(game.sessions) >= 8
    assert counts["delivered_to_http"] == counts["opened"] == peer.journal.tally["accepted"]
    assert missed(peer.journal.tally, {}) == []
    assert counts["closed"] + counts["ended_inactivity"] >= counts["opened"]
    assert report["timesMs"]["touch"]["count"] == counts["touched"] > 8


class Liar:
    """A private API in memory that breaks one promise."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.opened: dict[str, datetime] = {}
        self.touched: dict[str, datetime] = {}
        self.looks: dict[str, int] = {}

    async def __call__(self, method: str, *path: str, body: Any = None) -> tuple[int, Any]:
        await asyncio.sleep(0)
        session, verb = path[4], path[-1]
        now = datetime.now(UTC) + timedelta(hours=1)  # the daemon's clock differs from the provider's
        if method == "PUT":
            if self.fault == "failed":
                return 503, None
            self.opened[session] = self.touched[session] = now
            return 201, {}
        if verb == "touch":
            if self.fault == "touch refused early":
                return 410, {}
            if self.fault == "session forgotten":
                return 404, None
            self.touched[session] = now
            return 204, None
        return self._look(session)

    def _look(self, session: str) -> tuple[int, Any]:
        if self.fault in ("lost", "session forgotten"):
            return 404, None
        self.looks[session] = self.looks.get(session, 0) + 1
        ended = self.touched[session] + timedelta(seconds=1)
        if self.fault == "early":
            ended -= timedelta(milliseconds=400)
        if self.fault == "late":
            ended += timedelta(seconds=20)
        if self.fault == "ended twice" and self.looks[session] > 1:
            ended += timedelta(milliseconds=50)
        state = "pending" if self.looks[session] == 1 else "delivered"
        delivery = {"sink": "http", "state": state, "createdAt": text(ended), "settledAt": text(ended)}
        times = {"openedAt": text(self.opened[session]), "lastSeenAt": text(self.touched[session])}
        copies = 2 if self.fault == "delivered twice" else 1
        return 200, {
            **times,
            "state": "ended",
            "reason": "inactivity",
            "endedAt": text(ended),
            "deliveries": [delivery] * copies,
        }


def text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        ("", None),
        ("early", "early"),
        ("touch refused early", "early"),
        ("late", "late"),
        ("lost", "lost"),
        ("session forgotten", "lost"),
        ("ended twice", "doubled"),
        ("delivered twice", "doubled"),
        ("failed", "failed"),
    ],
)
async def test_each_broken_promise_of_a_daemon_is_found(fault: str, promise: str | None) -> None:
    load = LOAD._replace(players=2, span_s=0.3, heartbeat_s=0.05, play_s=10, abandon=1, late_s=10)
    report = await Players(Liar(fault), "acme", load, seed=1).run()
    broken = {name for name, count in report["broken"].items() if count}
    assert broken == ({promise} if promise else set())
    assert report["good"] is (promise is None)
    assert promise is None or report["evidence"][0].startswith(f"{promise}: ")


async def test_a_daemon_that_was_away_is_asked_again_and_is_not_late() -> None:
    class Away(Liar):
        asked = 0

        async def __call__(self, method: str, *path: str, body: Any = None) -> tuple[int, Any]:
            self.asked += 1
            return (0, None) if 3 <= self.asked <= 5 else await super().__call__(method, *path, body=body)

    load = LOAD._replace(players=1, span_s=0.3, heartbeat_s=0.05, play_s=10, abandon=1, late_s=10)
    patient = await Players(Away("late"), "acme", load._replace(away_s=60), seed=1).run()
    assert (patient["good"], patient["counts"]["times_away"]) == (True, 1)
    impatient = await Players(Away("late"), "acme", load, seed=1).run()
    assert impatient["broken"]["failed"] == 3
    assert impatient["broken"]["late"] == 1


def test_what_is_not_among_the_evidence_is_counted_there() -> None:
    figures = Figures()
    for number in range(EVIDENCE_MAX + 3):
        figures.broke("late", f"s-{number}")
    shown = figures.shown({"late": ""}, 1.0)["evidence"]
    assert (len(shown), shown[-1]) == (EVIDENCE_MAX + 1, "late: and 3 more")


async def test_an_interrupted_game_still_has_a_report() -> None:
    task = asyncio.create_task(Players(Liar(""), "acme", LOAD._replace(span_s=60), seed=1).run())
    await asyncio.sleep(0.2)
    task.cancel()
    assert (await task)["counts"]["interrupted"] == 1


# -- playing a provider against an endpoint


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("", set()),
        ("500 on repeat", {"repeat_refused", "race_lost"}),
        ("HTML at malformed JSON", {"faulted"}),
        ("Error instead of error", {"refused", "race_lost"}),
    ],
)
async def test_each_broken_promise_of_an_endpoint_is_found(fault: str, broken: set[str]) -> None:
    async with served(Endpoint(fault)) as endpoint:
        operator = to(endpoint.url, provider_id=PROVIDER)
        report = await Storm(operator, Mix(notices=60, rate=1000), seed=3, token=TOKEN).run()
    assert {name for name, count in report["broken"].items() if count} == broken
    assert report["counts"]["requests"] == endpoint.seen
    assert report["timesMs"]["answer"]["count"] == endpoint.seen
    assert set(report["broken"]) == set(storm.PROMISES)


async def test_the_same_seed_sends_the_same_kinds() -> None:
    async def counts(seed: int) -> Any:
        async with served(Endpoint()) as endpoint:
            operator = to(endpoint.url, provider_id=PROVIDER)
            return (await Storm(operator, Mix(40, 1000), seed, token=TOKEN).run())["counts"]

    first, again, other = await counts(3), await counts(3), await counts(4)
    assert first["malformed"] == again["malformed"]
    assert first != other


async def test_an_endpoint_that_does_not_answer_is_told_so() -> None:
    async with served(Endpoint()) as endpoint:
        gone = endpoint.url
    report = await Storm(to(gone), Mix(5, 1000), seed=1).run()
    assert report["broken"]["unanswered"] >= 5
    assert "no connection could be made" in report["evidence"][0]


# -- the command


async def test_the_command_plays_a_provider_against_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    words = ["simulate", "provider", "--notices", "30", "--rate", "1000", "--token-file", "token", "--json"]
    async with served(Endpoint()) as right, served(Endpoint("500 on repeat")) as wrong:
        done = await asyncio.to_thread(run, *words, "--url", right.url, cwd=tmp_path)
        failed = await asyncio.to_thread(run, *words, "--url", wrong.url, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["good"] is True
    assert failed.returncode == 1
    assert TOKEN not in failed.stdout


async def test_the_command_plays_game_servers_against_the_running_daemon(tmp_path: Path) -> None:
    async with serving(
        tmp_path, '[sessions]\nrestart_grace = "0s"\n' + operator_table("acme", "", notify=False)
    ) as daemon:
        address = daemon.api.removeprefix("http://")
        file = tmp_path / "client.toml"
        written = (tmp_path / "config.toml").read_text()
        file.write_text(written.replace('[api]\nlisten = "127.0.0.1:0"', f'[api]\nlisten = "{address}"'))
        words = "simulate provider acme --players 5 --duration 500ms --heartbeat 100ms --idle 1s --late 30s"
        done = await asyncio.to_thread(run, "--config", file, *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Verdict: every promise was kept\n")
    assert " opened" in done.stdout


@pytest.mark.slow
async def test_a_daemon_that_is_killed_meanwhile_keeps_every_promise(tmp_path: Path) -> None:
    """The daemon is killed twice while the players play, and its operator fails often. No end is early, lost or
    doubled.
    """
    async with simulated_operator("20%: error 100; 10%: reset; 5%: truncate 9", seed=5) as peer:
        toml = '[sessions]\nrestart_grace = "500ms"\n'
        toml += operator_table("acme", peer.url, schedule=["100ms"] * 40, concurrency=8)
        with process(tmp_path, toml, command=FORKED) as daemon:
            words = "simulate provider acme --players 10 --duration 4s --play 1s --heartbeat 100ms --idle 1 --away 60s"
            command = [*COMMAND, "--config", "config.toml", *words.split(), "--late", "60s", "--json"]
            playing = await asyncio.create_subprocess_exec(
                *command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for killed in (1, 2):
                await until(lambda n=killed: peer.journal.tally["accepted"] >= 2 * n, within_s=60)
                daemon.kill()
                await asyncio.to_thread(daemon.start)
            out, err = await playing.communicate()
    report = json.loads(out)
    assert (playing.returncode, err, report["evidence"]) == (0, b"", [])
    assert report["counts"]["times_away"] >= 2
    assert report["counts"]["delivered_to_http"] == report["counts"]["opened"] == peer.journal.tally["accepted"]
    assert missed(peer.journal.tally, {}) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "give either an operator of the running daemon, or --url of an endpoint"),
        ("--url https://wallet.example/", "say --yes if that is meant"),
        ("--url http://127.0.0.1:9/ --mix 1,2", "--mix: must be four whole numbers"),
        ("--url http://127.0.0.1:9/ --dialect pragmatic", "needs --hash-key-file"),
        ("--url http://127.0.0.1:9/ --seed x", "--seed: must be a whole number"),
        ("nobody", "has no operator 'nobody'"),
        ("acme", "say --yes if that is meant"),
        pytest.param(
            f"--url http://127.0.0.1:9/ --mix {'9' * 5000},1,1,1", "--mix: must be four whole numbers", id="huge share"
        ),
        ("--url http://127.0.0.1:9/ --mix 0,0,0,0", "not all of them zero"),
        ("--url http://127.0.0.1:9/ --rate 0", "--rate: must be a positive number (got '0')"),
        ("--url http://127.0.0.1:9/ --rate 10001", "--rate: must be at most 10000 (got '10001')"),
        ("--url http://127.0.0.1:9/ --notices -1", "--notices: "),
        ("--url http://127.0.0.1:9/ --timeout 0s", "--timeout: must not be zero"),
        ("quiet --players 100001", "--players: must be at most 100000 (got '100001')"),
        ("quiet --idle 31d", "--idle: must be at most 30d (got '31d')"),
        ("quiet --heartbeat -1s", "--heartbeat: "),
        ("quiet --abandon 101", "--abandon: must be 0 to 100"),
        ("quiet --duration 0s", "--duration: must not be zero"),
        ("quiet --idle 0", "--idle: must not be zero"),
        ("quiet --idle 1500ms", "--idle: must be whole seconds (got '1500ms')"),
    ],
)
def test_bad_usage_of_simulate_provider_exits_2(tmp_path: Path, words: str, complaint: str) -> None:
    acme = operator_table("acme", "https://wallet.example/", allow_private_network=False)
    (tmp_path / "config.toml").write_text(acme + operator_table("quiet", "", notify=False))
    done = run("simulate", "provider", *words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_percentiles_are_of_all_that_was_measured() -> None:
    times = Times()
    for span_ms in range(1, 1001):
        times.add(span_ms / 1000)
    shown = times.shown()
    assert shown["count"] == 1000
    for name, expected in (("p50", 500), ("p99", 990), ("max", 1000)):
        assert shown[name] == pytest.approx(expected, rel=0.002)
    assert Times().shown() == {"count": 0}


def test_the_manual_explains_every_promise_in_the_words_of_the_report() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "workbench.md").read_text()
    for word, meaning in (players.PROMISES | storm.PROMISES).items():
        assert f"| `{word}` | {meaning}" in manual, word
