"""`lmdaemon check`: the daemon's own endpoint passes, an endpoint with one mistake fails in that check alone, and no
endpoint can harm the command.
"""

import asyncio
import json
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from certificates import make
from commands import COMMAND, environment, run
from endpoints import HASH_KEY, PROVIDER, QUICK, TOKEN, UNTIMED, Endpoint, checked, served, to
from faults import look_up_by, not_found
from support import serving

from lmdaemon import tls
from lmdaemon.commands.recipient import stranger
from lmdaemon.dialects import SHIPPED
from lmdaemon.workbench.bench import changed
from lmdaemon.workbench.checks import CHECKS
from lmdaemon.workbench.notices import SESSIONS_NEEDED
from lmdaemon.workbench.runner import Progress, Report, Runner, check_operator, chosen
from lmdaemon.workbench.wire import PER_SECOND, REQUESTS_MAX


def verdicts(report: Report, *wanted: str) -> dict[str, str]:
    return {result.check.id: result.text for result in report.results if result.verdict in wanted}


@pytest.mark.parametrize("dialect", SHIPPED)
async def test_an_endpoint_that_is_right_passes_every_check(dialect: str) -> None:
    async with served(Endpoint(dialect=SHIPPED[dialect], signed=dialect == "v4")) as endpoint:
        report = await checked(endpoint)
    assert verdicts(report, "fail") == {}
    proven = {"hash", "token"} & SHIPPED[dialect].fields.keys()
    assert set(verdicts(report, "warn")) == (set() if proven else {"authenticity.anything"})
    assert endpoint.seen == report.requests <= REQUESTS_MAX
    assert not report.stopped


FAULTS = [
    ("redirects", "connection.no-redirect"),
    ("HTML with 200", "answer.valid"),
    ("Error instead of error", "answer.valid"),
    ("status from the code", "answer.refusal-status"),
    ("codes of its own", "answer.codes"),
    ("repeats the token", "answer.no-echo"),
    ("gzip unasked", "answer.framing"),
    ("HTML at malformed JSON", "strictness.malformed"),
    ("faults at a list", "strictness.not-object"),
    ("does not miss externalPlayerId", "strictness.missing"),
    ("takes empty fields", "strictness.empty"),
    ("turns any type into text", "strictness.types"),
    ("the last of two", "strictness.duplicate-field"),
    ("takes any provider", "strictness.other-provider"),
    ("refuses further fields", "strictness.extra-fields"),
    ("64 characters at most", "strictness.long-ids"),
    ("SQL from text", "strictness.hostile-ids"),
    ("takes one spelling of the type", "strictness.charset"),
    ("GET ends sessions", "strictness.method"),
    ("500 at a large body", "strictness.large-body"),
    ("500 on repeat", "idempotence.repeat"),
    ("code 4 after logout", "idempotence.repeat"),
]


@pytest.mark.parametrize(("fault", "check"), FAULTS, ids=[fault for fault, _ in FAULTS])
async def test_one_fault_fails_its_own_check_and_no_other(fault: str, check: str) -> None:
    async with served(Endpoint(fault)) as endpoint:
        report = await checked(endpoint)
    assert set(verdicts(report, "fail")) == {check}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("hash is not checked", "authenticity.hash"),
        ("hash in lower case only", "authenticity.hash-case"),
        ("hash from a fixed list", "authenticity.hash-whole"),
    ],
)
async def test_one_fault_of_the_hash_fails_its_own_check(fault: str, check: str) -> None:
    async with served(Endpoint(fault, SHIPPED["pragmatic"])) as endpoint:
        report = await checked(endpoint)
    assert set(verdicts(report, "fail")) == {check}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("signature only if it is there", "authenticity.signature"),
        ("old signatures", "authenticity.timestamp"),
        ("one signature only", "authenticity.rotation"),
    ],
)
async def test_one_fault_of_the_signature_fails_its_own_check(fault: str, check: str) -> None:
    async with served(Endpoint(fault, signed=True)) as endpoint:
        report = await checked(endpoint)
    assert set(verdicts(report, "fail")) == {check}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("takes any player", "strictness.other-player"),
        ("provider in its very spelling", "strictness.provider-case"),
        ("takes any type", "strictness.content-type"),
        ("waits for slow bodies", "strictness.slow-body"),
        ("error as text", "answer.error-number"),
        ("no description", "answer.description"),
        ("a clock of its own", "answer.clock"),
        ("byte-order mark", "answer.framing"),
        ("text/plain", "answer.content-type"),
    ],
)
async def test_what_works_but_should_be_better_is_a_warning(fault: str, check: str) -> None:
    async with served(Endpoint(fault)) as endpoint:
        report = await checked(endpoint)
    assert (verdicts(report, "fail"), set(verdicts(report, "warn"))) == ({}, {check})


