"""An operator's SessionExpired endpoint that makes no mistake, or the one mistake that a test chooses."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook

from lmdaemon.commands.recipient import stranger
from lmdaemon.config import target
from lmdaemon.config.settings import Operator
from lmdaemon.config.values import whsec
from lmdaemon.dialects import SHIPPED, Dialect
from lmdaemon.workbench.bench import Limits, changed
from lmdaemon.workbench.runner import Report, Runner, chosen

PROVIDER = "luckymonaco"
TOKEN = "partner-token-of-the-tests"
HASH_KEY = "testKey-of-the-tests"
SIGNING_SECRET = "whsec_" + base64.b64encode(b"signing-secret-of-the-tests").decode()
HTML = "<!doctype html><html><body><h1>Server Error</h1></body></html>"


class RefusedError(Exception):
    def __init__(self, meaning: str) -> None:
        self.meaning = meaning


@dataclass
class Endpoint:
    """The endpoint. `fault` names its one mistake (empty: none). `signed` makes it require a signature. If `known` is
    not None, it refuses sessions that are not in `known`.
    """

    fault: str = ""
    dialect: Dialect = SHIPPED["v4"]
    signed: bool = False
    known: frozenset[str] | None = None
    url: str = ""
    players: dict[str, str] = field(default_factory=dict)  # by session
    seen: int = 0
    bodies: list[bytes] = field(default_factory=list)

    # -- how it reads a notice

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen += 1
        if request.method != "POST":
            if self.fault == "GET ends sessions":
                return self.answer(0)
            return web.Response(status=405, headers={"Allow": "POST"})
        if self.fault == "redirects" and request.path != "/elsewhere":
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        kind = (
            request.content_type if self.fault != "takes one spelling of the type" else request.headers["Content-Type"]
        )
        if kind != self.dialect.content_type and self.fault != "takes any type":
            return web.Response(status=415)
        try:
            async with asyncio.timeout(0.4 if self.fault != "waits for slow bodies" else 30):
                body = await request.content.read(16 * 1024 + 1)
                while not request.content.at_eof() and len(body) <= 16 * 1024:
                    body += await request.content.read(16 * 1024)
        except TimeoutError:
            return web.Response(status=408)
        if len(body) > 16 * 1024:
            if self.fault == "500 at a large body":
                return web.Response(status=500)
            return web.Response(status=413)
        self.bodies.append(body)
        try:
            return self.take(request, body)
        except RefusedError as refusal:
            return self.refusal(refusal.meaning)

    def refusal(self, meaning: str) -> web.Response:
        code = self.dialect.codes.of(meaning)
        if self.fault == "status from the code":
            return self.answer(code, status=400)
        if self.fault == "codes of its own":
            return self.answer(1)
        return self.answer(code)

    def take(self, request: web.Request, body: bytes) -> web.StreamResponse:
        fields = self.read(body)
        names = self.dialect.fields
        if self.signed:
            self.check_signature(request, body)
        required = [names[meaning] for meaning in self.dialect.required]
        for name in required:
            if name not in fields and self.fault != f"does not miss {name}":
                raise RefusedError("bad_parameters")
            if fields.get(name) == "" and self.fault != "takes empty fields":
                raise RefusedError("bad_parameters")
        if self.fault == "refuses further fields" and len(fields) > len(names):
            raise RefusedError("bad_parameters")
        for name, value in fields.items():
            if (name in required and not isinstance(value, str | int)) or isinstance(value, bool):
                if self.fault == "turns any type into text":
                    continue
                raise RefusedError("bad_parameters")
        self.check_hash(fields)
        provider, session, player = (str(fields.get(names[one], "")) for one in ("provider", "session", "player"))
        if self.fault == "provider in its very spelling" and provider != PROVIDER:
            raise RefusedError("bad_parameters")
        if provider.lower() != PROVIDER and self.fault != "takes any provider":
            raise RefusedError("bad_parameters")
        if (
            "token" in names
            and "hash" not in names
            and self.fault != "takes any token"
            and fields[names["token"]] != TOKEN
        ):
            raise RefusedError("bad_token")
        if self.known is not None and session not in self.known:
            raise RefusedError("unknown_session")
        if len(session) > 64 and self.fault == "64 characters at most":
            raise RefusedError("bad_parameters")
        if "'" in session and self.fault == "SQL from text":
            return web.Response(status=500, text=HTML, content_type="text/html")
        return self.end(session, player)

    def end(self, session: str, player: str) -> web.StreamResponse:
        again = session in self.players
        known = self.players.setdefault(session, player)
        if known != player and self.fault != "takes any player":
            raise RefusedError("player_mismatch")
        if again and self.fault == "500 on repeat":
            return self.answer(100, status=500)
        if again and self.fault == "code 4 after logout":
            return self.answer(4)
        return self.answer(0)

    def read(self, body: bytes) -> dict[str, Any]:
        if self.dialect.content == "form":
            try:
                pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
            except ValueError:
                raise RefusedError("bad_parameters") from None
            if len(dict(pairs)) != len(pairs):
                raise RefusedError("bad_parameters")
            return dict(pairs)

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(dict(pairs)) != len(pairs) and self.fault != "the last of two":
                raise RefusedError("bad_parameters")
            return dict(pairs)

        try:
            found = json.loads(body, object_pairs_hook=once)
        except (ValueError, RecursionError):
            if self.fault == "HTML at malformed JSON" and body.strip():
                raise web.HTTPInternalServerError(text=HTML, content_type="text/html") from None
            raise RefusedError("bad_parameters") from None
        if not isinstance(found, dict):
            if self.fault == "faults at a list":
                raise web.HTTPInternalServerError
            raise RefusedError("bad_parameters")
        return found

    def check_signature(self, request: web.Request, body: bytes) -> None:
        headers = dict(request.headers)
        if self.fault == "signature only if it is there" and "webhook-signature" not in headers:
            return
        if self.fault == "old signatures":
            age = int(headers.get("webhook-timestamp", "0"))
            known = Webhook(SIGNING_SECRET)
            signed = f"{headers.get('webhook-id')}.{age}.".encode() + body
            good = base64.b64encode(hmac.digest(known._whsecret, signed, "sha256")).decode()
            if f"v1,{good}" not in headers.get("webhook-signature", "").split(" "):
                raise RefusedError("bad_parameters")
            return
        if self.fault == "one signature only" and " " in headers.get("webhook-signature", ""):
            raise RefusedError("bad_parameters")
        try:
            Webhook(SIGNING_SECRET).verify(body, headers)
        except Exception:
            raise RefusedError("bad_parameters") from None

    def check_hash(self, fields: dict[str, Any]) -> None:
        if "hash" not in self.dialect.fields or self.fault == "hash is not checked":
            return
        given = fields["hash"] if self.fault == "hash in lower case only" else fields["hash"].lower()
        hashed = {name: value for name, value in fields.items() if name != "hash"}
        if self.fault == "hash from a fixed list":
            hashed = {name: value for name, value in hashed.items() if name in self.dialect.fields.values()}
        text = "&".join(f"{name}={hashed[name]}" for name in sorted(hashed)) + HASH_KEY
        if hashlib.md5(text.encode()).hexdigest() != given:
            raise RefusedError("bad_hash")

    # -- how it answers

    def answer(self, code: int, status: int = 200) -> web.Response:
        shown: dict[str, Any] = {"error": code, "description": "Success" if code == 0 else "Refused"}
        headers = {}
        match self.fault:
            case "HTML with 200":
                return web.Response(text=HTML, content_type="text/html")
            case "Error instead of error":
                shown = {"Error": code, "description": "Success"}
            case "error as text":
                shown["error"] = str(code)
            case "no description":
                del shown["description"]
            case "repeats the token":
                shown["request"] = {"token": TOKEN}
            case "a clock of its own":
                headers["Date"] = "Thu, 01 Jan 2026 00:00:00 GMT"
            case "gzip unasked":
                headers["Content-Encoding"] = "br"
        kind = "text/plain" if self.fault == "text/plain" else "application/json"
        text = json.dumps(shown)
        if self.fault == "byte-order mark":
            text = "\ufeff" + text
        return web.Response(text=text, status=status, headers=headers, content_type=kind)


@contextlib.asynccontextmanager
async def served(endpoint: Endpoint, tls: ssl.SSLContext | None = None) -> AsyncIterator[Endpoint]:
    app = web.Application(client_max_size=64 * 1024)
    app.router.add_route("*", "/{tail:.*}", endpoint.handle)
    server = TestServer(app)
    await server.start_server(ssl=tls) if tls else await server.start_server()
    try:
        endpoint.url = str(server.make_url(endpoint.dialect.path))
        yield endpoint
    finally:
        await server.close()


QUICK = Limits(burst=True, patience_s=1, lull_s=0)
UNTIMED = chosen([], ["connection.speed"])  # all checks but the one of speed, which a busy machine could fail


def to(url: str, **changes: Any) -> Operator:
    """An operator to send to, as `check --url` makes it."""
    return changed(stranger(), url=url, target=target.read(url), **changes)


async def checked(endpoint: Endpoint, **options: Any) -> Report:
    changes: dict[str, Any] = {"provider_id": PROVIDER, "sends": endpoint.dialect}
    if "hash" in endpoint.dialect.fields:
        changes["hash_key"] = HASH_KEY
    if endpoint.signed:
        changes["signing_keys"] = (whsec(SIGNING_SECRET),)
    return await Runner(
        to(endpoint.url, **changes), **{"checks": UNTIMED, "token": TOKEN, "limits": QUICK} | options
    ).run()
