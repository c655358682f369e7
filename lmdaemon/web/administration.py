"""The calls about operators, what holds them back, and the daemon itself: health, metrics, the OpenAPI document."""

import asyncio
from collections.abc import Callable

import orjson
from aiohttp import web

from lmdaemon import retry, shapes
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.config.shown import NEEDS_RESTART, differences, in_force, inherited
from lmdaemon.log import Log, writable
from lmdaemon.metrics import CONTENT_TYPE
from lmdaemon.model import rfc3339
from lmdaemon.store.contract import StoreError
from lmdaemon.web.calls import Asked, Context, shown

OPERATORS_AT_ONCE = 200  # shown in one turn of the event loop: about 1 ms

log = Log("api")


class Administration:
    """Their handlers. `describe` makes the OpenAPI document of settings, beside the event loop."""

    def __init__(self, context: Context, describe: Callable[[Settings], object]) -> None:
        self._context = context
        self._store = context.store
        self._clock = context.clock
        self._describe = describe
        self._reading = asyncio.Lock()
        self._described: tuple[Settings, bytes] | None = None

    # -- operators

    async def list_operators(self, asked: Asked[shapes.NoQuery]) -> shapes.OperatorList:
        """GET /v1/operators."""
        operators = self._context.settings.operators
        oldest = await shown(asked.request, self._store.oldest_pending_shown(operators))
        items = []
        for name, operator in operators.items():
            items.append(self._shown(operator, oldest.get(name)))
            if len(items) % OPERATORS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return shapes.OperatorList(items=items)

    def _shown(self, operator: Operator, oldest_at: int | None) -> shapes.Operator:
        now_at = self._clock.wall_ms()
        gate, figures = self._store.gate(operator.name), self._store.figures_of(operator.name)
        return shapes.Operator(
            operator=operator.name,
            notify=operator.notify,
            dialect=operator.sends.name,
            held=gate.held_at is not None,
            held_reason=gate.held_reason,
            breaker=retry.breaker(gate, now_at),
            live=figures.live,
            pending=figures.pending,
            dead=figures.dead,
            oldest_pending_seconds=None if oldest_at is None else max(0, now_at - oldest_at) / 1000,
            not_before=rfc3339(retry.not_before(gate, now_at)),
        )

    async def hold(self, asked: Asked[None]) -> shapes.Operator:
        """POST /v1/operators/{operator}/hold."""
        operator, (by, asking) = asked.operator, self._context.asker(asked.request)
        await self._store.set_gate(operator.name, lambda gate: retry.hold(gate, self._clock.wall_ms(), "by_hand"))
        log.warning("operator.held", operator=operator.name, reason="by_hand", by=by, request_id=asking)
        return await self._shown_now(operator)

    async def release(self, asked: Asked[None]) -> shapes.Operator:
        """POST /v1/operators/{operator}/release."""
        operator, (by, asking) = asked.operator, self._context.asker(asked.request)
        await self._store.set_gate(operator.name, lambda gate: retry.release(gate, self._clock.wall_ms()))
        log.info("operator.released", operator=operator.name, reason="by_hand", by=by, request_id=asking)
        return await self._shown_now(operator)

    async def _shown_now(self, operator: Operator) -> shapes.Operator:
        oldest = await self._store.oldest_pending_shown([operator.name])
        return self._shown(operator, oldest[operator.name])

    # -- the daemon itself

    async def show_config(self, asked: Asked[shapes.NoQuery]) -> shapes.Configuration:
        async with self._reading:  # one at a time: with 1,000 operators the file takes 0.2 s to read
            return await asyncio.to_thread(self._configuration)

    def _configuration(self) -> shapes.Configuration:
        settings = self._context.settings
        shown = {key: writable(value) for key, value in in_force(settings).items()}
        found = shapes.Configuration(
            file=writable(str(settings.file)), settings=shown, inherited=inherited(settings), changes=[], errors=[]
        )
        try:
            new = self._context.read_again()
        except ConfigError as error:
            found.errors.extend(map(writable, error.findings))
            return found
        for one in differences(settings, new):
            found.changes.append(
                shapes.SettingChange(
                    key=one.key,
                    old=None if one.old is None else writable(one.old),
                    new=None if one.new is None else writable(one.new),
                    content=one.content,
                    needs_restart=one.key in NEEDS_RESTART,
                )
            )
        return found

    async def show_health(self, asked: Asked[None]) -> web.Response:
        """GET /health, with every check."""
        report = await self._context.health.report()
        return health_answer(orjson.dumps(report), report["status"])

    async def show_metrics(self, asked: Asked[None]) -> web.Response:
        """GET /metrics."""
        try:
            oldest = await self._context.health.oldest_pending_s()
        except StoreError:  # everything else can still be told, that storing fails among it
            oldest = {}
        body = await self._context.metrics.scrape(oldest)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def show_openapi(self, asked: Asked[None]) -> web.Response:
        """GET /openapi.json."""
        settings = self._context.settings
        if self._described is None or self._described[0] is not settings:
            document = await asyncio.to_thread(lambda: orjson.dumps(self._describe(settings)))
            self._described = settings, document
        return web.Response(body=self._described[1], content_type="application/json")


def health_answer(body: bytes, status: str) -> web.Response:
    """The answer to GET /health: 503 if the status is `fail`."""
    return web.Response(body=body, status=503 if status == "fail" else 200, content_type="application/health+json")
