"""The simulated operator with a real daemon and a real sender: it does what its script says, and judges the sender
correctly.
"""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from commands import COMMAND, environment, run
from endpoints import HASH_KEY, SIGNING_SECRET, to
from simulated import simulated_operator
from support import operator_table, serving, until
from wires import open_session

from lmdaemon import tls
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.config.values import whsec
from lmdaemon.delivery.sender import Sender, Unreachable
from lmdaemon.dialects import SHIPPED
from lmdaemon.retry import judge
from lmdaemon.workbench import authority
from lmdaemon.workbench.bench import changed
from lmdaemon.workbench.journal import Journal, missed, read_expectations, verdict
from lmdaemon.workbench.notices import Notices
from lmdaemon.workbench.script import Script, ScriptError, read_text
from lmdaemon.workbench.stage import Stage


@dataclass
class Played:
    """A running stage, and a clock for it that the test moves."""

    stage: Stage
    journal: Journal
    url: str
    lines: list[str] = field(default_factory=list)
    now_s: float = 1000.0


@asynccontextmanager
async def playing(
    script: str | Script = "", schedule: tuple[float, ...] = (5.0, 30.0), keys: tuple[bytes, ...] = (), **options: Any
) -> AsyncIterator[Played]:
    play = read_text(script) if isinstance(script, str) else script
    journal = Journal(SHIPPED["v4"], schedule, keys)
    made: list[Played] = []
    stage = Stage(
        play, journal, tell=lambda line: made[0].lines.append(line), monotonic=lambda: made[0].now_s, **options
    )
    made.append(Played(stage, journal, ""))
    await stage.open("127.0.0.1", 0)
    scheme = "https" if options.get("contexts") else "http"
    made[0].url = f"{scheme}://localhost:{stage.address[1]}/V4/SessionExpired"
    try:
        yield made[0]
    finally:
        await stage.close()


async def attempt(operator: Operator, webhook_id: str, body: bytes, sender: Sender | None = None) -> str:
    """Makes one attempt as the daemon does. Returns the verdict and the cause of a failure."""
    own = sender or Sender(Clock())
    try:
        status, headers, answer, complete = await own.post(operator, webhook_id, body)
        found = judge(status, answer, complete=complete, retry_after=headers.get("Retry-After"), now_s=0)
        return f"{found.verdict} {found.reason}".strip()
    except Unreachable as error:
        return f"retry {error.cause}"
    finally:
        if sender is None:
            await own.close()


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("ok", "delivered"),
        ("error 100", "retry code_100"),
        ("error 120", "final code_120"),
        ("status 410", "hold gone"),
        ("status 503 retry-after 30", "retry status_503"),
        ("json '\"0\"'", "delivered"),
        ("json 0.0", "delivered"),
        ("json false", "retry bad_answer"),
        ("body '[]'", "retry bad_answer"),
        ("empty", "retry bad_answer"),
        ("html", "retry bad_answer"),
        ("garbage", "retry bad_http"),
        ("redirect", "retry redirect"),
        ("hang", "retry timeout"),
        ("delay 30s ok", "retry timeout"),
        ("reset", "retry connection_lost"),
        ("close", "retry connection_lost"),
        ("truncate 20", "retry incomplete_answer"),
        ("drip 1s", "retry timeout"),
        ("big 17KiB", "retry answer_too_long"),
        ("gzip-bomb 20MiB", "retry answer_too_long"),
        ("interim 15", "delivered"),
        ("interim 16", "retry too_many_interim"),
    ],
)
async def test_each_answer_is_what_a_sender_calls_it(script: str, outcome: str) -> None:
    async with playing(script) as played:
        operator = to(played.url)
        operator = changed(operator, policy=changed(operator.policy, timeout_s=0.5 if "timeout" in outcome else 20))
        notices = Notices(operator, run="t")
        assert await attempt(operator, "msg_1", notices.body(notices.fields())) == outcome


async def test_a_spoiled_handshake_fails_as_tls_and_the_next_one_works(tmp_path: Path) -> None:
    contexts = authority.contexts(tmp_path / "ca.pem", "localhost")
    async with playing("tls expired then tls wrong-name then tls refuse then ok", contexts=contexts) as played:
        operator = to(played.url, tls=tls.Profile(tls.Pem(tmp_path / "ca.pem", ""), None, None))
        notices = Notices(operator, run="t")
        body = notices.body(notices.fields())
        assert [await attempt(operator, "msg_1", body) for _ in range(4)] == [
            *("retry tls", "retry tls", "retry connect", "delivered"),
        ]
    assert [line for line in played.lines if "handshake" in line] == [
        *("a handshake: tls expired", "a handshake: tls wrong-name", "a handshake: tls refuse"),
    ]


