"""The types of requests and answers of the private API, with the limits that its code and its OpenAPI document share.

Requests are read into these types (`web.bodies`), answers are made of them, and `web.openapi` describes them. So the
document always agrees with the code. An answer may get further members in a later version; a request may not have any
others.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lmdaemon.masks import SHOWN_MAX
from lmdaemon.model import ID_MAX, TOKEN_MAX, DeliveryState, Reason

BULK_IDS_MAX = 10_000
BULK_BODY_MAX = 4 * 1024 * 1024
ATTRIBUTES_MAX = 4096  # bytes of JSON
IDLE_MAX_S = 30 * 86400
HOLD_MAX_S = 30 * 86400
NOTE_MAX = 256  # characters
PAGE_DEFAULT, PAGE_MAX = 100, 1000
CURSOR_MAX = 18  # most digits of a cursor

# The pattern of an id: no control characters (C0, DEL, C1). Lone surrogates need no mention, because JSON is UTF-8 and
# cannot have them.
PLAIN = "^[^\\u0000-\\u001f\\u007f-\\u009f]+$"


def text(longest: int) -> dict[str, Any]:
    """The schema of an id or a token, as `model.id_problem` checks it."""
    return {"minLength": 1, "maxLength": longest, "pattern": PLAIN}


_TEXT = {"type": "string"}
# Stated explicitly, because generated TypeScript would otherwise have an object without members
_ANYTHING = {"type": "object", "additionalProperties": True}

Id = Annotated[str, Meta(extra_json_schema=text(ID_MAX))]
SessionId = Annotated[Id, Meta(description="Opaque; compared as it is.", examples=["game-7f3a91"])]
PlayerId = Annotated[Id, Meta(description="Opaque; compared as it is.", examples=["player-4711"])]
OperatorName = Annotated[str, Meta(description="As in the configuration.", examples=["acme"])]
Token = Annotated[
    str,
    Meta(
        description="The player's token, a secret that is never returned. Required (else 400) where the operator's "
        "dialect must send one, as v4 does.",
        extra_json_schema=text(TOKEN_MAX),
        extra={"secret": True},
    ),
]
Cursor = Annotated[
    str,
    Meta(
        description="Where the next page begins.",
        pattern=f"^[1-9][0-9]{{0,{CURSOR_MAX - 1}}}$",
        extra={"rule": "must be the `next` of a page"},
    ),
]
WebhookId = Annotated[
    str,
    Meta(
        description="The `webhook-id` header of every attempt.",
        extra_json_schema={"pattern": "^msg_[1-9][0-9]{0,17}_[0-9a-f]{20}$"},
        examples=["msg_42_0123456789abcdef0123"],
    ),
]
Sink = Annotated[
    str,
    Meta(
        description="`http`: the operator's URL; `plugin:NAME`: a plug-in.",
        extra_json_schema={"pattern": "^(http|plugin:[^\\u0000-\\u001f\\u007f-\\u009f]+)$", "maxLength": ID_MAX},
        examples=["http"],
    ),
]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"}, examples=["2026-01-31T03:00:00.000Z"])]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
# With a title they become named schemas, so that generated code has one enum for each, and not one for each place where
# it is used.
SessionState = Annotated[Literal["active", "ended"], Meta(title="SessionState", extra_json_schema=_TEXT)]
EndReason = Annotated[Reason, Meta(title="EndReason", description="Why a session ended.", extra_json_schema=_TEXT)]
StateOfDelivery = Annotated[DeliveryState, Meta(title="DeliveryState", extra_json_schema=_TEXT)]
Breaker = Annotated[Literal["closed", "open", "half-open"], Meta(title="Breaker", extra_json_schema=_TEXT)]
HealthStatus = Annotated[str, Meta(title="HealthStatus", extra_json_schema=_TEXT | {"enum": ["pass", "warn", "fail"]})]


# -- requests


class Request(msgspec.Struct, rename="camel", kw_only=True, forbid_unknown_fields=True):
    """A body, or the parameters of a query."""


class Opening(Request):
    """Opens a session. Where the operator's dialect has a hash, no id and no token may have `&` or `=`."""

    player_id: PlayerId
    token: Token | UnsetType = UNSET
    idle_timeout_seconds: (
        Annotated[int, Meta(ge=1, le=IDLE_MAX_S, description="By default what is configured.", examples=[900])]
        | UnsetType
    ) = UNSET
    attributes: (
        Annotated[
            dict[str, Any],
            Meta(
                extra_json_schema=_ANYTHING,
                description=f"Kept for plug-ins. At most {ATTRIBUTES_MAX} bytes as JSON, nested at most 250 levels. "
                "Integers are kept exactly up to 64 bits, longer ones refused; so are fractions and exponents beyond "
                "2^53.",
                examples=[{"table": 7}],
            ),
        ]
        | UnsetType
    ) = UNSET


