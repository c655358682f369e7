"""The private side: checks who may call, finds the handler of the call, and answers errors.

`routes` lists the calls; their handlers are in `sessions`, `deliveries`, `administration`, `watching` and `trying`. It
has a listener of its own, for game servers, the commands of `lmdaemon`, and administrators.
"""

import asyncio
import re
from collections.abc import Awaitable
from functools import partial
from typing import Any, NoReturn

import orjson
from aiohttp import web
from aiohttp.http import RawRequestMessage

from lmdaemon.config.settings import ApiToken, Settings
from lmdaemon.config.values import names_itself
from lmdaemon.log import Log, place, writable
from lmdaemon.store.contract import StoreError
from lmdaemon.web import openapi
from lmdaemon.web.administration import Administration, health_answer
from lmdaemon.web.calls import SEEN_MAX, SESSION, SESSIONS, Context
from lmdaemon.web.connection import Begun
from lmdaemon.web.console import PATHS, Console
from lmdaemon.web.deliveries import Deliveries
from lmdaemon.web.documents import to_json
from lmdaemon.web.frequent import Frequent
from lmdaemon.web.problems import Problem, invalid
from lmdaemon.web.requests import Handler, Head, Reply, bearer, busy_answer, request_id
from lmdaemon.web.routes import CALLS, HEALTH
from lmdaemon.web.sessions import Sessions
from lmdaemon.web.trying import Trying
from lmdaemon.web.watching import Watching

# Paths of the frequent calls: opening and touching a session. An operator's name never needs an escape.
_FREQUENT = re.compile(r"/v1/operators/(?P<operator>[\w.-]+)/sessions/(?P<session>[^/]+)(?P<touch>/touch)?", re.ASCII)

log = Log("api")


class Api:
    """The private side as an aiohttp application."""

    def __init__(self, context: Context) -> None:
        self._context = context
        sessions = Sessions(context)
        parts = (
            sessions,
            Deliveries(context),
            Administration(context, openapi.document),
            Watching(context),
            Trying(context),
        )
        by_name = {type(part).__name__: part for part in parts}
        self._served = {call.name: call.served_by(by_name[call.part], context) for call in CALLS}
        self._console = Console(context)
        self._health = context.health
        self._metrics = context.metrics
        self._frequent = Frequent(sessions, context, self._answered)
        self.submit = context.store.submit  # for what `begin` returns

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
            add = app.router.add_get if call.method == "GET" else partial(app.router.add_route, call.method)
            add(path, self._served[call.name])
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
            return (None if expect else self._frequent_call(request)) or otherwise(request)

        return handle

    def begin(self, head: RawRequestMessage, body: bytes, _: asyncio.Transport | None) -> Begun | None:
        """Begins a frequent call that is allowed (`connection.Begin`). None for all other requests."""
        call, found = _call_at(head.method, head.url.raw_path)
        if found is None or not self._may_change(head):
            return None
        return self._frequent.begin(call, found["operator"], found["session"], head, body)

    def _frequent_call(self, request: web.Request) -> Awaitable[Reply] | None:
        """Serves a frequent call; None for all other requests."""
        call, _ = _call_at(request.method, request.rel_url.raw_path)
        return self._guarded(request, self._served[call]) if call else None

    def knows(self, head: Head) -> bool:
        """Whether the head of a request has a valid token. It is asked before the body has arrived."""
        tokens = self._context.settings.api_tokens
        return not tokens or bearer(head, tokens) is not None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> Any:
        """Checks the bearer token, then calls the handler. Every error becomes a problem document."""
        return await self._answered(request, getattr(handler, "__name__", ""), self._checked(request, handler))

    async def _checked(self, request: web.Request, handler: Handler) -> Any:
        tokens = self._context.settings.api_tokens
        token = bearer(request, tokens) if tokens else None
        if token is not None or not tokens:
            self._check_rights(request, token)
            return await handler(request)
        if handler == self._console.serve:  # the console's files need no token: nothing secret is in them
            return await handler(request)
        if request.path.rstrip("/") == HEALTH and request.method in ("GET", "HEAD"):
            return await self._public_health()
        log.warning("api.unauthorized", peer=request.remote or None, request_id=request_id(request))
        raise Problem("unauthorized", "a valid bearer token is required")

    async def _answered(self, head: web.Request | RawRequestMessage, call: str, reply: Awaitable[Any]) -> Any:
        """The reply of a call, or the answer to its error. `head` is aiohttp's request, or its head alone."""
        headers = {}
        try:
            return await reply
        except Problem as one:
            problem = one
        except StoreError as error:
            problem = Problem("cannot-store", writable(str(error)))
        except web.HTTPMethodNotAllowed as error:
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            detail = f"{error.method} is not allowed here; {headers['Allow']} is"
            problem = Problem("method-not-allowed", detail)
        except web.HTTPNotFound:
            problem = Problem("unknown-path", f"nothing is served at {head.path!r}")
        except Exception as error:
            where = {"call": call, "error": type(error).__name__, "where": place(error)}
            log.exception("api.failed", method=head.method, **where, request_id=request_id(head))
            problem = Problem("internal-error", "a bug; the log has its traceback")
        self._metrics.api_error(problem.status)
        return problem.answer(headers)

    def _may_change(self, head: Head) -> bool:
        """Whether a request may change something, as `_check_rights` decides. Where no token is configured, False also
        for a request with an Origin, because it takes more to decide that.
        """
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
        host = request.headers.get("Host")
        origins = request.headers.getall("Origin", ())  # may be several, although no browser sends that
        own = f"{request.scheme}://{host}".lower() if origins else ""
        origin = next((one for one in origins if one.lower() != own), None)
        if host is not None and not self._is_named(host):
            rule = "without a token, Host must be localhost, a loopback address or the configured one"
            problem = Problem("misdirected", f"{rule} (got {host[:SEEN_MAX]!r})")
        elif changes and origin is not None:
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


def _call_at(method: str, path: str) -> tuple[str, re.Match[str] | None]:
    """The name of a frequent call, and what _FREQUENT has found in its path; "" and None for any other call."""
    found = _FREQUENT.fullmatch(path)
    if found is None:
        return "", None
    if method == "POST":
        if found["touch"]:
            return "touchSession", found
        if found["session"] == "touch":
            return "touchSessions", found
    elif method == "PUT" and not found["touch"]:
        return "openSession", found
    return "", None


async def _unexpected(_: web.Request) -> NoReturn:
    raise Problem("expectation-failed", "Expect must be 100-continue")


def malformed(reason: str) -> web.Response:
    """The answer to malformed HTTP."""
    return invalid(reason).answer()


def unavailable(reason: str) -> bytes:
    """The answer to a client whose request is not read."""
    return busy_answer(to_json(Problem("cannot-store", reason).body), "application/problem+json")
