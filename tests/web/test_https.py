"""TLS on both listeners and both event loops: handshakes with real certificates, and everything that can go wrong."""

import asyncio
import contextlib
import socket
import ssl
import warnings
from asyncio import sslproto
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import DAY, Files, make
from clocks import HandClock
from commands import run
from support import RawConnection, Serving, hear, load, serving, until

from lmdaemon import tls
from lmdaemon.config.findings import ConfigError
from lmdaemon.limits import LIMITS, Limits
from lmdaemon.web import handshakes

OPERATOR = '[operators.acme]\nprovider_id = "luckymonaco"\n'
NOTICE = {"providerId": "luckymonaco", "sessionId": "s", "externalPlayerId": "p", "token": "tok-3n"}
ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SIDES = pytest.mark.parametrize("side", ["server", "api"])


@pytest.fixture
def ca(tmp_path: Path) -> Files:
    return make(tmp_path, "ca", authority=True)


def table(name: str, files: Files, client_ca: Files | None = None) -> str:
    lines = [
        f"[{name}]",
        'listen = "127.0.0.1:0"',
        f'tls_cert_file = "{files.cert.name}"',
        f'tls_key_file = "{files.key.name}"',
        *([f'client_ca_file = "{client_ca.cert.name}"'] if client_ca else []),
    ]
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def serving_tls(
    directory: Path, files: Files, client_ca: Files | None = None, limits: Limits = LIMITS
) -> AsyncIterator[Serving]:
    """A daemon that uses TLS on both listeners."""
    toml = table("server", files, client_ca) + table("api", files, client_ca) + OPERATOR
    async with serving(directory, toml, limits=limits) as daemon:
        daemon.server = daemon.server.replace("http:", "https:")
        daemon.api = daemon.api.replace("http:", "https:")
        yield daemon


@contextlib.asynccontextmanager
async def connected(url: str, context: ssl.SSLContext | None) -> AsyncIterator[RawConnection]:
    """A connection with TLS, or without it if there is no context."""
    host, _, port = url.rpartition("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def serial(peer: RawConnection) -> int:
    """The serial number of the certificate that the daemon has shown."""
    return int(peer.writer.get_extra_info("ssl_object").getpeercert()["serialNumber"], 16)


# -- what is spoken


@SIDES
async def test_https_is_spoken(tmp_path: Path, ca: Files, side: str) -> None:
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon:
        context = tls.client_context(ca.cert, None, None)
        async with daemon.client.get(getattr(daemon, side) + "/health", ssl=context) as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "pass")
        async with daemon.client.post(daemon.server + "/V4/SessionExpired", json=NOTICE, ssl=context) as answer:
            assert await answer.json() == {"error": 0, "description": "Success"}