class OpeningOfMany(Opening, kw_only=True):
    """One of the sessions to open."""

    session_id: Annotated[SessionId, Meta(examples=["game-7f3a92"])]


class BulkOpen(Request):
    """Sessions of one operator to open, as after a restore. Those that are open already are touched."""

    sessions: Annotated[list[OpeningOfMany], Meta(extra_json_schema={"maxItems": BULK_IDS_MAX})]


class BulkTouch(Request):
    """Sessions of one operator; an id that stands twice counts once."""

    session_ids: Annotated[list[SessionId], Meta(extra_json_schema={"maxItems": BULK_IDS_MAX})]


class Hold(Request):
    """Why sending is to stop, and for how long; without `forSeconds`, until it is released."""

    note: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=NOTE_MAX,
                pattern=PLAIN,
                description="Shown to people who find the operator held.",
                examples=["they move their database"],
            ),
        ]
        | UnsetType
    ) = UNSET
    for_seconds: (
        Annotated[int, Meta(ge=1, le=HOLD_MAX_S, description="It is released by itself then.", examples=[7200])]
        | UnsetType
    ) = UNSET


class DeadOnes(Request):
    """Which dead deliveries of an operator are meant: all that are not discarded, or those of them that match every
    given member.
    """

    since: (
        Annotated[Time, Meta(description="Those that died then or later; a time ahead is refused (400).")] | UnsetType
    ) = UNSET
    until: Annotated[Time, Meta(description="Those that died before then.")] | UnsetType = UNSET
    ended_since: Annotated[Time, Meta(description="Whose session ended then or later.")] | UnsetType = UNSET
    ended_until: Annotated[Time, Meta(description="Whose session ended before then.")] | UnsetType = UNSET
    reason: (
        Annotated[str, Meta(min_length=1, max_length=NOTE_MAX, description="Their `lastError`.", examples=["timeout"])]
        | UnsetType
    ) = UNSET
    dry_run: Annotated[bool, Meta(description="Change nothing, but answer with what is found.")] | UnsetType = UNSET


class RetryDead(DeadOnes):
    """Which dead deliveries become due again."""

    limit: Annotated[int, Meta(ge=1, description="At most so many, those that died first.")] | UnsetType = UNSET


_Note = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=NOTE_MAX,
        pattern=PLAIN,
        description="Why nobody wants them.",
        examples=["the operator has closed its books"],
    ),
]


class Discard(Request):
    """Why nobody wants a dead delivery any more."""

    note: _Note


class DiscardDead(DeadOnes, kw_only=True):
    """Which dead deliveries nobody wants any more, and why."""

    note: _Note


class TestNotice(Request):
    """The ids that a test notice has; those that are not given are made up and begin with `lmdaemon-test`."""

    session_id: SessionId | UnsetType = UNSET
    player_id: PlayerId | UnsetType = UNSET


class NoQuery(Request):
    """No parameters."""


