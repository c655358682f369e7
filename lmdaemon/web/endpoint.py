"""The public side: `POST …/SessionExpired` for every operator, and the bare `/health`.

It parses and authenticates a notice, asks the plug-ins, records the notice, and answers after the commit;
docs/endpoint.md has the statuses and codes. It must never answer success before the commit.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, Protocol

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.http import RawRequestMessage

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.config.values import endpoint_key
from lmdaemon.dialects import (
    SHIPPED,
    SUCCESS,
    BadNotice,
    Dialect,
    Extra,
    Parsed,
    answer,
    check_hash,
    content_of,
    extra_of,
    parse,
    uncoded,
)
from lmdaemon.log import Log, place
from lmdaemon.model import Notice, Refuse
from lmdaemon.plugins import LoadedPlugin, PluginFailed
from lmdaemon.store.contract import Recording, Store, StoreError
from lmdaemon.web.connection import Begun
from lmdaemon.web.quota import PerMinute
from lmdaemon.web.requests import (
    RETRY_AFTER_S,
    Address,
    BodyTooLarge,
    BodyTooSlow,
    Head,
    Ready,
    Reply,
    allowed,
    busy_answer,
    client_address,
    read_body,
    request_id,
)

BODY_MAX = 16 * 1024
SEEN_MAX = 100  # characters of a header in a log line
UNRECORDED = {  # results of Store.record for a notice that was not recorded, and the description that is answered
    "bad_token": "the token is not the session's",
    "unknown_session": "the session is not known here",
    "player_mismatch": "the session belongs to another player",
}

_SUCCESS = Ready(200, SUCCESS, "application/json")

log = Log("endpoint")


class Route:
    """One path: its operators by provider id, and its dialects by their content (`json` or `form`).

    `codes_of` is the first dialect. Its codes are answered when a request fails, or is refused before its body is
    parsed. `only` is the name of the operator, if the path has only one.
    """

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self.dialects: dict[str, list[Dialect]] = {}
        self.codes_of = SHIPPED["v4"]
        self.looks_at_addresses = False  # whether an operator has `allow_from`
        self.only: str | None = None

    def add(self, operator: Operator, path: str) -> None:
        """Serves one more operator at this path (an `endpoint_key`)."""
        dialects = _in_order(operator, path)
        if not self.operators:
            self.codes_of = dialects[0]
        self.operators[operator.provider_id.casefold()] = operator
        self.only = operator.name if len(self.operators) == 1 else None
        self.looks_at_addresses |= bool(operator.allow_from)
        for dialect in dialects:
            known = self.dialects.setdefault(dialect.content, [])
            if dialect not in known:
                known.append(dialect)


class Refused(Exception):  # noqa: N818
    """A request that is refused before it is parsed.

    `dialect` is the one whose codes are answered, if it is known. `seen` are facts for the log line. With `logged`, the
    log line has been written already.
    """

    def __init__(
        self,
        status: int,
        description: str,
        dialect: Dialect | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        logged: bool = False,
        **seen: str,
    ) -> None:
        super().__init__(description)
        self.status = status
        self.description = description
        self.dialect = dialect
        self.headers = headers
        self.logged = logged
        self.seen = seen


class NotRead(Exception):  # noqa: N818
    """A notice that cannot be read, or is refused before anything is stored: the dialect whose codes are answered, the
    refusal, and facts for the log line.
    """

    def __init__(self, dialect: Dialect, refusal: BadNotice, facts: Mapping[str, Any]) -> None:
        super().__init__(refusal.description)
        self.dialect = dialect
        self.refusal = refusal
        self.facts = facts


class NoticeObserver(Protocol):
    """Is called for every request to an endpoint."""

    def answered(self, operator: str, dialect: str, code: int) -> None:
        """A request whose body was parsed was answered with this code; `operator` is empty if it is unknown."""

    def not_taken(self, status: int) -> None:
        """A request whose body was not parsed was answered with this status."""

    def over_quota(self, operator: str) -> None:
        """A notice of an unknown session was refused, because the operator's `unknown_per_minute` is used up."""


