"""What the doers know of the store: its values, its errors and its operations. It knows no engine.

Wall times (`_at`) are milliseconds since the epoch, service times (`_ms`) milliseconds of the service clock.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from lmdaemon.model import Delivery, DeliveryState, Gate, Session

BATCH_ROWS = 10_000  # rows that the operations of one batch name together; one that names as many is alone in its batch
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