class PageQuery(Request):
    """Which part of a list."""

    limit: Annotated[
        int,
        Meta(
            ge=1,
            le=PAGE_MAX,
            description="How many at most; a page also ends at 1 MiB, or when it has looked at as many rows as it may.",
        ),
    ] = PAGE_DEFAULT
    after: Annotated[Cursor, Meta(description="The `next` of the page before, until that is null.")] | UnsetType = UNSET

    @property
    def after_id(self) -> int | None:
        """The cursor as the number that the store knows; None at the first page."""
        return None if self.after is UNSET else int(self.after)


class SessionQuery(PageQuery):
    """Which sessions of an operator."""

    state: Annotated[SessionState, Meta(description="Only those in this state.")] | UnsetType = UNSET
    player_id: Annotated[PlayerId, Meta(description="Only those of this player.")] | UnsetType = UNSET


class FindQuery(PageQuery):
    """Which sessions of all operators: one of the two ids is needed."""

    session_id: Annotated[SessionId, Meta(description="Those with this id.")] | UnsetType = UNSET
    player_id: Annotated[PlayerId, Meta(description="Those of this player.")] | UnsetType = UNSET


class DeliveryQuery(PageQuery):
    """Which deliveries."""

    operator: Annotated[Id, Meta(description="Only those of this operator, configured or not.")] | UnsetType = UNSET
    sink: (
        Annotated[Sink, Meta(description="Only those for `http` or for this plug-in, configured or with deliveries.")]
        | UnsetType
    ) = UNSET
    state: Annotated[StateOfDelivery, Meta(description="Only those in this state.")] | UnsetType = UNSET


# -- answers


class Answer(msgspec.Struct, rename="camel", kw_only=True):
    """The body of an answer, or a part of one."""


class BulkTouched(Answer):
    """How many sessions were touched, and which ids are unknown or have ended."""

    touched: Count
    unknown: list[SessionId]
    ended: list[SessionId]


class Session(Answer):
    """A session, without its token."""

    operator: OperatorName
    session_id: SessionId
    player_id: PlayerId
    state: SessionState
    reason: Annotated[EndReason | None, Meta(description="Why it ended; null while it is active.")]
    opened_at: Time
    last_seen_at: Time
    expires_at: Annotated[Time | None, Meta(description="When it ends if no touch comes; null once it has ended.")]
    ended_at: Time | None
    idle_timeout_seconds: Annotated[float, Meta(ge=1, examples=[900])]
    opened_request_id: Annotated[str | None, Meta(description="The `X-Request-Id` of the call that opened it.")]
    closed_request_id: Annotated[str | None, Meta(description="The `X-Request-Id` of the call that closed it.")]
    attributes: Annotated[
        msgspec.Raw,
        Meta(description="As given when it was opened.", extra_json_schema=_ANYTHING, examples=[{"table": 7}]),
    ]


class OpenedSession(Session):
    """The answer to an opening: the session, and whether the call changed anything."""

    changed: Annotated[
        bool, Meta(description="False: it was open already. The call counted as a touch and changed nothing else.")
    ]
    ignored: Annotated[
        list[str],
        Meta(description="Fields that were given with other values than those in force, which are shown here."),
    ]


class BulkOpened(Answer):
    """What became of each: how many were opened and how many were open already, and which could not be opened."""

    opened: Count
    open: Annotated[Count, Meta(description="Open already, with the same playerId and token: touched.")]
    differs: Annotated[list[SessionId], Meta(description="Open with another playerId or token.")]
    ended: list[SessionId]


class Discarded(Answer):
    """When a dead delivery was discarded, by whom and why."""

    at: Time
    by: Annotated[str | None, Meta(description="The name of the API token used, if it has one.")]
    note: str


