"""The private side: sessions, deliveries, operators, health, metrics and the OpenAPI document.

Contract, section 5. Called by aiohttp on a listener of its own, for game servers, `lmdaemon`'s own commands and
administrators. It must never return a token, and never count reading as activity.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import unquote

import orjson
from aiohttp import web

from lmdaemon import retry, shapes
from lmdaemon.clock import Clock
from lmdaemon.config.settings import ApiToken, Operator, Settings
from lmdaemon.config.values import names_itself
from lmdaemon.dialects import BadNotice, Dialect, breaks_hash, content_of, json_object, rounded, uncoded, without_mark
from lmdaemon.log import Log, place, writable
from lmdaemon.metrics import CONTENT_TYPE, Metrics
from lmdaemon.model import HTTP_SINK, ID_MAX, PLUGIN_PREFIX, TOKEN_MAX, Delivery, Gate, Session, id_problem, rfc3339
from lmdaemon.shapes import ATTRIBUTES_MAX, BULK_BODY_MAX, IDLE_MAX_S, PAGE_DEFAULT, PAGE_MAX
from lmdaemon.store.contract import PAGE_BYTES, Opening, Page, Store, StoreError
from lmdaemon.web import bodies, openapi
from lmdaemon.web.documents import delivery_document, history_document, read_time, session_document
from lmdaemon.web.listener import until_client_leaves
from lmdaemon.web.requests import (
    BodyTooLarge,
    BodyTooSlow,
    Handler,
    Head,
    Ready,
    bearer,
    decode_segment,
    read_body,
    request_id,
)

BODY_MAX = 64 * 1024
RETRY_AFTER_S = "5"
OPERATORS_AT_ONCE = 200  # shown in one turn of the event loop: about 1 ms
SEEN_MAX = 100  # characters of a header in an answer or a log line

_NO_CONTENT = Ready(204)

_TOUCH = re.compile(r"/v1/operators/[^/]+/sessions/[^/]+/touch")
CURSOR_MAX = 18  # digits
_CURSOR = re.compile(f"[1-9][0-9]{{0,{CURSOR_MAX - 1}}}")

_Found = TypeVar("_Found")
_Row = TypeVar("_Row", Session, Delivery)

log = Log("api")


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An answer that is an error: problem+json with status, title, detail, and the session that it is about."""

    def __init__(self, status: int, title: str, detail: str, session: shapes.Session | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.body: shapes.Problem = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        if session is not None:
            self.body["session"] = session


class Health(Protocol):
    """What the daemon knows of itself: a status, and every check with its figures."""

    async def status(self) -> str: ...
    async def report(self) -> shapes.Health: ...
    async def oldest_pending_s(self) -> dict[str, float]: ...


class Api:
    """The handlers. `expires_at` belongs to another doer, which this one never imports."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        health: Health,
        metrics: Metrics,
        expires_at: Callable[[Session], int | None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._health = health
        self._metrics = metrics
        self._expires_at = expires_at
        self._settings: Settings
        self._openapi: bytes | None = None  # of the settings in force, once somebody has asked for it
        self._retrying: set[str] = set()  # operators whose dead deliveries are being retried

    def configure(self, settings: Settings) -> None:
        """Takes over new settings for all requests that come from now on."""
        self._settings = settings
        self._openapi = None

    def application(self) -> web.Application:
        """The aiohttp application of the private listener."""
        app = web.Application(middlewares=[self._guarded])
        operator = "/v1/operators/{operator}"
        session = operator + "/sessions/{sessionId:[^/]+}"  # by itself, aiohttp would not let an id hold { or }
        app.router.add_routes(
            [
                # Before the session's own path: POST names no session here, but a session may be called "touch"
                web.post(operator + "/sessions/touch", self.touch_many),
                web.put(operator + "/sessions/touch", self.open),
                web.get(operator + "/sessions/touch", self.show),
                web.put(session, self.open),
                web.get(session, self.show),
                web.post(session + "/touch", self.touch),
                web.post(session + "/close", self.close),
                web.get(operator + "/sessions", self.list_sessions),
                web.get("/v1/deliveries", self.list_deliveries),
                web.get("/v1/deliveries/{id}", self.show_delivery),
                web.post("/v1/deliveries/{id}/retry", self.retry_one),
                web.post(operator + "/deliveries/retry", self.retry_dead),
                web.get("/v1/operators", self.list_operators),
                web.post(operator + "/hold", self.hold),
                web.post(operator + "/release", self.release),
                web.get("/health", self.health),
                web.get("/health/", self.health),
                web.get("/metrics", self.metrics),
                web.get("/openapi.json", self.openapi),
            ]
        )
        return app

    def shortcut(self, otherwise: Handler) -> Handler:
        """Touches, the one call that comes all day, past aiohttp's router and middleware; the rest to `otherwise`."""

        def handle(request: web.Request) -> Awaitable[web.StreamResponse]:
            is_touch = request.method == "POST" and _TOUCH.fullmatch(request.rel_url.raw_path)
            expect = request.headers.get("Expect", "").lower()
            if expect and expect != "100-continue":  # aiohttp would say 417 before a token is asked for
                return self._guarded(request, _unexpected)
            if not is_touch or expect:
                return otherwise(request)
            return self._guarded(request, self.touch)

        return handle

    def knows(self, head: Head) -> bool:
        """Whether the head of a request shows that its sender is let in, before there is a request."""
        tokens = self._settings.api_tokens
        return not tokens or bearer(head, tokens) is not None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Bearer token first, then the handler; every error becomes a problem document."""
        headers = {}
        try:
            tokens = self._settings.api_tokens
            token = bearer(request, tokens) if tokens else None
            if token is not None or not tokens:
                self._check_rights(request, token)
                return await handler(request)
            if request.path in ("/health", "/health/") and request.method in ("GET", "HEAD"):
                return await self._public_health()
            headers["WWW-Authenticate"] = "Bearer"
            log.warning("api.unauthorized", peer=request.remote or None, request_id=request_id(request))
            problem = Problem(401, "Unauthorized", "a valid bearer token is required")
        except Problem as one:
            problem = one
        except StoreError as error:
            headers["Retry-After"] = RETRY_AFTER_S
            problem = Problem(503, "Service Unavailable", writable(str(error)))
        except web.HTTPMethodNotAllowed as error:
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            detail = f"{error.method} is not allowed here; {headers['Allow']} is"
            problem = Problem(405, "Method Not Allowed", detail)
        except web.HTTPException as error:
            problem = Problem(error.status, error.reason, f"nothing is served at {request.path!r}")
        except Exception as error:
            where = {"call": handler.__name__, "error": type(error).__name__, "where": place(error)}
            log.exception("api.failed", method=request.method, **where, request_id=request_id(request))
            problem = Problem(500, "Internal Server Error", "a bug; the log has its traceback")
        self._metrics.api_error(problem.status)
        return _problem(problem, headers)

    def _check_rights(self, request: web.Request, token: ApiToken | None) -> None:
        """Whether what it asks for is allowed; raises Problem. None: no token is configured."""
        changes = request.method not in ("GET", "HEAD")
        if token is None:
            self._check_browser(request, changes=changes)
        elif changes and not token.may_change:
            raise Problem(403, "Forbidden", "this token may only read")

    def _check_browser(self, request: web.Request, *, changes: bool) -> None:
        """Without a token, what a page in a browser on this machine asks for must be refused; raises Problem.

        A page from anywhere may have its browser send requests to loopback. It names where it comes from in Origin and
        may not see what a GET answers, unless its own name leads here (DNS rebinding): then that name is in Host. No
        browser reaches a unix socket, and none sends a request without Host.
        """
        listen, host, origin = self._settings.api.listen, request.headers.get("Host"), request.headers.get("Origin")
        if host is not None and not listen.unix and not names_itself(host, listen):
            rule = "without a token, Host must be localhost, a loopback address or the configured one"
            problem = Problem(421, "Misdirected Request", f"{rule} (got {host[:SEEN_MAX]!r})")
        elif changes and origin is not None and origin.lower() != f"{request.scheme}://{host}".lower():
            rule = "a change with an Origin other than this address, as a browser sends it, needs a token"
            problem = Problem(403, "Forbidden", f"{rule} (got {origin[:SEEN_MAX]!r})")
        else:
            return
        seen = {"host": (host or "")[:SEEN_MAX], "origin": (origin or "")[:SEEN_MAX] or None}
        peer = request.remote or None
        log.warning("api.refused", status=problem.status, **seen, peer=peer, request_id=request_id(request))
        raise problem

    def _by(self, request: web.Request) -> str | None:
        """The name of the token used, for the log; None for one without a name, or where none is needed."""
        token = bearer(request, self._settings.api_tokens)
        return token.name or None if token is not None else None

    # -- sessions

    async def open(self, request: web.Request) -> web.Response:
        operator, session_id = self._operator(request), self._session_id(request)
        if session_id in (".", ".."):  # also as %2E: clients and proxies resolve it
            raise _bad(
                "sessionId: must not be . or .., which no client can address: it is resolved as a part of the path"
            )
        fields = await _fields(request, shapes.Opening)
        player_id = _text(fields, "playerId", ID_MAX)
        token = _text(fields, "token", TOKEN_MAX)
        for name, value, meaning in (("playerId", player_id, "player"), ("token", token, "token")):
            if value is None and meaning in operator.sends.required:
                raise _bad(f"{name}: is required: dialect {operator.sends.name} must send it")
        if player_id is None:
            raise _bad("playerId: is required")
        if "hash" in operator.sends.fields:
            _check_hashed(operator.sends, sessionId=session_id, playerId=player_id, token=token)
        opened = await self._store.open_session(
            Opening(
                operator.name,
                session_id,
                player_id,
                token,
                _attributes(fields),
                _idle_ms(fields, operator),
                int(operator.lifetime_s * 1000),
            )
        )
        if opened.outcome == "differs":
            raise Problem(409, "Conflict", "the session is open with another playerId or token")
        if opened.outcome == "ended":
            raise Problem(409, "Conflict", "the session has ended", self._session(opened.session))
        if opened.outcome == "created":
            self._metrics.opened(operator.name)
            log.info("session.opened", operator=operator.name, session=session_id)
        else:
            self._metrics.touched(operator.name, 1)
        return _json(self._session(opened.session), 201 if opened.outcome == "created" else 200)

    async def touch(self, request: web.Request) -> web.StreamResponse:
        operator, session_id = self._operator(request), self._session_id(request)
        touched = await self._store.touch(operator.name, [session_id])
        if touched.unknown:
            raise _unknown_session()
        if touched.ended:
            found = await self._store.session(operator.name, session_id)
            raise Problem(410, "Gone", "the session has ended", self._session(found[0]) if found is not None else None)
        self._metrics.touched(operator.name, 1)
        return _NO_CONTENT.to(request)

    async def touch_many(self, request: web.Request) -> web.Response:
        operator = self._operator(request)
        try:
            session_ids = bodies.session_ids(await _body(request, BULK_BODY_MAX))
        except ValueError as error:
            raise _bad(str(error)) from error
        touched = await self._store.touch(operator.name, session_ids)
        self._metrics.touched(operator.name, touched.touched)
        answer: shapes.BulkTouched = {
            "touched": touched.touched,
            "unknown": touched.unknown,
            "ended": touched.ended,
        }
        return _json(answer)

    async def close(self, request: web.Request) -> web.Response:
        session = await self._store.end(self._operator(request).name, self._session_id(request))
        if session is None:
            raise _unknown_session()
        return _json(self._session(session))

    async def show(self, request: web.Request) -> web.Response:
        reading = self._store.shown_session(self._operator(request).name, self._session_id(request))
        found = await _shown(request, reading)
        if found is None:
            raise _unknown_session()
        session, deliveries = found
        answer: shapes.SessionWithDeliveries = {
            **self._session(session),
            "deliveries": [self._delivery(delivery) for delivery in deliveries],
        }
        return _json(answer)

    async def list_sessions(self, request: web.Request) -> web.Response:
        operator = self._operator(request)
        query = _query(request, {"state", "playerId", "limit", "after"})
        reading = self._store.sessions(
            operator.name,
            state=_choice(query, "state", ("active", "ended")),
            player_id=_id(query, "playerId"),
            limit=_limit(query),
            after=_after(query),
        )
        return _json(_page(await _shown(request, reading), self._session))

    def _session(self, session: Session) -> shapes.Session:
        return session_document(session, self._expires_at(session))

    # -- deliveries

    async def list_deliveries(self, request: web.Request) -> web.Response:
        query = _query(request, {"operator", "sink", "state", "limit", "after"})
        reading = self._store.deliveries(
            operator=_id(query, "operator"),
            sink=await self._sink(request, query),
            state=_choice(query, "state", ("pending", "delivered", "dead")),
            limit=_limit(query),
            after=_after(query),
        )
        return _json(_page(await _shown(request, reading), self._delivery))

    async def _sink(self, request: web.Request, query: Mapping[str, str]) -> str | None:
        """A sink that is configured, or that has deliveries. Raises Problem for any other."""
        sink = _id(query, "sink")
        if sink is None or sink == HTTP_SINK:
            return sink
        if not sink.startswith(PLUGIN_PREFIX):
            raise _bad(f"sink: must be {HTTP_SINK} or {PLUGIN_PREFIX}NAME (got {sink!r})")
        is_configured = sink.removeprefix(PLUGIN_PREFIX) in self._settings.plugins
        if not is_configured and not await _shown(request, self._store.has_sink(sink)):
            raise _bad(f"sink: no plug-in of this name is configured or has deliveries (got {sink!r})")
        return sink

    async def show_delivery(self, request: web.Request) -> web.Response:
        delivery = await _shown(request, self._store.delivery(request.match_info["id"]))
        if delivery is None:
            raise Problem(404, "Not Found", "no delivery has this id")
        answer: shapes.DeliveryWithHistory = {**self._delivery(delivery), "history": history_document(delivery)}
        return _json(answer)

    def _delivery(self, delivery: Delivery) -> shapes.Delivery:
        return delivery_document(delivery, self._store.gate(delivery.operator))

    async def retry_one(self, request: web.Request) -> web.Response:
        before = await self._store.retry_one(request.match_info["id"])
        if before is None:
            raise Problem(404, "Not Found", "no delivery has this id")
        if before.state != "dead":
            raise Problem(409, "Conflict", f"the delivery is {before.state}, not dead")
        delivery = await self._store.delivery(before.webhook_id)
        if delivery is None or delivery.state == "dead":
            raise Problem(409, "Conflict", f"the delivery can never be sent ({before.last_error})")
        log.info("delivery.retried_by_hand", operator=before.operator, id=before.webhook_id, by=self._by(request))
        return _json(self._delivery(delivery), 202)

    async def retry_dead(self, request: web.Request) -> web.Response:
        operator = self._operator(request)
        fields = await _fields(request, shapes.RetrySince, optional=True)
        since_at = _time(fields, "since")
        if since_at > self._clock.wall_ms():
            raise _bad(f"since: must not lie ahead (got {fields['since']!r})")
        if operator.name in self._retrying:
            raise Problem(409, "Conflict", "another call is retrying the dead deliveries of this operator")
        self._retrying.add(operator.name)
        try:
            retried = await self._store.retry_dead(operator.name, since_at)
        finally:
            self._retrying.discard(operator.name)
        log.info("delivery.retried_by_hand", operator=operator.name, count=retried, by=self._by(request))
        answer: shapes.RetriedDeliveries = {"retried": retried}
        return _json(answer, 202)

    # -- operators

    async def list_operators(self, request: web.Request) -> web.Response:
        _query(request, set())
        oldest = await _shown(request, self._store.oldest_pending_shown(self._settings.operators))
        items = []
        for name, operator in self._settings.operators.items():
            items.append(self._shown(operator, oldest.get(name)))
            if len(items) % OPERATORS_AT_ONCE == 0:
                await asyncio.sleep(0)
        answer: shapes.OperatorList = {"items": items}
        return _json(answer)

    def _shown(self, operator: Operator, oldest_at: int | None) -> shapes.Operator:
        now_at = self._clock.wall_ms()
        gate, figures = self._store.gate(operator.name), self._store.figures_of(operator.name)
        return {
            "operator": operator.name,
            "notify": operator.notify,
            "dialect": operator.sends.name,
            "held": gate.held_at is not None,
            "heldReason": gate.held_reason,
            "breaker": retry.breaker(gate, now_at),
            "live": figures.live,
            "pending": figures.pending,
            "dead": figures.dead,
            "oldestPendingSeconds": None if oldest_at is None else max(0, now_at - oldest_at) / 1000,
            "notBefore": rfc3339(retry.not_before(gate, now_at)),
        }

    async def hold(self, request: web.Request) -> web.Response:
        operator = self._operator(request)
        await self._change_gate(operator, lambda gate: retry.hold(gate, self._clock.wall_ms(), "by_hand"))
        log.warning("operator.held", operator=operator.name, reason="by_hand", by=self._by(request))
        return await self._shown_now(operator)

    async def release(self, request: web.Request) -> web.Response:
        operator = self._operator(request)
        await self._change_gate(operator, lambda gate: retry.release(gate, self._clock.wall_ms()))
        log.info("operator.released", operator=operator.name, reason="by_hand", by=self._by(request))
        return await self._shown_now(operator)

    async def _change_gate(self, operator: Operator, change: Callable[[Gate], Gate]) -> None:
        await self._store.set_gate(operator.name, change)

    async def _shown_now(self, operator: Operator) -> web.Response:
        oldest = await self._store.oldest_pending_shown([operator.name])
        return _json(self._shown(operator, oldest[operator.name]))

    # -- the daemon itself

    async def health(self, request: web.Request) -> web.Response:
        report = await self._health.report()
        return web.Response(
            body=orjson.dumps(report),
            status=503 if report["status"] == "fail" else 200,
            content_type="application/health+json",
        )

    async def _public_health(self) -> web.Response:
        status = await self._health.status()
        return web.Response(
            body=orjson.dumps({"status": status}),
            status=503 if status == "fail" else 200,
            content_type="application/health+json",
        )

    async def metrics(self, request: web.Request) -> web.Response:
        try:
            oldest = await self._health.oldest_pending_s()
        except StoreError:  # everything else can still be told, that storing fails among it
            oldest = {}
        return web.Response(body=await self._metrics.scrape(oldest), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.Response:
        document = self._openapi
        if document is None:
            settings = self._settings
            document = await asyncio.to_thread(lambda: orjson.dumps(openapi.document(settings)))
            if settings is self._settings:
                self._openapi = document
        return web.Response(body=document, content_type="application/json")

    # -- pieces of a request

    def _operator(self, request: web.Request) -> Operator:
        name = unquote(request.rel_url.raw_path.split("/")[3])
        operator = self._settings.operators.get(name)
        if operator is None:
            raise Problem(404, "Not Found", f"no operator of this name is configured (got {name[:ID_MAX]!r})")
        return operator

    @staticmethod
    def _session_id(request: web.Request) -> str:
        # The path as sent, not as aiohttp repaired it: /v1/operators/{operator}/sessions/{sessionId}…
        raw = request.rel_url.raw_path.split("/")[5]
        try:
            session_id = decode_segment(raw)
        except ValueError as error:
            raise _bad(f"sessionId: {error}") from error
        problem = id_problem(session_id)
        if problem:
            raise _bad(f"sessionId: {problem}")
        return session_id


async def _unexpected(_: web.Request) -> NoReturn:
    raise Problem(417, "Expectation Failed", "Expect must be 100-continue")


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def _problem(problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(problem.body),
        status=problem.status,
        headers=headers,
        content_type="application/problem+json",
    )


def malformed(reason: str) -> web.Response:
    """The answer to what is no HTTP."""
    return _problem(_bad(reason))


def _bad(detail: str) -> Problem:
    return Problem(400, "Bad Request", detail)


def _unknown_session() -> Problem:
    return Problem(404, "Not Found", "no session has this id")


async def _shown(request: web.Request, reading: Awaitable[_Found]) -> _Found:
    """What is read for people, which ends when its client leaves."""
    with until_client_leaves(request):
        return await reading


def _page(page: Page[_Row], document: Callable[[_Row], object]) -> dict[str, Any]:
    """A page as it is answered: it ends before an item that would make it longer than PAGE_BYTES."""
    items: list[orjson.Fragment] = []
    left = PAGE_BYTES - len('{"items":[],"next":""}') - CURSOR_MAX
    for row in page.rows:
        item = orjson.dumps(document(row))
        left -= len(item) + 1  # and a comma
        if left < 0:
            return {"items": items, "next": str(page.rows[len(items) - 1].id)}
        items.append(orjson.Fragment(item))
    return {"items": items, "next": None if page.next is None else str(page.next)}


async def _body(request: web.Request, limit: int, *, optional: bool = False) -> bytes:
    """A body that says it is JSON; where it is optional, an empty one need not say so. Raises Problem."""
    if not uncoded(codings := request.headers.getall("Content-Encoding", ())):
        seen = ", ".join(codings)[:SEEN_MAX]
        raise Problem(415, "Unsupported Media Type", f"the body must not be compressed (got Content-Encoding {seen!r})")
    try:
        body = await read_body(request, limit)
    except BodyTooLarge:
        raise Problem(413, "Content Too Large", f"the body must be at most {limit} bytes") from None
    except BodyTooSlow:
        raise Problem(408, "Request Timeout", "the body came too slowly or broke off") from None
    if (body or not optional) and content_of(seen := request.headers.get("Content-Type", "")) != "json":
        detail = f"Content-Type must be application/json (got {seen[:SEEN_MAX]!r})"
        raise Problem(415, "Unsupported Media Type", detail)
    return body


async def _fields(request: web.Request, kind: type, *, optional: bool = False) -> Mapping[str, Any]:
    """The body as an object of this type's members, whose values are not looked at yet. Raises Problem."""
    known = kind.__annotations__
    body = await _body(request, BODY_MAX, optional=optional)
    if optional and not without_mark(body):
        return {}
    try:
        fields = json_object(body)
    except BadNotice as error:
        raise _bad(error.description) from error
    for name in fields:
        if name not in known:
            raise _bad(f"{name[:ID_MAX]}: is no field of this call; known are {', '.join(sorted(known))}")
    return fields


def _text(fields: Mapping[str, Any], name: str, longest: int) -> str | None:
    value = fields.get(name)
    if value is None and name not in fields:
        return None
    if not isinstance(value, str):
        raise _bad(f"{name}: must be a string")
    problem = id_problem(value, longest)
    if problem:
        raise _bad(f"{name}: {problem}")
    return value


def _check_hashed(dialect: Dialect, **facts: str | None) -> None:
    for name, value in facts.items():
        if value is not None and breaks_hash(value):
            raise _bad(f"{name}: must have no & and no =, which separate the fields that dialect {dialect.name} hashes")


def _attributes(fields: Mapping[str, Any]) -> str | None:
    if "attributes" not in fields:
        return None
    attributes = fields["attributes"]
    if not isinstance(attributes, dict):
        raise _bad("attributes: must be an object")
    try:
        text = orjson.dumps(attributes)
    except orjson.JSONEncodeError as error:  # it reads 1024 levels, but writes 254
        raise _bad("attributes: must not be nested deeper than 250 levels") from error
    if len(text) > ATTRIBUTES_MAX:
        raise _bad(f"attributes: must be at most {ATTRIBUTES_MAX} bytes of JSON (got {len(text)})")
    if rounded(attributes, text):
        raise _bad(
            "attributes: must have numbers of 64 bits at most, above 2^53 only integers; others go into a string"
        )
    return text.decode()


def _idle_ms(fields: Mapping[str, Any], operator: Operator) -> int:
    if "idleTimeoutSeconds" not in fields:
        return int(operator.idle_s * 1000)
    seconds = fields["idleTimeoutSeconds"]
    # 90.0 is an integer too, to JSON Schema; true is none
    whole = type(seconds) is int or (type(seconds) is float and seconds.is_integer())
    if not whole or not 1 <= seconds <= IDLE_MAX_S:
        got = orjson.dumps(seconds).decode()[:40]
        raise _bad(f"idleTimeoutSeconds: must be an integer from 1 to {IDLE_MAX_S} (got {got})")
    return int(seconds) * 1000


def _query(request: web.Request, known: set[str]) -> dict[str, str]:
    """The query's parameters, each known and given once. Raises Problem."""
    query: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in known:
            raise _bad(f"{name[:ID_MAX]}: is no parameter of this call; known are {', '.join(sorted(known)) or 'none'}")
        if name in query:
            raise _bad(f"{name}: must be given once")
        query[name] = value
    return query


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(PAGE_DEFAULT))
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= PAGE_MAX:
        raise _bad(f"limit: must be an integer from 1 to {PAGE_MAX} (got {text[:40]!r})")
    return int(text)


def _after(query: Mapping[str, str]) -> int | None:
    if "after" not in query:
        return None
    if not _CURSOR.fullmatch(query["after"]):
        raise _bad(f"after: must be the `next` of a page (got {query['after'][:40]!r})")
    return int(query["after"])


def _choice(query: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    if name in query and query[name] not in choices:
        raise _bad(f"{name}: must be one of {', '.join(choices)} (got {query[name][:40]!r})")
    return query.get(name)


def _id(query: Mapping[str, str], name: str) -> str | None:
    problem = id_problem(query[name]) if name in query else None
    if problem:
        raise _bad(f"{name}: {problem}")
    return query.get(name)


def _time(fields: Mapping[str, Any], name: str) -> int:
    """A time as wall milliseconds; 0 when absent."""
    if name not in fields:
        return 0
    text = fields[name]
    try:
        return read_time(text if isinstance(text, str) else "")
    except ValueError as error:
        raise _bad(f"{name}: {error}") from None
