"""What the doers know of the store: its values, its errors and its operations. It knows no engine.

Wall times (`_at`) are milliseconds since the epoch, service times (`_ms`) milliseconds of the service clock.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from lmdaemon.clock import ServiceClock
from lmdaemon.model import Delivery, DeliveryState, Gate, Session

BATCH_ROWS = 10_000  # rows that the operations of one batch name together; one that names as many is alone in its batch
PAGE_BYTES = 1024 * 1024  # of a page's rows as text: bounds an answer, and what waits for slow readers
SWEEP_ROWS = 100  # sessions looked at in one sweep operation: about 3 ms on the writer


class StoreError(Exception):
    """Nothing was stored, and trying again later may help: disk full, locked or failing, or too much queued."""


class DatabaseError(Exception):
    """The database cannot be used at all: another daemon has it, it is damaged, or a newer program made it. It was left
    untouched.
    """


class NewDelivery(NamedTuple):
    """A sink of an ended session: its body as it will be sent, or why it never can be."""

    sink: str
    body: bytes
    impossible: str | None = None


SinksOf = Callable[[Session], Sequence[NewDelivery]]


@dataclass(slots=True)
class Figures:
    """Counts kept up in every transaction, so that nobody ever counts rows."""

    live: int = 0
    pending: int = 0
    dead: int = 0


# -- operations and their answers; the verbs of Store document them


Answer = TypeVar("Answer")


class Operation(msgspec.Struct, Generic[Answer], frozen=True):
    """Something to be written, which is answered with an Answer once it is on disk."""

    @property
    def rows(self) -> int:
        """How many rows it names: bounds what is queued and what is in one batch. 0: it changes nothing of what is
        stored.
        """
        return 1

    def __repr__(self) -> str:
        return type(self).__name__  # its fields may be secret


class Opened(NamedTuple):
    outcome: Literal["created", "open", "differs", "ended"]
    session: Session


class Opening(Operation[Opened], frozen=True):
    operator: str
    session_id: str
    player_id: str
    token: str | None
    attributes: str | None
    idle_ms: int
    lifetime_ms: int  # 0: none


class Touched(NamedTuple):
    touched: int
    unknown: list[str]
    ended: list[str]


class Touching(Operation[Touched], frozen=True):
    operator: str
    session_ids: Sequence[str]

    @property
    def rows(self) -> int:
        return len(self.session_ids)


class Closing(Operation[Session | None], frozen=True):
    operator: str
    session_id: str


Recorded = Literal["ended", "repeated", "unknown_session", "player_mismatch", "bad_token"]


class Recording(Operation[Recorded], frozen=True):
    """A notice to record. `compare_token`: it must have the session's own token. `accept_unknown` False: an unknown
    session is refused.
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
    """What one sweep did. `looked_at` equal to SWEEP_ROWS says that more may be due."""

    ended: int
    looked_at: int


class Sweep(Operation[Swept], frozen=True):
    """End what is due by max_lifetime, and what was idle for too long as of that service time (None: nothing). One of a
    crowd is alone in its batch, so that whoever came before it need not wait for it.
    """

    as_of_ms: int | None
    crowd: bool = False

    @property
    def rows(self) -> int:
        return BATCH_ROWS if self.crowd else 1


class Settled(NamedTuple):
    """When the row is due again, if it is pending, and the operator's gate before and after."""

    due_at: int
    before: Gate
    after: Gate


class Settlement(Operation[Settled], frozen=True):
    """The result of one attempt: what becomes of the row, after how many milliseconds a pending one is due again, the
    history's entry (None when nothing was sent), whether it counts as an attempt, and what it does to the operator's
    gate at the wall time of its commit (None for a plug-in, which has none).
    """

    delivery: Delivery
    state: DeliveryState
    wait_ms: int
    step: int
    attempt: Mapping[str, Any] | None = None
    spent: bool = True
    gate: Callable[[Gate, int], Gate] | None = None


