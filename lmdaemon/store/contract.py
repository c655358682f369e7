"""The store as the rest of the daemon sees it: its values, errors, operations and verbs. It knows no engine.

Wall times (`_at`) are milliseconds since the epoch, service times (`_ms`) milliseconds of the service clock.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from lmdaemon.clock import Clock, ServiceClock
from lmdaemon.model import Delivery, DeliveryState, Gate, Member, Session

BATCH_ROWS = 10_000  # most rows that the operations of one batch name in all
PAGE_BYTES = 1024 * 1024  # most bytes of a page's rows as text; bounds an answer, and the memory that slow clients take
AGING_ROWS = 50  # deliveries of an operator that `Store.aging_shown` looks at
RETRY_SPACING_MS = 100  # between deliveries retried by hand: at most ten a second for an operator
# Most sessions past their idle time, and as many past their lifetime, that a sweep looks at: 2 ms of the writer's time
SWEEP_ROWS = 60


class StoreError(Exception):
    """Nothing was stored, but trying again later may help: the disk is full, locked or failing, or too much is
    queued.
    """


class DatabaseError(Exception):
    """The database cannot be used: another daemon has it, it is damaged, or a newer lmdaemon made it.

    It is unchanged.
    """


class Room(NamedTuple):
    """The space on the database's file system, in bytes: `free` is what the database may still use, `size` is used and
    free space together.
    """

    free: int
    size: int


class Oldest(NamedTuple):
    """What is told of an operator's oldest pending delivery."""

    created_at: int
    sink: str
    due_at: int
    last_error: str | None


class NewDelivery(NamedTuple):
    """A delivery to be added for an ended session: the body to send, or in `impossible` the reason why nothing can be
    sent.
    """

    sink: str
    body: bytes
    impossible: str | None = None


SinksOf = Callable[[Session], Sequence[NewDelivery]]


@dataclass(slots=True)
class Figures:
    """Counts of an operator's sessions and deliveries.

    Every transaction updates them, so that rows are never counted.
    """

    live: int = 0
    pending: int = 0
    dead: int = 0


# -- operations and their answers; each is described at the verb of Store that queues it


Answer = TypeVar("Answer")


class Operation(msgspec.Struct, Generic[Answer], frozen=True):
    """A change to be written. Its caller gets an Answer once it is on disk."""

    @property
    def rows(self) -> int:
        """The number of rows that the operation names; 0 if it changes no stored data. The sum of these numbers is
        limited for the queue and for each batch.
        """
        return 1

    def __repr__(self) -> str:
        return type(self).__name__  # without its fields, which may be secret


class Opened(NamedTuple):
    """The session, and what was found: it is new ("created"), open with the same player and token ("open"), open with
    another player or token ("differs"), or has ended.
    """

    outcome: Literal["created", "open", "differs", "ended"]
    session: Session


class Opening(Operation[Opened], frozen=True):
    """Open a session: `Store.open_session`."""

    operator: str
    session_id: str
    player_id: str
    token: str | None
    attributes: str | None
    idle_ms: int
    lifetime_ms: int  # 0: no maximum lifetime
    request_id: str | None = None  # the id of the HTTP request, for finding it in logs


class Touched(NamedTuple):
    """How many sessions were touched, and the ids of those that are unknown or have ended."""

    touched: int
    unknown: list[str]
    ended: list[str]


class Touching(Operation[Touched], frozen=True):
    """Touch sessions: `Store.touch`."""

    operator: str
    session_ids: Sequence[str]

    @property
    def rows(self) -> int:
        """The number of ids."""
        return len(self.session_ids)


class Closing(Operation[Session | None], frozen=True):
    """End a session because its game was closed: `Store.end`."""

    operator: str
    session_id: str
    request_id: str | None = None


Recorded = Literal["ended", "repeated", "unknown_session", "player_mismatch", "bad_token"]


class Recording(Operation[Recorded], frozen=True):
    """Record a notice: `Store.record`.

    With `compare_token` the notice's token must be the one of the session. Without `accept_unknown` a notice of an
    unknown session is refused.
    """

    operator: str
    session_id: str
    player_id: str
    token: str | None
    compare_token: bool
    accept_unknown: bool
    extra: str | None
    idle_ms: int


class Swept(NamedTuple):
    """How many sessions a sweep has ended. `looked_at` is how many it has looked at of those past their idle time, or
    of those past their maximum lifetime, whichever is more. With SWEEP_ROWS or more of them, more may be due.
    """

    ended: int
    looked_at: int