class Delivery(Answer):
    """One end of a session for one sink of its operator."""

    id: WebhookId
    operator: OperatorName
    session_id: SessionId
    sink: Sink
    state: StateOfDelivery
    attempts: Count
    created_at: Time
    attempt_since: Annotated[
        Time | None, Meta(description="When the attempt began that is under way; null without one.")
    ]
    next_attempt_at: Annotated[
        Time | None,
        Meta(
            description="When it can be tried: not before a Retry-After, the breaker's next probe and the pace of "
            "retries by hand allow it. Null while the operator is held, while it is not in the file or its `notify` is "
            "false (for a plug-in: while that does not listen to it), and once it is settled."
        ),
    ]
    settled_at: Time | None
    last_status: Annotated[int | None, Meta(description="HTTP status of the last attempt.", examples=[200])]
    last_code: Annotated[float | None, Meta(description="Its `error`.", examples=[0])]
    last_error: Annotated[
        str | None, Meta(description="Why it failed: one word of the list in docs/delivery.md.", examples=["timeout"])
    ]
    discarded: Annotated[
        Discarded | None,
        Meta(description="Set if it was discarded: it is dead, but no longer counts as dead."),
    ]
    body_sha256: Annotated[
        str | None,
        Meta(description="SHA-256 (hex) of the body, the same at every attempt; null for plug-ins and old deliveries."),
    ]


class Attempt(Answer):
    """One attempt of a delivery."""

    at: Annotated[Time, Meta(description="When it began.")]
    duration_ms: Annotated[Count | None, Meta(description="Null if the daemon ended before the attempt did.")]
    status: Annotated[int | None, Meta(description="HTTP status, if there was an answer.", examples=[503])]
    code: Annotated[float | None, Meta(description="`error` of the answer, if it had one.")]
    error: Annotated[str | None, Meta(description="Why it failed; null if it did not.", examples=["status"])]
    url: Annotated[str, Meta(description="Where it was sent, without user info and query.")] | UnsetType = UNSET
    address: (
        Annotated[
            str | None,
            Meta(
                description="Address and port of the connection; null if there was none.", examples=["203.0.113.7:443"]
            ),
        ]
        | UnsetType
    ) = UNSET
    detail: Annotated[str, Meta(description="Details of the error, in words.")] | UnsetType = UNSET
    answer: (
        Annotated[
            Annotated[str, Meta(extra_json_schema={"maxLength": SHOWN_MAX})] | None,
            Meta(
                description=f"Of a failure: the first {SHOWN_MAX} characters that the operator answered, the notice's "
                "own secrets masked; null if no answer could be read as HTTP."
            ),
        ]
        | UnsetType
    ) = UNSET


class SessionWithDeliveries(Session):
    """A session and what became of its end."""

    deliveries: list[Delivery]


class DeliveryWithHistory(Delivery):
    """A delivery and its attempts, the oldest first."""

    history: list[Attempt]


class SentRequest(Answer):
    """What is sent at each attempt, with the settings in force. Secrets in it are masked (`***`)."""

    url: Annotated[str, Meta(description="Without user info, the values of its query masked.")]
    headers: Annotated[
        dict[str, str], Meta(description="A signature is made anew for each attempt; the time is that of the last.")
    ]
    body: Annotated[
        str | None, Meta(description="Only ids can be read in it; null once delivered, when it is no longer kept.")
    ]
    curl: Annotated[str, Meta(description="The same as a command for a shell.")]


class DeliveryWithRequest(DeliveryWithHistory):
    """A delivery with its attempts, and what is sent."""

    request: Annotated[
        SentRequest | None,
        Meta(description="Null if nothing is sent: for a plug-in, or without a URL or a value that must be sent."),
    ]


class ArchivedSession(Session):
    """A session and all that became of its end."""

    deliveries: list[DeliveryWithHistory]


class SessionPage(Answer):
    """Sessions, newest first."""

    items: Annotated[list[Session], Meta(extra_json_schema={"maxItems": PAGE_MAX})]
    next: Annotated[Cursor | None, Meta(description="To be given as `after`; null on the last page.")]


class DeliveryPage(Answer):
    """Deliveries, newest first."""

    items: Annotated[list[Delivery], Meta(extra_json_schema={"maxItems": PAGE_MAX})]
    next: Annotated[Cursor | None, Meta(description="To be given as `after`; null on the last page.")]


