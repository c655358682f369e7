"""What all calls of the private API have in common: `Call`, a row of the table in `routes`; `Asked`, what a handler
gets of a request; and `Context`, what all handlers share. What a single call does is not here but in its handler.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import unquote

import msgspec
from aiohttp import web
from msgspec import field

from lmdaemon import shapes
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.dialects import content_of, uncoded
from lmdaemon.metrics import Metrics
from lmdaemon.model import ID_MAX, Asker, Delivery, Member, Session, id_problem
from lmdaemon.store.contract import PAGE_BYTES, Page, Store
from lmdaemon.threads import on_a_thread
from lmdaemon.web import bodies
from lmdaemon.web.connection import until_client_leaves
from lmdaemon.web.documents import delivery_document, session_document, to_json, with_history
from lmdaemon.web.events import Events
from lmdaemon.web.problems import KINDS, Problem, invalid
from lmdaemon.web.recent import Recent
from lmdaemon.web.requests import (
    BodyTooLarge,
    BodyTooSlow,
    Head,
    Ready,
    Reply,
    bearer,
    decode_segment,
    read_body,
    request_id,
)

SEEN_MAX = 100  # characters of a header in an answer or a log line
STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # otherwise nginx would keep events until its buffer is full
}
OPERATOR = "/v1/operators/{operator}"
SESSIONS = OPERATOR + "/sessions"
SESSION = SESSIONS + "/{sessionId}"

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")
_Row = TypeVar("_Row", Session, Delivery)


class Health(Protocol):
    """What the daemon knows of itself: a status, and every check with its figures."""

    async def status(self) -> str:
        """The worst status of all checks."""

    async def report(self) -> shapes.Health:
        """Every check with its figures."""

    async def oldest_pending_s(self) -> dict[str, float]:
        """The age (s) of each operator's oldest pending delivery."""

    async def look_for_daemons(self) -> Sequence[Member]:
        """The daemons on the database, for the metrics."""


class ShownRequest(Protocol):
    """A request with its secrets masked."""

    @property
    def url(self) -> str:
        """The URL without user info, with the values of its query masked."""

    @property
    def headers(self) -> Mapping[str, str]:
        """All headers that are sent."""

    @property
    def body(self) -> str | None:
        """The body; None if it is no longer kept."""

    @property
    def curl(self) -> str:
        """The request as a curl command."""


class Trials(Protocol):
    """Sends test notices and checks to operators' endpoints."""

    def obstacle(self, operator: Operator) -> str:
        """The reason, in words, why no trial of this operator can begin now; empty if one can."""

    async def send(self, operator: Operator, session_id: str | None, player_id: str | None) -> Mapping[str, Any]:
        """Sends one test notice; returns the members of shapes.TestResult. Raises CannotEncode."""

    async def check(self, operator: Operator, on_progress: Callable[[Any], None]) -> Mapping[str, Any]:
        """Runs the checks and calls `on_progress` for each; returns the members of shapes.CheckReport. If it is
        cancelled, it returns the results so far.
        """


