"""Server-sent events for clients that watch the daemon. Without such a client no event is made or kept.

Events are gathered for 0.1 s and sent together, because waking every listener for each event would cost more than
everything else. Each listener has a queue of at most 2,000 events; one that reads too slowly is dropped, so that it
delays nobody. Nothing is sent again: a listener that comes back begins with the figures of all operators. Source: HTML,
section 9.2.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import NamedTuple

from lmdaemon import retry, shapes
from lmdaemon.clock import Clock
from lmdaemon.limits import LIMITS, Limits
from lmdaemon.log import Log
from lmdaemon.model import Gate, Session, rfc3339
from lmdaemon.store.contract import Settled, Settlement, Store, StoreObserver
from lmdaemon.web.documents import session_document, to_json
from lmdaemon.web.recent import Counts, Since, Totals, together

RECONNECT_MS = 2000  # how long a browser is asked to wait before it connects again

log = Log("events")


class Listener:
    """One client and its queue. It listens to all operators or to one. Events are queued as the bytes to send."""

    def __init__(self, operator: str | None, abort: Callable[[], None], waiting_max: int = LIMITS.waiting_max) -> None:
        self.operator = operator
        self._waiting_max = waiting_max
        self.dropped = False
        self._abort = abort
        self._queue: deque[bytes] = deque()
        self._waiting = 0  # events in the queue
        self._filled = asyncio.Event()
        self._closed = False

    def wants(self, operator: str) -> bool:
        """Whether the client listens to events of this operator."""
        return self.operator is None or self.operator == operator

    def put(self, told: bytes, events: int = 1) -> None:
        """Queues events; a client with too many waiting events is dropped."""
        if self._closed:
            return
        if self._waiting >= self._waiting_max:
            self.dropped = True
            self._queue.clear()
            self.close()
            self._abort()  # its handler waits until the client reads, which it may never do
            return
        self._queue.append(told)
        self._waiting += events
        self._filled.set()

    def close(self) -> None:
        """Ends the stream after the events that are queued."""
        self._closed = True
        self._filled.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events to send, until the stream is closed; those that are waiting come in one piece."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            if self._queue:
                chunk = b"".join(self._queue)
                self._queue.clear()
                self._waiting = 0
                yield chunk
            elif self._closed:
                return


class _State(NamedTuple):
    """The state of an operator. It is compared with the state that was sent last, and sent if it has changed."""

    live: int
    pending: int
    dead: int
    gate: Gate
    breaker: str

    @property
    def kept_back(self) -> tuple[object, ...]:
        """What keeps deliveries waiting. A change of it is sent at once; other changes wait for the next figures."""
        gate = self.gate
        return gate.held_at, gate.held_reason, self.breaker, gate.not_before_at, gate.probe_at if gate.pause_ms else 0


class Events(StoreObserver):
    """Makes events of what store and dispatcher report, and queues them for the listeners. `operators()` returns the
    configured operators.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        totals: Totals,
        operators: Callable[[], Collection[str]],
        limits: Limits = LIMITS,
    ) -> None:
        self._limits = limits
        self._store = store
        self._clock = clock
        self._totals = totals
        self._operators = operators
        self._listeners: set[Listener] = set()
        self._told: dict[str, _State] = {}  # by operator, the state that listeners were sent last
        self._gathered: list[tuple[str, bytes]] = []  # events that are not sent yet, with their operators
        self._sending: asyncio.TimerHandle | None = None
        self._since: Since
        self._ticking: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def listeners(self) -> int:
        """The number of clients."""
        return len(self._listeners)

    @property
    def full(self) -> bool:
        """Whether no further client is accepted."""
        return self._stopped or len(self._listeners) >= self._limits.listeners_max

    def listen(self, operator: str | None, abort: Callable[[], None]) -> Listener:
        """Adds a listener. The first event that it gets is a snapshot of all figures. With the first listener, the task
        starts that sends figures every second. `abort` is called to close the connection of a listener that is too
        slow.
        """
        listener = Listener(operator, abort, self._limits.waiting_max)
        self._send()  # sends first what was gathered, which is older than the snapshot of the new listener
        if not self._listeners:
            self._told.clear()
            self._since = Since(self._totals, self._store.service_clock.now_ms)
            self._ticking = asyncio.create_task(self._tick())
        self._listeners.add(listener)
        listener.put(f"retry: {RECONNECT_MS}\n\n".encode())
        listener.put(self._snapshot(operator))
        return listener

    def leave(self, listener: Listener) -> None:
        """Removes a listener. With the last one, the task that sends figures every second stops."""
        self._listeners.discard(listener)
        if listener.dropped:
            log.warning("events.listener_dropped", operator=listener.operator, waiting=self._limits.waiting_max)
        if not self._listeners and self._ticking is not None:
            self._send()  # nobody listens, so this only drops the events that were gathered
            self._ticking.cancel()
            self._ticking = None

    def configured(self) -> None:
        """Sends every client a snapshot, after the configuration has changed. The streams of operators that are no
        longer configured end.
        """
        self._send()
        operators = self._operators()
        for listener in self._listeners:
            if listener.operator is None or listener.operator in operators:
                listener.put(self._snapshot(listener.operator))
            else:
                listener.close()

    def stop(self) -> None:
        """Ends all streams, when the daemon stops."""
        self._stopped = True
        self._send()
        for listener in self._listeners:
            listener.close()

    # -- what store and dispatcher report

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Sends events for ended sessions (StoreObserver)."""
        if self._listeners:
            self._since.sessions_ended(sessions)
            for session in sessions:
                self._tell("session.ended", session.operator, session_document(session, None))

    def gate_changed(self, operator: str) -> None:
        """Sends an event if a hold, a breaker or a pause has changed (StoreObserver)."""
        if self._listeners and operator in self._operators():
            state, told = self._state(operator), self._told.get(operator)
            self._told[operator] = state
            if told is None or state.kept_back != told.kept_back:
                self._tell("operator.changed", operator, self._figures_of(operator, Counts()))

    def settled(self, settlement: Settlement, settled: Settled) -> None:
        """Sends an event for the stored result of an attempt: `delivery.retry` if the delivery is still pending, else
        `delivery.settled`.
        """
        if self._listeners:
            name = "delivery.retry" if settlement.state == "pending" else "delivery.settled"
            self._tell(name, settlement.delivery.operator, _delivery(settlement, settled.due_at))

    # -- what is sent

    def _tell(self, name: str, operator: str, document: shapes.Answer) -> None:
        if not any(listener.wants(operator) for listener in self._listeners):
            return
        self._gathered.append((operator, event(name, document)))
        if len(self._gathered) >= self._limits.gathered_max:
            self._send()
        elif self._sending is None:
            self._sending = asyncio.get_running_loop().call_later(self._limits.gather_s, self._send)

    def _send(self) -> None:
        """Queues the gathered events for their listeners."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        everything = b"".join(told for _, told in gathered)
        for listener in self._listeners:
            if listener.operator is None:
                listener.put(everything, len(gathered))
            else:
                its = [told for operator, told in gathered if operator == listener.operator]
                if its:
                    listener.put(b"".join(its), len(its))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._limits.figures_every_s)
            self.tell_figures()

    def tell_figures(self) -> None:
        """Sends the figures that have changed since the last call. A listener to one operator gets only its figures."""
        self._send()
        counts = self._since.take()
        items = {}
        for name in self._operators():
            state = self._state(name)
            if name in counts or state != self._told.get(name):
                items[name] = self._figures_of(name, counts.get(name, Counts()))
                self._told[name] = state
        everything = event("figures", self._figures(list(items.values()), together(counts), snapshot=False))
        for listener in self._listeners:
            if listener.operator is None:
                listener.put(everything)
            else:
                own = [items[listener.operator]] if listener.operator in items else []
                of_all = counts.get(listener.operator, Counts())
                listener.put(event("figures", self._figures(own, of_all, snapshot=False)))

    def _snapshot(self, operator: str | None) -> bytes:
        names = [name for name in self._operators() if operator in (None, name)]
        shown = {name: self._figures_of(name, Counts()) for name in names}
        self._told |= {name: self._state(name) for name in names}
        return event("figures", self._figures(list(shown.values()), Counts(), snapshot=True))

    def _figures(self, items: list[shapes.OperatorFigures], counts: Counts, *, snapshot: bool) -> shapes.FiguresEvent:
        figures = self._store.figures.values()
        return shapes.FiguresEvent(
            at=rfc3339(self._clock.wall_ms()),
            snapshot=snapshot,
            live=self._store.live,
            pending=sum(one.pending for one in figures),
            dead=sum(one.dead for one in figures),
            **counts._asdict(),
            operators=items,
        )

    def _state(self, operator: str) -> "_State":
        """The state of an operator. It is compared every second for each operator, so it must be cheap."""
        figures, gate = self._store.figures_of(operator), self._store.gate(operator)
        breaker = retry.breaker(gate, self._clock.wall_ms()) if gate.failures else "closed"
        return _State(figures.live, figures.pending, figures.dead, gate, breaker)

    def _figures_of(self, operator: str, counts: Counts) -> shapes.OperatorFigures:
        now_at = self._clock.wall_ms()
        gate, figures = self._store.gate(operator), self._store.figures_of(operator)
        return shapes.OperatorFigures(
            operator=operator,
            live=figures.live,
            pending=figures.pending,
            dead=figures.dead,
            held=gate.held_at is not None,
            held_reason=gate.held_reason,
            breaker=retry.breaker(gate, now_at),
            not_before=rfc3339(retry.not_before(gate, now_at)),
            **counts._asdict(),
        )


def _delivery(settlement: Settlement, due_at: int) -> shapes.DeliveryEvent:
    delivery, attempt = settlement.delivery, settlement.attempt or {}
    return shapes.DeliveryEvent(
        id=delivery.webhook_id,
        operator=delivery.operator,
        session_id=delivery.session_id,
        sink=delivery.sink,
        state=settlement.state,
        attempts=delivery.attempts + (bool(settlement.attempt) and settlement.spent),
        due_at=rfc3339(due_at) if settlement.state == "pending" else None,
        duration_ms=attempt.get("durationMs"),
        status=attempt.get("status"),
        code=attempt.get("code"),
        error=attempt.get("error") if attempt else delivery.last_error,
    )


def event(name: str, document: shapes.Answer) -> bytes:
    """One event as it is sent."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), to_json(document))