class FoundDead(Answer):
    """What a dry run has found: how many dead deliveries, and how many of them can be sent."""

    found: Count
    can_be_sent: Annotated[Count, Meta(description="The others lack a value that the dialect must send.")]
    oldest_settled_at: Annotated[Time | None, Meta(description="When the first of them died.")]
    reasons: Annotated[dict[str, Count], Meta(description="How many by `lastError`.")]
    seconds: Annotated[Seconds, Meta(description="How long it takes to send them, ten a second, once they are due.")]


class RetriedDeliveries(Answer):
    """How many dead deliveries became due again."""

    retried: Count
    dry_run: FoundDead | UnsetType = UNSET


class DiscardedDeliveries(Answer):
    """How many dead deliveries were discarded."""

    discarded: Count
    dry_run: FoundDead | UnsetType = UNSET


class Failure(Answer):
    """An attempt that failed."""

    at: Time
    reason: Annotated[str, Meta(description="One word of the list in docs/delivery.md.", examples=["tls"])]
    detail: Annotated[
        str | None,
        Meta(
            description="Details, in words.",
            examples=["certificate has expired"],
        ),
    ]


class Operator(Answer):
    """An operator: what waits for it, and what holds it back."""

    operator: OperatorName
    notify: Annotated[bool, Meta(description="Whether ends are sent to its URL.")]
    dialect: Annotated[str, Meta(description="What is sent.", examples=["v4"])]
    held: Annotated[bool, Meta(description="Nothing is sent until it is released.")]
    held_reason: Annotated[str | None, Meta(examples=["by_hand"])]
    held_since: Time | None
    held_by: Annotated[str | None, Meta(description="The name of the API token used.", examples=["anna"])]
    held_note: Annotated[str | None, Meta(description="The note that was given with the hold.")]
    held_until: Annotated[Time | None, Meta(description="When it is released by itself.")]
    breaker: Breaker
    breaker_since: Annotated[Time | None, Meta(description="When it opened; null while it is closed.")]
    failed_attempts: Annotated[Count, Meta(description="Failures in a row since the last success.")]
    failing_since: Annotated[Time | None, Meta(description="The first failure since the last success.")]
    last_failure: Annotated[Failure | None, Meta(description="Kept also when later attempts have succeeded.")]
    paused_since: Annotated[Time | None, Meta(description="When the Retry-After came that is in force.")]
    ends_wait_until: Annotated[
        Time | None,
        Meta(
            description="How long its ends for inactivity wait at most, since its touches have stopped (`mass_expiry`)."
        ),
    ]
    live: Annotated[Count, Meta(description="Sessions that are active.")]
    pending: Annotated[Count, Meta(description="Deliveries not yet settled.")]
    dead: Annotated[Count, Meta(description="Deliveries given up, which can be retried.")]
    oldest_pending_seconds: Seconds | None
    not_before: Annotated[
        Time | None, Meta(description="Until when a Retry-After or the breaker puts the next attempt off.")
    ]
    kept_back: Annotated[
        str | None,
        Meta(
            description="What keeps it back, since when and why, in words; null where nothing does.",
            examples=["held since 2026-01-31T03:00:00Z by anna: by_hand (they move their database)"],
        ),
    ]
    outlook: Annotated[
        str | None,
        Meta(
            description="What will happen by itself; null where nothing keeps it back.",
            examples=["tried again at 2026-01-31T03:05:00Z; the first notice dies at 2026-02-03T03:00:00Z"],
        ),
    ]


class ChangedOperator(Operator):
    """An operator after a hold or a release."""

    changed: Annotated[bool, Meta(description="False: the operator was in this state already.")]


class OperatorList(Answer):
    """All configured operators."""

    items: list[Operator]


class SettingChange(Answer):
    """A key whose value a reload would change."""

    key: Annotated[str, Meta(description="Its place in the file.", examples=["operators.acme.idle_timeout"])]
    old: Annotated[str | None, Meta(description="In force now, as TOML; null where it is not in the file.")]
    new: Annotated[str | None, Meta(description="As the file has it now.")]
    content: Annotated[bool, Meta(description="True: the content of the file or variable that it names has changed.")]
    needs_restart: Annotated[bool, Meta(description="A reload changes nothing of it.")]