async def test_an_operator_that_goes_down_comes_back_at_the_same_address() -> None:
    async with playing("down 300ms then ok") as played:
        operator = to(played.url)
        notices = Notices(operator, run="t")
        body = notices.body(notices.fields())
        assert await attempt(operator, "msg_1", body) == "retry connection_lost"
        await until(lambda: "up again" in played.lines)
        assert await attempt(operator, "msg_1", body) == "delivered"


async def test_what_a_sender_must_never_do_is_told_with_evidence() -> None:
    key = whsec(SIGNING_SECRET)
    async with playing("session *: ok", keys=(key,)) as played:
        right = to(played.url, signing_keys=(key,))
        notices = Notices(right, run="t")
        first, other = notices.fields(), notices.fields()
        await attempt(right, "msg_1", notices.body(first))
        played.now_s += 3  # the schedule says 5 s ±20 %
        await attempt(right, "msg_1", notices.body(first))
        assert played.journal.tally["too_soon"] == 1
        played.now_s += 100
        await attempt(right, "msg_1", notices.body(first | {"more": 1}))
        assert played.journal.tally["changed"] == 1
        await attempt(right, "msg_2", notices.body(first))
        assert played.journal.tally["doubled"] == 1
        await attempt(to(played.url), "msg_3", notices.body(other))
        assert played.journal.tally["unsigned"] == 1
        await attempt(
            to(played.url, signing_keys=(b"another-secret-of-24-bytes",)), "msg_4", notices.body(notices.fields())
        )
        assert played.journal.tally["wrong_signature"] == 1
        await attempt(right, "msg_5", b'{"sessionId": ')
        assert played.journal.tally["malformed"] == 1
    words = [line.partition(":")[0] for line in played.journal.evidence]
    assert words == ["too_soon", "changed", "doubled", "unsigned", "wrong_signature", "malformed"]
    assert played.journal.evidence[0] == f"too_soon: msg_1, session {first['sessionId']}, attempt 2"
    assert [wrong.partition(":")[0] for wrong in missed(played.journal.tally, {})] == [
        *("malformed", "unsigned", "wrong_signature", "changed", "doubled", "too_soon"),
    ]


async def test_a_hash_is_verified_where_the_key_is_known() -> None:
    async with simulated_operator(dialect="pragmatic", hash_key=HASH_KEY) as played:
        right = to(played.url, sends=SHIPPED["pragmatic"], hash_key=HASH_KEY)
        notices = Notices(right, run="t")
        assert await attempt(right, "msg_1", notices.body(notices.fields())) == "delivered"
        assert missed(played.journal.tally, {}) == []
        await attempt(right, "msg_2", notices.body(notices.fields(), key="another"))
        assert missed(played.journal.tally, {}) == ["wrong_hash: 0 expected, 1 seen"]