@pytest.mark.parametrize(("timeout_s", "verdict"), [(10, "warn"), (1, "fail")])
async def test_an_endpoint_that_takes_its_time_is_told_how_much(timeout_s: float, verdict: str) -> None:
    async with served(Endpoint()) as endpoint:
        prompt = endpoint.handle

        async def handle(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(1.2)
            return await prompt(request)

        endpoint.handle = handle  # type: ignore[method-assign]
        async with served(endpoint):
            operator = to(endpoint.url, provider_id=PROVIDER)
            operator = changed(operator, policy=changed(operator.policy, timeout_s=timeout_s))
            report = await Runner(operator, checks=chosen(["connection.speed"], []), token=TOKEN).run()
    assert "connection.speed" in verdicts(report, verdict)


async def test_an_endpoint_that_is_slow_in_a_crowd_alone_is_told_so() -> None:
    turn = asyncio.Lock()

    class OneByOne(Endpoint):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            async with turn:
                await asyncio.sleep(0.15)
                return await super().handle(request)

    async with served(OneByOne()) as endpoint:
        report = await checked(endpoint, checks=chosen(["connection.speed", "idempotence.race"], []))
    told = next(result for result in report.results if result.check.id == "connection.speed")
    assert told.verdict == "warn"
    assert "when several come at once" in told.text
    assert told.hint.startswith("Serve several connections at once")


@pytest.mark.parametrize("dialect", SHIPPED)
async def test_an_endpoint_that_knows_its_sessions_is_given_some(dialect: str) -> None:
    ids = [f"real-{number}" for number in range(SESSIONS_NEEDED)]
    async with served(Endpoint(dialect=SHIPPED[dialect], known=frozenset(ids))) as endpoint:
        without = await checked(endpoint)
        report = await checked(endpoint, sessions=ids, limits=QUICK._replace(burst=False), per_second=None)
    (failed,) = (result for result in without.results if result.verdict == "fail")
    assert failed.check.id == "answer.valid"
    assert "open sessions of that player (--session-file)" in failed.hint
    assert (report.stopped, verdicts(report, "fail")) == ("", {})
    passed = verdicts(report, "pass")
    assert passed.keys() >= {"strictness.long-ids", "strictness.hostile-ids", "idempotence.unknown"}


async def test_too_few_sessions_are_told_and_blame_nobody() -> None:
    ids = [f"real-{number}" for number in range(6)]
    async with served(Endpoint(known=frozenset(ids))) as endpoint:
        report = await checked(endpoint, sessions=ids)
    assert "all test sessions were used" in report.stopped
    assert not report.is_good
    assert verdicts(report, "fail", "warn") == {}


async def test_an_endpoint_that_believes_anybody_is_warned_about_loudly() -> None:
    async with served(Endpoint("takes any token")) as endpoint:
        report = await checked(endpoint)
    warned = verdicts(report, "warn")
    assert set(warned) == {"authenticity.token", "authenticity.anything"}
    assert "NOTHING" in warned["authenticity.anything"]


def test_checks_are_data_with_a_sentence_each() -> None:
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids)) >= 40
    for check in CHECKS:
        assert all(text.endswith(".") for text in (check.title, check.why, check.hint)), check.id


def test_only_and_skip_take_ids_and_groups() -> None:
    assert {check.id for check in chosen(["authenticity.hash"], [])} == {"authenticity.hash", "answer.valid"}
    assert {check.group for check in chosen([], ["strictness", "behaviour"])} == {
        *("connection", "answer", "idempotence", "authenticity"),
    }
    with pytest.raises(ValueError, match="'nonsense'; groups are connection, answer"):
        chosen(["nonsense"], [])
    with pytest.raises(ValueError, match=r"'strictnes\.method'; did you mean strictness\.method"):
        chosen([], ["strictnes.method"])
    assert {check.id for check in chosen(["answer", "connection.tls"], ["answer"])} == {
        "answer.valid",
        "connection.tls",
    }


