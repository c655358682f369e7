"""The private side: who is let in, which call is meant, and how an error is answered.

What a call does is in `sessions`, `deliveries` and `administration`; which there are, in `routes`. It
has a listener of its own, for game servers, the commands of `lmdaemon`, and administrators.
"""

import re
from collections.abc import Awaitable, Coroutine
from functools import partial
from typing import Any, NoReturn

import orjson
from aiohttp import web

from lmdaemon.config.settings import ApiToken, Settings
from lmdaemon.config.values import names_itself
from lmdaemon.log import Log, place, writable
from lmdaemon.store.contract import StoreError
from lmdaemon.web import openapi
from lmdaemon.web.administration import Administration, health_answer
from lmdaemon.web.calls import SEEN_MAX, SESSION, SESSIONS, Context
from lmdaemon.web.console import PATHS, Console
from lmdaemon.web.deliveries import Deliveries
from lmdaemon.web.problems import Problem, invalid
from lmdaemon.web.requests import Handler, Head, bearer, request_id
from lmdaemon.web.routes import CALLS, HEALTH
from lmdaemon.web.sessions import Sessions
from lmdaemon.web.trying import Trying
from lmdaemon.web.watching import Watching

# Where the calls are served that come all day; an operator's name never needs an escape. Groups: session, touch.
_DIRECT = re.compile(r"/v1/operators/[\w.-]+/sessions/([^/]+)(/touch)?", re.ASCII)

log = Log("api")


class Api:
    """The private side as an aiohttp application."""

    def __init__(self, context: Context) -> None:
        self._context = context
        parts = (
            Sessions(self._context),
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
        app = web.Application(middlewares=[self._guarded])
        # By itself, aiohttp would not let an id hold { or }
        routes = [(call, call.path.replace("{sessionId}", "{sessionId:[^/]+}")) for call in CALLS]
        routes += [(call, HEALTH + "/") for call in CALLS if call.path == HEALTH]
        # At the path of touchSessions, which comes first: a session may be called "touch"
        routes[1:1] = [(call, SESSIONS + "/touch") for call in CALLS if call.path == SESSION]
        for call, path in routes:
            handler = call.served_by(self._parts[call.part], self._context)
            add = app.router.add_get if call.method == "GET" else partial(app.router.add_route, call.method)
            add(path, handler)
        for path in PATHS:
            app.router.add_get(path, self._console.serve)
        return app

    def shortcut(self, otherwise: Handler) -> Handler:
        """The calls that come all day, past aiohttp's router and middleware; the rest to `otherwise`."""

        def handle(request: web.Request) -> Awaitable[web.StreamResponse]:
            expect = request.headers.get("Expect", "").lower()
            if expect and expect != "100-continue":  # aiohttp would say 417 before a token is asked for
                return self._guarded(request, _unexpected)
            return (None if expect else self.direct(request)) or otherwise(request)

        return handle

    def direct(self, request: web.Request) -> Coroutine[Any, Any, web.StreamResponse] | None:
        """The handler at work on one of the calls that come all day, if this is one. None of them needs a task."""
        found = _DIRECT.fullmatch(request.rel_url.raw_path)
        if found is None:
            return None
        session, touch = found.groups()
        handler: Handler | None = None
        if request.method == "POST":
            handler = self._touch if touch else self._touch_many if session == "touch" else None
        elif request.method == "PUT" and not touch:
            handler = self._open
        return None if handler is None else self._guarded(request, handler)

    def knows(self, head: Head) -> bool:
        """Whether the head of a request shows that its sender is let in, before there is a request."""
        tokens = self._context.settings.api_tokens
        return not tokens or bearer(head, tokens) is not None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Bearer token first, then the handler; every error becomes a problem document."""
        headers = {}
        try:
            tokens = self._context.settings.api_tokens
            token = bearer(request, tokens) if tokens else None
            if token is not None or not tokens:
                self._check_rights(request, token)
                return await handler(request)
            if handler == self._console.serve:  # anybody may have the files: nothing secret is in them
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

    def _check_rights(self, request: web.Request, token: ApiToken | None) -> None:
        """Whether what it asks for is allowed; raises Problem. None: no token is configured."""
        changes = request.method not in ("GET", "HEAD")
        if token is None:
            self._check_browser(request, changes=changes)
        elif changes and not token.may_change:
            raise Problem("read-only", "this token may only read")

    def _check_browser(self, request: web.Request, *, changes: bool) -> None:
        """Without a token, what a page in a browser on this machine asks for must be refused; raises Problem.

        A page from anywhere may have its browser send requests to loopback. It names where it comes from in Origin and
        may not see what a GET answers, unless its own name leads here (DNS rebinding): then that name is in Host. No
        browser reaches a unix socket, and none sends a request without Host.
        """
        listen, host, origin = (
            self._context.settings.api.listen,
            request.headers.get("Host"),
            request.headers.get("Origin"),
        )
        if host is not None and not listen.unix and not names_itself(host, listen):
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


async def _unexpected(_: web.Request) -> NoReturn:
    raise Problem("expectation-failed", "Expect must be 100-continue")


def malformed(reason: str) -> web.Response:
    """The answer to what is no HTTP."""
    return invalid(reason).answer()