@pytest.mark.parametrize("dialect", SHIPPED)
async def test_the_daemon_pleases_an_operator_of_each_dialect(dialect: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(HASH_KEY)
    (tmp_path / "key").chmod(0o600)
    hashed = "hash" in SHIPPED[dialect].fields
    options = {"hash_key_file": "key"} if hashed else {}
    async with simulated_operator("attempt 1: error 100", dialect=dialect, hash_key=HASH_KEY) as played:
        toml = operator_table("acme", played.url, schedule=["10ms"] * 9, dialect=dialect, accept=[dialect], **options)
        async with serving(tmp_path, toml) as daemon:
            await open_session(daemon, "s")
            async with daemon.client.post(f"{daemon.api}/v1/operators/acme/sessions/s/close") as answer:
                assert answer.status == 200
            await until(lambda: played.journal.tally["accepted"] == 1)
    assert missed(played.journal.tally, {}) == []
    assert played.journal.tally["notices"] == 2


async def test_a_retry_after_must_be_waited_for() -> None:
    async with playing("status 503 retry-after 60 then ok", schedule=(5.0,)) as played:
        operator = to(played.url)
        notices = Notices(operator, run="t")
        body = notices.body(notices.fields())
        await attempt(operator, "msg_1", body)
        played.now_s += 59
        await attempt(operator, "msg_1", body)
    assert played.journal.tally["too_soon"] == 1


async def test_sessions_that_were_never_taken_are_named_at_the_end() -> None:
    async with playing("session *-1: error 100; ok") as played:
        operator = to(played.url)
        notices = Notices(operator, run="t")
        for number in (1, 2):
            fields = notices.fields(f"s-{number}")
            await attempt(operator, f"msg_{number}", notices.body(fields))
    assert verdict(played.journal, {})["neverAccepted"] == ["s-1"]


async def test_the_daemon_does_nothing_that_a_simulated_operator_finds_wrong(tmp_path: Path) -> None:
    """Thirty sessions and an operator that fails in many ways. Every end arrives once, in time, and always with the
    same bytes.
    """
    (tmp_path / "signing").write_text(SIGNING_SECRET)
    (tmp_path / "signing").chmod(0o600)
    script = "20%: reset; 20%: status 503; 10%: error 100; 10%: html; 5%: truncate 9; session s-7, attempt 1: garbage"
    schedule = ["50ms"] * 40
    async with playing(read_text(script, seed=3), schedule=(0.05,) * 40, keys=(whsec(SIGNING_SECRET),)) as played:
        played.stage._monotonic = asyncio.get_running_loop().time
        toml = operator_table("acme", played.url, schedule=schedule, signing_secret_file="signing", concurrency=8)
        async with serving(tmp_path, toml) as daemon:
            for number in range(30):
                await open_session(daemon, f"s-{number}")
                url = f"{daemon.api}/v1/operators/acme/sessions/s-{number}/close"
                async with daemon.client.post(url) as answer:
                    assert answer.status == 200
            await until(lambda: played.journal.tally["accepted"] == 30, within_s=60)
    counts = played.journal.tally
    assert (counts["sessions"], counts["accepted"]) == (30, 30)
    assert verdict(played.journal, {})["neverAccepted"] == []
    assert counts["notices"] > 30
    assert missed(counts, {}) == []


# -- expectations and the command


def test_expectations_are_counts_and_ranges() -> None:
    expected = read_expectations('notices = 3\naccepted = "2+"\nrepeated = "1-2"\ntoo_soon = "0-5"')
    assert missed({"notices": 3, "accepted": 2, "repeated": 2, "too_soon": 4}, expected) == []
    assert missed({"notices": 4, "accepted": 1}, expected) == [
        "notices: 3 expected, 4 seen",
        "accepted: 2 or more expected, 1 seen",
        "repeated: 1 to 2 expected, 0 seen",
    ]
    for text, complaint in (
        ("many = 1", "many: is not known"),
        ("notices = -1", "must be a count"),
        ("notices = true", "must be a count"),
        ("notices = 1.5", "must be a count"),
        ("notices = 10000000000", "must be a count"),
        ('notices = "5-2"', "N must be at most M"),
        ("=", "Invalid"),
    ):
        with pytest.raises(ScriptError, match=complaint):
            read_expectations(text)


async def test_the_command_journals_each_notice_and_ends_with_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "expect.toml").write_text("notices = 2\nsessions = 1\naccepted = 1\n")
    (tmp_path / "play.toml").write_text('[[rule]]\nattempt = 1\nanswer = "status 503"\n')
    words = ("simulate", "operator", "--listen", "127.0.0.1:0", "--script", "play.toml", "--journal", "journal.jsonl")
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *(*words, "--expect", "expect.toml", "--schedule", "10ms"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    address = (await process.stderr.readline()).decode().removeprefix("Serving ").strip()
    operator = to(address + "V4/SessionExpired")
    notices = Notices(operator, run="t", token="token-that-is-no-secret")
    body = notices.body(notices.fields())
    assert await attempt(operator, "msg_1", body) == "retry status_503"
    await asyncio.sleep(0.01)
    assert await attempt(operator, "msg_1", body) == "delivered"
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    lines = out.decode().splitlines()
    assert "attempt 1  status 503" in lines[0]
    assert lines[-1] == "Verdict: as expected"
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [(one["attempt"], one["answer"], one["faults"]) for one in journal] == [(1, "status 503", []), (2, "ok", [])]
    assert journal[0]["bodySha256"] == journal[1]["bodySha256"]


async def test_the_command_serves_a_unix_socket_too(tmp_path: Path) -> None:
    """A socket that nobody serves is replaced, also by an operator that was down, and one that is served is not."""
    path = tmp_path / "operator"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    words = ("simulate", "operator", "--listen", f"unix:{path}", "--script", "down 100ms then ok")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert process.stdout is not None
    assert (await process.stderr.readline()).decode() == f"Serving http on unix:{path}\n"
    notices = Notices(to("http://operator.example/"), run="t")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client:

        async def tell() -> int:
            headers = {"Content-Type": "application/json"}
            async with client.post("http://x/", data=notices.body(notices.fields()), headers=headers) as answer:
                return answer.status

        with pytest.raises(aiohttp.ClientError):
            await tell()
        while b"up again" not in await process.stdout.readline():
            pass
        assert await tell() == 200
        second = await asyncio.to_thread(run, *words, cwd=tmp_path)
        assert (second.returncode, second.stderr) == (
            *(1, f"lmdaemon: --listen: unix:{path}: Address already in use\n"),
        )
        assert await tell() == 200
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == 0


FULL = "cannot be written to: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("output", "journal", "problem"),
    [
        ("/dev/full", "journal.jsonl", f"standard output {FULL}"),
        ("/dev/null", "/dev/full", f"--journal: /dev/full {FULL}"),
        ("/dev/full", "/dev/full", f"standard output {FULL}; --journal: /dev/full {FULL}"),
        ("left", "journal.jsonl", "standard output cannot be written to: Broken pipe"),
    ],
)
async def test_output_that_cannot_be_written_changes_no_answer(
    tmp_path: Path, output: str, journal: str, problem: str
) -> None:
    """Every notice gets the script's answer. One line at the end says what was not written, and has the verdict."""
    reading, writing = os.pipe()
    if output != "left":
        os.close(writing)
        writing = os.open(output, os.O_WRONLY)
    os.close(reading)
    words = ("simulate", "operator", "--listen", "127.0.0.1:0", "--script", "attempt 1: error 100", "--schedule", "1ms")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *words, "--journal", journal, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert process.stderr is not None
    operator = to((await process.stderr.readline()).decode().removeprefix("Serving ").strip() + "V4/SessionExpired")
    body = (notices := Notices(operator, run="t")).body(notices.fields())
    assert await attempt(operator, "msg_1", body) == "retry code_100"
    for _ in range(3):
        assert await attempt(operator, "msg_1", body) == "delivered"
    process.send_signal(signal.SIGTERM)
    _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (1, f"lmdaemon: {problem}; Verdict: as expected\n")
    if journal != "/dev/full":
        assert len((tmp_path / journal).read_text().splitlines()) == 4