class GateChange(Operation[Gate], frozen=True):
    operator: str
    alter: Callable[[Gate], Gate]


class Alone(Operation[Answer], Generic[Answer], frozen=True):
    """One that does not share its batch, so that it need not be decided what it means beside the others."""

    @property
    def rows(self) -> int:
        return BATCH_ROWS


class RetryDead(Alone[int], frozen=True):
    """Make these dead deliveries due again, spaced out."""

    operator: str
    deliveries: Sequence[int]  # their numbers


class RetryOne(Alone[Delivery | None], frozen=True):
    webhook_id: str


class Pruned(NamedTuple):
    """How many sessions went, and where to go on; None at the end."""

    sessions: int
    after: tuple[int, int] | None


class Pruning(Alone[Pruned], frozen=True):
    """Delete what ended before that wall time, beginning behind `after` (ended_at, id)."""

    before_at: int
    after: tuple[int, int]


class Probe(Operation[None], frozen=True):
    """Write the clock and nothing else."""

    @property
    def rows(self) -> int:
        return 0


# -- what people read

_Row = TypeVar("_Row", Session, Delivery)


class Page(NamedTuple, Generic[_Row]):
    """Rows, newest first, and the id behind which the next page begins, or None after the last row.

    A page that ends before it has the rows asked for has `next`, too: it may even be empty.
    """

    rows: list[_Row]
    next: int | None


class Ended(NamedTuple):
    """Ended sessions with their deliveries, in the order in which they ended, and behind which (ended_at, id) to go on,
    None at the end.
    """

    sessions: list[tuple[Session, list[Delivery]]]
    after: tuple[int, int] | None


class Archive(Protocol):
    """What has ended, read beside the daemon for an export. Its verbs raise DatabaseError."""

    def ended(self, operator: str | None, after: tuple[int, int], before_at: int) -> Ended:
        """A page of what ended before then, beginning behind `after`."""

    def gates(self) -> Mapping[str, Gate]:
        """What holds each operator back."""

    def committed_at(self) -> int:
        """Wall time of the last transaction."""


# -- what the dispatcher reads


class Claim(NamedTuple):
    """What to claim: rows of one operator and sink, the earliest due first, but none of those `taken` (ids)."""

    operator: str
    sink: str
    taken: Sequence[int]
    limit: int


# -- what is told of commits


class StoreObserver:
    """Told of what a commit has made true, on the event loop and before whoever waits for it is answered. Override what
    you want to hear; it must not do I/O or raise.
    """

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """These have ended."""

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        """A delivery of this operator and sink is due at that wall time, perhaps before all others."""

    def gate_changed(self, operator: str) -> None:
        """What holds this operator's URL back has changed."""

    def deadline_nearer(self) -> None:
        """The next deadline may have come nearer, or the first session has opened."""

    def wall_clock_set_back(self) -> None:
        """The wall clock was set back, and kept waits with it."""

    def committed(self, operations: int, took_s: float) -> None:
        """A transaction of so many operations took so long, its sync included."""


# -- the store


