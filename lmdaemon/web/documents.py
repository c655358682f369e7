"""Sessions and deliveries as JSON documents, the same to whoever reads them: `api` and the export. Pure.

A token or a body must never get into one.
"""

import re
from datetime import UTC, datetime
from typing import Any

import orjson

from lmdaemon import shapes
from lmdaemon.model import Delivery, Gate, Session, rfc3339
from lmdaemon.retry import next_attempt_at

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


def session_document(session: Session, expires_at: int | None) -> shapes.Session:
    """A session without its token; `expires_at` is None once it has ended."""
    return {
        "operator": session.operator,
        "sessionId": session.session_id,
        "playerId": session.player_id,
        "state": "active" if session.reason is None else "ended",
        "reason": session.reason,
        "openedAt": rfc3339(session.opened_at),
        "lastSeenAt": rfc3339(session.seen_at),
        "expiresAt": rfc3339(expires_at),
        "endedAt": rfc3339(session.ended_at),
        "idleTimeoutSeconds": session.idle_ms // 1000 if session.idle_ms % 1000 == 0 else session.idle_ms / 1000,
        "attributes": orjson.Fragment(session.attributes or "{}"),
    }


def delivery_document(delivery: Delivery, gate: Gate) -> shapes.Delivery:
    """A delivery without its body and history; `gate` is its operator's."""
    return {
        "id": delivery.webhook_id,
        "operator": delivery.operator,
        "sessionId": delivery.session_id,
        "sink": delivery.sink,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "createdAt": rfc3339(delivery.created_at),
        "nextAttemptAt": rfc3339(next_attempt_at(delivery, gate)),
        "settledAt": rfc3339(delivery.settled_at),
        "lastStatus": delivery.last_status,
        "lastCode": delivery.last_code,
        "lastError": delivery.last_error,
    }


def history_document(delivery: Delivery) -> list[shapes.Attempt]:
    """The attempts that are kept, the oldest first."""
    return [_attempt_document(attempt) for attempt in orjson.loads(delivery.history)]


def _attempt_document(attempt: dict[str, Any]) -> shapes.Attempt:
    """As stored; of a failure that an older version stored, the answer is not known."""
    unknown: Any = {"answer": None} if attempt["error"] is not None else {}
    shown: shapes.Attempt = unknown | attempt | {"at": rfc3339(attempt["at"])}
    return shown


def read_time(text: str) -> int:
    """A time as in RFC 3339 as wall milliseconds. Raises ValueError with the rule."""
    try:
        if not _RFC3339.fullmatch(text):
            raise ValueError
        return int(datetime.fromisoformat(text.upper()).astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ValueError("must be a time as in RFC 3339, such as 2026-01-31T03:00:00Z") from None
