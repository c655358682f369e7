"""The calls about operators, what holds them back, and the daemon itself: health, metrics, the OpenAPI document."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from lmdaemon import gates, retry, shapes
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import NEEDS_RESTART, Operator, Settings
from lmdaemon.config.shown import differences, in_force, inherited
from lmdaemon.log import Log, writable
from lmdaemon.metrics import CONTENT_TYPE
from lmdaemon.model import Gate, rfc3339
from lmdaemon.store.contract import StoreError
from lmdaemon.threads import on_a_thread
from lmdaemon.web.calls import Asked, Context, shown
from lmdaemon.web.problems import NO_URL, Problem
from lmdaemon.web.requests import bearer

OPERATORS_AT_ONCE = 200  # operators shown in one turn of the event loop, which takes about 1 ms

log = Log("api")


class Administration:
    """Handlers of the calls about operators, health, metrics and OpenAPI.

    `describe` makes the OpenAPI document for given settings. It is called on a thread, because it takes long.
    """

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
        now_at = self._clock.wall_ms()
        kept_back = [name for name in operators if gates.because(self._store.gate(name), now_at) is not None]
        aging = await shown(asked.request, self._store.aging_shown(kept_back)) if kept_back else {}
        items = []
        for name, operator in operators.items():
            items.append(shapes.Operator(**self._shown(operator, oldest.get(name), aging.get(name))))
            if len(items) % OPERATORS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return shapes.OperatorList(items=items)

    def _shown(self, operator: Operator, oldest_at: int | None, aged_from_at: int | None) -> dict[str, Any]:
        """The members of shapes.Operator. `aged_from_at` is as `Store.aging_shown` returns it."""
        now_at = self._clock.wall_ms()
        gate, figures = self._store.gate(operator.name), self._store.figures_of(operator.name)
        breaker = retry.breaker(gate, now_at)
        dies_at = None
        if aged_from_at is not None:
            dies_at = aged_from_at + round(operator.policy.max_age_s * 1000) + retry.held_ms(gate, now_at)
        last_failure = None
        if gate.failed_at is not None:
            reason, detail = gate.failed_reason or "", gate.failed_detail
            last_failure = shapes.Failure(at=rfc3339(gate.failed_at), reason=reason, detail=detail)
        return {
            "operator": operator.name,
            "notify": operator.notify,
            "dialect": operator.sends.name,
            "held": gate.held_at is not None,
            "held_reason": gate.held_reason,
            "held_since": rfc3339(gate.held_at),
            "held_by": gate.held_by,
            "held_note": gate.held_note,
            "held_until": rfc3339(gate.held_until_at),
            "breaker": breaker,
            "breaker_since": rfc3339(None if breaker == "closed" else gate.opened_at),
            "failed_attempts": gate.failures,
            "failing_since": rfc3339(gate.failing_since_at),
            "last_failure": last_failure,
            "paused_since": rfc3339(gate.paused_at if gate.not_before_at > now_at else None),
            "ends_wait_until": self._ends_wait_until(operator.name, now_at),
            "live": figures.live,
            "pending": figures.pending,
            "dead": figures.dead,
            "oldest_pending_seconds": None if oldest_at is None else max(0, now_at - oldest_at) / 1000,
            "not_before": rfc3339(retry.not_before(gate, now_at)),
            "kept_back": gates.because(gate, now_at),
            "outlook": gates.outlook(gate, now_at, pending=figures.pending, dies_at=dies_at),
        }

    def _ends_wait_until(self, operator: str, now_at: int) -> str | None:
        until_ms = self._store.waits_until_ms(operator)
        return None if until_ms is None else rfc3339(now_at + until_ms - self._store.service_clock.now_ms())

    async def hold(self, asked: Asked[shapes.Hold]) -> shapes.ChangedOperator:
        """POST /v1/operators/{operator}/hold."""
        given, now_at = asked.given, self._clock.wall_ms()
        by, _ = asker = self._context.asker(asked.request)
        note = given.note or None
        until_at = now_at + given.for_seconds * 1000 if given.for_seconds else None

        def alter(gate: Gate) -> Gate:
            return retry.hold(gate, now_at, "by_hand", by=by, note=note, until_at=until_at)

        return await self._change(asked.operator, alter, asker)

    async def release(self, asked: Asked[None]) -> shapes.ChangedOperator:
        """POST /v1/operators/{operator}/release."""
        asker = self._context.asker(asked.request)
        ends_released = await self._store.release_ends(asked.operator.name)
        if ends_released:
            by, request_id = asker
            log.info("operator.ends_released", operator=asked.operator.name, by=by, request_id=request_id)

        def alter(gate: Gate) -> Gate:
            return retry.release(gate, self._clock.wall_ms())

        return await self._change(asked.operator, alter, asker, changed=ends_released)

    async def _change(
        self,
        operator: Operator,
        alter: Callable[[Gate], Gate],
        asker: tuple[str | None, str | None],
        *,
        changed: bool = False,
    ) -> shapes.ChangedOperator:
        """Changes the gate of an operator and logs the change. `changed` says that the call has already changed
        something besides the gate.
        """
        before, (by, asking) = self._store.gate(operator.name), asker

        def remembered(gate: Gate) -> Gate:
            nonlocal before
            before = gate
            return alter(gate)

        gate = await self._store.set_gate(operator.name, remembered)
        now_at, pending = self._clock.wall_ms(), self._store.figures_of(operator.name).pending
        if gate == before and not changed:
            log.info(
                "operator.unchanged", operator=operator.name, held=gate.held_at is not None, by=by, request_id=asking
            )
        gates.log_change(
            operator.name, before, gate, now_at, pending=pending, cause="by_hand", by=by, request_id=asking
        )
        oldest = await self._store.oldest_pending_shown([operator.name])
        aging = await self._store.aging_shown([operator.name])
        shown = self._shown(operator, oldest[operator.name], aging[operator.name])
        return shapes.ChangedOperator(**shown, changed=changed or gate != before)

    async def probe(self, asked: Asked[None]) -> shapes.DeliveryWithHistory:
        """POST /v1/operators/{operator}/probe."""
        operator, (by, asking) = asked.operator, self._context.asker(asked.request)
        if operator.target is None:
            raise Problem("no-url", NO_URL)
        webhook_id = await self._context.probe(operator.name)
        delivery = None if webhook_id is None else await self._store.delivery(webhook_id)
        if delivery is None:
            raise Problem("nothing-to-send", "no delivery to the operator's URL waits, except those under way already")
        log.info(
            "operator.probed", operator=operator.name, id=webhook_id, state=delivery.state, by=by, request_id=asking
        )
        return self._context.delivery_with_history(delivery)

    # -- the daemon itself

    async def show_config(self, asked: Asked[shapes.NoQuery]) -> shapes.Configuration:
        """GET /v1/config."""
        async with self._reading:  # one call at a time, because reading a file with 1,000 operators takes 0.2 s
            return await on_a_thread(self._configuration)

    def _configuration(self) -> shapes.Configuration:
        settings = self._context.settings
        shown = {key: writable(value) for key, value in in_force(settings).items()}
        found = shapes.Configuration(
            file=writable(str(settings.named)), settings=shown, inherited=inherited(settings), changes=[], errors=[]
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

    async def show_token(self, asked: Asked[shapes.NoQuery]) -> shapes.TokenRights:
        """GET /v1/token."""
        token = bearer(asked.request, self._context.settings.api_tokens)
        if token is None:  # no token is configured, so everybody who can reach the listener may do everything
            return shapes.TokenRights(name=None, may_change=True)
        return shapes.TokenRights(name=token.name or None, may_change=token.may_change)

    async def show_health(self, asked: Asked[None]) -> web.Response:
        """GET /health, with every check."""
        report = await self._context.health.report()
        return health_answer(orjson.dumps(report), report["status"])

    async def show_metrics(self, asked: Asked[None]) -> web.Response:
        """GET /metrics."""
        health = self._context.health
        try:
            oldest = {
                name: age_s for name, age_s in (await health.oldest_pending_s()).items() if self._store.owns(name)
            }
            await health.look_for_daemons()
        except StoreError:  # the other metrics can still be shown, including the one that says that storing fails
            oldest = {}
        body = await self._context.metrics.scrape(oldest)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def show_openapi(self, asked: Asked[None]) -> web.Response:
        """GET /openapi.json."""
        settings = self._context.settings
        if self._described is None or self._described[0] is not settings:
            document = await on_a_thread(lambda: orjson.dumps(self._describe(settings)))
            self._described = settings, document
        return web.Response(body=self._described[1], content_type="application/json")


def health_answer(body: bytes, status: str) -> web.Response:
    """The answer to GET /health: 503 if the status is `fail`."""
    return web.Response(body=body, status=503 if status == "fail" else 200, content_type="application/health+json")
