"""The private side: checks who may call, finds the handler of the call, and answers errors.

`routes` lists the calls; their handlers are in `sessions`, `deliveries`, `administration`, `watching` and `trying`. It
has a listener of its own, for game servers, the commands of `lmdaemon`, and administrators.
"""

import re
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NoReturn

import orjson
from aiohttp import web

from lmdaemon.config.settings import ApiToken, Operator, Settings
from lmdaemon.config.values import names_itself
from lmdaemon.log import Log, place, writable
from lmdaemon.model import ID_MAX
from lmdaemon.store.contract import StoreError, Touched, Touching
from lmdaemon.web import openapi
from lmdaemon.web.administration import Administration, health_answer
from lmdaemon.web.calls import SEEN_MAX, SESSION, SESSIONS, Asked, Context
from lmdaemon.web.connection import Begun
from lmdaemon.web.console import PATHS, Console
from lmdaemon.web.deliveries import Deliveries
from lmdaemon.web.problems import Problem, invalid
from lmdaemon.web.requests import Handler, Head, Ready, Reply, bearer, request_id
from lmdaemon.web.routes import CALLS, HEALTH
from lmdaemon.web.sessions import Sessions
from lmdaemon.web.trying import Trying
from lmdaemon.web.watching import Watching

# Paths of the frequent calls: opening and touching a session. An operator's name never needs an escape. Groups: session
# id, `touch`.
_DIRECT = re.compile(r"/v1/operators/[\w.-]+/sessions/([^/]+)(/touch)?", re.ASCII)

# A touch of an operator and a session that are written without escapes. Groups: operator, session id
_TOUCH = re.compile(rf"/v1/operators/([\w.-]+)/sessions/([\w~-][\w.~-]{{0,{ID_MAX - 1}}})/touch", re.ASCII)

log = Log("api")


