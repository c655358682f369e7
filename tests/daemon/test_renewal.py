"""Renewed certificates are used from the next reload on. A test server notes which certificate it was shown."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from certificates import DAY, Files, make
from support import Event, Serving, hear, operator_table, serving, until

KEYS = {"ca_file": "ca.pem", "client_cert_file": "client.crt", "client_key_file": "client.key"}


@dataclass
class Wallet:
    """An operator's TLS server. It asks for a client certificate and notes the common name of each."""

    context: ssl.SSLContext
    port: int = 0
    shown: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.shown.append(request.transport.get_extra_info("peercert")["subject"][0][0][1])
        await self.go_on.wait()
        return web.json_response({"error": 0})


@contextlib.asynccontextmanager
async def wallet(server: Files, clients: Files) -> AsyncIterator[Wallet]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=clients.cert)
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    one = Wallet(context)
    one.go_on.set()
    app = web.Application()
    app.router.add_post("/", one.handle)
    listening = TestServer(app, scheme="https")
    await listening.start_server(ssl=context)
    one.port = listening.port or 0
    try:
        yield one
    finally:
        await listening.close()


@dataclass
class Home:
    """The daemon's directory with its files, and the authority that signed all certificates."""

    path: Path
    authority: Files
    server: Files

    def toml(self, port: int) -> str:
        return operator_table("acme", f"https://127.0.0.1:{port}/", schedule=["50ms"] * 100, **KEYS)

    def show(self, client: Files) -> None:
        (self.path / "client.crt").write_bytes(client.cert.read_bytes())
        (self.path / "client.key").write_bytes(client.key.read_bytes())
        (self.path / "client.key").chmod(0o600)

    def trust(self, authority: Files) -> None:
        (self.path / "ca.pem").write_bytes(authority.cert.read_bytes())

    def client(self, name: str, **options: Any) -> Files:
        return make(self.authority.cert.parent, name, self.authority, **options)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = tmp_path / "made"
    made.mkdir()
    authority = make(made, "authority", authority=True)
    one = Home(tmp_path, authority, make(made, "server", authority))
    one.trust(authority)
    one.show(one.client("first"))
    return one


async def end(daemon: Serving, session: str) -> None:
    url = f"{daemon.api}/v1/operators/acme/sessions/{session}"
    assert (await daemon.client.put(url, json={"playerId": "p", "token": "t"})).status == 201
    assert (await daemon.client.post(url + "/close")).status == 200


async def delivery(daemon: Serving, session: str) -> dict[str, Any]:
    async with daemon.client.get(f"{daemon.api}/v1/operators/acme/sessions/{session}") as answer:
        found: dict[str, Any] = (await answer.json())["deliveries"][0]
    return found


async def delivered(daemon: Serving, session: str) -> None:
    async def so() -> bool:
        return (await delivery(daemon, session))["state"] == "delivered"

    await until(so)


async def reload(daemon: Serving) -> list[Event]:
    with hear("lmdaemon.daemon") as events:
        await daemon.daemon.reload_once()
    return [event for event in events if event.name.startswith("config.")]


async def test_a_renewed_client_certificate_is_shown_from_the_next_reload_on(home: Home) -> None:
    """The new certificate is shown although a connection that showed the old one is still open and idle."""
    async with wallet(home.server, home.authority) as peer, serving(home.path, home.toml(peer.port)) as daemon:
        await end(daemon, "before")
        await delivered(daemon, "before")
        (unchanged,) = await reload(daemon)
        assert unchanged.facts["changed"] == "nothing"
        home.show(home.client("second"))
        (told,) = await reload(daemon)
        assert told.facts["changed"] == "operators.acme.client_cert_file,operators.acme.client_key_file"
        await end(daemon, "after")
        await delivered(daemon, "after")
        assert peer.shown == ["first", "second"]


async def test_what_is_in_flight_at_the_reload_finishes_as_it_began(home: Home) -> None:
    async with wallet(home.server, home.authority) as peer, serving(home.path, home.toml(peer.port)) as daemon:
        peer.go_on.clear()
        await end(daemon, "before")
        await until(lambda: peer.shown)
        home.show(home.client("second"))
        await reload(daemon)
        await end(daemon, "after")
        await until(lambda: len(peer.shown) == 2)
        peer.go_on.set()
        for session in ("before", "after"):
            await delivered(daemon, session)
            assert (await delivery(daemon, session))["attempts"] == 1
        assert peer.shown == ["first", "second"]


async def test_a_certificate_expired_at_the_start_is_renewed_by_a_reload(home: Home) -> None:
    home.show(home.client("late", ends=-DAY / 2))
    async with wallet(home.server, home.authority) as peer:
        with hear("lmdaemon.daemon") as events:
            async with serving(home.path, home.toml(peer.port)) as daemon:
                await end(daemon, "s")

                async def refused() -> Any:
                    return (await delivery(daemon, "s"))["lastError"]

                await until(refused)
                home.show(home.client("in time"))
                await reload(daemon)
                await daemon.client.post(f"{daemon.api}/v1/operators/acme/release")
                await delivered(daemon, "s")
        assert peer.shown == ["in time"]
        (warned,) = [event.facts["finding"] for event in events if event.name == "config.warned"]
        assert warned.startswith("operators.acme.client_cert_file: has expired on ")


@pytest.mark.parametrize("store", ["ca_file", "the system's"])
async def test_a_renewed_authority_is_trusted_from_the_next_reload_on(
    home: Home, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = home.authority.cert.parent
    other = make(made, "other", authority=True)
    async with wallet(make(made, "renewed", other), home.authority) as peer:
        toml = home.toml(peer.port)
        if store != "ca_file":
            # Where OpenSSL looks for the system's authorities
            monkeypatch.setenv("SSL_CERT_FILE", str(home.path / "ca.pem"))
            toml = toml.replace('ca_file = "ca.pem"\n', "")
        async with serving(home.path, toml) as daemon:
            await end(daemon, "s")

            async def refused() -> bool:
                return bool((await delivery(daemon, "s"))["lastError"] == "tls")

            await until(refused)
            home.trust(other)
            (told,) = await reload(daemon)
            assert told.facts["changed"] == ("operators.acme.ca_file" if store == "ca_file" else "nothing")
            await daemon.client.post(f"{daemon.api}/v1/operators/acme/release")
            await delivered(daemon, "s")


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        ("key", "operators.acme.client_cert_file: does not fit its key"),
        ("ca", "operators.acme.ca_file: must hold a certificate in PEM form"),
        ("gone", "operators.acme.client_key_file: cannot be read: No such file or directory"),
    ],
)
async def test_a_renewal_half_done_changes_nothing(home: Home, broken: str, finding: str) -> None:
    """A renewal of which one file is missing is not used. The next reload with all files uses it."""
    async with wallet(home.server, home.authority) as peer, serving(home.path, home.toml(peer.port)) as daemon:
        renewed = home.client("second")
        (home.path / "client.crt").write_bytes(renewed.cert.read_bytes())
        if broken == "ca":
            (home.path / "ca.pem").write_bytes(b"")
            home.show(renewed)
        if broken == "gone":
            (home.path / "client.key").unlink()
        (told,) = await reload(daemon)
        assert (told.name, told.level) == ("config.reload_failed", "error")
        assert finding in told.facts["finding"]
        await end(daemon, "before")
        await delivered(daemon, "before")
        home.show(renewed)
        home.trust(home.authority)
        assert [event.name for event in await reload(daemon)] == ["config.reloaded"]
        await end(daemon, "after")
        await delivered(daemon, "after")
        assert peer.shown == ["first", "second"]
