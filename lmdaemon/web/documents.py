"""Makes JSON documents of sessions and deliveries, for the API and for the export. Pure. No document may contain a
token or the body of a notice.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
import orjson

from lmdaemon import gates, shapes
from lmdaemon.model import HTTP_SINK, Delivery, Gate, Session, rfc3339
from lmdaemon.retry import next_attempt_at

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:(\d\d)(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")

to_json = msgspec.json.Encoder().encode


_Shown = TypeVar("_Shown", bound=shapes.Session)


def session_document(session: Session, expires_at: int | None) -> shapes.Session:
    """A session without its token; `expires_at` is None once it has ended."""
    return _session(shapes.Session, session, expires_at)


def opened_document(
    session: Session, expires_at: int | None, *, changed: bool, ignored: list[str]
) -> shapes.OpenedSession:
    """A session as the answer to an opening."""
    return _session(shapes.OpenedSession, session, expires_at, changed=changed, ignored=ignored)


def _session(kind: Callable[..., _Shown], session: Session, expires_at: int | None, **more: object) -> _Shown:
    opened_at = rfc3339(session.opened_at)
    return kind(
        **more,
        operator=session.operator,
        session_id=session.session_id,
        player_id=session.player_id,
        state="active" if session.reason is None else "ended",
        reason=session.reason,
        opened_at=opened_at,
        last_seen_at=opened_at if session.seen_at == session.opened_at else rfc3339(session.seen_at),
        expires_at=rfc3339(expires_at),
        ended_at=None if session.ended_at is None else rfc3339(session.ended_at),
        idle_timeout_seconds=session.idle_ms // 1000 if session.idle_ms % 1000 == 0 else session.idle_ms / 1000,
        opened_request_id=session.opened_request,
        closed_request_id=session.ended_request,
        attributes=msgspec.Raw((session.attributes or "{}").encode()),
    )


def with_deliveries(session: shapes.Session, deliveries: Sequence[shapes.Delivery]) -> shapes.SessionWithDeliveries:
    """A session with its deliveries, as API answers have it."""
    return shapes.SessionWithDeliveries(**msgspec.structs.asdict(session), deliveries=list(deliveries))


def delivery_document(
    delivery: Delivery, gate: Gate, under_way_since: int | None = None, *, is_tried: bool = True
) -> shapes.Delivery:
    """A delivery without its body and history; `gate` is its operator's, `is_tried` as Settings.delivers says."""
    return shapes.Delivery(
        id=delivery.webhook_id,
        operator=delivery.operator,
        session_id=delivery.session_id,
        sink=delivery.sink,
        state=delivery.state,
        attempts=delivery.attempts,
        created_at=rfc3339(delivery.created_at),
        attempt_since=rfc3339(under_way_since),
        next_attempt_at=rfc3339(next_attempt_at(delivery, gate, is_tried=is_tried)),
        settled_at=rfc3339(delivery.settled_at),
        last_status=delivery.last_status,
        last_code=delivery.last_code,
        last_error=delivery.last_error,
        body_sha256=delivery.body_digest,
        discarded=None if delivery.discarded is None else _discarded(orjson.loads(delivery.discarded)),
    )


def _discarded(stored: dict[str, Any]) -> shapes.Discarded:
    return shapes.Discarded(at=rfc3339(stored["at"]), by=stored["by"], note=stored["note"])


def with_history(
    delivery: Delivery, gate: Gate, under_way_since: int | None = None, *, is_tried: bool = True
) -> shapes.DeliveryWithHistory:
    """A delivery with the attempts that are kept, the oldest first."""
    shown = msgspec.structs.asdict(delivery_document(delivery, gate, under_way_since, is_tried=is_tried))
    return shapes.DeliveryWithHistory(
        **shown, history=[_attempt(one, _url_of(one, delivery, gate)) for one in orjson.loads(delivery.history)]
    )


def with_request(
    delivery: shapes.DeliveryWithHistory, request: shapes.SentRequest | None
) -> shapes.DeliveryWithRequest:
    """A delivery with the request that is sent, its secrets masked."""
    return shapes.DeliveryWithRequest(**msgspec.structs.asdict(delivery), request=request)


def archived(
    session: Session, deliveries: Iterable[Delivery], gate: Gate, delivers: Callable[[str, str], bool]
) -> shapes.ArchivedSession:
    """An ended session with its deliveries and all their attempts; `gate` is its operator's, `delivers` is that of
    Settings.
    """
    shown = msgspec.structs.asdict(session_document(session, None))
    return shapes.ArchivedSession(
        **shown, deliveries=[with_history(one, gate, is_tried=delivers(one.operator, one.sink)) for one in deliveries]
    )


def _url_of(stored: dict[str, Any], delivery: Delivery, gate: Gate) -> str | None:
    return gates.url_at(gate, stored["at"]) if delivery.sink == HTTP_SINK else None


def _attempt(stored: dict[str, Any], url: str | None) -> shapes.Attempt:
    """One attempt. For a failure that an older version stored, the answer is not known."""
    unknown = {"answer": None} if stored["error"] is not None else {}
    sent = {} if url is None else {"url": url, "address": stored.get("address")}
    attempt = msgspec.convert(unknown | stored | sent | {"at": rfc3339(stored["at"])}, shapes.Attempt)
    attempt.code = stored["code"]  # a whole number is to be shown as 120; msgspec has made 120.0 of it
    return attempt


def read_time(text: str) -> int:
    """A time as in RFC 3339 as wall milliseconds. Raises ValueError with the rule.

    A leap second (60, at the end of a month in UTC) is the second after it, as Unix time has none.
    """
    try:
        found = _RFC3339.fullmatch(text)
        if found is None:
            raise ValueError
        is_leap = found[1] == "60"
        if is_leap:
            text = f"{text[: found.start(1)]}59{text[found.end(1) :]}"
        at = datetime.fromisoformat(text.upper()).astimezone(UTC) + timedelta(seconds=is_leap)
        if is_leap and (at.day, at.hour, at.minute) != (1, 0, 0):
            raise ValueError
        return int(at.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ValueError("must be a time as in RFC 3339, such as 2026-01-31T03:00:00Z") from None
