"""The calls for watching the daemon: events as they happen, the figures of the last hour, and the list of daemons."""

from aiohttp import web

from lmdaemon import shapes
from lmdaemon.model import rfc3339
from lmdaemon.web.calls import STREAM_HEADERS, Asked, Context
from lmdaemon.web.connection import until_client_leaves
from lmdaemon.web.problems import Problem
from lmdaemon.web.recent import STEPS_S, Counts


class Watching:
    """The handlers of the calls for watching the daemon."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._events = context.events

    async def stream_events(self, asked: Asked[shapes.EventQuery]) -> web.StreamResponse:
        """GET /v1/events."""
        request, operator = asked.request, asked.given.operator or None
        if operator is not None:
            self._context.configured(operator)
        if request.method == "HEAD":
            return web.Response(headers=STREAM_HEADERS)
        if self._events.full:
            raise Problem("too-many-listeners", "too many clients listen already, or the daemon is stopping")
        response = web.StreamResponse(headers=STREAM_HEADERS)

        def abort() -> None:
            if request.transport is not None:
                request.transport.abort()

        listener = self._events.listen(operator, abort)
        try:
            with until_client_leaves(request):
                await response.prepare(request)
                async for chunk in listener.chunks():
                    await response.write(chunk)
        except ConnectionError:
            pass  # the client has gone, or was disconnected because it was too slow
        finally:
            self._events.leave(listener)
        return response

    async def show_recent(self, asked: Asked[shapes.NoQuery]) -> shapes.RecentFigures:
        """GET /v1/figures."""
        second, series = self._context.recent.series()
        now_at = self._context.clock.wall_ms()
        spans = [
            shapes.Span(
                step_seconds=step_s,
                ends_at=rfc3339(now_at + (step_s - second % step_s) * 1000),
                series=[
                    shapes.Series(operator=operator, **dict(zip(Counts._fields, spans[at], strict=True)))
                    for operator, spans in series.items()
                ],
            )
            for at, step_s in enumerate(STEPS_S)
        ]
        return shapes.RecentFigures(at=rfc3339(now_at), spans=spans)

    async def list_daemons(self, asked: Asked[shapes.NoQuery]) -> shapes.DaemonList:
        """GET /v1/daemons."""
        return shapes.DaemonList(
            items=[
                shapes.Daemon(
                    name=one.name,
                    version=one.version,
                    address=one.address,
                    since=rfc3339(one.since_at),
                    last_heard_at=rfc3339(one.heard_at),
                    service_lag_ms=one.lag_ms,
                    operators=list(one.operators),
                    self=one.is_self,
                )
                for one in await self._context.store.daemons()
            ]
        )