class Configuration(Answer):
    """The settings in force, and what a reload would make of the file as it is now. No secret is in it."""

    file: str
    settings: Annotated[
        dict[str, str],
        Meta(description="By key of the file, as TOML.", examples=[{"sessions.idle_timeout": '"30m"'}]),
    ]
    inherited: Annotated[list[str], Meta(description="Keys that operators have from [sessions] or [delivery].")]
    changes: list[SettingChange]
    errors: Annotated[list[str], Meta(description="Why a reload would be refused; then it would change nothing.")]


class TokenRights(Answer):
    """What the token that was given is, and may do."""

    name: Annotated[str | None, Meta(description="Its name in the log; null if it has none.", examples=["anna"])]
    may_change: Annotated[bool, Meta(description="False: every change is answered 403 (`read-only`).")]


class Daemon(Answer):
    """A daemon on this database."""

    name: Annotated[str, Meta(description="Host, process and a random part.", examples=["wallet-1:811-5f0c9a3e"])]
    version: str
    address: Annotated[str, Meta(description="Where its private side listens.", examples=["127.0.0.1:8081"])]
    since: Annotated[Time, Meta(description="When it was started.")]
    last_heard_at: Annotated[Time, Meta(description="When it was last known to be alive.")]
    service_lag_ms: Annotated[Count, Meta(description="By how much its service clock is behind the furthest.")]
    operators: Annotated[list[OperatorName], Meta(description="For which it ends sessions and delivers.")]
    self: Annotated[bool, Meta(description="Whether it is the one that answers.")]


class DaemonList(Answer):
    """All daemons on this database."""

    items: list[Daemon]


# -- trials of an operator's endpoint


class ShownRequest(Answer):
    """A request that was sent, with its secrets masked."""

    method: str
    url: str
    headers: dict[str, str]
    body: str


class ShownAnswer(Answer):
    """What was read of an answer, with secrets masked."""

    status: int
    headers: dict[str, str]
    body: str
    complete: Annotated[bool, Meta(description="False if the answer was longer; the rest was not read.")]


class TestResult(Answer):
    """A test notice, what was answered, and what would have become of a delivery."""

    request: ShownRequest
    answer: Annotated[ShownAnswer | None, Meta(description="Null if no answer came.")]
    explanation: Annotated[str, Meta(description="The answer in words.", examples=["200, `error` is 0"])]
    verdict: Annotated[Literal["delivered", "retry", "final", "hold"], Meta(title="Verdict", extra_json_schema=_TEXT)]
    meaning: Annotated[str, Meta(description="The verdict in words.", examples=["would be retried because timeout"])]
    reason: Annotated[str | None, Meta(description="One word of the list in docs/delivery.md.", examples=["timeout"])]
    detail: str | None
    retry_after_seconds: Seconds | None
    duration_ms: Count


class CheckedExchange(Answer):
    """A request of a check and what came back."""

    request: ShownRequest
    answer: ShownAnswer | None
    cause: Annotated[str | None, Meta(description="Why there is no answer.")]
    detail: str | None
    duration_ms: Count


class CheckResult(Answer):
    """The result of a check."""

    id: Annotated[str, Meta(examples=["answer.valid"])]
    title: str
    verdict: Annotated[Literal["pass", "warn", "fail", "skipped"], Meta(title="CheckVerdict", extra_json_schema=_TEXT)]
    text: str
    why: Annotated[str, Meta(description="Why it matters.")]
    hint: Annotated[str | None, Meta(description="What to do, of a warning or a failure.")]
    requests: Count
    duration_ms: Count
    evidence: list[CheckedExchange]


class CheckProgress(Answer):
    """The event `check.progress`: a check has begun, or has ended."""

    done: Count
    total: Count
    check: Annotated[str | None, Meta(description="The check that begins.")]
    result: Annotated[CheckResult | None, Meta(description="The result of the check that has ended.")]


