"""The vocabulary: sessions, notices, ends and deliveries as frozen values.

Everybody imports this module; it imports nobody and does no I/O. Wall times end in `_at` and are milliseconds since
the epoch (UTC); service times end in `_ms` and are milliseconds of the persisted service clock (`lmdaemon.clock`);
spans in seconds end in `_s`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

Reason = Literal["inactivity", "max_lifetime", "closed", "reported"]
DeliveryState = Literal["pending", "delivered", "dead"]
HTTP_SINK = "http"
PLUGIN_PREFIX = "plugin:"

# What an answer can mean besides success: the keys of a dialect's `codes` and the vocabulary of `Refuse`.
MEANINGS = ("bad_parameters", "bad_token", "bad_hash", "unknown_session", "player_mismatch", "retry", "final")

ID_MAX = 256  # characters of a session, player or provider id
TOKEN_MAX = 4096  # characters; the page gives no limit, a body of 16 KiB does


_NEVER_IN_IDS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def id_problem(value: str, longest: int = ID_MAX) -> str | None:
    """Says what makes `value` no id, or None: 1 to `longest` characters, none of them control or lone surrogate."""
    if not value:
        return "must not be empty"
    if len(value) > longest:
        return f"must be at most {longest} characters (got {len(value)})"
    if value.isprintable():  # as almost always; no control character is, nor a surrogate
        return None
    found = _NEVER_IN_IDS.search(value)
    if found is None:
        return None
    what = "control characters" if found[0] < "\ud800" else "lone surrogates"
    return f"must not contain {what}"


class Refuse(Exception):  # noqa: N818 - the name is the plug-in contract's: `raise Refuse("bad_token", "…")`
    """Raised by a plug-in's `check(notice)` to refuse a notice with a meaning of the dialect's code table.

    Raises ValueError when `meaning` is none of `MEANINGS`: an answer nobody defined cannot be given.
    """

    def __init__(self, meaning: str, description: str = "Refused") -> None:
        if meaning not in MEANINGS:
            raise ValueError(f"Refuse: meaning must be one of {', '.join(MEANINGS)} (got {meaning!r})")
        super().__init__(meaning, description)
        self.meaning = meaning
        self.description = description


@dataclass(frozen=True, slots=True)
class Notice:
    """One SessionExpired as received: parsed and authenticated, not yet recorded.

    `token` and `request` are None where the dialect has none or the sender left them out; `extra` holds the fields
    no dialect knows, as received.
    """

    operator: str
    dialect: str
    provider_id: str
    session_id: str
    player_id: str
    token: str | None = field(default=None, repr=False)
    request: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The end of a session, as a plug-in's `session_ended(event)` gets it: at least once, always with the same `id`.

    The end of a session never ends money: late results, cancels and refunds for it stay valid, so release locks and
    seats here, not bets. `token` is a secret (None where none is known) and stays out of the repr. Times are aware
    datetimes in UTC; `reason` is "inactivity", "max_lifetime", "closed" or "reported" (the peer said so).
    """

    id: str
    operator: str
    provider_id: str
    session_id: str
    player_id: str
    token: str | None = field(repr=False)
    reason: Reason
    opened_at: datetime
    last_seen_at: datetime
    ended_at: datetime
    attributes: Mapping[str, Any]
    extra: Mapping[str, Any] = field(repr=False)


# Named tuples: hundreds are made at a time, each in a tenth of the time that a frozen dataclass takes.


def _shown(row: NamedTuple, *hidden: str) -> str:
    facts = (f"{name}={value!r}" for name, value in row._asdict().items() if name not in hidden)
    return f"{type(row).__name__}({', '.join(facts)})"


class Session(NamedTuple):
    """A session as stored. `attributes` and `extra` are JSON text as stored, or None."""

    id: int
    operator: str
    session_id: str
    player_id: str
    token: str | None
    attributes: str | None
    extra: str | None
    idle_ms: int
    opened_at: int
    seen_ms: int
    seen_at: int
    lifetime_at: int | None
    ended_at: int | None
    reason: Reason | None

    def __repr__(self) -> str:
        return _shown(self, "token", "extra")

    @property
    def deadline_ms(self) -> int:
        """Service time at which the session is idle for too long."""
        return self.seen_ms + self.idle_ms


class Delivery(NamedTuple):
    """One end for one sink: the row that is the queue. `body` is what is sent, byte for byte, at every attempt."""

    id: int
    nonce: str
    session: int
    operator: str
    session_id: str
    token: str | None  # the session's
    sink: str
    state: DeliveryState
    created_at: int
    due_at: int
    settled_at: int | None
    attempts: int
    step: int
    aged_from_at: int
    held_base_ms: int
    last_status: int | None
    last_code: int | float | None
    last_error: str | None
    history: str
    body: bytes

    def __repr__(self) -> str:
        return _shown(self, "token", "body")

    @property
    def webhook_id(self) -> str:
        """The public id. It carries its row number, so finding it needs no index; the nonce keeps it unique for ever,
        also after an older database was restored and row numbers are given out again.
        """
        return f"msg_{self.id}_{self.nonce}"


@dataclass(frozen=True, slots=True)
class Gate:
    """What holds an operator's URL back, persisted (contract, section 6). All times are wall milliseconds.

    `failures` counts failures in a row; the breaker is open from the fifth on, and `probe_at` says when the next
    single attempt may go. `held_total_ms` sums finished holds, so that a hold stops a delivery's age.
    """

    held_at: int | None = None
    held_reason: str | None = None
    held_total_ms: int = 0
    failures: int = 0
    failing_since_at: int | None = None
    pause_ms: int = 0
    probe_at: int = 0
    not_before_at: int = 0
    paced_until_at: int = 0


def utc(at_ms: int) -> datetime:
    """The aware UTC datetime of a wall time in milliseconds."""
    return datetime.fromtimestamp(at_ms / 1000, UTC)


@overload
def rfc3339(at_ms: int) -> str: ...
@overload
def rfc3339(at_ms: int | None) -> str | None: ...
def rfc3339(at_ms: int | None) -> str | None:
    """RFC 3339 in UTC with milliseconds, or None."""
    if at_ms is None:
        return None
    seconds, ms = divmod(at_ms, 1000)
    return f"{_second(seconds)}.{ms:03}Z"


@lru_cache(256)  # documents made at about the same time share theirs: a quarter of the time
def _second(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat().removesuffix("+00:00")