def test_an_expectation_that_is_missed_at_the_end_fails_the_command(tmp_path: Path) -> None:
    (tmp_path / "expect.toml").write_text("notices = 1\n")
    words = "simulate operator --listen 127.0.0.1:0 --for 10ms --json --expect expect.toml"
    done = run(*words.split(), cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["missed"] == ["notices: 1 expected, 0 seen"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--listen nowhere", "--listen: must be HOST:PORT, a port of at most 65535 (got 'nowhere')"),
        ("--listen unix:operator", '--listen: must be "unix:" and an absolute path of at most 107 bytes (got'),
        ("--listen 127.0.0.1:0 --script oops", "--script: rule 1 ('oops')"),
        ("--listen 127.0.0.1:0 --script play.txt", "and there is no file play.txt"),
        ("--listen 127.0.0.1:0 --script missing.toml", "--script: missing.toml cannot be read"),
        ("--listen 127.0.0.1:0 --expect missing.toml", "--expect: missing.toml cannot be read"),
        ("--listen 127.0.0.1:65536", "a port of at most 65535 (got '127.0.0.1:65536')"),
        pytest.param(f"--listen 127.0.0.1:{'9' * 5000}", "--listen: must be HOST:PORT", id="port of 5000 digits"),
        ("--listen 127.0.0.1:0 --script 'ok x0'", "how many notices an answer is given to must be x1"),
        ("--listen 127.0.0.1:0 --schedule soon", "--schedule: must be a duration"),
        ("--listen 127.0.0.1:0 --schedule 5s,0s", "--schedule: must not be zero"),
        ("--listen 127.0.0.1:0 --schedule 5s,", "(got '')"),
        ("--listen 127.0.0.1:0 --seed x", "--seed: must be a whole number"),
        ("--listen 127.0.0.1:0 --for 0s", "--for: must not be zero"),
    ],
)
def test_bad_usage_of_simulate_operator_exits_2(tmp_path: Path, words: str, complaint: str) -> None:
    done = run("simulate", "operator", *shlex.split(words), cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
