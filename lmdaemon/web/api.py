"""The private side: checks who may call, finds the handler of the call, and answers errors.

`routes` lists the calls; their handlers are in `sessions`, `deliveries`, `administration`, `watching` and `trying`. It
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
from lmdaemon.web.requests import Handler, Head, Reply, bearer, request_id
from lmdaemon.web.routes import CALLS, HEALTH
from lmdaemon.web.sessions import Sessions
from lmdaemon.web.trying import Trying
from lmdaemon.web.watching import Watching

# Paths of the frequent calls: opening and touching a session. An operator's name never needs an escape. Groups: session
# id, `touch`.
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
                return self._guarded(request, _unexpected)
            return (None if expect else self.direct(request)) or otherwise(request)

        return handle

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
        return None if handler is None else self._guarded(request, handler)

    def knows(self, head: Head) -> bool:
        """Whether the head of a request has a valid token. It is asked before the body has arrived."""
        tokens = self._context.settings.api_tokens
        return not tokens or bearer(head, tokens) is not None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> Any:
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
    """The answer to malformed HTTP."""
    return invalid(reason).answer()
