"""The calls about sessions, for game servers. A token must never be returned, and reading never counts as activity."""

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

import orjson
from aiohttp import web
from msgspec import UNSET

from lmdaemon import shapes
from lmdaemon.dialects import breaks_hash, rounded
from lmdaemon.log import Log
from lmdaemon.model import Session
from lmdaemon.shapes import ATTRIBUTES_MAX
from lmdaemon.store.contract import Opened, Opening, Touched, Touching
from lmdaemon.web.calls import Asked, Context, page_answer, ready_answer, shown
from lmdaemon.web.documents import opened_document, with_deliveries
from lmdaemon.web.problems import Problem, ended, invalid, unknown_session
from lmdaemon.web.requests import Ready, Reply, request_id

OPENED_AT_ONCE = 250  # sessions of a bulk opening handled in one turn of the event loop, which takes a few milliseconds

_NO_CONTENT = Ready(204)

log = Log("api")


class Sessions:
    """The handlers of the calls about sessions."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._metrics = context.metrics

    async def open(self, asked: Asked[shapes.Opening]) -> Reply:
        """PUT /v1/operators/{operator}/sessions/{sessionId}."""
        opened = await self._store.open_session(self.opening(asked))
        return self.opened(asked, opened) or await self.refuse_opening(asked, opened)

    def opening(self, asked: Asked[shapes.Opening]) -> Opening:
        """What is stored for an opening. Raises Problem."""
        return _opening(asked, asked.session_id, asked.given)

    def opened(self, asked: Asked[shapes.Opening], opened: Opened) -> Ready | None:
        """The answer to an opening, which is counted and logged; None if the session differs or has ended."""
        operator = asked.operator
        changed = opened.outcome == "created"
        if changed:
            self._metrics.opened(operator.name)
            if not log.suppresses("session.opened"):
                by, asking = self._context.asker(asked.request)
                log.info("session.opened", operator=operator.name, session=asked.session_id, by=by, request_id=asking)
        elif opened.outcome == "open":
            self._metrics.touched(operator.name, 1)
        else:
            return None
        ignored = [] if changed else _ignored(asked.given, opened.session)
        expires_at = self._context.expires_at(opened.session)
        document = opened_document(opened.session, expires_at, changed=changed, ignored=ignored)
        return ready_answer(document, 201 if changed else 200)

    async def refuse_opening(self, asked: Asked[shapes.Opening], opened: Opened) -> NoReturn:
        """Raises the Problem of an opening that has found a session that differs or has ended. A coroutine only because
        `refuse_touch` is one, and `frequent` calls both in the same way.
        """
        if opened.outcome == "differs":
            raise Problem("differs", "the session is open with another playerId or token")
        raise ended(self._context.session(opened.session), 409)

    async def open_many(self, asked: Asked[shapes.BulkOpen]) -> shapes.BulkOpened:
        """POST /v1/operators/{operator}/sessions. One session that differs or has ended does not affect the others."""
        operator, openings = asked.operator, []
        for at, given in enumerate(asked.given.sessions):
            try:
                openings.append(_opening(asked, given.session_id, given))
            except Problem as problem:
                raise invalid(f"sessions[{at}].{problem}") from problem
            if at % OPENED_AT_ONCE == OPENED_AT_ONCE - 1:
                await asyncio.sleep(0)
        answer = shapes.BulkOpened(opened=0, open=0, differs=[], ended=[])
        by, asking = self._context.asker(asked.request)
        for first in range(0, len(openings), OPENED_AT_ONCE):
            some = openings[first : first + OPENED_AT_ONCE]
            for opening, opened in zip(some, await asyncio.gather(*map(self._store.open_session, some)), strict=True):
                match opened.outcome:
                    case "created":
                        answer.opened += 1
                        opened_id = opening.session_id
                        log.info("session.opened", operator=operator.name, session=opened_id, by=by, request_id=asking)
                    case "open":
                        answer.open += 1
                    case "differs":
                        answer.differs.append(opening.session_id)
                    case "ended":
                        answer.ended.append(opening.session_id)
        self._metrics.opened(operator.name, answer.opened)
        self._metrics.touched(operator.name, answer.open)
        return answer

    async def touch(self, asked: Asked[None]) -> Reply:
        """POST …/sessions/{sessionId}/touch."""
        touched = await self._store.touch(asked.operator.name, [asked.session_id])
        return self.touched(asked, touched) or await self.refuse_touch(asked, touched)

    def touching(self, asked: Asked[None]) -> Touching:
        """What is stored for a touch."""
        return Touching(asked.operator.name, (asked.session_id,))

    def touched(self, asked: Asked[None], touched: Touched) -> Ready | None:
        """The answer to a touch, which is counted; None if the session is unknown or has ended."""
        if not touched.touched:
            return None
        self._metrics.touched(asked.operator.name, 1)
        return _NO_CONTENT

    async def refuse_touch(self, asked: Asked[None], touched: Touched) -> NoReturn:
        """Logs a touch of a session that is unknown or has ended, and raises its Problem."""
        operator, session_id = asked.operator.name, asked.session_id
        if touched.unknown:
            self._log_refused(asked, "unknown-session", [session_id])
            raise unknown_session()
        self._log_refused(asked, "ended", [session_id])
        found = await self._store.session(operator, session_id)
        raise ended(None if found is None else self._context.session(found[0]), 410)

    async def touch_many(self, asked: Asked[shapes.BulkTouch]) -> Reply:
        """POST /v1/operators/{operator}/sessions/touch."""
        return self.touched_many(asked, await self._store.touch(asked.operator.name, asked.given.session_ids))

    def touching_many(self, asked: Asked[shapes.BulkTouch]) -> Touching:
        """What is stored for touches in bulk."""
        return Touching(asked.operator.name, asked.given.session_ids)

    def touched_many(self, asked: Asked[shapes.BulkTouch], touched: Touched) -> Ready:
        """The answer to touches in bulk, which are counted; logs those that were refused."""
        self._metrics.touched(asked.operator.name, touched.touched)
        self._log_refused(asked, "unknown-session", touched.unknown)
        self._log_refused(asked, "ended", touched.ended)
        return ready_answer(shapes.BulkTouched(touched=touched.touched, unknown=touched.unknown, ended=touched.ended))

    def _log_refused(self, asked: Asked[Any], code: str, session_ids: Sequence[str]) -> None:
        """Logs touches of sessions that are unknown or have ended. The cause is a game that goes on after its session's
        end, or a game server that names the wrong operator.
        """
        if session_ids:
            facts = {"operator": asked.operator.name, "code": code, "session": ", ".join(session_ids[:3])}
            many = len(session_ids) if len(session_ids) > 1 else None
            log.warning("touch.refused", **facts, count=many, request_id=request_id(asked.request))

    async def close(self, asked: Asked[None]) -> shapes.Session:
        """POST …/sessions/{sessionId}/close."""
        key = (asked.operator.name, asked.session_id)
        self._context.closing[key] = asker = self._context.asker(asked.request)
        try:
            session = await self._store.end(*key, asker.request_id)
        finally:
            self._context.closing.pop(key, None)
        if session is None:
            raise unknown_session()
        return self._context.session(session)

    async def show(self, asked: Asked[None]) -> shapes.SessionWithDeliveries:
        """GET …/sessions/{sessionId}."""
        found = await shown(asked.request, self._store.shown_session(asked.operator.name, asked.session_id))
        if found is None:
            raise unknown_session()
        session, deliveries = found
        return with_deliveries(self._context.session(session), list(map(self._context.delivery, deliveries)))

    async def list(self, asked: Asked[shapes.SessionQuery]) -> web.Response:
        """GET /v1/operators/{operator}/sessions."""
        query = asked.given
        reading = self._store.sessions(
            asked.operator.name,
            state=query.state or None,
            player_id=query.player_id or None,
            limit=query.limit,
            after=query.after_id,
        )
        return page_answer(await shown(asked.request, reading), self._context.session)

    async def find(self, asked: Asked[shapes.FindQuery]) -> web.Response:
        """GET /v1/sessions."""
        query = asked.given
        if query.session_id is UNSET and query.player_id is UNSET:
            raise invalid("sessionId, playerId: one of them is required")
        reading = self._store.find_sessions(
            session_id=query.session_id or None,
            player_id=query.player_id or None,
            limit=query.limit,
            after=query.after_id,
        )
        return page_answer(await shown(asked.request, reading), self._context.session)


def _ignored(given: shapes.Opening, session: Session) -> list[str]:
    """The names of members of an opening whose values differ from those of the open session."""
    ignored = []
    if given.idle_timeout_seconds is not UNSET and given.idle_timeout_seconds * 1000 != session.idle_ms:
        ignored.append("idleTimeoutSeconds")
    if given.attributes is not UNSET and given.attributes != orjson.loads(session.attributes or "{}"):
        ignored.append("attributes")
    return ignored


def _opening(asked: Asked[Any], session_id: str, given: shapes.Opening) -> Opening:
    """The operation for the store. Raises Problem."""
    operator = asked.operator
    if session_id in (".", ".."):  # also if written %2E: clients and proxies resolve them as parts of a path
        raise invalid(
            "sessionId: must not be . or .., which no client can address: it is resolved as a part of the path"
        )
    token, dialect = given.token or None, operator.sends
    if token is None and "token" in dialect.required:
        raise invalid(f"token: is required: dialect {dialect.name} must send it")
    if "hash" in dialect.fields:
        for name, value in (("sessionId", session_id), ("playerId", given.player_id), ("token", token)):
            if value is not None and breaks_hash(value):
                rule = f"must have no & and no =, which separate the fields that dialect {dialect.name} hashes"
                raise invalid(f"{name}: {rule}")
    idle_s = operator.idle_s if given.idle_timeout_seconds is UNSET else given.idle_timeout_seconds
    return Opening(
        operator.name,
        session_id,
        given.player_id,
        token,
        None if given.attributes is UNSET else _attributes(given.attributes),
        round(idle_s * 1000),
        round(operator.lifetime_s * 1000),
        request_id(asked.request),
    )


def _attributes(attributes: dict[str, object]) -> str:
    try:
        text = orjson.dumps(attributes)
    except orjson.JSONEncodeError as error:  # orjson reads 1024 levels of nesting, but writes only 254
        raise invalid("attributes: must not be nested deeper than 250 levels") from error
    if len(text) > ATTRIBUTES_MAX:
        raise invalid(f"attributes: must be at most {ATTRIBUTES_MAX} bytes of JSON (got {len(text)})")
    if rounded(attributes, text):
        raise invalid(
            "attributes: must have numbers of 64 bits at most, above 2^53 only integers; others go into a string"
        )
    return text.decode()