async def test_a_run_keeps_its_pace_and_its_bound_of_requests() -> None:
    """Measured at the endpoint: no second has more requests than are allowed."""
    arrived: list[float] = []

    class Counting(Endpoint):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            arrived.append(asyncio.get_running_loop().time())
            return await super().handle(request)

    async with served(Counting()) as endpoint:
        report = await checked(endpoint, limits=QUICK._replace(burst=False), per_second=20)
    assert len(arrived) == report.requests <= REQUESTS_MAX
    assert report.requests > 40
    assert all(later - earlier >= 1 for earlier, later in zip(arrived, arrived[20:], strict=False))
    arrived.clear()
    async with served(Counting()) as endpoint:
        some = chosen(["idempotence.repeat", "idempotence.race", "idempotence.later"], [])
        report = await checked(endpoint, limits=QUICK._replace(burst=False), checks=some)
    assert verdicts(report, "pass")["idempotence.race"] == "all 5 succeed"
    assert len(arrived) == report.requests == 8
    assert all(later - earlier >= 1 for earlier, later in zip(arrived, arrived[PER_SECOND:], strict=False))


# -- the daemon's own endpoint

OWN = """
[server]
listen = "127.0.0.1:0"
[api]
listen = "127.0.0.1:0"
[operators.v4]
provider_id = "Provider-v4"
token_check = "partner"
partner_token_file = "token"
endpoint = "/v4/SessionExpired"
[operators."v4.01"]
provider_id = "Provider-v4.01"
accept = ["v4.01"]
endpoint = "/v4.01/SessionExpired"
[operators."v4.02"]
provider_id = "Provider-v4.02"
accept = ["v4.02"]
endpoint = "/v4.02/SessionExpired"
[operators.v1]
provider_id = "Provider-v1"
accept = ["v1"]
endpoint = "/v1/SessionExpired"
[operators.pragmatic]
provider_id = "Provider-pragmatic"
accept = ["pragmatic"]
dialect = "pragmatic"
hash_key_file = "hash-key"
endpoint = "/pragmatic/SessionExpired"
"""


def secret(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o600)
    return file


async def test_our_own_endpoint_passes_every_check_in_every_dialect(tmp_path: Path) -> None:
    secret(tmp_path / "token", TOKEN)
    secret(tmp_path / "hash-key", HASH_KEY)
    patient = QUICK._replace(patience_s=20)  # longer than the ten seconds that the endpoint waits for a body
    async with serving(tmp_path, OWN) as daemon:

        async def one(dialect: str) -> Report:
            shape = SHIPPED[dialect]
            key = HASH_KEY if "hash" in shape.fields else None
            changes = {"provider_id": f"Provider-{dialect}", "sends": shape, "hash_key": key}
            operator = to(f"{daemon.server}/{dialect}/SessionExpired", **changes)
            return await Runner(operator, checks=UNTIMED, token=TOKEN, limits=patient).run()

        reports = dict(zip(SHIPPED, await asyncio.gather(*map(one, SHIPPED)), strict=True))
    for dialect, report in reports.items():
        assert not report.stopped, dialect
        proven = {"hash", "token"} & SHIPPED[dialect].fields.keys()
        assert verdicts(report, "fail") == {}, dialect
        assert set(verdicts(report, "warn")) == (set() if proven else {"authenticity.anything"}), dialect
        assert report.requests <= REQUESTS_MAX


async def test_our_own_endpoint_over_mutual_tls_leaves_nothing_to_be_warned_of(tmp_path: Path) -> None:
    authority = make(tmp_path, "ca", authority=True)
    server, client = make(tmp_path, "server", authority), make(tmp_path, "client", authority)
    toml = OWN.replace('"127.0.0.1:0"\n[api]', f'"127.0.0.1:0"\ntls_cert_file = "{server.cert}"\n[api]').replace(
        "\n[api]", f'\ntls_key_file = "{server.key}"\nclient_ca_file = "{authority.cert}"\n[api]', 1
    )
    secret(tmp_path / "token", TOKEN)
    secret(tmp_path / "hash-key", HASH_KEY)
    profile = tls.Profile(*(tls.Pem(file, "") for file in (authority.cert, client.cert, client.key)))
    async with serving(tmp_path, toml) as daemon:
        url = daemon.server.replace("http://", "https://") + "/v1/SessionExpired"
        operator = to(
            url,
            provider_id="Provider-v1",
            sends=SHIPPED["v1"],
            tls=profile,
            ca_file=tls.Pem(authority.cert, ""),
            client_cert_file=tls.Pem(client.cert, ""),
        )
        report = await Runner(
            operator, limits=QUICK, checks=chosen([], ["strictness.slow-body", "connection.speed"])
        ).run()
    assert verdicts(report, "fail", "warn") == {}
    passed = verdicts(report, "pass")
    assert {"connection.tls", "connection.plain-http", "authenticity.client-certificate"} <= passed.keys()
    assert passed["authenticity.anything"] == "by client-certificate"


