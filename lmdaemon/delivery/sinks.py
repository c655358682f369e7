"""The deliveries of an ended session, one for each sink of its operator: the body for a URL, the event for a plug-in.

Pure but for random request ids: it runs as a part of the transaction that ends the session.
"""

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from lmdaemon.config.settings import Operator, Settings
from lmdaemon.dialects import CannotEncode, encode
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX, Session, SessionEnded, utc
from lmdaemon.store.contract import NewDelivery


def sinks_of(settings: Settings, session: Session) -> list[NewDelivery]:
    """One delivery for each sink of an ended session's operator, with the body that is sent at every attempt.

    It runs on the writer's thread or on the event loop, and again if the transaction has to be repeated.
    """
    operator = settings.operators.get(session.operator)
    if operator is None:
        return []
    found = [_to_url(operator, session)] if operator.notify else []
    if settings.plugins:
        plugins = (plugin for plugin in settings.plugins.values() if plugin.listens_to(operator.name))
        found += [NewDelivery(PLUGIN_PREFIX + plugin.name, b"") for plugin in plugins]
    return found


def _to_url(operator: Operator, session: Session) -> NewDelivery:
    try:
        return NewDelivery(HTTP_SINK, compose(operator, session))
    except CannotEncode as error:
        return NewDelivery(HTTP_SINK, b"", error.cause)


def compose(operator: Operator, session: Session) -> bytes:
    """The body for the operator's URL. Raises CannotEncode when nothing can be sent."""
    return encode(
        operator.sends,
        provider_id=operator.provider_id,
        session_id=session.session_id,
        player_id=session.player_id,
        token=session.token,
        request_id=uuid4().hex if "request" in operator.sends.fields else "",
        hash_key=operator.hash_key,
    )


def event_of(operator: Operator, session: Session, event_id: str) -> SessionEnded:
    """The event for plug-ins: the same at every attempt, because an ended session never changes."""
    assert session.reason is not None  # noqa: S101 - only ended sessions have deliveries
    assert session.ended_at is not None  # noqa: S101
    return SessionEnded(
        id=event_id,
        operator=operator.name,
        provider_id=operator.provider_id,
        session_id=session.session_id,
        player_id=session.player_id,
        token=session.token,
        reason=session.reason,
        opened_at=utc(session.opened_at),
        last_seen_at=utc(session.seen_at),
        ended_at=utc(session.ended_at),
        attributes=_json_object(session.attributes),
        extra=_json_object(session.extra),
    )


def _json_object(text: str | None) -> Mapping[str, Any]:
    return json.loads(text) if text else {}