class Sweep(Operation[Swept], frozen=True):
    """End what is due: `Store.end_due`.

    A session ends for inactivity if its idle time was over at the service time `as_of_ms`; None: no session ends for
    inactivity. `crowd` says that so many sessions are due that many sweeps follow each other. Each of them then has a
    batch of its own, so that operations queued before it need not wait for it. A sweep looks at `most` sessions past
    their idle time, and at as many past their maximum lifetime.
    """

    as_of_ms: int | None
    crowd: bool = False
    most: int = SWEEP_ROWS

    @property
    def rows(self) -> int:
        """As many as a whole batch may have, if the sweep must be alone in its batch."""
        return BATCH_ROWS if self.crowd else 1


class Settled(NamedTuple):
    """When the delivery is due again, if it is pending, and the operator's gate before and after the result."""

    due_at: int
    before: Gate
    after: Gate


class Settlement(Operation[Settled], frozen=True):
    """Store the result of an attempt: `Store.settle`.

    `state` is the delivery's new state, and `step` its place in the schedule. If it stays pending, it is due again
    after `wait_ms`. `attempt` is the entry for the history (None: nothing was sent); `spent` says whether it counts as
    an attempt. `gate` computes the operator's gate from the present one and the wall time of the commit; it is None for
    a plug-in.
    """

    delivery: Delivery
    state: DeliveryState
    wait_ms: int
    step: int
    attempt: Mapping[str, Any] | None = None
    spent: bool = True
    gate: Callable[[Gate, int], Gate] | None = None


class GateChange(Operation[Gate], frozen=True):
    """Change an operator's gate: `Store.set_gate`."""

    operator: str
    alter: Callable[[Gate], Gate]


class Alone(Operation[Answer], Generic[Answer], frozen=True):
    """An operation that is always alone in its batch, so that its rules need not consider other operations."""

    @property
    def rows(self) -> int:
        """As many as a whole batch may have, so that no other operation fits in."""
        return BATCH_ROWS


class Dead(NamedTuple):
    """Chooses dead deliveries of an operator: those that died in [since_at, until_at), of sessions that ended in
    [ended_since_at, ended_until_at), whose last failure had this `cause`. None stands for any. Discarded ones are never
    chosen.
    """

    since_at: int = 0
    until_at: int | None = None
    ended_since_at: int = 0
    ended_until_at: int | None = None
    cause: str | None = None


class FoundDead(NamedTuple):
    """How many dead deliveries there are, how many of them can be sent, when the first one died, and how many there are
    of each cause ("": no cause is stored).
    """

    found: int
    can_be_sent: int
    oldest_at: int | None
    causes: Mapping[str, int]


class RetryDead(Alone[int], frozen=True):
    """Make dead deliveries due again, spaced out: a step of `Store.retry_dead`."""

    operator: str
    deliveries: Sequence[int]  # row numbers of deliveries


class RetryOne(Alone[Delivery | None], frozen=True):
    """Make one dead delivery due again: `Store.retry_one`."""

    webhook_id: str


class Discard(Alone[int], frozen=True):
    """Discard dead deliveries: a step of `Store.discard`."""

    deliveries: Sequence[int]  # row numbers of deliveries
    by: str | None
    note: str


class Pruned(NamedTuple):
    """How many sessions were deleted, and the (ended_at, id) after which to go on; None at the end."""

    sessions: int
    after: tuple[int, int] | None


class Pruning(Alone[Pruned], frozen=True):
    """Delete old sessions: `Store.prune`."""

    before_at: int
    after: tuple[int, int]


class Probe(Operation[None], frozen=True):
    """Write the clock and nothing else: `Store.probe`."""

    @property
    def rows(self) -> int:
        """0: no stored data changes."""
        return 0


# -- what is read for people

_Row = TypeVar("_Row", Session, Delivery)


class Page(NamedTuple, Generic[_Row]):
    """Rows, newest first. `next` is the id after which the next page begins, or None when there are no more rows.

    A page may have fewer rows than were asked for, or none, and still have a `next`.
    """

    rows: list[_Row]
    next: int | None


class Ended(NamedTuple):
    """Ended sessions with their deliveries, in the order in which they ended.

    `after` is the (ended_at, id) after which to go on; None at the end.
    """

    sessions: list[tuple[Session, list[Delivery]]]
    after: tuple[int, int] | None


class Wanted(NamedTuple):
    """Chooses ended sessions for an archive: of an operator, of a player, with an id. None stands for any."""

    operator: str | None = None
    player_id: str | None = None
    session_id: str | None = None

    @property
    def few(self) -> bool:
        """Whether the sessions are found by a session id or a player id, which few sessions share. Otherwise they are
        found by the time of their end.
        """
        return self.player_id is not None or self.session_id is not None