@pytest.mark.parametrize(
    ("play", "told"),
    [
        ("says_nothing", "the handshake was not over within 0.2 s"),
        ("is_no_http", "WRONG_VERSION_NUMBER"),
        ("closes", "the server closed the connection during the handshake"),
    ],
)
async def test_a_handshake_that_comes_to_nothing_is_explained(play: str, told: str) -> None:
    async with playing(PLAYS[play]) as url:
        operator = to(url.replace("http://", "https://"))
        operator = changed(operator, policy=changed(operator.policy, timeout_s=0.3))
        report = await Runner(
            operator, checks=chosen(["connection.tls"], []), limits=QUICK._replace(connect_s=0.2)
        ).run()
    failed = verdicts(report, "fail")
    assert failed.keys() == {"connection.tls", "answer.valid"}
    assert told in failed["connection.tls"]


async def test_a_certificate_that_fits_no_name_fails_tls_and_skips_the_rest(tmp_path: Path) -> None:
    authority = make(tmp_path, "ca", authority=True)
    stranger = make(tmp_path, "stranger")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(stranger.cert, stranger.key)
    async with served(Endpoint(), context) as endpoint:
        operator = to(endpoint.url, tls=tls.Profile(tls.Pem(authority.cert, ""), None, None))
        report = await Runner(operator, limits=QUICK).run()
    assert set(verdicts(report, "fail")) == {"connection.tls", "answer.valid"}
    assert "certificate" in verdicts(report, "fail")["connection.tls"]
    assert endpoint.seen == 0 or not endpoint.bodies  # no token was sent to a server that could not prove its name


# -- hostile targets

Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"\r\n")
    while True:
        writer.write(b" " * 65536)
        await writer.drain()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def is_huge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 10000000000\r\n\r\n" + b"x" * 1_000_000)
    await writer.drain()


async def has_endless_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: " + b"y" * 1000 + b"\r\n")
        await writer.drain()