async def test_a_chain_is_sent_whole(tmp_path: Path, ca: Files) -> None:
    between = make(tmp_path, "between", ca, authority=True)
    own = make(tmp_path, "own", between)
    own.cert.write_bytes(own.cert.read_bytes() + between.cert.read_bytes())
    async with serving_tls(tmp_path, own) as daemon:
        async with daemon.client.get(daemon.api + "/health", ssl=tls.client_context(ca.cert, None, None)) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("version", "spoken"),
    [(ssl.TLSVersion.TLSv1_1, None), (ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")],
)
async def test_versions_from_1_2_are_spoken(
    tmp_path: Path, ca: Files, version: ssl.TLSVersion, spoken: str | None
) -> None:
    context = tls.client_context(ca.cert, None, None)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon:
        if spoken is None:
            context.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.raises(OSError):  # noqa: PT011 - OpenSSL's own, or the connection reset
                async with connected(daemon.server, context):
                    pass
            return
        async with connected(daemon.server, context) as peer:
            secured = peer.writer.get_extra_info("ssl_object")
            assert (secured.version(), secured.selected_alpn_protocol()) == (spoken, "http/1.1")


# -- what is no handshake


async def failed(daemon: Serving, side: str, context: ssl.SSLContext) -> dict[str, float]:
    """The counts of failed handshakes by reason, without zeros."""
    async with daemon.client.get(daemon.api + "/metrics", ssl=context) as answer:
        lines = (await answer.text()).splitlines()
    start = f'lmdaemon_tls_handshakes_failed_total{{listener="{side}",reason="'
    found = {
        line.removeprefix(start).partition('"')[0]: float(line.split()[-1]) for line in lines if line.startswith(start)
    }
    assert found.keys() == set(handshakes.REASONS)
    return {reason: count for reason, count in found.items() if count}


@SIDES
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (ASK, "plain_http"),
        (b"\x00" * 300, "not_tls"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_tls"),
        (bytes.fromhex("16030100c8010000c40303") + bytes(200), "other"),
    ],
    ids=["http", "zeros", "ssh", "a broken hello"],
)
async def test_what_is_no_tls_is_told_and_closed(
    tmp_path: Path, ca: Files, side: str, sent: bytes, reason: str
) -> None:
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon:
        with hear() as events:
            async with connected(getattr(daemon, side), None) as peer:
                await peer.send(sent)
                with contextlib.suppress(ConnectionError):
                    await peer.rest()
            (event,) = await until(lambda: [one for one in events if one.name == "tls.handshake_failed"])
        assert (event.level, event.facts["listener"], event.facts["peer"]) == ("warning", side, "127.0.0.1")
        assert (event.facts["reason"], bool(event.facts["detail"])) == (reason, True)
        assert await failed(daemon, side, tls.client_context(ca.cert, None, None)) == {reason: 1}


@SIDES
async def test_who_only_looks_whether_somebody_listens_is_no_warning(tmp_path: Path, ca: Files, side: str) -> None:
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon:
        with hear() as events:
            async with connected(getattr(daemon, side), None):
                pass
            (event,) = await until(lambda: [one for one in events if one.name.startswith("tls.")])
        assert (event.name, event.level) == ("tls.closed", "info")
        assert await failed(daemon, side, tls.client_context(ca.cert, None, None)) == {"closed": 1}


@SIDES
async def test_a_handshake_that_hangs_is_cut(tmp_path: Path, ca: Files, side: str) -> None:
    own, limits = make(tmp_path, "own", ca), Limits(handshake_s=0.2)
    async with serving_tls(tmp_path, own, limits=limits) as daemon:
        with hear() as events:
            async with connected(getattr(daemon, side), None) as peer:
                await peer.send(bytes.fromhex("16030100c8"))
                with contextlib.suppress(ConnectionError):
                    assert await peer.rest() == b""
            (event,) = await until(lambda: [one for one in events if one.name == "tls.handshake_failed"])
        assert event.facts["reason"] == "timeout"


@SIDES
async def test_handshakes_count_as_connections_and_leave_room_for_others(tmp_path: Path, ca: Files, side: str) -> None:
    context = tls.client_context(ca.cert, None, None)
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon, contextlib.AsyncExitStack() as stack:
        url, site = getattr(daemon, side), daemon.sites[side]
        site.most, site.share = 3, 1
        honest = await stack.enter_async_context(connected(url, context))
        hanging = [await stack.enter_async_context(connected(url, None)) for _ in range(2)]
        await until(lambda: site.connections == 3)
        with pytest.raises(OSError):  # noqa: PT011 - closed before any TLS
            await stack.enter_async_context(connected(url, context))
        assert site.turned_away["listener"] == 1
        await honest.send(ASK)
        assert (await honest.answer()).status == 200
        hanging[0].writer.transport.abort()
        await until(lambda: site.connections == 2)
        another = await stack.enter_async_context(connected(url, context))
        await another.send(ASK)
        assert (await another.answer()).status == 200


# -- certificates of clients


