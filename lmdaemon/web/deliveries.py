"""The calls about deliveries: pages, single ones with their attempts, and another try for dead ones."""

from aiohttp import web
from msgspec import UNSET, UnsetType

from lmdaemon import shapes
from lmdaemon.log import Log
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX
from lmdaemon.web.calls import SEEN_MAX, Asked, Context, page_answer, shown
from lmdaemon.web.documents import read_time, with_history
from lmdaemon.web.problems import Problem, invalid

log = Log("api")


class Deliveries:
    """Their handlers."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._retrying: set[str] = set()  # operators whose dead deliveries are being retried

    async def list(self, asked: Asked[shapes.DeliveryQuery]) -> web.Response:
        """GET /v1/deliveries."""
        query = asked.given
        reading = self._store.deliveries(
            operator=query.operator or None,
            sink=await self._sink(asked),
            state=query.state or None,
            limit=query.limit,
            after=query.after_id,
        )
        return page_answer(await shown(asked.request, reading), self._context.delivery)

    async def _sink(self, asked: Asked[shapes.DeliveryQuery]) -> str | None:
        """A sink that is configured, or that has deliveries. Raises Problem for any other."""
        sink = asked.given.sink
        if sink is UNSET or sink == HTTP_SINK:
            return sink or None
        if not sink.startswith(PLUGIN_PREFIX):
            raise invalid(f"sink: must be {HTTP_SINK} or {PLUGIN_PREFIX}NAME (got {sink!r})")
        is_configured = sink.removeprefix(PLUGIN_PREFIX) in self._context.settings.plugins
        if not is_configured and not await shown(asked.request, self._store.has_sink(sink)):
            raise invalid(f"sink: no plug-in of this name is configured or has deliveries (got {sink!r})")
        return sink

    async def show(self, asked: Asked[None]) -> shapes.DeliveryWithHistory:
        """GET /v1/deliveries/{id}."""
        delivery = await shown(asked.request, self._store.delivery(asked.request.match_info["id"]))
        if delivery is None:
            raise _unknown_delivery()
        since_at = self._context.under_way_since(delivery.id)
        return with_history(delivery, self._store.gate(delivery.operator), since_at)

    async def retry_one(self, asked: Asked[None]) -> shapes.Delivery:
        """POST /v1/deliveries/{id}/retry."""
        before = await self._store.retry_one(asked.request.match_info["id"])
        if before is None:
            raise _unknown_delivery()
        if before.state != "dead":
            raise Problem("not-dead", f"the delivery is {before.state}, not dead")
        delivery = await self._store.delivery(before.webhook_id)
        if delivery is None or delivery.state == "dead":
            raise Problem("cannot-be-sent", f"the delivery can never be sent ({before.last_error})")
        by, asking = self._context.asker(asked.request)
        log.info(
            "delivery.retried_by_hand",
            operator=before.operator,
            id=before.webhook_id,
            by=by,
            request_id=asking,
        )
        return self._context.delivery(delivery)

    async def retry_dead(self, asked: Asked[shapes.RetrySince]) -> shapes.RetriedDeliveries:
        """POST /v1/operators/{operator}/deliveries/retry."""
        operator, since_at = asked.operator.name, self._since_at(asked.given.since)
        if operator in self._retrying:
            raise Problem("busy", "another call is retrying the dead deliveries of this operator")
        self._retrying.add(operator)
        try:
            retried = await self._store.retry_dead(operator, since_at)
        finally:
            self._retrying.discard(operator)
        by, asking = self._context.asker(asked.request)
        log.info("delivery.retried_by_hand", operator=operator, count=retried, by=by, request_id=asking)
        return shapes.RetriedDeliveries(retried=retried)

    def _since_at(self, since: str | UnsetType) -> int:
        """As wall milliseconds, 0 when it is not given. Raises Problem."""
        if since is UNSET:
            return 0
        try:
            since_at = read_time(since)
        except ValueError as error:
            raise invalid(f"since: {error} (got {since[:SEEN_MAX]!r})") from None
        if since_at > self._context.clock.wall_ms():
            raise invalid(f"since: must not lie ahead (got {since!r})")
        return since_at


def _unknown_delivery() -> Problem:
    return Problem("unknown-delivery", "no delivery has this id")
