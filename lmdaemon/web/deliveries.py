"""The calls about deliveries: lists, single deliveries with their attempts, and retrying or discarding dead ones."""

from typing import Any

import orjson
from aiohttp import web
from msgspec import UNSET, UnsetType

from lmdaemon import shapes
from lmdaemon.log import Log
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX, Delivery, rfc3339
from lmdaemon.store.contract import RETRY_SPACING_MS, Dead
from lmdaemon.web.calls import SEEN_MAX, Asked, Context, page_answer, shown
from lmdaemon.web.documents import read_time, with_request
from lmdaemon.web.problems import Problem, invalid

log = Log("api")


class Deliveries:
    """The handlers of the calls about deliveries."""

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
        """The sink that the query names; None: it names none. Raises Problem for one that is neither `http` nor a
        plug-in that is configured or has deliveries.
        """
        sink = asked.given.sink
        if sink is UNSET or sink == HTTP_SINK:
            return sink or None
        if not sink.startswith(PLUGIN_PREFIX):
            raise invalid(f"sink: must be {HTTP_SINK} or {PLUGIN_PREFIX}NAME (got {sink!r})")
        is_configured = sink.removeprefix(PLUGIN_PREFIX) in self._context.settings.plugins
        if not is_configured and not await shown(asked.request, self._store.has_sink(sink)):
            raise invalid(f"sink: no plug-in of this name is configured or has deliveries (got {sink!r})")
        return sink

    async def show(self, asked: Asked[None]) -> shapes.DeliveryWithRequest:
        """GET /v1/deliveries/{id}."""
        delivery = await shown(asked.request, self._store.delivery(asked.request.match_info["id"]))
        if delivery is None:
            raise _unknown_delivery()
        return with_request(self._context.delivery_with_history(delivery), self._request_of(delivery))

    def _request_of(self, delivery: Delivery) -> shapes.SentRequest | None:
        operator = self._context.settings.operators.get(delivery.operator)
        if operator is None:
            return None
        attempts = orjson.loads(delivery.history)
        at = attempts[-1]["at"] if attempts else self._context.clock.wall_ms()
        found = self._context.request_of(operator, delivery, at / 1000)
        if found is None:
            return None
        return shapes.SentRequest(url=found.url, headers=dict(found.headers), body=found.body, curl=found.curl)

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

    async def retry_dead(self, asked: Asked[shapes.RetryDead]) -> shapes.RetriedDeliveries:
        """POST /v1/operators/{operator}/deliveries/retry."""
        operator, dead = asked.operator.name, self._dead(asked.given)
        if asked.given.dry_run is True:
            return shapes.RetriedDeliveries(retried=0, dry_run=await self._found(asked, dead))
        if operator in self._retrying:
            raise Problem("busy", "another call is retrying the dead deliveries of this operator")
        self._retrying.add(operator)
        try:
            retried = await self._store.retry_dead(operator, dead, asked.given.limit or None)
        finally:
            self._retrying.discard(operator)
        by, asking = self._context.asker(asked.request)
        if retried or not asked.given.limit:  # a call with a limit is one of several, of which the last finds nothing
            log.info("delivery.retried_by_hand", operator=operator, count=retried, by=by, request_id=asking)
        return shapes.RetriedDeliveries(retried=retried)

    async def discard_one(self, asked: Asked[shapes.Discard]) -> shapes.Delivery:
        """POST /v1/deliveries/{id}/discard."""
        by, asking = self._context.asker(asked.request)
        note = asked.given.note
        before = await self._store.discard_one(asked.request.match_info["id"], by, note)
        if before is None:
            raise _unknown_delivery()
        if before.state != "dead":
            raise Problem("not-dead", f"the delivery is {before.state}, not dead")
        name = before.webhook_id
        if before.discarded is None:
            facts = {"operator": before.operator, "id": name, "note": note}
            log.info("delivery.discarded_by_hand", **facts, by=by, request_id=asking)
        return self._context.delivery(await self._store.delivery(name) or before)

    async def discard_dead(self, asked: Asked[shapes.DiscardDead]) -> shapes.DiscardedDeliveries:
        """POST /v1/operators/{operator}/deliveries/discard."""
        operator, dead, note = asked.operator.name, self._dead(asked.given), asked.given.note
        if asked.given.dry_run is True:
            return shapes.DiscardedDeliveries(discarded=0, dry_run=await self._found(asked, dead))
        by, asking = self._context.asker(asked.request)
        count = await self._store.discard(operator, dead, by, note)
        log.info("delivery.discarded_by_hand", operator=operator, count=count, note=note, by=by, request_id=asking)
        return shapes.DiscardedDeliveries(discarded=count)

    async def _found(self, asked: Asked[Any], dead: Dead) -> shapes.FoundDead:
        found = await shown(asked.request, self._store.find_dead(asked.operator.name, dead))
        return shapes.FoundDead(
            found=found.found,
            can_be_sent=found.can_be_sent,
            oldest_settled_at=rfc3339(found.oldest_at),
            reasons=dict(found.causes),
            seconds=found.can_be_sent * RETRY_SPACING_MS / 1000,
        )

    def _dead(self, given: shapes.DeadOnes) -> Dead:
        """The filter for dead deliveries that the request asks for. Raises Problem."""
        since_at = self._at("since", given.since) or 0
        if since_at > self._context.clock.wall_ms():
            raise invalid(f"since: must not lie ahead (got {given.since!r})")
        until_at = self._at("until", given.until)
        ended_since_at = self._at("endedSince", given.ended_since) or 0
        ended_until_at = self._at("endedUntil", given.ended_until)
        if until_at is not None and until_at < since_at:
            raise invalid("since: must not be later than until")
        if ended_until_at is not None and ended_until_at < ended_since_at:
            raise invalid("endedSince: must not be later than endedUntil")
        return Dead(since_at, until_at, ended_since_at, ended_until_at, given.reason or None)

    @staticmethod
    def _at(name: str, given: str | UnsetType) -> int | None:
        """A time of the request as wall time (ms), None when it is not given. Raises Problem."""
        if given is UNSET:
            return None
        try:
            return read_time(given)
        except ValueError as error:
            raise invalid(f"{name}: {error} (got {given[:SEEN_MAX]!r})") from None


def _unknown_delivery() -> Problem:
    return Problem("unknown-delivery", "no delivery has this id")