@SIDES
async def test_a_client_must_show_a_certificate_of_the_authority(tmp_path: Path, ca: Files, side: str) -> None:
    theirs = make(tmp_path, "theirs", authority=True)
    good, bad = make(tmp_path, "good", theirs), make(tmp_path, "bad", ca)
    late = make(tmp_path, "late", theirs, begins=-3 * DAY, ends=-DAY)
    async with serving_tls(tmp_path, make(tmp_path, "own", ca), theirs) as daemon:
        with hear() as events:
            for shown, reason in (
                (None, "no_client_certificate"),
                (bad, "client_certificate_refused"),
                (late, "client_certificate_refused"),
                (good, None),
            ):
                context = tls.client_context(ca.cert, shown and shown.cert, shown and shown.key)
                events.clear()
                status = None
                with contextlib.suppress(OSError, EOFError):  # in TLS 1.3 the refusal may come after the handshake
                    async with connected(getattr(daemon, side), context) as peer:
                        await peer.send(ASK)
                        status = (await peer.answer()).status
                assert status == (None if reason else 200), shown
                if reason:
                    (event,) = await until(lambda: [one for one in events if one.name == "tls.handshake_failed"])
                    assert event.facts["reason"] == reason


@pytest.mark.parametrize(
    ("version", "alert"),
    [
        (ssl.TLSVersion.TLSv1_2, "SSLV3_ALERT_HANDSHAKE_FAILURE"),
        (ssl.TLSVersion.TLSv1_3, "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    ],
)
async def test_a_client_is_told_why_it_is_refused(
    tmp_path: Path, ca: Files, version: ssl.TLSVersion, alert: str
) -> None:
    context = tls.client_context(ca.cert, None, None)
    context.maximum_version = version

    def ask(port: int) -> None:
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        with context.wrap_socket(raw, server_hostname="localhost", do_handshake_on_connect=False) as secured:
            secured.do_handshake()
            secured.recv(1)  # in TLS 1.3 the alert comes after the handshake

    async with serving_tls(tmp_path, make(tmp_path, "own", ca), ca) as daemon:
        with pytest.raises(ssl.SSLError) as caught:
            await asyncio.to_thread(ask, daemon.daemon.addresses["server"][1])
    assert caught.value.reason == alert


async def test_plain_http_is_told_to_use_https(tmp_path: Path, ca: Files) -> None:
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon, connected(daemon.server, None) as peer:
        await peer.send(ASK)
        answer = await peer.answer()
        assert (answer.status, answer.body) == (400, b"This address speaks https://\n")
        assert await peer.rest() == b""


async def test_a_client_that_does_not_trust_us_is_heard(tmp_path: Path, ca: Files) -> None:
    """Clients on OpenSSL send an alert when they do not trust the certificate. Python's clients only close the
    connection.
    """
    own = make(tmp_path, "own", ca)
    strange = ssl.create_default_context(cafile=make(tmp_path, "strange", authority=True).cert)

    def distrust(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as raw, pytest.raises(ssl.SSLCertVerificationError):
            strange.wrap_socket(raw, server_hostname="localhost")

    async with serving_tls(tmp_path, own) as daemon:
        with hear() as events:
            await asyncio.to_thread(distrust, daemon.daemon.addresses["server"][1])
            (event,) = await until(lambda: [one for one in events if one.name == "tls.handshake_failed"])
        assert (event.facts["reason"], event.facts["detail"]) == ("refused_by_peer", "tlsv1 alert unknown ca")


# -- renewal


@SIDES
async def test_a_renewed_certificate_is_shown_next_and_cuts_nobody_off(tmp_path: Path, ca: Files, side: str) -> None:
    context = tls.client_context(ca.cert, None, None)
    own = make(tmp_path, "own", ca)
    async with serving_tls(tmp_path, own) as daemon, connected(getattr(daemon, side), context) as before:
        await before.send(ASK)
        assert (await before.answer()).status == 200
        renewed = make(tmp_path, "own", ca)
        with hear("lmdaemon.daemon") as events:
            await daemon.daemon.reload_once()
        (event,) = [one for one in events if one.name == "config.reloaded"]
        files = [f"{name}.{key}" for name in ("api", "server") for key in ("tls_cert_file", "tls_key_file")]
        assert event.facts["changed"] == ",".join(files)
        async with connected(getattr(daemon, side), context) as after:
            assert serial(after) == renewed.certificate.serial_number
            for peer in (before, after):
                await peer.send(ASK)
                assert (await peer.answer()).status == 200
        assert serial(before) == own.certificate.serial_number


async def test_a_handshake_that_began_before_a_renewal_ends_well(tmp_path: Path, ca: Files) -> None:
    own = make(tmp_path, "own", ca)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.client_context(ca.cert, None, None).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    async with serving_tls(tmp_path, own) as daemon, connected(daemon.server, None) as peer:
        await peer.send(hello[:100])
        await until(lambda: daemon.sites["server"].connections == 1)
        make(tmp_path, "own", ca)
        await daemon.daemon.reload_once()
        await peer.send(hello[100:])
        while True:
            incoming.write(await peer.reader.read(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
        shown = client.getpeercert()
        assert shown is not None
        assert int(str(shown["serialNumber"]), 16) == own.certificate.serial_number


@pytest.mark.parametrize("what", ["another key", "an empty file", "no file"])
async def test_a_renewal_that_cannot_be_used_changes_nothing(tmp_path: Path, ca: Files, what: str) -> None:
    context = tls.client_context(ca.cert, None, None)
    own = make(tmp_path, "own", ca)
    async with serving_tls(tmp_path, own) as daemon:
        if what == "another key":
            own.key.write_bytes(make(tmp_path, "other", ca).key.read_bytes())
        elif what == "an empty file":
            own.cert.write_bytes(b"")
        else:
            own.cert.unlink()
        with hear("lmdaemon.daemon") as events:
            await daemon.daemon.reload_once()
        findings = [one.facts["finding"] for one in events if one.name == "config.reload_failed"]
        key = "tls_cert_file"
        assert [finding.split(": ")[1] for finding in findings] == [f"server.{key}", f"api.{key}"]
        async with connected(daemon.server, context) as peer:
            assert serial(peer) == own.certificate.serial_number
        async with daemon.client.get(daemon.api + "/health", ssl=context) as answer:
            assert (await answer.json())["checks"]["config"][0]["status"] == "warn"


async def test_tls_can_be_switched_on_and_off_at_a_reload(tmp_path: Path, ca: Files) -> None:
    own = make(tmp_path, "own", ca)
    context = tls.client_context(ca.cert, None, None)
    plain = '[server]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "127.0.0.1:0"\n'
    async with serving(tmp_path, plain) as daemon:
        for toml, spoken in ((table("server", own) + table("api", own), context), (plain, None)):
            (tmp_path / "config.toml").write_text(toml)
            await daemon.daemon.reload_once()
            async with connected(daemon.api, spoken) as peer:
                await peer.send(ASK)
                assert (await peer.answer()).status == 200


# -- stopping


async def test_a_stop_waits_for_nobody_who_only_holds_a_connection(tmp_path: Path, ca: Files) -> None:
    """The stop waits neither for a handshake that hangs nor for a client that does not answer the end of TLS."""
    context = tls.client_context(ca.cert, None, None)
    async with contextlib.AsyncExitStack() as stack:
        own, limits = make(tmp_path, "own", ca), Limits(heard_within_s=0.2)
        daemon = await stack.enter_async_context(serving_tls(tmp_path, own, limits=limits))
        for url in (daemon.server, daemon.api):
            quiet = await stack.enter_async_context(connected(url, context))
            await quiet.send(ASK)
            assert (await quiet.answer()).status == 200
            quiet.writer.transport.pause_reading()
            await stack.enter_async_context(connected(url, None))
        await until(lambda: all(site.connections == 2 for site in daemon.sites.values()))
        daemon.daemon.stop()
        async with asyncio.timeout(5):
            await daemon.running


async def test_a_request_over_tls_is_answered_while_the_daemon_stops(tmp_path: Path, ca: Files) -> None:
    context = tls.client_context(ca.cert, None, None)
    async with serving_tls(tmp_path, make(tmp_path, "own", ca)) as daemon, connected(daemon.server, context) as peer:
        daemon.daemon.stop()
        await until(lambda: daemon.sites["server"].closing)
        await peer.send(ASK)
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.rest() == b""


# -- what is configured


@pytest.mark.parametrize("at", ["server", "api"])
@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        ("tls_cert_file = 'own.crt'", "tls_cert_file: and tls_key_file must be given together"),
        ("tls_key_file = 'own.key'", "tls_cert_file: and tls_key_file must be given together"),
        (
            "client_ca_file = 'ca.crt'",
            "client_ca_file: needs tls_cert_file: only over TLS a client can show a certificate",
        ),
        (
            "tls_cert_file = 'none.crt'\ntls_key_file = 'own.key'",
            "tls_cert_file: cannot be read: No such file or directory ({home}/none.crt)",
        ),
        (
            "tls_cert_file = 'empty'\ntls_key_file = 'own.key'",
            "tls_cert_file: must hold a certificate in PEM form ({home}/empty)",
        ),
        (
            "tls_cert_file = 'own.key'\ntls_key_file = 'own.key'",
            "tls_cert_file: must hold a certificate in PEM form ({home}/own.key)",
        ),
        (
            "tls_cert_file = 'own.crt'\ntls_key_file = 'own.crt'",
            "tls_key_file: must hold a private key in PEM form, without a passphrase ({home}/own.crt)",
        ),
        (
            "tls_cert_file = 'own.crt'\ntls_key_file = 'locked.key'",
            "tls_key_file: must hold a private key in PEM form, without a passphrase ({home}/locked.key)",
        ),
        ("tls_cert_file = 'own.crt'\ntls_key_file = 'ca.key'", "tls_cert_file: does not fit its key"),
        (
            "tls_cert_file = 'upside-down.crt'\ntls_key_file = 'own.key'",
            (
                "tls_cert_file: does not fit its key; it begins with an issuer's certificate: the server's own must "
                "come first"
            ),
        ),
        (
            "tls_cert_file = 'own.crt'\ntls_key_file = 'cut.key'",
            "tls_key_file: cannot be used for TLS: it is damaged",
        ),
        (
            "tls_cert_file = 'torn.crt'\ntls_key_file = 'own.key'",
            "tls_cert_file: cannot be used for TLS: it is damaged",
        ),
        (
            "tls_cert_file = 'own.crt'\ntls_key_file = 'own.key'\nclient_ca_file = 'torn.crt'",
            "client_ca_file: cannot be used for TLS: it is damaged",
        ),
        (
            "tls_cert_file = 'own.crt'\ntls_key_file = 'own.key'\nclient_ca_file = 'own.key'",
            "client_ca_file: must hold a certificate in PEM form ({home}/own.key)",
        ),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, ca: Files, at: str, lines: str, finding: str) -> None:
    own = make(tmp_path, "own", ca)
    (tmp_path / "empty").write_bytes(b"\n")
    (tmp_path / "upside-down.crt").write_bytes(ca.cert.read_bytes() + own.cert.read_bytes())
    (tmp_path / "cut.key").write_bytes(own.key.read_bytes()[:100])
    (tmp_path / "torn.crt").write_bytes(own.cert.read_bytes().replace(b"\nMI", b"\n!I", 1))
    (tmp_path / "locked.key").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    file = tmp_path / "config.toml"
    with pytest.raises(ConfigError) as caught:
        load(file, f"[{at}]\n{lines}\n")
    assert caught.value.findings == [f"{file}: {at}.{finding.format(home=tmp_path)}"]


def test_a_key_that_others_can_read_is_warned_about(tmp_path: Path, ca: Files) -> None:
    own = make(tmp_path, "own", ca)
    assert load(tmp_path / "config.toml", table("server", own)).warnings == ()
    own.key.chmod(0o644)
    (warning,) = load(tmp_path / "config.toml", table("server", own)).warnings
    assert warning == f"server.tls_key_file: others can read this secret (mode 644): {own.key}"


def test_what_others_may_refuse_is_warned_about(tmp_path: Path, ca: Files) -> None:
    own, stranger = make(tmp_path, "own", ca, begins=-3 * DAY, ends=-DAY), make(tmp_path, "stranger")
    own.cert.write_bytes(own.cert.read_bytes() + stranger.cert.read_bytes())
    order = "has stranger after own, which stranger has not issued: some clients will not trust that"
    assert sorted(load(tmp_path / "config.toml", table("server", own)).warnings) == [
        f"server.tls_cert_file: has expired on {own.end:%Y-%m-%d %H:%M} UTC (own): {own.cert}",
        f"server.tls_cert_file: {order}: {own.cert}",
    ]


def test_an_authority_left_over_in_a_file_is_no_reason_to_warn(tmp_path: Path, ca: Files) -> None:
    own, old = make(tmp_path, "own", ca), make(tmp_path, "old", authority=True, begins=-3 * DAY, ends=-DAY)
    (tmp_path / "both.crt").write_bytes(old.cert.read_bytes() + ca.cert.read_bytes())
    toml = table("server", own, ca)
    assert load(tmp_path / "config.toml", toml.replace("ca.crt", "both.crt")).warnings == ()
    (warning,) = load(tmp_path / "config.toml", toml.replace("ca.crt", "old.crt")).warnings
    assert warning == f"server.client_ca_file: has expired on {old.end:%Y-%m-%d %H:%M} UTC (old): {old.cert}"


def test_a_client_certificate_authenticates_a_sender(tmp_path: Path, ca: Files) -> None:
    own = make(tmp_path, "own", ca)
    everybody = table("server", own).replace("127.0.0.1:0", "0.0.0.0:8080") + OPERATOR
    with pytest.raises(ConfigError, match="nothing authenticates a sender"):
        load(tmp_path / "config.toml", everybody)
    load(tmp_path / "config.toml", everybody.replace("[operators", 'client_ca_file = "ca.crt"\n[operators'))


def test_files_are_looked_up_among_the_credentials_first(
    tmp_path: Path, ca: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").mkdir()
    own = make(tmp_path / "credentials", "own", ca)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    settings = load(tmp_path / "config.toml", table("server", own))
    assert settings.tls["server"].context is not None
    assert settings.handed_over == ("server.tls_cert_file", "server.tls_key_file")


# -- dates


async def test_an_end_that_is_near_is_told_by_health_and_metrics(tmp_path: Path, ca: Files, clock: HandClock) -> None:
    own = make(tmp_path, "own", ca, ends=30 * DAY)
    clock.wall = int(datetime.now(UTC).timestamp() * 1000)
    context = tls.client_context(ca.cert, None, None)
    toml = table("server", own) + table("api", own) + OPERATOR
    async with serving(tmp_path, toml, clock=clock) as daemon:
        url = daemon.api.replace("http:", "https:")

        async def check() -> dict[str, Any]:
            async with daemon.client.get(url + "/health", ssl=context) as answer:
                found: dict[str, Any] = (await answer.json())["checks"]["certificates"][0]
                return found

        assert (await check())["status"] == "pass"
        for days, ending in ((10, "expires"), (21, "has expired")):
            clock.step_wall(days * 86400)
            found = await check()
            sentences = [
                f"{at}.tls_cert_file: {ending} on {own.end:%Y-%m-%d %H:%M} UTC (own): {own.cert}"
                for at in ("server", "api")
            ]
            assert (found["status"], found["output"]) == ("warn", "; ".join(sentences))
        async with daemon.client.get(url + "/metrics", ssl=context) as answer:
            lines = (await answer.text()).splitlines()
        for at in ("server", "api"):
            start = f'lmdaemon_certificate_expires_timestamp_seconds{{listener="{at}"}} '
            (line,) = [line for line in lines if line.startswith(start)]
            assert float(line.removeprefix(start)) == own.end.timestamp()


# -- the commands


def point_to(daemon: Serving, directory: Path) -> None:
    """Writes the daemon's real port into the file, by which the commands find it."""
    file = directory / "config.toml"
    before, _, after = file.read_text().partition("[api]")
    port = daemon.daemon.addresses["api"][1]
    file.write_text(before + "[api]" + after.replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"', 1))


@pytest.mark.parametrize("end", [100 * DAY, -DAY], ids=["valid", "expired"])
async def test_the_commands_trust_the_certificate_of_the_file_and_no_other(
    tmp_path: Path, ca: Files, end: timedelta
) -> None:
    own = make(tmp_path, "own", ca, begins=-3 * DAY, ends=end)
    async with serving_tls(tmp_path, own) as daemon:
        point_to(daemon, tmp_path)
        done = await asyncio.to_thread(run, "hold", "acme", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        make(tmp_path, "own", ca)  # another certificate of the same authority
        done = await asyncio.to_thread(run, "hold", "acme", cwd=tmp_path)
        assert done.returncode == 1
        assert "shows another certificate than api.tls_cert_file has" in done.stderr


async def test_the_commands_show_a_certificate_where_one_is_asked_for(tmp_path: Path, ca: Files) -> None:
    own, mine, bad = make(tmp_path, "own", ca), make(tmp_path, "mine", ca), make(tmp_path, "bad")
    async with serving_tls(tmp_path, own, ca) as daemon:
        point_to(daemon, tmp_path)
        for words, code, message in (
            ((), 2, "api.client_ca_file asks for a client's certificate"),
            (("--client-cert", mine.cert), 2, "--client-cert: cannot be used for TLS"),
            (("--client-cert", mine.cert, "--client-key", bad.key), 2, "--client-cert: does not fit its key"),
            (("--client-cert", bad.cert, "--client-key", bad.key), 1, "--client-cert"),
            (("--client-cert", mine.cert, "--client-key", mine.key), 0, ""),
        ):
            done = await asyncio.to_thread(run, "hold", "acme", *words, cwd=tmp_path)
            assert done.returncode == code, done.stderr
            assert message in done.stderr


async def test_a_daemon_that_speaks_no_tls_yet_is_told_by_the_commands(tmp_path: Path, ca: Files) -> None:
    own = make(tmp_path, "own", ca)
    async with serving(tmp_path) as daemon:
        (tmp_path / "config.toml").write_text(table("api", own))
        point_to(daemon, tmp_path)
        done = await asyncio.to_thread(run, "status", cwd=tmp_path)
        address = f"127.0.0.1:{daemon.daemon.addresses['api'][1]}"
        assert (done.returncode, done.stderr) == (
            1,
            f"lmdaemon: no TLS with the daemon at {address}: wrong version number\n",
        )


# -- memory


async def test_asyncio_holds_no_more_for_a_connection_than_it_needs(tmp_path: Path, ca: Files) -> None:
    """An assumption of the memory limits: asyncio reads at most SSLProtocol.max_size bytes of TLS at once, and holds as
    much for each connection.
    """
    own = make(tmp_path, "own", ca)
    protocol = sslproto.SSLProtocol(
        asyncio.get_running_loop(),
        asyncio.Protocol(),
        tls.server_context(own.cert, own.key),
        None,
        server_side=True,
    )
    assert len(protocol.get_buffer(-1)) == handshakes.READ_MAX
    protocol.connection_lost(None)