class Context(msgspec.Struct, kw_only=True):
    """What the handlers share. `expires_at` and `probe` are functions of other parts; `settings` are those in force."""

    store: Store
    clock: Clock
    health: Health
    metrics: Metrics
    expires_at: Callable[[Session], int | None]
    # When the running attempt of a delivery began (wall ms); None: none is running
    under_way_since: Callable[[int], int | None]
    # Tries an operator's next delivery and returns its id; None: there is no delivery to try
    probe: Callable[[str], Awaitable[str | None]]
    # The request of a delivery, as it would be signed at a time (seconds since 1970)
    request_of: Callable[[Operator, Delivery, float], ShownRequest | None]
    trials: Trials
    recent: Recent
    events: Events
    read_again: Callable[[], Settings]  # the file as it is now; raises ConfigError
    body_s: float  # within which the body of a request has to arrive
    # Who is closing which session, by operator and session id. The log line of the end is written after the commit, by
    # code that does not know the request and finds here who asked for it
    closing: dict[tuple[str, str], Asker] = field(default_factory=dict)
    settings: Settings

    def operator(self, request: web.Request) -> Operator:
        """The operator in the path. Raises Problem."""
        return self.configured(unquote(request.rel_url.raw_path.split("/")[3]))

    def configured(self, name: str) -> Operator:
        """The operator of this name. Raises Problem."""
        operator = self.settings.operators.get(name)
        if operator is None:
            raise Problem("unknown-operator", f"no operator of this name is configured (got {name[:ID_MAX]!r})")
        return operator

    def asker(self, request: Head) -> Asker:
        """Who asked for a change, for the log line about it."""
        token = bearer(request, self.settings.api_tokens)
        return Asker(token.name or None if token is not None else None, request_id(request))

    def session(self, session: Session) -> shapes.Session:
        """A session as API answers have it."""
        return session_document(session, self.expires_at(session))

    def delivery(self, delivery: Delivery) -> shapes.Delivery:
        """A delivery as API answers have it."""
        gate, since_at = self.store.gate(delivery.operator), self.under_way_since(delivery.id)
        is_tried = self.settings.delivers(delivery.operator, delivery.sink)
        return delivery_document(delivery, gate, since_at, is_tried=is_tried)

    def delivery_with_history(self, delivery: Delivery) -> shapes.DeliveryWithHistory:
        """A delivery with its attempts as API answers have it."""
        gate, since_at = self.store.gate(delivery.operator), self.under_way_since(delivery.id)
        is_tried = self.settings.delivers(delivery.operator, delivery.sink)
        return with_history(delivery, gate, since_at, is_tried=is_tried)


class Asked(Generic[_Given]):
    """A request as its handler gets it. `operator` and `session_id` are from the path, `given` is the body or the
    query. An attribute that the call does not have is not set.
    """

    __slots__ = ("given", "operator", "request", "session_id")

    operator: Operator
    session_id: str
    given: _Given

    def __init__(self, request: Any) -> None:
        self.request = request  # aiohttp's request; or its head alone, in a call that `frequent` has begun


Handler = Callable[[Any, Asked[Any]], Awaitable[shapes.Answer | Reply]]