class Archive(Protocol):
    """Ended sessions, read for an export by another process than the daemon. Its verbs raise DatabaseError."""

    def ended(self, wanted: Wanted, after: tuple[int, int], before_at: int) -> Ended:
        """The next sessions that ended before `before_at`, after `after` (ended_at, id), with their deliveries.

        Those that are not `wanted` are left out after reading, so a page may be short or empty before the end.
        """

    def gates(self) -> Mapping[str, Gate]:
        """The gate of each operator."""

    def committed_at(self) -> int:
        """The wall time before which every end is stored: no daemon stores an end with an earlier time any more. It
        advances only with the daemons' transactions.
        """

    def now_at(self) -> int:
        """The present wall time, by the clock with which ends are dated."""


class Whole(Protocol):
    """The whole content of a stopped daemon's store, read in order, to be moved into another one. Its verbs raise
    DatabaseError.
    """

    source: str  # identifies the content, for recognising it in a later run

    def counts(self) -> Mapping[str, int]:
        """The numbers of sessions and deliveries by state, which are shown to people and compared with those of the
        other store.
        """

    def clock(self) -> tuple[int, int]:
        """The service time and the wall time of the last transaction (ms)."""

    def operators(self) -> Mapping[str, tuple[Figures, Gate]]:
        """The counts and the gate of each operator."""

    def sessions(self, after: int, rows: int) -> list[tuple[Session, int]]:
        """Sessions with their `due_ms`, in the order of their ids, beginning after the id `after`."""

    def deliveries(self, after: int, rows: int) -> list[Delivery]:
        """Deliveries in the order of their ids, beginning after the id `after`, without the tokens of their
        sessions.
        """


class Moved(NamedTuple):
    """What was moved: the counts, the same in both stores, and whether an earlier run had moved it already."""

    counts: Mapping[str, int]
    before: bool


# -- what the dispatcher reads


class Claim(NamedTuple):
    """Asks for pending deliveries of one operator and sink, the earliest due first, but not for those with ids in
    `taken`.
    """

    operator: str
    sink: str
    taken: Sequence[int]
    limit: int


# -- what only the daemon that owns an operator can do

# "probe": try the operator's next delivery now. "release_ends": let its ends for inactivity wait no longer.
Wish = Literal["probe", "release_ends"]


# -- events after a commit


class StoreObserver:
    """Is called after each commit with what it has changed, on the event loop, before the callers get their answers.

    Subclasses override what they need. The methods must not do I/O or raise.
    """

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """These sessions have ended."""

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        """A delivery of this operator and sink is due at this wall time, which may be earlier than all others."""

    def gate_changed(self, operator: str) -> None:
        """The gate of this operator has changed."""

    def deadline_nearer(self) -> None:
        """The next deadline may be earlier than before, or the first session was opened."""

    def read_again(self) -> None:
        """The figures, gates and deadlines in memory were read again from the tables: each of them may have changed."""

    def ownership_changed(self, operator: str) -> None:
        """This daemon owns the operator from now on, or no longer: see `Store.owns`."""

    def probe_asked(self, number: int, operator: str) -> None:
        """Somebody has asked another daemon to try the next delivery of this operator, which this daemon owns. The
        answer, under this `number`, is given by `Store.answer_probe`.
        """

    def wall_clock_set_back(self) -> None:
        """The wall clock was set back, and stored waits were moved with it."""

    def committed(self, operations: int, took_s: float) -> None:
        """A transaction with so many operations took `took_s` seconds, its sync included."""


# -- the store


# Takes the answer to an operation, or the exception that the operation failed with. It must not raise
Done = Callable[[Any], None]
Submit = Callable[[Operation[Any], Done], None]  # see `Store.submit`


