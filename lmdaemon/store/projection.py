"""What the daemon keeps in memory of the tables: figures and gates by operator, the next deadlines, the clocks.

An engine loads it at the start and updates it with every committed batch, so that rows are never counted. Observers are
called for each change. It does no I/O.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lmdaemon.clock import Clock, ServiceClock
from lmdaemon.log import Log
from lmdaemon.model import Gate, Member, Session
from lmdaemon.store import silence
from lmdaemon.store.contract import Figures, SinksOf, StoreError, StoreObserver, Wish
from lmdaemon.store.rules import OPEN_GATE, Changes, World, least
from lmdaemon.version import __version__

SET_BACK_MS = 1000  # a wall clock that is behind by less than this has drifted; by more, it was set back

log = Log("store")


class Loaded(NamedTuple):
    """What was read from the tables at the start. `committed_at` is the wall time of the last transaction, or 0."""

    service_ms: int
    committed_at: int
    operators: Mapping[str, tuple[Figures, Gate]]
    next_due_ms: int | None
    next_lifetime_at: int | None
    last_session: int


class Projection:
    """Figures, gates and deadlines as of the last commit. `observers` are called on the event loop, in their order."""

    def __init__(self, clock: Clock, name: str = "") -> None:
        self._clock = clock
        self._name = name  # the daemon's name
        self._since_at = clock.wall_ms()
        self._address = self._digest = ""
        self.service_clock = ServiceClock(clock, 0)
        self.sinks_of: SinksOf = lambda session: ()
        self.configured: frozenset[str] = frozenset()
        self.figures: dict[str, Figures] = {}
        self.live = 0  # active sessions of all operators
        self.gates: dict[str, Gate] = {}
        self.next_due_ms: int | None = None
        self.next_lifetime_at: int | None = None
        self.touched_ms: dict[str, int] = {}
        self.pausing: frozenset[str] = frozenset()
        self.grace_ms = self.daemon_grace_ms = 0
        self.joined_others = False
        self.expulsions = 0
        self._pauses: dict[str, silence.Pause] = {}
        self._is_configured = False
        self._returned_ms: dict[str, int] = {}  # as in World
        self.observers: tuple[StoreObserver, ...] = ()
        self.last_session = 0  # the greatest row number of a session
        self._committed_at = (clock.wall_ms(), clock.monotonic())

    @property
    def clock(self) -> Clock:
        """The daemon's clocks (Store.clock)."""
        return self._clock

    def configure(
        self,
        operators: frozenset[str],
        sinks_of: SinksOf,
        pausing: frozenset[str] = frozenset(),
        grace_ms: int = 0,
        daemon_grace_ms: int = 0,
    ) -> None:
        """Takes over new settings (Store.configure)."""
        if self._is_configured:  # not at the start, after which the restart grace applies
            now_ms = self.service_clock.now_ms()
            self._returned_ms.update(dict.fromkeys(operators - self.configured, now_ms))
        self._is_configured = True
        self.configured, self.sinks_of, self.pausing, self.grace_ms = operators, sinks_of, pausing, grace_ms
        self.daemon_grace_ms = daemon_grace_ms

    def introduce(self, address: str, digest: str) -> None:
        """Keeps what other daemons are shown of this one (Store.introduce)."""
        self._address, self._digest = address, digest

    @property
    def operators_with_sessions(self) -> list[str]:
        """The operators that may have sessions. An operator has no figures if all its sessions were reported by notices
        only and had no deliveries; so the configured operators are included in any case.
        """
        return list(self.figures.keys() | self.configured)

    @property
    def is_idle(self) -> bool:
        """Whether no session is live and no delivery pending."""
        return not self.live and not any(figures.pending for figures in self.figures.values())

    def owns(self, operator: str) -> bool:
        """Whether this daemon owns the operator (Store.owns). It is the only daemon here, so it owns all."""
        return True

    @property
    def is_sure(self) -> bool:
        """Whether the answer of `owns` is certainly still true (Store.is_sure)."""
        return True

    @property
    def hold_until_ms(self) -> int:
        """Service time before which nothing ends for inactivity (Store.hold_until_ms)."""
        return 0

    def let_go(self, operator: str) -> None:
        """Does nothing: there is no other daemon that waits for the operator (Store.let_go)."""

    async def daemons(self) -> Sequence[Member]:
        """The daemons on the database (Store.daemons). Here it is this one alone."""
        now_at, operators = self._clock.wall_ms(), sorted(self.configured)
        return [
            Member(self._name, __version__, self._address, self._since_at, now_at, 0, operators, self._digest, True)
        ]

    def load(self, found: "Loaded") -> None:
        """Takes over what was read from the tables at the start."""
        self.service_clock = ServiceClock(self._clock, found.service_ms)
        self.figures = {name: figures for name, (figures, _) in found.operators.items()}
        self.live = sum(figures.live for figures in self.figures.values())
        self.gates = {name: gate for name, (_, gate) in found.operators.items()}
        self.next_due_ms, self.next_lifetime_at = found.next_due_ms, found.next_lifetime_at
        self.last_session = found.last_session
        if found.committed_at:
            self._committed_at = (found.committed_at, self._clock.monotonic())

    def reload(self, found: "Loaded") -> None:
        """Takes over what the tables say after an outage: a transaction whose answer was lost may have changed them."""
        self.figures.clear()
        self.figures.update({name: figures for name, (figures, _) in found.operators.items()})
        self.live = sum(figures.live for figures in self.figures.values())
        self.gates.clear()
        self.gates.update({name: gate for name, (_, gate) in found.operators.items()})
        self.next_due_ms, self.next_lifetime_at = found.next_due_ms, found.next_lifetime_at
        for observer in self.observers:
            observer.read_again()

    def waits_until_ms(self, operator: str) -> int | None:
        """Until when the operator's ends for inactivity wait (Store.waits_until_ms)."""
        pause = self._pauses.get(operator)
        if pause is None or operator not in self.pausing:
            return None
        now_ms = self.service_clock.now_ms()
        return silence.waits_until(pause, self.touched_ms.get(operator), now_ms, self.grace_ms)

    def ends_at_ms(self, session: Session) -> int:
        """When the session ends for inactivity if it is not touched again (Store.ends_at_ms)."""
        operator = session.operator
        again_ms = silence.may_touch_until(session.seen_ms, self._returned_ms.get(operator), self.grace_ms)
        return max(session.deadline_ms, again_ms, self.waits_until_ms(operator) or 0)

    async def ask_owner(self, operator: str, wish: Wish, within_s: float) -> str:
        """Has the daemon that owns the operator fulfil a wish (Store.ask_owner). Here there is no other daemon."""
        raise StoreError(f"no other daemon owns {operator}")

    async def answer_probe(self, number: int, webhook_id: str) -> None:
        """Answers another daemon (Store.answer_probe). Here there is none."""

    async def release_ends(self, operator: str) -> bool:
        """Lets the operator's ends for inactivity wait no longer (Store.release_ends)."""
        return self.let_ends_go_on(operator)

    def let_ends_go_on(self, operator: str) -> bool:
        """Does what `release_ends` promises, for an operator that this daemon owns."""
        waited = self.waits_until_ms(operator) is not None
        if waited:
            self._pauses[operator] = self._pauses[operator]._replace(released=True)
        return waited

    def _note_touches(self, changes: Changes) -> None:
        """Notes the time of the latest touch of each operator, and ends the operator's pause (`silence.Pause`) if
        touches have come again for long enough.
        """
        self._pauses.update(changes.pauses)
        for operator in changes.touched:
            self.note_touch(operator, changes.seen_ms)

    def note_touch(self, operator: str, at_ms: int) -> None:
        """Notes that a session of the operator was touched at this service time."""
        before_ms, pause = self.touched_ms.get(operator, 0), self._pauses.get(operator)
        if pause is not None:
            after = silence.touched(pause, before_ms, at_ms, self.grace_ms)
            if after is None:
                del self._pauses[operator]
            else:
                self._pauses[operator] = after
        self.touched_ms[operator] = max(before_ms, at_ms)

    def observe(self, observer: StoreObserver) -> None:
        """Adds an observer, which is called after each commit from now on."""
        self.observers += (observer,)

    def available(self, available: bool) -> None:
        """Stops the service clock while nothing can be stored, because no touch can be acknowledged then."""
        if available:
            self.service_clock.thaw("store")
        else:
            self.service_clock.freeze("store")

    def measured(self, operations: int, took_s: float) -> None:
        """Passes the duration of a transaction (seconds, its sync included) on to the observers."""
        for observer in self.observers:
            observer.committed(operations, took_s)

    def figures_of(self, operator: str) -> Figures:
        """The operator's counts; zeros for an unknown operator."""
        return self.figures.get(operator) or Figures()

    def gate(self, operator: str) -> Gate:
        """The operator's gate; an open one for an unknown operator."""
        return self.gates.get(operator, OPEN_GATE)

    @property
    def set_back_ms(self) -> int:
        """How far (ms) the wall clock was set back since the last transaction, which may have been in the previous run.

        0 if it has only drifted. The next transaction moves every stored wait back by as much.
        """
        wall_at, monotonic = self._committed_at
        by_ms = wall_at + int((self._clock.monotonic() - monotonic) * 1000) - self._clock.wall_ms()
        return by_ms if by_ms > SET_BACK_MS else 0

    def world(self) -> World:
        """The state in memory with which the next batch is decided."""
        return World(
            service_ms=self.service_clock.now_ms(),
            wall_at=self._clock.wall_ms(),
            monotonic=self._clock.monotonic(),
            set_back_ms=self.set_back_ms,
            last_session=self.last_session,
            gates=self.gates,
            configured=self.configured,
            sinks_of=self.sinks_of,
            pausing=self.pausing,
            grace_ms=self.grace_ms,
            pauses=self._pauses,
            touched_ms=self.touched_ms,
            returned_ms=self._returned_ms,
            figures=self.figures,
        )

    def absorb(self, changes: Changes) -> None:
        """Takes over the changes of a committed batch, and calls the observers."""
        self.take_over(changes)
        self.tell_of_ends(changes)

    def take_over(self, changes: Changes) -> None:
        """Takes over the changes of a committed batch. Calls the observers for all of them except ends and
        deliveries.
        """
        was_live = self.live > 0
        self.last_session = changes.last_session
        self._committed_at = (changes.world.wall_at, changes.world.monotonic)
        if changes.world.set_back_ms:
            log.warning("clock.set_back", by_s=changes.world.set_back_ms / 1000)
            for observer in self.observers:
                observer.wall_clock_set_back()
        for name, figures in changes.figures.items():
            total = self.figures.setdefault(name, Figures())
            total.live += figures.live
            self.live += figures.live
            total.pending += figures.pending
            total.dead += figures.dead
        self._note_touches(changes)
        self.gates.update(changes.gates)
        for observer in self.observers:
            for operator in changes.gates:
                observer.gate_changed(operator)
        self._absorb_deadlines(changes, was_live=was_live)

    def tell_of_ends(self, changes: Changes) -> None:
        """Calls the observers for the ends and the deliveries of a batch that was taken over."""
        for observer in self.observers:
            if changes.ends:
                observer.sessions_ended(changes.ends)
            for (operator, sink), due_at in changes.due.items():
                observer.delivery_due(operator, sink, due_at)

    def _absorb_deadlines(self, changes: Changes, *, was_live: bool) -> None:
        if changes.swept:  # the engine has read the next deadlines of the whole table
            self.next_due_ms, self.next_lifetime_at = changes.next_due_ms, changes.next_lifetime_at
            return
        before = (self.next_due_ms, self.next_lifetime_at)
        self.next_due_ms = least(self.next_due_ms, changes.next_due_ms)
        self.next_lifetime_at = least(self.next_lifetime_at, changes.next_lifetime_at)
        # Observers are also told when the first session is opened: while no session was live, the sweeper slept and
        # nobody has read the service clock
        if before != (self.next_due_ms, self.next_lifetime_at) or (self.live and not was_live):
            for observer in self.observers:
                observer.deadline_nearer()