class CheckReport(Answer):
    """The event `check.report`: all results."""

    url: str
    dialect: str
    run: Annotated[str, Meta(description="A part of all made-up ids of the run.")]
    started_at: Time
    duration_ms: Count
    requests: Count
    stopped: Annotated[str | None, Meta(description="Why not everything was tried; null if it was.")]
    counts: Annotated[dict[str, Count], Meta(description="How many by verdict.")]
    checks: list[CheckResult]
    by_hand: Annotated[list[str], Meta(description="What only people can check.")]


# -- events and what happened lately


class Counted(Answer):
    """What has happened since the event before. In a snapshot all counts are 0."""

    touches: Count
    ends: Count
    delivered: Annotated[Count, Meta(description="Attempts that succeeded.")]
    failed: Annotated[Count, Meta(description="Attempts that failed.")]
    lag_ms: Annotated[Count, Meta(description="Of ends for inactivity: the greatest time from deadline to commit.")]


class OperatorFigures(Counted):
    """An operator as it is now: the event `operator.changed`, and an item of `figures`."""

    operator: OperatorName
    live: Count
    pending: Count
    dead: Count
    held: bool
    held_reason: str | None
    breaker: Breaker
    not_before: Annotated[Time | None, Meta(description="Until when the next attempt is put off.")]


class FiguresEvent(Counted):
    """The event `figures`, once a second: all operators together, and those of which anything has changed."""

    at: Time
    snapshot: Annotated[bool, Meta(description="Whether `operators` has all of them; the first of a stream has.")]
    live: Count
    pending: Count
    dead: Count
    operators: list[OperatorFigures]


class DeliveryEvent(Answer):
    """The events `delivery.settled` and `delivery.retry`: the result of an attempt."""

    id: WebhookId
    operator: OperatorName
    session_id: SessionId
    sink: Sink
    state: StateOfDelivery
    attempts: Count
    due_at: Annotated[Time | None, Meta(description="When it is due again; null if it is settled.")]
    duration_ms: Annotated[Count | None, Meta(description="Null where nothing was sent: it was too old.")]
    status: int | None
    code: float | None
    error: Annotated[str | None, Meta(description="Why it failed; null if it did not.")]


class EventQuery(Request):
    """What to listen to."""

    operator: Annotated[Id, Meta(description="Only what happens to this operator.")] | UnsetType = UNSET


_SLOTS = Annotated[list[Count], Meta(min_length=60, max_length=60)]


class Series(Answer):
    """60 steps, the oldest first; the last is not over yet."""

    operator: Annotated[OperatorName | None, Meta(description="Null: all together.")]
    touches: _SLOTS
    ends: _SLOTS
    delivered: _SLOTS
    failed: _SLOTS
    lag_ms: _SLOTS


class Span(Answer):
    """A length of time in 60 steps."""

    step_seconds: Annotated[int, Meta(examples=[1, 60])]
    ends_at: Annotated[Time, Meta(description="When the last step will be over.")]
    series: list[Series]


class RecentFigures(Answer):
    """The last minute by second, and the last hour by minute. If there are many operators, only those with the highest
    counts.
    """

    at: Time
    spans: list[Span]


class Problem(Answer):
    """An error (RFC 9457)."""

    type: Annotated[str, Meta(extra_json_schema={"format": "uri"}, examples=["urn:lmdaemon:problem:unknown-session"])]
    title: Annotated[str, Meta(examples=["Not Found"])]
    status: Annotated[int, Meta(ge=400, le=599, examples=[404])]
    detail: Annotated[str, Meta(description="Place, rule and value.", examples=["no session has this id"])]
    code: Annotated[
        str,
        Meta(
            description="The last part of `type`, by which programs decide. Each call lists its codes.",
            extra_json_schema={"pattern": "^[a-z]+(-[a-z]+)*$"},
            examples=["unknown-session"],
        ),
    ]
    session: Session | UnsetType = UNSET