async def redirects_to_itself(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 307 Again\r\nLocation: /V4/SessionExpired\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def is_no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x1b[2J220 smtp ready\r\n" * 10)
    await writer.drain()


async def nests_deeply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = b'{"error":' + b"[" * 15000 + b"]"
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closes with a FIN after what was sent before."""


PLAYS = {"says_nothing": says_nothing, "is_no_http": is_no_http, "closes": closes}
IMPATIENT = (hangs_up, is_no_http)


@asynccontextmanager
async def playing(play: Play) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if play is closes:
                await reader.read(1)
            elif play not in IMPATIENT:
                await reader.readuntil(b"\r\n\r\n")
            await play(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/V4/SessionExpired"
    finally:
        server.close()


async def test_nothing_passes_before_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up_by(monkeypatch, not_found)
    report = await Runner(to("https://nowhere.invalid/V4/SessionExpired"), limits=QUICK).run()
    assert set(verdicts(report, "fail")) == {"connection.resolves", "connection.tls", "answer.valid"}
    assert verdicts(report, "pass", "warn") == {}


async def test_nothing_is_sent_into_a_private_network_that_was_not_allowed() -> None:
    async with served(Endpoint()) as endpoint:
        for host in ("127.0.0.1", "localhost"):
            url = endpoint.url.replace("127.0.0.1", host)
            report = await Runner(to(url, allow_private_network=False), limits=QUICK).run()
            assert "private" in verdicts(report, "fail")["answer.valid"]
            assert verdicts(report, "pass", "warn").keys() <= {"connection.resolves"}
    assert endpoint.seen == 0


@pytest.mark.parametrize(
    "play",
    [
        says_nothing,
        never_ends,
        drips,
        is_huge,
        has_endless_headers,
        redirects_to_itself,
        is_no_http,
        nests_deeply,
        hangs_up,
    ],
)
async def test_a_hostile_target_gets_few_requests_and_a_report(play: Play) -> None:
    async with playing(play) as url, asyncio.timeout(60):
        operator = to(url)
        operator = changed(operator, policy=changed(operator.policy, timeout_s=0.3))
        report = await Runner(operator, limits=QUICK).run()
    assert report.counts["fail"] >= 1
    assert not report.is_good
    assert report.requests <= 5  # an endpoint that refuses valid notices gets no further requests
    assert not [text for text in verdicts(report, "skipped").values() if "itself failed" in text]
    assert len(json.dumps(report.as_json())) < 300_000


async def test_a_target_that_falls_silent_is_left_alone() -> None:
    async with served(Endpoint()) as endpoint:
        plays = endpoint.handle

        async def falls_silent(request: web.Request) -> web.StreamResponse:
            if endpoint.seen >= 8:
                await asyncio.sleep(30)
            return await plays(request)

        endpoint.handle = falls_silent  # type: ignore[method-assign]
        async with served(endpoint) as silent:
            operator = to(silent.url, provider_id=PROVIDER)
            operator = changed(operator, policy=changed(operator.policy, timeout_s=0.2))
            report = await Runner(operator, token=TOKEN, limits=QUICK).run()
    assert report.stopped == "3 requests in a row got no answer"
    assert report.requests < 30
    assert report.counts["pass"] >= 3


async def test_a_repeat_that_fails_otherwise_is_reported_by_its_own_check() -> None:
    """The plain repeat is refused. Ten repeats at once crash the endpoint, which is another fault."""

    class Fragile(Endpoint):
        under_way = 0

        async def handle(self, request: web.Request) -> web.StreamResponse:
            self.under_way += 1
            try:
                await asyncio.sleep(0.05)
                if self.under_way > 3:
                    return web.Response(status=500)
                return await super().handle(request)
            finally:
                self.under_way -= 1

    async with served(Fragile("code 4 after logout")) as endpoint:
        report = await checked(endpoint, checks=chosen(["idempotence"], []))
    assert set(verdicts(report, "fail")) == {"idempotence.repeat", "idempotence.race"}
    skipped = {name for name, text in verdicts(report, "skipped").items() if "as idempotence.repeat does" in text}
    assert skipped == {"idempotence.attempt", "idempotence.rewritten", "idempotence.later"}


# -- check_operator, for other programs


async def test_an_operator_is_checked_as_data_with_progress() -> None:
    seen: list[Progress] = []
    async with served(Endpoint("status from the code")) as endpoint:
        operator = to(endpoint.url, provider_id=PROVIDER)
        report = await check_operator(operator, token=TOKEN, limits=QUICK, on_progress=seen.append)
    assert report == json.loads(json.dumps(report))
    failed = {one["id"] for one in report["checks"] if one["verdict"] == "fail"}
    assert "answer.refusal-status" in failed
    assert (report["stopped"], report["counts"]["fail"]) == (None, len(failed))
    begun, ended = [one for one in seen if one.check], [one for one in seen if one.result]
    assert [one.done for one in begun] == list(range(len(CHECKS)))
    assert [one.done for one in ended] == list(range(1, len(CHECKS) + 1))
    found = {one.result["id"]: one.result for one in ended if one.result}
    assert [found[one["id"]] for one in report["checks"]] == report["checks"]


async def test_a_check_that_is_cancelled_returns_what_it_has_found() -> None:
    async with served(Endpoint()) as endpoint:

        def at_the_sixth(progress: Progress) -> None:
            if progress.check and progress.done == 5:
                running.cancel()

        operator = to(endpoint.url, provider_id=PROVIDER)
        running = asyncio.create_task(check_operator(operator, token=TOKEN, limits=QUICK, on_progress=at_the_sixth))
        report = await running
    assert report["stopped"] == "interrupted"
    assert len([one for one in report["checks"] if one["text"] == "interrupted"]) == len(CHECKS) - 5
    assert sum(report["counts"].values()) == len(CHECKS)


async def test_an_operator_that_cannot_be_checked_is_told_apart() -> None:
    with pytest.raises(ValueError, match="cannot be checked: it has no url"):
        await check_operator(stranger())
    with pytest.raises(ValueError, match="dialect pragmatic needs a hash key"):
        await check_operator(to("https://wallet.example/x", sends=SHIPPED["pragmatic"]))


# -- the command


async def test_check_prints_what_is_wrong_why_and_what_was_seen(tmp_path: Path) -> None:
    secret(tmp_path / "token", TOKEN)
    async with served(Endpoint("SQL from text")) as endpoint:
        words = ("check", "--url", endpoint.url, "--token-file", "token", "--burst", "--skip", "strictness.slow-body")
        done = await asyncio.to_thread(run, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"Checking {endpoint.url} (dialect v4)"
    assert lines[1].startswith("  Fields: providerId, sessionId, externalPlayerId, token; `error`: 0 success; 7 bad")
    at = next(number for number, line in enumerate(lines) if line.startswith("  fail      strictness.hostile-ids"))
    assert "HTTP 500, and the body is HTML" in lines[at]
    assert lines[at + 2].strip().startswith("Why: An id is somebody else's text")
    assert lines[at + 3].strip().startswith("Do:  Use bound parameters")
    assert lines[at + 4].strip() == f"| POST {endpoint.url}"
    assert TOKEN not in done.stdout
    assert '"token":"***"' in done.stdout
    assert " 1 fail, " in lines[-3]
    assert lines[-2:] == [
        "fail: strictness.hostile-ids",
        "To run only these again: --only strictness.hostile-ids",
    ]


async def test_check_trusts_a_private_ca_that_is_named(tmp_path: Path) -> None:
    authority = make(tmp_path, "ca", authority=True)
    server = make(tmp_path, "server", authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.cert, server.key)
    secret(tmp_path / "token", TOKEN)
    async with served(Endpoint(), context) as endpoint:
        words = ("check", "--url", endpoint.url, "--token-file", "token", "--burst", "--only", "connection.tls")
        stranger = await asyncio.to_thread(run, *words, cwd=tmp_path)
        done = await asyncio.to_thread(run, *words, "--ca-file", str(authority.cert), cwd=tmp_path)
    assert stranger.returncode == 1
    assert "--ca-file" in stranger.stdout
    assert (done.returncode, done.stderr) == (0, "")


async def test_check_as_json_masks_secrets_and_names_every_check(tmp_path: Path) -> None:
    secret(tmp_path / "token", TOKEN)
    async with served(Endpoint("repeats the token")) as endpoint:
        url = endpoint.url.replace("http://", "http://me:pass-word@") + "?key=query-secret"
        words = ("check", "--url", url, "--token-file", "token", "--burst", "--json", "--skip", "strictness")
        done = await asyncio.to_thread(run, *words, cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    failed = {one["id"]: one for one in document["checks"] if one["verdict"] == "fail"}
    assert set(failed) == {"answer.no-echo", "authenticity.credentials"}
    assert failed["answer.no-echo"]["evidence"][0]["answer"]["body"].count("***") == 1
    for hidden in (TOKEN, "pass-word", "query-secret"):
        assert hidden not in done.stdout
    assert document["counts"]["fail"] == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("check", "check: give --url, or an operator of the configuration that has a url"),
        ("check --url http://h --only nonsense", "no check and no group is called 'nonsense'"),
        ("check --url http://h --dialect pragmatic", "dialect pragmatic needs --hash-key-file"),
        (
            "check --url http://h --only answer --skip answer.valid",
            "--skip: answer.valid is always tried, because the oth",
        ),
        ("check --url http://h --session-file nowhere", "--session-file: nowhere cannot be read"),
        ("check --url https://h --ca-file config.toml", "--ca-file: config.toml cannot be used: "),
        ("check --url nonsense", "--url: must be a URL such as"),
        ("check --url http://h --junit none/junit.xml", "--junit: none/junit.xml cannot be written: No such file"),
        ("check --url http://h --html .", "--html: . cannot be written: Is a directory"),
    ],
)
def test_bad_usage_of_check_is_explained_and_exits_2(tmp_path: Path, words: str, complaint: str) -> None:
    (tmp_path / "config.toml").write_text("")
    done = run(*words.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
async def test_a_report_is_written_also_if_standard_output_is_full(tmp_path: Path, more: tuple[str, ...]) -> None:
    secret(tmp_path / "token", TOKEN)
    async with served(Endpoint()) as endpoint:
        words = (
            "check",
            "--url",
            endpoint.url,
            "--token-file",
            "token",
            "--only",
            "answer",
            "--junit",
            "junit.xml",
            *more,
        )
        with Path("/dev/full").open("wb") as full:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, *words, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE
            )
            _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (
        *(1, "lmdaemon: standard output cannot be written to: No space left on device\n"),
    )
    assert "answer.valid" in (tmp_path / "junit.xml").read_text()


async def test_ctrl_c_ends_with_what_was_found_so_far(tmp_path: Path) -> None:
    secret(tmp_path / "token", TOKEN)
    async with served(Endpoint()) as endpoint:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *("check", "--url", endpoint.url, "--token-file", "token", "--json", "--html", "report.html"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            while endpoint.seen < 1:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")
    document = json.loads(out)
    assert document["stopped"] == "interrupted"
    assert document["counts"]["skipped"] > 20
    assert "interrupted" in (tmp_path / "report.html").read_text()