class Endpoint:
    """The public side; `handle` is its request handler. `health()` returns the status for the bare `/health`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        health: Callable[[], Awaitable[str]],
        observer: NoticeObserver,
        body_s: float,
    ) -> None:
        """The body of a notice may take `body_s` to arrive."""
        self._store = store
        self.submit = store.submit  # for what `begin` returns
        self._clock = clock
        self._health = health
        self._observer = observer
        self._body_s = body_s
        self._routes: dict[str, Route] = {}
        self._settings: Settings
        self._plugins: list[LoadedPlugin] = []
        self._quotas: dict[str, PerMinute] = {}  # for notices of unknown sessions, by operator
        self._secret_names: frozenset[str] = frozenset()  # the names of token and hash in the dialects, casefolded
        self._spellings: set[tuple[str, str]] = set()  # operators and the misspelled provider ids that were logged

    def configure(self, settings: Settings, plugins: Mapping[str, LoadedPlugin]) -> None:
        """Takes over new settings. A request under way keeps its route and operator, with the new plug-ins."""
        routes: dict[str, Route] = {}
        for operator in settings.operators.values():
            for path in operator.paths:
                key = endpoint_key(path)
                routes.setdefault(key, Route()).add(operator, key)
        self._settings, self._routes = settings, routes
        self._plugins = [plugin for plugin in plugins.values() if plugin.checks]
        dialects = {one.name: one for op in settings.operators.values() for one in (op.sends, *op.receives)}
        self._quotas = {op.name: self._quota(op) for op in settings.operators.values() if _bounds_unknown(op)}
        self._secret_names = frozenset(
            dialect.fields[meaning].casefold()
            for dialect in dialects.values()
            for meaning in ("token", "hash")
            if meaning in dialect.fields
        )

    def _quota(self, operator: Operator) -> PerMinute:
        """The existing quota, or a new one: a reload must not reset the count."""
        quota = self._quotas.get(operator.name) or PerMinute(operator.unknown_per_minute)
        quota.limit = operator.unknown_per_minute
        return quota

    async def handle(self, request: web.BaseRequest) -> Any:
        """Answers any request to the public listener."""
        path = endpoint_key(request.rel_url.raw_path)
        route = self._routes.get(path)
        return await self.answered(request, path, route, self._receive(request, path, route))

    def begin(self, head: RawRequestMessage, body: bytes, transport: asyncio.Transport | None) -> Begun | None:
        """Begins a notice that can be recorded (`connection.Begin`). None for a notice that is refused or that a
        plug-in or a quota may refuse, and for all other requests.
        """
        path = endpoint_key(head.url.raw_path)
        route = None if self._plugins or head.method != "POST" else self._routes.get(path)
        if route is None:
            return None
        try:
            address, content = self._admit(head, transport, route)
            if len(body) > BODY_MAX:
                return None
            received = self._read(head, path, route, address, content, body)
        except (Refused, NotRead):
            return None
        return None if received.operator.name in self._quotas else received

    async def answered(self, head: Head, path: str, route: Route | None, reply: Awaitable[Reply]) -> Reply:
        """The reply to a request, or the answer to its error. `head` is aiohttp's request, or its head alone."""
        try:
            return await reply
        except Exception as error:
            refused = error if isinstance(error, Refused) else Refused(500, "Internal error, please retry")
            if refused is not error:
                facts = {"error": type(error).__name__, "where": place(error), "request_id": request_id(head)}
                log.exception("notice.failed", path=path, **facts)
            codes_of = refused.dialect or (SHIPPED["v4"] if route is None else route.codes_of)
            code = codes_of.codes.of("retry" if refused.status >= 500 else "bad_parameters")
            seen = refused.seen
            why = {
                "status": refused.status,
                "reason": refused.description,
                "address": seen.get("address"),
                "content_type": seen.get("content_type"),
                "content_encoding": seen.get("content_encoding"),
                "request_id": request_id(head),
            }
            if route is None:  # no warning and no path: scanners guess paths all the time, and put anything into them
                log.debug("notice.not_taken", **why)
            elif not refused.logged:
                log.warning("notice.not_taken", path=path, **why)
            self._observer.not_taken(refused.status)
            response = _response(answer(code, refused.description), refused.status, refused.headers)
            if refused.status == 408:
                response.force_close()  # otherwise the rest of the body would be read as the next request
            return response

    async def _answer_health(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return _response(answer(7, "Method not allowed"), 405, {"Allow": "GET, HEAD"})
        status = await self._health()
        body = orjson.dumps({"status": status})
        return web.Response(body=body, status=503 if status == "fail" else 200, content_type="application/health+json")

    async def _receive(self, request: web.BaseRequest, path: str, route: Route | None) -> Reply:
        if path == "/health":
            return await self._answer_health(request)
        if route is None:
            raise Refused(404, "Not found")
        if request.method != "POST":
            raise Refused(405, "Method not allowed", headers={"Allow": "POST"})
        address, content = self._admit(request, request.transport, route)
        try:
            if "Expect" in request.headers:
                await _ask_for_body(request)
            body = await read_body(request, BODY_MAX, self._body_s)
        except BodyTooLarge:
            raise Refused(413, f"Body too large: at most {BODY_MAX} bytes") from None
        except BodyTooSlow:
            raise Refused(408, "Body too slow or incomplete") from None
        try:
            received = self._read(request, path, route, address, content, body)
        except NotRead as error:
            return self.refuse(error.dialect, error.refusal, error.facts)
        result: Any
        try:
            await self._check(received)
            result = await self._store.record(received.change)
        except (BadNotice, StoreError) as error:
            result = error
        return received.ready(result) or received.refuse(result)

    def _admit(
        self, head: Head, transport: asyncio.BaseTransport | None, route: Route
    ) -> tuple[Address | None, Literal["json", "form"]]:
        """The address that a notice comes from, if it matters, and its content. Raises Refused."""
        address = None
        if route.looks_at_addresses:
            address = client_address(head, transport, self._settings.server.trusted_proxies)
            if not any(allowed(address, operator.allow_from) for operator in route.operators.values()):
                raise _not_allowed(address)
        content = content_of(content_type := head.headers.get("Content-Type", ""))
        if content is None or content not in route.dialects:
            raise Refused(415, "Unsupported media type", content_type=content_type[:SEEN_MAX])
        codings = head.headers.getall("Content-Encoding", ())
        if codings and not uncoded(codings):
            raise Refused(415, "Unsupported content encoding", content_encoding=", ".join(codings)[:SEEN_MAX])
        return address, content

    def _read(
        self, head: Head, path: str, route: Route, address: Address | None, content: str, body: bytes
    ) -> "_Received":
        """Reads and authenticates one notice. Raises Refused, and NotRead for a notice that gets an answer code."""
        # The dialect whose codes are answered if that of the body cannot be found out
        dialect = route.dialects[content][0]
        facts: dict[str, Any] = {"operator": route.only, "request_id": request_id(head)}
        try:
            parsed = parse(body, content, route.dialects[content])
            dialect = parsed.dialect
            facts |= {"session": parsed.session_id, "request": parsed.request}
            operator = _operator(route, parsed)
            facts["operator"] = operator.name
            if operator.allow_from and not allowed(address, operator.allow_from):
                raise _not_allowed(address, dialect)
            if parsed.provider_id != operator.provider_id:
                self._note_spelling(operator, parsed.provider_id)
            extra = extra_of(parsed, self._secret_names)
            if "hash" in dialect.fields:
                check_hash(parsed, operator.hash_key or "")
            _check_token(operator, parsed)
        except BadNotice as refusal:
            raise NotRead(refusal.dialect or dialect, refusal, facts) from refusal
        return _Received(self, head, path, route, operator, parsed, extra, facts)

    async def _check(self, received: "_Received") -> None:
        """Has the plug-ins check a notice, and keeps to the quota of its operator. Raises BadNotice and StoreError."""
        operator, parsed = received.operator, received.parsed
        plugins = self._plugins and [one for one in self._plugins if one.settings.listens_to(operator.name)]
        quota = self._quotas.get(operator.name)
        if not plugins and quota is None:
            return
        known = await self._store.session(operator.name, parsed.session_id)
        # A repeat gets the answer of the first notice, without another check
        if known is None or known[0].reason is None:
            await _ask(plugins, _notice(operator, parsed, received.extra.fields))
        if known is None and quota is not None and not quota.take(self._clock.monotonic()):
            self._observer.over_quota(operator.name)
            raise BadNotice("retry", "too many notices of unknown sessions in a minute, please retry later")

    def refuse(self, dialect: Dialect, refusal: BadNotice, facts: Mapping[str, Any]) -> web.Response:
        """The answer to a notice that is refused with an answer code."""
        code = dialect.codes.of(refusal.meaning)
        why = {"dialect": dialect.name, "code": code, "meaning": refusal.meaning, "reason": refusal.description}
        log.warning("notice.refused", **facts, **why)
        self._observer.answered(facts["operator"] or "", dialect.name, code)
        return _response(answer(code, refusal.description))

    def recorded(self, dialect: Dialect, operator: str) -> Ready:
        """The answer to a notice that is recorded."""
        self._observer.answered(operator, dialect.name, 0)
        return _SUCCESS

    def _note_spelling(self, operator: Operator, provider_id: str) -> None:
        key = (operator.name, provider_id)
        if key not in self._spellings and len(self._spellings) < 1000:
            self._spellings.add(key)
            log.warning("notice.misspelled", operator=operator.name, expected=operator.provider_id, got=provider_id)


class _Received:
    """A notice that was read and authenticated (`connection.Begun`)."""

    __slots__ = ("_endpoint", "_facts", "_head", "_path", "_route", "change", "extra", "operator", "parsed")

    def __init__(
        self,
        endpoint: Endpoint,
        head: Head,
        path: str,
        route: Route,
        operator: Operator,
        parsed: Parsed,
        extra: Extra,
        facts: Mapping[str, Any],
    ) -> None:
        self._endpoint = endpoint
        self._head = head
        self._path = path
        self._route = route
        self._facts = facts
        self.operator = operator
        self.parsed = parsed
        self.extra = extra
        self.change = Recording(
            operator.name,
            parsed.session_id,
            parsed.player_id,
            parsed.token,
            compare_token=operator.token_check == "session",
            accept_unknown=operator.accept_unknown,
            extra=extra.text,
            idle_ms=round(operator.idle_s * 1000),
        )

    def ready(self, result: Any) -> Ready | None:
        if isinstance(result, Exception) or result in UNRECORDED:
            return None
        event = "notice.repeated" if result == "repeated" else "notice.recorded"
        dialect, facts = self.parsed.dialect, self._facts
        if not log.suppresses(event):
            log.info(event, **facts, dialect=dialect.name, extra_left_out=self.extra.left_out or None)
        return self._endpoint.recorded(dialect, self.operator.name)

    def refuse(self, result: Any) -> Reply:
        """The answer to a notice that was not recorded. Raises Refused if it could not be stored, and any exception in
        the place of a result that is neither a BadNotice nor a StoreError.
        """
        dialect, facts = self.parsed.dialect, self._facts
        if isinstance(result, StoreError):
            log.warning("notice.not_stored", **facts, reason=str(result))
            headers = {"Retry-After": RETRY_AFTER_S}
            raise Refused(503, "Cannot be stored now, please retry", dialect, headers=headers, logged=True) from result
        if isinstance(result, Exception) and not isinstance(result, BadNotice):
            raise result
        refusal = result if isinstance(result, BadNotice) else BadNotice(result, UNRECORDED[result])
        return self._endpoint.refuse(dialect, refusal, facts)

    def answer_unusual(self, result: Any) -> Coroutine[Any, Any, Reply]:
        return self._endpoint.answered(self._head, self._path, self._route, self._refuse(result))

    async def _refuse(self, result: Any) -> Reply:
        """`refuse` as a coroutine; `Endpoint.answered` answers what it raises."""
        return self.refuse(result)


def _in_order(operator: Operator, path: str) -> Sequence[Dialect]:
    """The dialects that an operator receives at a path: all that it accepts, in its order. If its paths are the default
    ones, those dialects come first that have this path.
    """
    defaults = [endpoint_key(dialect.path) for dialect in operator.receives]
    if {endpoint_key(one) for one in operator.paths} != set(defaults):
        return operator.receives
    return sorted(operator.receives, key=lambda dialect: endpoint_key(dialect.path) != path)


def _bounds_unknown(operator: Operator) -> bool:
    """Whether notices of unknown sessions are counted: not if they are refused anyway."""
    return operator.unknown_per_minute > 0 and operator.accept_unknown and operator.token_check != "session"


def _not_allowed(address: Address | None, dialect: Dialect | None = None) -> Refused:
    return Refused(403, "Address not allowed", dialect, address=str(address or "unknown"))


def _operator(route: Route, parsed: Parsed) -> Operator:
    operator = route.operators.get(parsed.provider_id.casefold())
    if operator is None:
        raise BadNotice("bad_parameters", f"{parsed.dialect.fields['provider']} is not known here")
    if parsed.dialect not in operator.receives and not any(map(parsed.dialect.same_wire, operator.receives)):
        raise BadNotice("bad_parameters", f"dialect {parsed.dialect.name} is not accepted for this provider")
    return operator


def _check_token(operator: Operator, parsed: Parsed) -> None:
    """Checks the token of a notice; raises BadNotice: absent is bad parameters, wrong is bad token.

    With `token_check = "session"` it is compared later, in the store, with the session's own.
    """
    if operator.token_check == "present":
        return
    if parsed.token is None:
        raise BadNotice("bad_parameters", f"field {parsed.dialect.fields['token']!r} is missing")
    if operator.token_check == "partner":
        given = parsed.token.encode()
        matches = [hmac.compare_digest(given, token.encode()) for token in operator.partner_tokens]
        if not any(matches):
            raise BadNotice("bad_token", "the token is not the partner's")


def _notice(operator: Operator, parsed: Parsed, extra: Mapping[str, Any]) -> Notice:
    """The notice as plug-ins get it."""
    return Notice(
        operator=operator.name,
        dialect=parsed.dialect.name,
        provider_id=parsed.provider_id,
        session_id=parsed.session_id,
        player_id=parsed.player_id,
        token=parsed.token,
        request=parsed.request,
        extra=extra,
    )


async def _ask_for_body(request: web.BaseRequest) -> None:
    """Answers 100 to a client that waits for it; aiohttp does that only for a web.Application. Source: RFC 9110
    §10.1.1.
    """
    if request.version < HttpVersion11 or request.headers.get("Expect", "").lower() != "100-continue":
        return
    if (request.content_length or 0) <= BODY_MAX:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # else aiohttp would take the 100 for a part of the answer


async def _ask(plugins: Sequence[LoadedPlugin], notice: Notice) -> None:
    for plugin in plugins:
        try:
            await plugin.check(notice)
        except Refuse as refusal:
            raise BadNotice(refusal.meaning, refusal.description) from refusal
        except PluginFailed as failure:
            log.error("plugin.check_failed", plugin=plugin.name, operator=notice.operator, reason=str(failure))
            raise BadNotice("retry", "cannot be checked now, please retry") from failure


def malformed(reason: str) -> web.Response:
    """The answer to malformed HTTP, for which no path is known."""
    return _response(_without_path("bad_parameters", reason), 400)


def unavailable(reason: str) -> bytes:
    """The answer to a client whose request is not read."""
    return busy_answer(_without_path("retry", f"{reason}, please retry"), "application/json")


def _without_path(meaning: str, reason: str) -> bytes:
    return answer(SHIPPED["v4"].codes.of(meaning), reason[0].upper() + reason[1:])


def _response(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