class Api:
    """The private side as an aiohttp application."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.store = context.store
        self.sessions = Sessions(context)
        parts = (
            self.sessions,
            Deliveries(self._context),
            Administration(self._context, openapi.document),
            Watching(self._context),
            Trying(self._context),
        )
        self._parts = {type(part).__name__: part for part in parts}
        self._console = Console(context)
        self._health = context.health
        self._metrics = context.metrics
        served = {call.name: call.served_by(self._parts[call.part], self._context) for call in CALLS}
        self._open, self._touch, self._touch_many = (
            served[name] for name in ("openSession", "touchSession", "touchSessions")
        )

    def configure(self, settings: Settings) -> None:
        """Takes over new settings for all requests that come from now on."""
        self._context.settings = settings

    def application(self) -> web.Application:
        """The aiohttp application of the private listener."""
        app = web.Application(middlewares=[self.guarded])
        # aiohttp's own pattern for a part of a path does not match { and }, which an id may have
        routes = [(call, call.path.replace("{sessionId}", "{sessionId:[^/]+}")) for call in CALLS]
        routes += [(call, HEALTH + "/") for call in CALLS if call.path == HEALTH]
        # A session may have the id "touch", so the path of touchSessions also serves the calls for one session
        routes[1:1] = [(call, SESSIONS + "/touch") for call in CALLS if call.path == SESSION]
        for call, path in routes:
            handler = call.served_by(self._parts[call.part], self._context)
            add = app.router.add_get if call.method == "GET" else partial(app.router.add_route, call.method)
            add(path, handler)
        for path in PATHS:
            app.router.add_get(path, self._console.serve)
        return app

    def shortcut(self, otherwise: Handler) -> Handler:
        """A handler that serves frequent calls without aiohttp's router and middleware, and passes all others to
        `otherwise`.
        """

        def handle(request: web.Request) -> Awaitable[Any]:
            expect = request.headers.get("Expect", "").lower()
            if expect and expect != "100-continue":  # aiohttp would answer 417 before the token is checked
                return self.guarded(request, _unexpected)
            return (None if expect else self.direct(request)) or otherwise(request)

        return handle

    def begin(self, head: Any, body: bytes) -> Begun | None:
        """Begins to handle a touch that is allowed, given its head as aiohttp's parser returns it. None for all other
        requests.
        """
        found = None if body or head.method != "POST" else _TOUCH.fullmatch(head.path)
        if found is None:
            return None
        name, session_id = found.groups()
        operator = self._context.settings.operators.get(name)
        return _Touch(self, operator, session_id) if operator is not None and self._may_change(head) else None

    def direct(self, request: web.Request) -> Coroutine[Any, Any, Reply] | None:
        """Begins to handle a frequent call and returns its coroutine, which needs no task of its own. Returns None for
        all other requests.
        """
        found = _DIRECT.fullmatch(request.rel_url.raw_path)
        if found is None:
            return None
        session, touch = found.groups()
        handler: Handler | None = None
        if request.method == "POST":
            handler = self._touch if touch else self._touch_many if session == "touch" else None
        elif request.method == "PUT" and not touch:
            handler = self._open
        return None if handler is None else self.guarded(request, handler)

    def knows(self, head: Head) -> bool:
        """Whether the head of a request has a valid token. It is asked before the body has arrived."""
        tokens = self._context.settings.api_tokens
        return not tokens or bearer(head, tokens) is not None

    @web.middleware
    async def guarded(self, request: web.Request, handler: Handler) -> Any:
        """Checks the bearer token, then calls the handler. Every error becomes a problem document."""
        headers = {}
        try:
            tokens = self._context.settings.api_tokens
            token = bearer(request, tokens) if tokens else None
            if token is not None or not tokens:
                self._check_rights(request, token)
                return await handler(request)
            if handler == self._console.serve:  # the console's files need no token: nothing secret is in them
                return await handler(request)
            if request.path.rstrip("/") == HEALTH and request.method in ("GET", "HEAD"):
                return await self._public_health()
            headers["WWW-Authenticate"] = "Bearer"
            log.warning("api.unauthorized", peer=request.remote or None, request_id=request_id(request))
            problem = Problem("unauthorized", "a valid bearer token is required")
        except Problem as one:
            problem = one
        except StoreError as error:
            problem = Problem("cannot-store", writable(str(error)))
        except web.HTTPMethodNotAllowed as error:
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            detail = f"{error.method} is not allowed here; {headers['Allow']} is"
            problem = Problem("method-not-allowed", detail)
        except web.HTTPNotFound:
            problem = Problem("unknown-path", f"nothing is served at {request.path!r}")
        except Exception as error:
            where = {"call": handler.__name__, "error": type(error).__name__, "where": place(error)}
            log.exception("api.failed", method=request.method, **where, request_id=request_id(request))
            problem = Problem("internal-error", "a bug; the log has its traceback")
        self._metrics.api_error(problem.status)
        return problem.answer(headers)

    def _may_change(self, head: Head) -> bool:
        """Whether a request may change something, without looking at its Origin: False if it has one."""
        tokens = self._context.settings.api_tokens
        if tokens:
            token = bearer(head, tokens)
            return token is not None and token.may_change
        return "Origin" not in head.headers and self._is_named(head.headers.get("Host"))

    def _is_named(self, host: str | None) -> bool:
        """Whether the header Host, if there is one, names this daemon."""
        listen = self._context.settings.api.listen
        return host is None or bool(listen.unix) or names_itself(host, listen)

    def _check_rights(self, request: web.Request, token: ApiToken | None) -> None:
        """Raises Problem if the token does not allow the request. `token` is None if no token is configured."""
        changes = request.method not in ("GET", "HEAD")
        if token is None:
            self._check_browser(request, changes=changes)
        elif changes and not token.may_change:
            raise Problem("read-only", "this token may only read")

    def _check_browser(self, request: web.Request, *, changes: bool) -> None:
        """Refuses requests that a web page could have caused, where no token is configured; raises Problem.

        Any web page can make a browser on this machine send requests to loopback. If such a request changes something,
        its Origin header has the page's own address. A page cannot read the answer to a GET, unless its host name
        resolves to this machine (DNS rebinding); then that name is in the Host header. No browser can reach a unix
        socket, and none sends a request without Host.
        """
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        if host is not None and not self._is_named(host):
            rule = "without a token, Host must be localhost, a loopback address or the configured one"
            problem = Problem("misdirected", f"{rule} (got {host[:SEEN_MAX]!r})")
        elif changes and origin is not None and origin.lower() != f"{request.scheme}://{host}".lower():
            rule = "a change with an Origin other than this address, as a browser sends it, needs a token"
            problem = Problem("cross-origin", f"{rule} (got {origin[:SEEN_MAX]!r})")
        else:
            return
        seen = {"host": (host or "")[:SEEN_MAX], "origin": (origin or "")[:SEEN_MAX] or None}
        peer = request.remote or None
        log.warning("api.refused", status=problem.status, **seen, peer=peer, request_id=request_id(request))
        raise problem

    async def _public_health(self) -> web.Response:
        status = await self._health.status()
        return health_answer(orjson.dumps({"status": status}), status)


class _Touch:
    """A touch that is being stored (`connection.Begun`)."""

    __slots__ = ("_api", "_operator", "_session_id")

    def __init__(self, api: Api, operator: Operator, session_id: str) -> None:
        self._api = api
        self._operator = operator
        self._session_id = session_id

    def store(self, done: Callable[[Any], None]) -> None:
        self._api.store.submit(Touching(self._operator.name, (self._session_id,)), done)

    def ready(self, result: Touched | Exception) -> Ready | None:
        if isinstance(result, Touched) and result.touched:
            return self._api.sessions.touched_one(self._operator.name)
        return None

    def rest(self, request: web.Request, result: Touched | Exception) -> Coroutine[Any, Any, Reply]:
        asked: Asked[None] = Asked(request)
        asked.operator, asked.session_id = self._operator, self._session_id

        async def touch(_: web.Request) -> Reply:
            if isinstance(result, Exception):
                raise result
            return await self._api.sessions.answer_touch(asked, result)

        return self._api.guarded(request, touch)


async def _unexpected(_: web.Request) -> NoReturn:
    raise Problem("expectation-failed", "Expect must be 100-continue")


def malformed(reason: str) -> web.Response:
    """The answer to malformed HTTP."""
    return invalid(reason).answer()