class Store(Protocol):
    """The sessions and deliveries. Endpoint, API, sweeper and dispatcher share nothing else.

    A verb that changes something returns when the change is on disk. Changes take effect in the order of the calls,
    even if a caller is cancelled meanwhile. Each verb raises StoreError when nothing was stored, and may then be
    repeated.
    """

    engine: Mapping[str, str]  # name and version of the database engine

    # Kept in memory, as of the last commit
    service_clock: ServiceClock
    figures: dict[str, Figures]
    # Service time of the next deadline for inactivity; the true one may be later, never earlier
    next_due_ms: int | None
    # Wall time of the next end by maximum lifetime; the true one may be later, never earlier
    next_lifetime_at: int | None
    touched_ms: dict[str, int]  # service time of the latest touch of each operator since the start
    pausing: frozenset[str]  # as given to `configure`
    expulsions: int  # daemons on the database that this one has expelled, since the start
    # Whether others used the database at the start. If so, they heard touches all the while, and no restart grace
    # applies
    joined_others: bool

    @property
    def clock(self) -> Clock:
        """The daemon's clocks. All stored wall times are by this clock: the one of this machine, or, with PostgreSQL,
        the one of the database's server.
        """

    @property
    def hold_until_ms(self) -> int:
        """Service time before which no daemon on the database ends a session for inactivity. It is set when a daemon
        was lost, and when one starts while no other is there. 0 with SQLite.
        """

    def configure(
        self,
        operators: frozenset[str],
        sinks_of: SinksOf,
        pausing: frozenset[str] = frozenset(),
        grace_ms: int = 0,
        daemon_grace_ms: int = 0,
    ) -> None:
        """Takes over new settings, for all batches from the next one on.

        Only sessions of `operators` end for inactivity or age. For operators in `pausing`, ends for inactivity wait
        while no touches come, and for `grace_ms` of service time after touches have come again. Older sessions of an
        operator that was not among `operators` before do not end for inactivity for `grace_ms` either, because their
        touches were refused. If this daemon joins while no other one is on the database, the ends of all operators wait
        for `grace_ms`, too; if another daemon is lost, for `daemon_grace_ms`.
        """

    def introduce(self, address: str, digest: str) -> None:
        """Tells the other daemons on the database where this one listens, and a digest of its operators' settings."""

    def owns(self, operator: str) -> bool:
        """Whether this daemon, and no other one on the database, ends the operator's idle sessions and delivers for it.
        With SQLite there is no other one.
        """

    @property
    def is_sure(self) -> bool:
        """Whether the answer of `owns` is certainly still true. If this daemon's last transaction was too long ago,
        others may have expelled it; only another transaction, such as that of `probe`, then finds out.
        """

    def let_go(self, operator: str) -> None:
        """Reports that no attempt is under way any more for an operator that this daemon hands over. The next owner
        begins to deliver after this report, or after a minute without one.
        """

    async def ask_owner(self, operator: str, wish: Wish, within_s: float) -> str:
        """Has the daemon that owns the operator fulfil the wish, and returns that daemon's answer. Raises StoreError if
        it has not answered within `within_s`.
        """

    async def answer_probe(self, number: int, webhook_id: str) -> None:
        """Answers another daemon's request for a probe (`StoreObserver.probe_asked`) with the id of the delivery that
        was tried; "" if no delivery waits.
        """

    async def daemons(self) -> Sequence[Member]:
        """The daemons on the database, this one included."""

    @property
    def live(self) -> int:
        """The number of active sessions in the database, whichever daemon they were opened through."""

    @property
    def set_back_ms(self) -> int:
        """How far (ms) the wall clock was set back since the last commit, perhaps of an earlier run; else 0."""

    def figures_of(self, operator: str) -> Figures:
        """The operator's counts; zeros for an unknown operator."""

    def gate(self, operator: str) -> Gate:
        """The operator's gate; an open one for an unknown operator."""

    def waits_until_ms(self, operator: str) -> int | None:
        """Until when (service time) the operator's ends for inactivity wait because its touches have stopped; None if
        they do not wait.
        """

    def ends_at_ms(self, session: Session) -> int:
        """Service time at which the active session ends for inactivity if it is not touched again, as far as its
        operator is concerned: later than its deadline while the operator's ends wait.
        """

    async def release_ends(self, operator: str) -> bool:
        """Lets the operator's ends for inactivity wait no longer. They can wait again only after touches have come
        again. Returns whether they waited.
        """

    def observe(self, observer: StoreObserver) -> None:
        """Adds an observer, which is called after each commit from now on."""

    # State of the engine
    @property
    def failure(self) -> str | None:
        """Why the last write was refused; None while writes work."""

    @property
    def failing_since(self) -> float | None:
        """Since when every write has failed (monotonic s); None while writes work."""

    @property
    def strained(self) -> str | None:
        """In words, a problem of the engine that does not prevent writing; None if there is none."""

    @property
    def writing_since(self) -> float | None:
        """Monotonic time (seconds) at which the current transaction began; None while there is none."""

    @property
    def waiting(self) -> int:
        """The number of operations that wait for the writer."""

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log at the last transaction."""

    @property
    def file_bytes(self) -> int:
        """Size of the database at the last transaction."""

    @property
    def room(self) -> Room | None:
        """The space on the database's file system at the last transaction; None if that is on another machine."""

    @property
    def refused(self) -> Mapping[str, int]:
        """The number of operations refused since the start, by reason."""

    async def run(self) -> None:
        """Writes what is queued, for ever. Raises DatabaseError when the database was taken away."""

    async def close(self) -> None:
        """Refuses what is queued, and closes the database."""

    # Changes
    @property
    def submit(self) -> Submit:
        """Begins a change without a coroutine. `submit(operation, done)` has `done` called once, on the event loop:
        after the commit, or with an exception. If the change is refused at once, that is before `submit` returns.

        A property, so that whoever keeps it calls the writer's own function.
        """

    async def open_session(self, opening: Opening) -> Opened:
        """Opens a session. If it is open already with the same player and token, that counts as a touch and changes
        nothing else.
        """

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Touched:
        """Records activity in sessions of one operator. An id that is given twice counts once."""

    async def end(self, operator: str, session_id: str, request_id: str | None = None) -> Session | None:
        """Ends a session because its game was closed. Returns the session, also if it had ended before; None:
        unknown.
        """

    async def record(self, recording: Recording) -> Recorded:
        """Records a notice. The first one ends the session; a repeat changes nothing and is answered as such."""

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        """Ends sessions past their maximum lifetime and, if `idle`, those idle for too long at the time of the call.

        Each operator's oldest come first. At most SWEEP_ROWS of each kind are looked at; with `crowd` (see `Sweep`) an
        engine may look at more.
        """

    async def settle(self, settlement: Settlement) -> Settled:
        """Stores the result of an attempt. If the delivery is settled already, only the operator's gate changes."""

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Gate:
        """Changes an operator's gate atomically and returns the new one. `change` has no side effects: if another
        daemon changes the same gate, it is called again with that one's result.
        """

    async def retry_dead(self, operator: str, dead: Dead, most: int | None = None) -> int:
        """Makes dead deliveries due again, RETRY_SPACING_MS apart, those that died first before others.

        Returns how many became due, `most` at most. It takes several transactions; if one fails, a repeated call
        retries the rest.
        """

    async def discard(self, operator: str, dead: Dead, by: str | None, note: str) -> int:
        """Marks dead deliveries as wanted by nobody: they no longer count as dead.

        Returns how many were marked. It takes several transactions; if one fails, a repeated call discards the rest.
        """

    async def discard_one(self, webhook_id: str, by: str | None, note: str) -> Delivery | None:
        """Discards a delivery if it is dead, and returns it as it was before; None: unknown."""

    async def find_dead(self, operator: str, dead: Dead) -> FoundDead:
        """Counts dead deliveries, at most as many as one call of `retry_dead` would retry."""

    async def retry_one(self, webhook_id: str) -> Delivery | None:
        """Makes a delivery due again if it is dead, also a discarded one, and returns it as it was before; None:
        unknown.
        """

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        """Deletes a bounded number of sessions that ended before `before_at` and have no pending delivery.

        It begins after `after` (ended_at, id).
        """

    async def probe(self) -> None:
        """Writes the clock and nothing else: proves that writes work."""

    # Reading, for the daemon itself
    async def session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        """One session with its deliveries; None: unknown."""

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:
        """The pending deliveries of each operator and sink, the earliest due first. Some of them may not be due yet."""

    async def oldest_pending(self, operators: Iterable[str]) -> dict[str, int | None]:
        """The wall time at which each operator's oldest pending delivery was created; None: nothing is pending."""

    async def oldest_waiting(self, operators: Iterable[str]) -> dict[str, Oldest]:
        """Each operator's oldest pending delivery; operators for which nothing is pending are left out."""

    # Reading, for people: bounded in rows, bytes and time. Only `delivery` has a body and the session's token
    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        """One session with its deliveries; None: unknown."""

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        """A page of sessions, newest first, with ids below `after`."""

    async def find_sessions(
        self, *, session_id: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        """A page of sessions of all operators, also of those no longer configured, newest first: those with a session
        id, or those of a player. With both, those of the player with that id.
        """

    async def delivery(self, webhook_id: str) -> Delivery | None:
        """One delivery by its public id, whole: with its history, its body and the session's token; None: unknown."""

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        """A page of deliveries, newest first, with ids below `after`."""

    async def has_sink(self, sink: str) -> bool:
        """Whether any operator has deliveries for this sink."""

    async def aging_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        """By operator: the least `aged_from_at - held_base_ms` of the first AGING_ROWS deliveries that wait for its
        URL; None if none waits. The age of the oldest delivery is counted from `aged_from_at`; `held_base_ms` is how
        long the operator had been held by then.
        """

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        """As `oldest_pending`, but read for people."""