class Store(Protocol):
    """The session table and the deliveries, as verbs. The doers meet here and nowhere else.

    A verb that changes something returns once that is on disk. They take effect in the order in which they were
    called, also when their callers are cancelled meanwhile. Each raises StoreError when nothing was stored, and may be
    repeated.
    """

    # What the daemon hands in
    configured: frozenset[str]  # operators whose sinks are known: nobody else's sessions end by themselves
    sinks_of: SinksOf

    engine: Mapping[str, str]  # its name and version

    # What is known without looking, as of the last commit
    service_clock: ServiceClock
    figures: dict[str, Figures]
    next_due_ms: int | None  # the next deadline may be later, never earlier
    next_lifetime_at: int | None

    @property
    def live(self) -> int:
        """Sessions that are active."""

    @property
    def set_back_ms(self) -> int:
        """By how much the wall clock was set back since the last commit, of this run or the one before; else 0."""

    def figures_of(self, operator: str) -> Figures:
        """Its counts; zeros for one that is unknown."""

    def gate(self, operator: str) -> Gate:
        """What holds its URL back; an open gate for one that is unknown."""

    def observe(self, observer: StoreObserver) -> None:
        """Tells one more of what is committed from now on."""

    # How the engine is
    @property
    def failure(self) -> str | None:
        """Why the last write was refused; None while writes work."""

    @property
    def strained(self) -> str | None:
        """What is wrong with the engine but does not stop it, in words; None if nothing is."""

    @property
    def writing_since(self) -> float | None:
        """Monotonic time in seconds at which the running transaction began; None between two."""

    @property
    def waiting(self) -> int:
        """Operations that wait for the writer."""

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log at the last transaction."""

    @property
    def file_bytes(self) -> int:
        """Size of the database at the last transaction."""

    @property
    def refused(self) -> Mapping[str, int]:
        """Operations refused so far, by reason."""

    async def run(self) -> None:
        """Writes what is queued, for ever. Raises DatabaseError when the database is gone."""

    async def close(self) -> None:
        """Refuses what is queued, and lets go of the database."""

    # Changes
    async def open_session(self, opening: Opening) -> Opened:
        """Opens a session; opening the same again counts as a touch and changes nothing else."""

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Touched:
        """Notes activity of sessions of one operator; a duplicate counts once. Touching again only moves deadlines."""

    async def end(self, operator: str, session_id: str) -> Session | None:
        """Closes a session and returns it, also when it had ended before; None when it is unknown."""

    async def record(self, recording: Recording) -> Recorded:
        """Records a notice from the peer: the first ends the session, each repeat is told so and changes nothing."""

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        """Ends what is past its lifetime and, if `idle`, what had been idle for too long when this was called; the
        oldest first, at most SWEEP_ROWS sessions each. One of a crowd has a transaction of its own.
        """

    async def settle(self, settlement: Settlement) -> Settled:
        """Stores the result of an attempt. That of a delivery which is settled already changes its operator's gate
        alone.
        """

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Gate:
        """Changes what holds an operator's URL back, atomically, and returns it."""

    async def retry_dead(self, operator: str, since_at: int) -> int:
        """Makes deliveries that died since then due again, spaced out, in steps. Returns how many; what is left when a
        step fails is retried by asking again.
        """

    async def retry_one(self, webhook_id: str) -> Delivery | None:
        """Makes a dead delivery due again. Returns it as it was: one that was not dead is untouched; None: unknown."""

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        """Deletes sessions that ended before then and have nothing pending, a bounded number, beginning behind `after`
        as (ended_at, id).
        """

    async def probe(self) -> None:
        """Writes the clock and nothing else: proves that writes work."""

    # Reading, for the daemon itself
    async def session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        """One session with its deliveries."""

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:
        """For each lane its pending deliveries, the earliest due first, also those not due yet: they tell when."""

    async def oldest_pending(self, operators: Iterable[str]) -> dict[str, int | None]:
        """When the oldest pending delivery of each operator was made; None when nothing is pending."""

    # Reading, for people: bounded in rows, bytes and time; without tokens and bodies
    async def shown_session(self, operator: str, session_id: str) -> tuple[Session, list[Delivery]] | None:
        """One session with its deliveries."""

    async def sessions(
        self, operator: str, *, state: str | None, player_id: str | None, limit: int, after: int | None
    ) -> Page[Session]:
        """A page of sessions, newest first, with ids below `after`."""

    async def delivery(self, webhook_id: str) -> Delivery | None:
        """One delivery by its public id, with its history."""

    async def deliveries(
        self, *, operator: str | None, sink: str | None, state: str | None, limit: int, after: int | None
    ) -> Page[Delivery]:
        """A page of deliveries, newest first, with ids below `after`."""

    async def has_sink(self, sink: str) -> bool:
        """Whether there are deliveries for a sink, of whatever operator."""

    async def oldest_pending_shown(self, operators: Iterable[str]) -> dict[str, int | None]:
        """As `oldest_pending`."""
