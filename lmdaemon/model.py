"""The vocabulary: sessions, notices, ends and deliveries as frozen values.

Every other module may import this one; it imports none of them and does no I/O. Names tell units: `_at` is wall time in
milliseconds since the epoch (UTC), `_ms` is service time in milliseconds (`lmdaemon.clock`) or a span in milliseconds,
`_s` is a span in seconds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args, overload

Reason = Literal["inactivity", "max_lifetime", "closed", "reported"]
DeliveryState = Literal["pending", "delivered", "dead"]
DELIVERY_STATES: tuple[DeliveryState, ...] = get_args(DeliveryState)
HTTP_SINK = "http"
PLUGIN_PREFIX = "plugin:"

# The meanings of a refusal: the keys of a dialect's `codes`, and what `Refuse` takes.
MEANINGS = ("bad_parameters", "bad_token", "bad_hash", "unknown_session", "player_mismatch", "retry", "final")

ID_MAX = 256  # characters of a session, player or provider id
TOKEN_MAX = 4096  # characters of a player's token; the protocol names no limit


_NEVER_IN_IDS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def id_problem(value: str, longest: int = ID_MAX) -> str | None:
    """The rule for ids that `value` breaks, in words, or None.

    An id has 1 to `longest` characters, no control characters and no lone surrogates.
    """
    if not value:
        return "must not be empty"
    if len(value) > longest:
        return f"must be at most {longest} characters (got {len(value)})"
    if value.isprintable():  # the usual case: neither control characters nor surrogates are printable
        return None
    found = _NEVER_IN_IDS.search(value)
    if found is None:
        return None
    what = "control characters" if found[0] < "\ud800" else "lone surrogates"
    return f"must not contain {what}"


class Refuse(Exception):  # noqa: N818 - plug-ins raise it by this name: `raise Refuse("bad_token", "…")`
    """Raised by a plug-in's `check(notice)` to refuse a notice. `meaning` chooses the answer code of the dialect.

    Raises ValueError when `meaning` is none of `MEANINGS`, for which no dialect has a code.
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

    `token` and `request` are None where the dialect has none or the sender left them out; `extra` has fields that the
    dialect does not know, as received (docs/plugins.md, "Extra fields").
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

    The end of a session settles no money: late results, cancels and refunds for it stay valid, so release locks and
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


# Rows are named tuples because hundreds are made at a time: one takes a tenth of the time of a frozen dataclass.


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
    opened_request: str | None = None  # the X-Request-Id of the call that opened the session
    ended_request: str | None = None  # the X-Request-Id of the call that closed it

    def __repr__(self) -> str:
        return _shown(self, "token", "extra")

    @property
    def deadline_ms(self) -> int:
        """Service time at which the session ends for inactivity."""
        return self.seen_ms + self.idle_ms


class Delivery(NamedTuple):
    """One end for one sink, as stored: the table of these rows is the queue.

    `body` is sent as it is at every attempt.
    """

    id: int
    nonce: str
    session: int
    operator: str
    session_id: str
    token: str | None  # the session's token
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
    body_digest: str | None  # SHA-256 in hex; None where nothing is sent as bytes
    discarded: str | None  # JSON object: at, by, note; None unless the delivery was discarded
    history: str
    body: bytes

    def __repr__(self) -> str:
        return _shown(self, "token", "body")

    @property
    def webhook_id(self) -> str:
        """The public id of the delivery. It contains the row number, so the delivery is found without another index.

        The random `nonce` keeps it unique, also after an older database was restored and row numbers are used again.
        """
        return f"msg_{self.id}_{self.nonce}"


@dataclass(frozen=True, slots=True)
class Gate:
    """What keeps deliveries to an operator's URL waiting: hold, breaker and Retry-After, as stored (docs/delivery.md).

    `failures` counts failures in a row. The breaker opens at the fifth; then `probe_at` is when the next single attempt
    may be sent, and `pause_ms` the pause before it. `not_before_at` is from Retry-After. `held_total_ms` is the sum of
    finished holds, which no delivery's age includes. `paced_until_at` is when the last delivery retried by hand is due.

    For people: `held_by` and `held_note` tell who holds it and why; at `held_until_at` it is released by itself.
    `paused_at` is when the Retry-After came, `opened_at` when the breaker opened. `failed_at`, `failed_reason` and
    `failed_detail` describe the last failure and stay after a success. Since `alike_since_at` all attempts have failed
    for that same reason; `failed_before_at` is the last failure before `failing_since_at`. `urls` are the URLs that
    were used, and since when, as JSON (see `gates.url_at`).
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
    held_by: str | None = None
    held_note: str | None = None
    held_until_at: int | None = None
    paused_at: int | None = None
    opened_at: int | None = None
    failed_at: int | None = None
    failed_reason: str | None = None
    failed_detail: str | None = None
    alike_since_at: int | None = None
    failed_before_at: int | None = None
    urls: str | None = None


class Asker(NamedTuple):
    """Who asked for a change over the API, as log lines say it: the name of the token, and the X-Request-Id."""

    by: str | None = None
    request_id: str | None = None


class Member(NamedTuple):
    """A daemon on a database: where its private side listens, when it was started and last heard, by how many
    milliseconds its service clock is behind the furthest, the operators that it owns, and a digest of its settings of
    all operators.
    """

    name: str
    version: str
    address: str
    since_at: int
    heard_at: int
    lag_ms: int
    operators: Sequence[str]
    digest: str
    is_self: bool


def utc(at_ms: int) -> datetime:
    """The aware UTC datetime of a wall time in milliseconds."""
    return datetime.fromtimestamp(at_ms / 1000, UTC)


@overload
def rfc3339(at_ms: int) -> str: ...
@overload
def rfc3339(at_ms: int | None) -> str | None: ...
def rfc3339(at_ms: int | None) -> str | None:
    """A wall time (ms) as text in RFC 3339, in UTC with milliseconds; None stays None."""
    if at_ms is None:
        return None
    seconds, ms = divmod(at_ms, 1000)
    return f"{_second(seconds)}.{ms:03}Z"


def in_bytes(number: float) -> str:
    """A size with three digits, in powers of 1000: `74.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def in_time(seconds: float) -> str:
    """A span in the largest unit of which it has at least two: `7 d`, `90 min`, `1.5 s`."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.3g} s"


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun: `1 row`, `2 rows`. `several` is the plural, by default with an s."""
    return f"{number} {one if number == 1 else several or one + 's'}"


@lru_cache(256)  # many documents are made in the same second: with the cache they take a quarter of the time
def _second(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat().removesuffix("+00:00")