class NoticeAnswer(Answer):
    """The answer to a notice: `error` is 0 if the notice was accepted."""

    error: int
    description: Annotated[str, Meta(examples=["Success"])]


# -- health


class Check(TypedDict):
    """One thing that was looked at."""

    status: HealthStatus
    time: Time
    output: NotRequired[Annotated[str, Meta(description="What is wrong.")]]


class StoreCheck(Check):
    """Whether the database can be written."""

    sessions: Annotated[Count, Meta(description="Sessions that are active.")]
    waiting: Annotated[Count, Meta(description="Operations that wait to be written.")]
    walBytes: Annotated[Count, Meta(description="Size of the write-ahead log.")]


class DiskCheck(Check):
    """How much space the database's file system has; without these figures if the disk is another machine's."""

    freeBytes: NotRequired[Count]
    sizeBytes: NotRequired[Annotated[Count, Meta(description="Used and free together.")]]
    growthBytesPerDay: NotRequired[Annotated[int | None, Meta(description="By how much free space shrinks a day.")]]
    daysLeft: NotRequired[Annotated[float | None, Meta(description="Until no space is free, at this rate.")]]


class LoopCheck(Check):
    """Whether a loop of the daemon runs when it should."""

    observedValue: Annotated[Seconds, Meta(description="How late it is.")]
    observedUnit: str


class ExpiryCheck(Check):
    """Whether many sessions ended at once, of an operator or of all, or the touches of an operator have stopped."""

    massExpired: Annotated[
        list[OperatorName],
        Meta(description="Operators of whose sessions a large part ended at once in the last ten minutes."),
    ]
    touchesStopped: Annotated[
        list[OperatorName],
        Meta(description="Operators with many live sessions and no touch for half of their idle time."),
    ]
    ended: NotRequired[Count]
    of: NotRequired[Count]


class DeliveriesCheck(Check):
    """Whether deliveries are dead or have waited for long."""

    pending: Count
    dead: Count
    oldestPendingSeconds: NotRequired[Seconds]


class NotConfigured(TypedDict):
    """An operator that is not in the file, with what remains of it."""

    operator: OperatorName
    live: Count
    pending: Count


class OperatorsCheck(Check):
    """Which operators are held back, and which are not in the file."""

    held: list[OperatorName]
    broken: Annotated[list[OperatorName], Meta(description="Those whose breaker is not closed.")]
    notConfigured: NotRequired[
        Annotated[
            list[NotConfigured],
            Meta(description="Those that are not in the file, though sessions are live or deliveries wait."),
        ]
    ]


class DaemonsCheck(Check):
    """How many daemons are on the database, and whose service clock is furthest behind."""

    daemons: NotRequired[Count]
    slowest: NotRequired[Annotated[str, Meta(description="The name of that daemon, where there are several.")]]
    slowestLagMs: NotRequired[
        Annotated[Count, Meta(description="How far the slowest service clock is behind the furthest.")]
    ]


_ONE = Meta(min_length=1, max_length=1)


class Checks(TypedDict):
    """Every check, as a list of one."""

    store: Annotated[list[StoreCheck], _ONE]
    daemons: Annotated[list[DaemonsCheck], _ONE]
    sweeper: Annotated[list[LoopCheck], _ONE]
    dispatcher: Annotated[list[LoopCheck], _ONE]
    disk: Annotated[list[DiskCheck], _ONE]
    listeners: Annotated[list[Check], _ONE]
    expiry: Annotated[list[ExpiryCheck], _ONE]
    deliveries: Annotated[list[DeliveriesCheck], _ONE]
    operators: Annotated[list[OperatorsCheck], _ONE]
    config: Annotated[list[Check], _ONE]
    certificates: Annotated[list[Check], _ONE]


class Health(TypedDict):
    """The state of the daemon; without the token, and in public, `status` alone."""

    status: HealthStatus
    version: NotRequired[str]
    description: NotRequired[str]
    checks: NotRequired[Checks]
