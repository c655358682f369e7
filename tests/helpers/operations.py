"""Makes operations for a store, with default values for what a test does not care about, and reads the results."""

import dataclasses
from collections.abc import Callable

from msgspec.structs import replace as replaced

from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import Opening, Recording, Store

IDLE_MS = 10_000
BODY = b'{"sessionId":"s"}'


def opening(session_id: str = "s", operator: str = "acme", **changes: object) -> Opening:
    return replaced(Opening(operator, session_id, "p", "secret", None, IDLE_MS, 0), **changes)  # type: ignore[arg-type]


def notice(session_id: str = "s", operator: str = "acme", **changes: object) -> Recording:
    row = Recording(operator, session_id, "p", "secret", False, True, None, IDLE_MS)
    return replaced(row, **changes)  # type: ignore[arg-type]


def attempt(**facts: object) -> dict[str, object]:
    """An entry of a delivery's history."""
    return {"at": 1, "durationMs": 2, "status": None, "code": None, "error": None} | facts


def counted(*, failed: bool) -> Callable[[Gate, int], Gate]:
    """The change that a result makes to the gate of its operator: a failure adds one to the count of failures, a
    success sets it to zero.
    """
    return lambda gate, now_at: dataclasses.replace(gate, failures=gate.failures + 1 if failed else 0)


async def found(db: Store, session_id: str = "s", operator: str = "acme") -> Session:
    known = await db.session(operator, session_id)
    assert known is not None
    return known[0]


async def one_delivery(db: Store, session_id: str = "s", operator: str = "acme") -> Delivery:
    """Opens a session and ends it. Returns its first delivery."""
    await db.open_session(opening(session_id, operator=operator))
    await db.end(operator, session_id)
    known = await db.session(operator, session_id)
    assert known is not None
    return known[1][0]


async def kept(db: Store) -> tuple[str, list[bytes]]:
    """Where the token of session "s" is still stored: in the session's own row, and in the bodies of its deliveries."""
    known = await db.session("acme", "s")
    assert known is not None
    return str(known[0].token), [delivery.body for delivery in known[1]]


def comparable(answer: object) -> object:
    """An operation's answer as one plain word, to compare it with tables of cases and with PlainStore."""
    match answer:
        case Session():
            return answer.reason
        case Delivery():
            return answer.state
    if hasattr(answer, "outcome"):
        return answer.outcome
    if hasattr(answer, "before"):
        return answer.before, answer.after
    return answer