class Call(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One row of the table of calls.

    `answers` has, by status, its meaning and the type of its body; the first is for what the handler returns, unless it
    returns a response. `takes` is the type of the query of a GET, or of the body. `problems` are the codes that it may
    answer with, besides those of every call; with a status if that differs from the code's usual one. `links` name
    calls that take the id of the first item of a page; `events` are the events of a stream.
    """

    handler: Handler  # a method of one of the classes of handlers, such as `Sessions.open`
    method: str
    path: str
    name: str
    tag: str
    summary: str
    description: str
    answers: Mapping[int, tuple[str, Any]]
    problems: tuple[str | tuple[str, int], ...] = ()
    takes: type[shapes.Request] | None = None
    media: str = "application/json"
    links: tuple[str, ...] = ()
    events: Mapping[str, type[shapes.Answer]] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """The name of the class that has the handler."""
        return self.handler.__qualname__.partition(".")[0]

    @property
    def has_body(self) -> bool:
        """Whether the call takes a body."""
        return self.takes is not None and self.method != "GET"

    @property
    def may_fail_with(self) -> list[tuple[str, int]]:
        """Code and status of all its problems."""
        special = dict(one for one in self.problems if not isinstance(one, str))
        codes = {"unauthorized", "misdirected", "internal-error", *special}
        codes.update(one for one in self.problems if isinstance(one, str))
        if self.method != "GET":
            codes |= {"read-only", "cross-origin"}
        if "{operator}" in self.path:
            codes.add("unknown-operator")
        if self.takes is not None:
            codes.add("invalid")
        if self.has_body:
            codes |= {"too-slow", "too-large", "unsupported-media-type"}
        return [(code, special.get(code, kind.status)) for code, kind in KINDS.items() if code in codes]

    def served_by(self, part: object, context: Context) -> Callable[[Any], Awaitable[Any]]:
        """Returns the handler for aiohttp: it reads the request, calls the handler on `part`, and writes the answer."""
        handler = self.handler.__get__(part)
        status = next(iter(self.answers))
        of_operator, of_session, takes = "{operator}" in self.path, "{sessionId}" in self.path, self.takes
        read = partial(_body, within_s=context.body_s) if self.has_body else _query

        async def handle(request: web.Request) -> Reply:
            asked: Asked[Any] = Asked(request)
            if of_operator:
                asked.operator = context.operator(request)
            if of_session:
                asked.session_id = session_id_of(request)
            if takes is not None:
                asked.given = await read(request, takes)
            answer = await handler(asked)
            return answer if isinstance(answer, (Ready, web.StreamResponse)) else json_answer(answer, status)

        handle.__name__ = self.name
        return handle


def session_id_of(request: web.Request) -> str:
    """The session id in the path as it was sent, not as aiohttp normalised it:
    /v1/operators/{operator}/sessions/{sessionId}… Raises Problem.
    """
    return decoded_id(request.rel_url.raw_path.split("/")[5])


def decoded_id(raw: str) -> str:
    """A session id from one segment of a path. Raises Problem."""
    try:
        session_id = decode_segment(raw)
    except ValueError as error:
        raise invalid(f"sessionId: {error}") from error
    problem = id_problem(session_id)
    if problem:
        raise invalid(f"sessionId: {problem}")
    return session_id


async def _query(request: web.Request, kind: type[shapes.Request]) -> shapes.Request:
    """The parameters of the query, all of which must be known and stand only once. Raises Problem."""
    query: dict[str, str] = {}
    for name, value in request.query.items():
        if name in query:
            raise invalid(f"{name[:ID_MAX]}: must be given once")
        query[name] = value
    try:
        return bodies.of_query(kind, query)
    except ValueError as error:
        raise invalid(str(error)) from error


async def _body(request: web.Request, kind: type[shapes.Request], *, within_s: float) -> shapes.Request:
    """The body, as `read_given` reads it. Raises Problem."""
    check_codings(request)
    limit = bodies.longest(kind)
    try:
        body = await read_body(request, limit, within_s)
    except BodyTooLarge:
        raise Problem("too-large", f"the body must be at most {limit} bytes") from None
    except BodyTooSlow:
        raise Problem("too-slow", "the body came too slowly or broke off") from None
    if bodies.takes_long(kind):
        return await on_a_thread(read_given, request, kind, body)
    return read_given(request, kind, body)


def check_codings(head: Head) -> None:
    """Raises Problem for a body that is compressed."""
    codings = head.headers.getall("Content-Encoding", ())
    if codings and not uncoded(codings):
        seen = ", ".join(codings)[:SEEN_MAX]
        detail = f"the body must not be compressed (got Content-Encoding {seen!r})"
        raise Problem("unsupported-media-type", detail)


def read_given(head: Head, kind: type[shapes.Request], body: bytes) -> shapes.Request:
    """A body of at most `bodies.longest(kind)` bytes, which must have Content-Type JSON unless it is empty and no field
    is required. Raises Problem.
    """
    may_be_empty = not bodies.required(kind)
    if (body or not may_be_empty) and content_of(seen := head.headers.get("Content-Type", "")) != "json":
        detail = f"Content-Type must be application/json (got {seen[:SEEN_MAX]!r})"
        raise Problem("unsupported-media-type", detail)
    try:
        return bodies.of_body(kind, body)
    except ValueError as error:
        raise invalid(str(error)) from error


# -- answers


def json_answer(answer: shapes.Answer, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(body=to_json(answer), status=status, content_type="application/json")


def ready_answer(answer: shapes.Answer, status: int = 200) -> Ready:
    """An answer in JSON as a `Ready`, which costs less; for frequent calls."""
    return Ready(status, to_json(answer), "application/json")


async def shown(request: web.Request, reading: Awaitable[_Found]) -> _Found:
    """The result of a read for people. The read is cancelled if the client closes the connection."""
    with until_client_leaves(request):
        return await reading


def page_answer(page: Page[_Row], document: Callable[[_Row], shapes.Answer]) -> web.Response:
    """A page as JSON. It ends before an item that would make it longer than PAGE_BYTES."""
    items: list[bytes] = []
    left, after = PAGE_BYTES - len('{"items":[],"next":""}') - shapes.CURSOR_MAX, page.next
    for row in page.rows:
        item = to_json(document(row))
        left -= len(item) + 1  # and a comma
        if left < 0:
            after = page.rows[len(items) - 1].id
            break
        items.append(item)
    cursor = to_json(None if after is None else str(after))
    body = b'{"items":[' + b",".join(items) + b'],"next":' + cursor + b"}"
    return web.Response(body=body, content_type="application/json")
