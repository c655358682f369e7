"""The rules of the store: `decide` turns a batch of operations and facts into `Changes`. No SQL, no clock, no network.

An engine reads the facts that a batch needs (`questions`) and applies the changes in one transaction, all or nothing.
Most batches are decided without facts, on two assumptions: sessions to be added are not known yet, and deliveries to be
settled are pending. If one is wrong, the engine's statement aborts; then the facts are read and the batch is decided
again. The deliveries of a session's end come from `sinks_of`: nothing here knows a protocol or a URL.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import orjson
from msgspec import field

from lmdaemon import retry
from lmdaemon.model import Delivery, DeliveryState, Gate, Reason, Session
from lmdaemon.store import silence
from lmdaemon.store.contract import (
    RETRY_SPACING_MS,
    Closing,
    Discard,
    Figures,
    GateChange,
    NewDelivery,
    Opened,
    Opening,
    Probe,
    Pruned,
    Pruning,
    Recorded,
    Recording,
    RetryDead,
    RetryOne,
    Settled,
    Settlement,
    SinksOf,
    Sweep,
    Swept,
    Touched,
    Touching,
)

PRUNE_ROWS = 500
# A due session whose operator is not configured is looked at again after its idle time, this time at most: not later
# than it would end if the operator were configured and the session touched now. If it has been due for long, it is
# looked at more and more seldom, because it may stay for ever
REVISIT_MS = 60_000
REVISIT_SHARE = 0.125  # of the time for which it has been due
REVISIT_MAX_MS = 3_600_000
HISTORY_MAX = 50  # the latest attempts that are kept for a delivery

ANY = 2**31 - 1  # stands for any number of attempts

OPEN_GATE = Gate()


# -- input of a decision


class World(NamedTuple):
    """The state that the daemon has in memory when the batch is decided."""

    service_ms: int
    wall_at: int
    monotonic: float = 0.0  # when both were read
    set_back_ms: int = 0  # how far the wall clock was set back since the last transaction
    last_session: int = 0  # the greatest row number of a session
    gates: Mapping[str, Gate] = MappingProxyType({})
    configured: frozenset[str] = frozenset()  # operators whose sinks are known
    sinks_of: SinksOf = lambda session: ()
    pausing: frozenset[str] = frozenset()  # operators whose ends for inactivity wait while their touches have stopped
    grace_ms: int = 0  # for how long these ends wait after touches have come again
    pauses: Mapping[str, silence.Pause] = MappingProxyType({})
    touched_ms: Mapping[str, int] = MappingProxyType({})  # service time of the latest touch, by operator
    # Service time at which operators were configured again, by operator: their touches were refused until then
    returned_ms: Mapping[str, int] = MappingProxyType({})
    figures: Mapping[str, Figures] = MappingProxyType({})
    elsewhere: Callable[[str], bool] = lambda operator: False  # whether another daemon owns the operator
    moves_waits: Callable[[str], bool] = lambda operator: True  # whether this daemon moves the operator's waits


class Questions(msgspec.Struct, kw_only=True):
    """What an engine has to read from the tables to decide a batch. The answers are `Facts`."""

    sessions: dict[str, set[str]] = field(default_factory=dict)  # session ids by operator: which are known?
    # (delivery, attempts) of each result, its own attempt included: is the delivery pending, with no more attempts than
    # that? With more, another daemon has gone on with it, and a failure does not count any more. A success always
    # counts (ANY).
    results: list[tuple[int, int]] = field(default_factory=list)
    due_rows: int = 0  # which sessions are past their maximum lifetime? So many at most
    due_ms: int | None = None  # which sessions are due at this service time? `due_rows` at most
    retry: RetryDead | None = None  # which of the deliveries to retry are dead and can be sent?
    # Public ids of deliveries: which are known, and can they be sent?
    deliveries: list[str] = field(default_factory=list)
    discard: list[int] = field(default_factory=list)  # row numbers of deliveries: which are dead and not discarded?
    pruning: Pruning | None = None  # which sessions are old enough to be pruned, and what deliveries do they have?


class OldDelivery(NamedTuple):
    """A delivery of a session that is old enough to be pruned."""

    session: int
    operator: str
    state: DeliveryState
    settled_at: int | None
    discarded: str | None


class Facts(msgspec.Struct, kw_only=True):
    """The answers to `Questions`. A session id in `asked` that is not in `sessions` is unknown."""

    asked: Mapping[str, set[str]] = field(default_factory=dict)  # session ids by operator, as in Questions
    sessions: Iterable[Session] = ()
    pending: frozenset[int] = frozenset()  # the deliveries in `Questions.results` that are pending
    outlived: Sequence[Session] = ()  # past their maximum lifetime, the longest of each operator first
    due: Sequence[Session] = ()  # the earliest due of each operator first
    dead: dict[int, str] = field(default_factory=dict)  # row number → sink of deliveries to retry that can be sent
    deliveries: Mapping[str, Delivery | None] = field(default_factory=dict)  # by public id
    to_discard: Mapping[int, str] = field(default_factory=dict)  # row number → operator of dead ones to be discarded
    old: Sequence[tuple[int, int]] = ()  # (id, ended_at) of sessions old enough to be pruned
    old_deliveries: Sequence[OldDelivery] = ()


_LOOKED_UP = frozenset({Closing, Sweep, RetryDead, RetryOne, Discard, Pruning})


def must_look_up(kinds: Iterable[type]) -> bool:
    """Whether a batch with operations of these kinds needs facts."""
    return not _LOOKED_UP.isdisjoint(kinds)


def questions(batch: Iterable[Any]) -> Questions:
    """What has to be read to decide these operations. Nothing for touches: the statement that writes them returns the
    ids it did not find.
    """
    asked = Questions()
    for one in batch:
        match one:
            case Opening() | Recording() | Closing():
                asked.sessions.setdefault(one.operator, set()).add(one.session_id)
            case Settlement():
                asked.results.append((one.delivery.id, ANY if one.state == "delivered" else _attempts(one)))
            case Sweep():
                asked.due_rows += one.most
                if one.as_of_ms is not None:
                    asked.due_ms = max(one.as_of_ms, asked.due_ms or 0)
            case RetryDead():
                asked.retry = one
            case RetryOne():
                asked.deliveries.append(one.webhook_id)
            case Discard():
                asked.discard = list(one.deliveries)
            case Pruning():
                asked.pruning = one
    return asked


# -- the changes


class Changes(msgspec.Struct):
    """What a batch changes: rows for an engine, answers for the callers, and events for after the commit."""

    world: World
    # Rows for the tables
    touched: dict[str, dict[str, None]] = field(default_factory=dict)  # ids of touched sessions, by operator
    # Row numbers of touched sessions that answers have called active
    active: dict[int, None] = field(default_factory=dict)
    sessions: list[tuple[Any, ...]] = field(default_factory=list)  # new ones, with the fields of Session
    # Sessions that end: id, reason, extra (None: unchanged), token, the last touch that was known (only for inactivity:
    # a later one prevents the end), id of the HTTP request
    ended: list[tuple[Any, ...]] = field(default_factory=list)
    moved_due: list[tuple[int, int]] = field(default_factory=list)  # (session, new due_ms)
    moved_lifetime: list[tuple[int, int]] = field(default_factory=list)  # (session, new lifetime_at)
    deliveries: list[tuple[Any, ...]] = field(default_factory=list)  # new ones, with the columns of NEW_DELIVERY
    results: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # with the columns of RESULT, by delivery
    digests: list[tuple[int, str]] = field(default_factory=list)  # session, and the salted hash that replaces its token
    # Dead deliveries that become due again: id, due_at, aged_from_at, held_base_ms
    revived: list[tuple[int, int, int, int]] = field(default_factory=list)
    discarded: list[tuple[int, str]] = field(default_factory=list)  # delivery, and by whom, when and why, as JSON
    pruned: list[int] = field(default_factory=list)  # sessions to delete, with their deliveries
    figures: dict[str, Figures] = field(default_factory=dict)  # by operator, to be added to the stored ones
    gates: dict[str, Gate] = field(default_factory=dict)
    # Kept in memory only
    pauses: dict[str, silence.Pause] = field(default_factory=dict)  # pauses that begin, by operator
    # Answers
    answers: list[Any] = field(default_factory=list)  # one for each operation
    touchings: list["_PlacedTouching"] = field(default_factory=list)  # touches whose answers the table may correct
    # Events for after the commit
    ends: list[Session] = field(default_factory=list)
    due: dict[tuple[str, str], int] = field(default_factory=dict)  # earliest due time by operator and sink
    next_due_ms: int | None = None
    next_lifetime_at: int | None = None
    swept: bool = False  # whether there was a sweep: then the engine sets both deadlines above from the whole table
    last_session: int = 0
    met_known: bool = False  # a session that was to be added was known already

    @property
    def seen_ms(self) -> int:
        """The service time that touched and new sessions get in this batch. It is rounded up, so that none of them
        ends a fraction of a millisecond early."""
        return self.world.service_ms + 1

    def figures_of(self, operator: str) -> Figures:
        """What the batch adds to the figures of an operator, to be changed in place."""
        figures = self.figures.get(operator)
        if figures is None:
            figures = self.figures[operator] = Figures()
        return figures

    def states_of_touched(self, active: Mapping[str, set[str]], ended: Mapping[str, set[str]]) -> None:
        """Corrects the answers of touches with the states that the table has, as session ids by operator."""
        for place, touching, decided in self.touchings:
            operator = touching.operator
            self.answers[place] = _touched(touching, decided, active[operator], ended[operator])


NEW_DELIVERY = (
    *("nonce", "session", "operator", "sink", "state", "created_at", "due_at", "settled_at", "aged_from_at"),
    *("held_base_ms", "last_error", "body_digest", "body"),
)
RESULT = (
    *("id", "state", "due_at", "settled_at", "attempts", "step", "last_status", "last_code", "last_error"),
    "history",
)


class FactsNeeded(Exception):  # noqa: N818 - not an error: the batch is decided again, with facts
    """Raised by `decide` when it was given no facts and needs them."""


RandomHex = Callable[[int, int], list[str]]


def random_hex(size: int, count: int) -> list[str]:
    """`count` texts, each of `size` random bytes in hex.

    One system call makes all of them, because each call releases the interpreter's lock and has to wait for it again.
    """
    if not count:
        return []
    text = secrets.token_hex(size * count)
    return [text[at : at + 2 * size] for at in range(0, len(text), 2 * size)]


def decide(batch: Sequence[Any], facts: Facts | None, world: World, random: RandomHex = random_hex) -> Changes:
    """Decides a batch, operation by operation, in its order. Raises FactsNeeded if `facts` is None and needed."""
    changes = Changes(world)
    sessions, deliveries = _Sessions(facts, changes), _Deliveries(facts, changes)
    sweeps = _Sweeps(facts, changes, sessions)
    for kind, operations in groupby(batch, type):
        if kind in _OF_SESSIONS:
            _OF_SESSIONS[kind](sessions, operations)
        elif kind is Sweep:
            sweeps.end_due(operations)
        elif kind is Probe:
            changes.answers += [None for _ in operations]
        else:
            _OF_DELIVERIES[kind](deliveries, operations)
    if changes.ends:
        sinks = [world.sinks_of(session) for session in changes.ends]
        sessions.keep_tokens(_tokens_kept([session.token for session in changes.ends], sinks, random))
        deliveries.add(changes.ends, sinks, random)
    sessions.seal()
    return changes


# State of touched ids, as far as it is known before anything is written. True: active, False: ended, None: unknown
_Decided = Mapping[str, bool | None]
_PlacedTouching = tuple[int, Touching, _Decided]

_ONE_TOUCHED = Touched(1, [], [])
_NOTHING_DECIDED: _Decided = {}

_TOKEN_AT = Session._fields.index("token")  # its column in the row of a session


class _Sessions:
    """The sessions that a batch concerns, as they are after each of its operations; their changes go into `changes`.

    `touch`, `open`, `end` and `record` each decide all operations of one kind, as the verbs of `Store` do for one.
    """

    __slots__ = ("_added", "_changes", "_facts", "_known", "_last_session", "_now")

    def __init__(self, facts: Facts | None, changes: Changes) -> None:
        self._facts = facts
        self._changes = changes
        self._now = changes.world.wall_at
        self._last_session = changes.world.last_session
        # Sessions by operator and id, as the operations so far have left them
        self._known: dict[str, dict[str, Session]] = {}
        # New sessions by operator and session id, in the order in which they are added, with what is kept of the token
        self._added: dict[tuple[str, str], str | None] = {}
        if facts is not None:
            for operator in facts.asked:
                self._known[operator] = {}
            for session in (*facts.sessions, *facts.outlived, *facts.due):
                self._put(session)

    def touch(self, touchings: Iterable[Touching]) -> None:
        changes = self._changes
        for touching in touchings:
            operator, session_ids = touching.operator, touching.session_ids
            if operator not in self._known and len(session_ids) == 1:  # the usual case
                changes.touched.setdefault(operator, {})[session_ids[0]] = None
                changes.touchings.append((len(changes.answers), touching, _NOTHING_DECIDED))
                changes.answers.append(_ONE_TOUCHED)
            else:
                self._touch_many(touching)

    def _touch_many(self, touching: Touching) -> None:
        """Touches several sessions, or one of an operator with facts or new sessions in this batch. What is known of
        them here is decided here; the engine's statement finds out about the others.
        """
        changes, operator = self._changes, touching.operator
        distinct = dict.fromkeys(touching.session_ids)
        mine, asked = self._known.get(operator, {}), self._asked(operator)
        decided: dict[str, bool | None] = {}
        if mine or asked:
            for session_id in distinct.keys() & (mine.keys() | asked):
                session = mine.get(session_id)
                decided[session_id] = None if session is None else session.reason is None
                if session is not None and session.reason is None:
                    self._see(session)
        left = distinct.keys() - decided.keys() if decided else distinct
        if left:
            changes.touched.setdefault(operator, {}).update(dict.fromkeys(left))
            changes.touchings.append((len(changes.answers), touching, decided))
        changes.answers.append(_touched(touching, decided, distinct.keys(), ()))

    def _asked(self, operator: str) -> set[str]:
        return self._facts.asked.get(operator, set()) if self._facts is not None else set()

    def _see(self, session: Session) -> Session:
        """Records activity in an active session."""
        seen = session._replace(seen_ms=self._changes.seen_ms, seen_at=self._now)
        self._put(seen)
        if not self._is_new(session):  # a session that this batch adds gets the time of its touch when its row is added
            self._changes.touched.setdefault(session.operator, {})[session.session_id] = None
            self._changes.active[session.id] = None
        return seen

    def open(self, openings: Iterable[Opening]) -> None:
        changes = self._changes
        for new in openings:
            known = self._find(new.operator, new.session_id)
            if known is None:
                session = self._add(self._new(new, attributes=new.attributes, lifetime_ms=new.lifetime_ms))
                changes.figures_of(new.operator).live += 1
                changes.next_due_ms = least(changes.next_due_ms, session.deadline_ms)
                changes.next_lifetime_at = least(changes.next_lifetime_at, session.lifetime_at)
                changes.answers.append(Opened("created", session))
            else:
                changes.answers.append(self._open_again(new, known))

    def _new(
        self,
        new: Opening | Recording,
        *,
        attributes: str | None = None,
        extra: str | None = None,
        lifetime_ms: int = 0,
        reason: Reason | None = None,
    ) -> Session:
        """A row for a session that begins now. If a reason is given, the session also ends now, for this reason."""
        return Session(
            id=self._last_session + 1,
            operator=new.operator,
            session_id=new.session_id,
            player_id=new.player_id,
            token=new.token,
            attributes=attributes,
            extra=extra,
            idle_ms=new.idle_ms,
            opened_at=self._now,
            seen_ms=self._changes.seen_ms,
            seen_at=self._now,
            lifetime_at=self._now + lifetime_ms if lifetime_ms else None,
            ended_at=None if reason is None else self._now,
            reason=reason,
            opened_request=new.request_id if isinstance(new, Opening) else None,
        )

    def _open_again(self, new: Opening, known: Session) -> Opened:
        self._changes.met_known |= not self._is_new(known)
        if known.reason is not None:
            return Opened("ended", known)
        if known.player_id != new.player_id or not same_token(known.token, new.token):
            return Opened("differs", known)
        return Opened("open", self._see(known))

    def _add(self, session: Session) -> Session:
        """Adds a session that is not known.

        Without facts, it must not have been touched in this batch before, because the answer of that touch depends on
        whether it is known.
        """
        if self._facts is None and session.session_id in self._changes.touched.get(session.operator, ()):
            raise FactsNeeded
        self._last_session = session.id
        self._added[session.operator, session.session_id] = session.token
        self._put(session)
        return session

    def end(self, closings: Iterable[Closing]) -> None:
        for one in closings:
            session = self._find(one.operator, one.session_id)
            if session is None and self._facts is None:
                raise FactsNeeded
            if session is not None and session.reason is None:
                session = self.end_one(session._replace(ended_request=one.request_id), "closed")
            self._changes.answers.append(session)

    def record(self, recordings: Iterable[Recording]) -> None:
        answers = self._changes.answers
        for new in recordings:
            session = self._find(new.operator, new.session_id)
            answers.append(self._record_unknown(new) if session is None else self._record_known(new, session))

    def _record_unknown(self, new: Recording) -> Recorded:
        refusal: Recorded | None = "bad_token" if new.compare_token else None
        if refusal is None and not new.accept_unknown:
            refusal = "unknown_session"
        if refusal is not None:
            if self._facts is None:  # without facts the session was assumed to be unknown, which may be wrong
                raise FactsNeeded
            return refusal
        self._changes.ends.append(self._add(self._new(new, extra=new.extra, reason="reported")))
        return "ended"

    def _record_known(self, new: Recording, session: Session) -> Recorded:
        self._changes.met_known |= not self._is_new(session)
        if new.compare_token and not same_token(session.token, new.token):
            return "bad_token"
        if session.player_id != new.player_id:
            return "player_mismatch"
        if session.reason is not None:
            return "repeated"
        # A token given at opening stays. If there was none, the token of the notice is taken
        self.end_one(session, "reported", token=None if session.token else new.token, extra=new.extra)
        return "ended"

    def end_one(self, session: Session, reason: Reason, token: str | None = None, extra: str | None = None) -> Session:
        """Ends a live session; every end is made here. Its deliveries are made when all operations are decided."""
        ended = session._replace(
            reason=reason, ended_at=self._now, token=token or session.token, extra=extra or session.extra
        )
        self._put(ended)
        self._changes.figures_of(session.operator).live -= 1
        self._changes.ends.append(ended)
        return ended

    def current(self, session: Session) -> Session:
        """The present state of a session of the facts: what the operations so far have made of it."""
        return self._known[session.operator][session.session_id]

    def _find(self, operator: str, session_id: str) -> Session | None:
        """The session after the operations so far. None if it is unknown, or assumed to be unknown because there are no
        facts.
        """
        mine = self._known.get(operator)
        return None if mine is None else mine.get(session_id)

    def _put(self, session: Session) -> None:
        self._known.setdefault(session.operator, {})[session.session_id] = session

    def _is_new(self, session: Session) -> bool:
        """Whether this batch adds the session."""
        return (session.operator, session.session_id) in self._added

    def keep_tokens(self, tokens: Sequence[str | None]) -> None:
        """Notes what is kept of the tokens of ended sessions: `tokens` has that for each of `changes.ends`. Adds to
        `changes.ended` those sessions whose rows are in the table already.
        """
        changes = self._changes
        for session, token in zip(changes.ends, tokens, strict=True):
            key = session.operator, session.session_id
            if key in self._added:
                self._added[key] = token
            else:
                seen_ms = session.seen_ms if session.reason == "inactivity" else None
                changes.ended.append((session.id, session.reason, session.extra, token, seen_ms, session.ended_request))

    def seal(self) -> None:
        """Adds the rows of new sessions. Nothing may be decided after this."""
        self._changes.last_session = self._last_session
        for (operator, session_id), token in self._added.items():
            session = self._known[operator][session_id]
            kept = token is session.token  # the whole token, as always while the session is open
            row = tuple(session) if kept else (*session[:_TOKEN_AT], token, *session[_TOKEN_AT + 1 :])
            self._changes.sessions.append(row)


class _Sweeps:
    """The sweeps of a batch: which of the sessions that the facts name as due have to end, and when to look again."""

    __slots__ = ("_changes", "_due", "_outlived", "_sessions", "_world")

    def __init__(self, facts: Facts | None, changes: Changes, sessions: _Sessions) -> None:
        self._changes = changes
        self._world = changes.world
        self._sessions = sessions
        # Both: sessions of the facts that no sweep of this batch has looked at yet
        self._outlived: Sequence[Session] = () if facts is None else facts.outlived
        self._due: Sequence[Session] = () if facts is None else facts.due

    def end_due(self, sweeps: Iterable[Sweep]) -> None:
        self._changes.swept = True
        for sweep in sweeps:
            ended, looked_at = self._end_outlived(sweep.most)
            if sweep.as_of_ms is not None:
                idle, due = self._end_idle(sweep.as_of_ms, sweep.most)
                ended, looked_at = ended + idle, max(looked_at, due)
            self._changes.answers.append(Swept(ended, looked_at))

    def _end_outlived(self, most: int) -> tuple[int, int]:
        """Ends sessions past their maximum lifetime. Returns how many ended, and how many were looked at."""
        outlived, self._outlived = self._outlived[:most], self._outlived[most:]
        ended = 0
        for session in map(self._sessions.current, outlived):
            if session.reason is not None:
                continue  # an earlier operation of this batch has ended it
            if session.operator not in self._world.configured:
                self._changes.moved_lifetime.append((session.id, self._world.wall_at + self._revisit_ms(session)))
            else:
                self._sessions.end_one(session, "max_lifetime")
                ended += 1
        return ended, len(outlived)

    def _end_idle(self, as_of_ms: int, most: int) -> tuple[int, int]:
        """Ends sessions whose idle time is over. Returns how many ended, and how many were looked at."""
        due, self._due = self._due[:most], self._due[most:]
        ended = 0
        for session in map(self._sessions.current, due):
            if session.reason is not None:
                continue  # an earlier operation of this batch has ended it
            if session.deadline_ms > as_of_ms:  # the session was touched: `deadline_ms` is its true deadline
                self._changes.moved_due.append((session.id, session.deadline_ms))
            elif session.operator not in self._world.configured:  # its sinks are unknown: no notice would be sent
                self._changes.moved_due.append((session.id, as_of_ms + self._revisit_ms(session)))
            elif (until_ms := self._waits_until(session, as_of_ms)) is not None:
                again_ms = silence.look_again_ms(as_of_ms, until_ms, session.idle_ms, self._world.grace_ms)
                self._changes.moved_due.append((session.id, again_ms))
            else:
                self._sessions.end_one(session, "inactivity")
                ended += 1
        return ended, len(due)

    def _revisit_ms(self, session: Session) -> int:
        """How long (ms) to wait before the next look at a session whose operator is not configured."""
        due_for_ms = self._world.service_ms - session.deadline_ms
        return max(min(session.idle_ms, REVISIT_MS), min(int(due_for_ms * REVISIT_SHARE), REVISIT_MAX_MS))

    def _waits_until(self, session: Session, as_of_ms: int) -> int | None:
        """Until when (service time) the end of an idle session waits, because its operator's touches have stopped or
        were refused.
        """
        operator, world, changes = session.operator, self._world, self._changes
        again_ms = silence.may_touch_until(session.seen_ms, world.returned_ms.get(operator), world.grace_ms)
        if again_ms > as_of_ms:
            return again_ms
        if operator not in world.pausing:
            return None
        touched_ms = changes.seen_ms if operator in changes.touched else world.touched_ms.get(operator)
        pause = changes.pauses.get(operator) or world.pauses.get(operator)
        if pause is None:
            figures = world.figures.get(operator)
            live = 0 if figures is None else figures.live
            if not silence.stopped(touched_ms, as_of_ms, session.idle_ms, live):
                return None
            pause = changes.pauses[operator] = silence.Pause(as_of_ms, silence.silence_of(session.idle_ms))
        return silence.waits_until(pause, touched_ms, as_of_ms, world.grace_ms)


class _Deliveries:
    """The deliveries and gates that a batch concerns, as they are after each of its operations.

    Their changes go into `changes`. The methods for operations are as in `_Sessions`.
    """

    __slots__ = ("_changes", "_facts", "_now", "_settled", "_world")

    def __init__(self, facts: Facts | None, changes: Changes) -> None:
        self._facts = facts
        self._changes = changes
        self._world = changes.world
        self._now = changes.world.wall_at
        self._settled: set[int] = set()  # deliveries that this batch has settled so far
        if self._world.set_back_ms:
            self._set_gates_back()

    def settle(self, settlements: Iterable[Settlement]) -> None:
        for one in settlements:
            self._changes.answers.append(self._settled_one(one))

    def _settled_one(self, one: Settlement) -> Settled:
        """Stores one result. If the delivery was settled before, only the gate changes.

        If another daemon has taken over the operator meanwhile, only a success is stored, and the gate stays as it is.
        """
        delivery, due_at = one.delivery, self._now + one.wait_ms
        is_late = self._world.elsewhere(delivery.operator)
        if is_late and one.state != "delivered":
            before = self._gate(delivery.operator)
            return Settled(due_at, before, before)
        if self._is_pending(delivery.id):
            self._changes.results[delivery.id] = _result(one, due_at, self._now)
            if one.state == "pending":
                self._note_due(delivery.operator, delivery.sink, due_at)
            else:
                self._settled.add(delivery.id)
                figures = self._changes.figures_of(delivery.operator)
                figures.pending -= 1
                figures.dead += one.state == "dead"
                if delivery.token:
                    # The nonce serves as salt: a salt need not be secret, it only makes hashes of equal tokens differ
                    self._changes.digests.append((delivery.session, digest(delivery.token, delivery.nonce[:16])))
        before, alter = self._gate(delivery.operator), one.gate
        if alter is None or is_late:
            return Settled(due_at, before, before)
        return Settled(due_at, before, self._alter(delivery.operator, lambda gate: alter(gate, self._now)))

    def _is_pending(self, delivery: int) -> bool:
        return delivery not in self._settled and (self._facts is None or delivery in self._facts.pending)

    def _note_due(self, operator: str, sink: str, due_at: int) -> None:
        known = self._changes.due.get((operator, sink))
        self._changes.due[operator, sink] = due_at if known is None else min(known, due_at)

    def set_gate(self, gate_changes: Iterable[GateChange]) -> None:
        for one in gate_changes:
            self._changes.answers.append(self._alter(one.operator, one.alter))

    def _gate(self, operator: str) -> Gate:
        return self._changes.gates.get(operator) or self._world.gates.get(operator, OPEN_GATE)

    def _alter(self, operator: str, alter: Callable[[Gate], Gate]) -> Gate:
        before = self._gate(operator)
        gate = alter(before)
        if gate is not before and gate != before:
            self._changes.gates[operator] = gate
        return gate

    def _set_gates_back(self) -> None:
        """Moves the waits in all gates back by as much as the wall clock was set back.

        Waits are stored as wall times because they must survive a restart. They are moved in the transaction that
        stores the new time, so that nothing waits longer than it was meant to, even if the daemon is killed at any
        moment. The engine moves the due times of deliveries in the same transaction.
        """
        for operator in self._world.gates:
            if self._world.moves_waits(operator):  # only one of several daemons moves them
                self._alter(operator, partial(_gate_set_back, now_at=self._now, by_ms=self._world.set_back_ms))

    def retry_dead(self, retries: Iterable[RetryDead]) -> None:
        sinks = self._looked_up.dead
        for one in retries:
            dead = [(number, sinks[number]) for number in one.deliveries if number in sinks]
            self._revive(one.operator, dead, counted=len(dead))
            self._changes.answers.append(len(sinks))

    def retry_one(self, retries: Iterable[RetryOne]) -> None:
        for one in retries:
            delivery = self._looked_up.deliveries[one.webhook_id]
            if delivery is not None and delivery.id in self._looked_up.dead:
                counted = int(delivery.discarded is None)
                self._revive(delivery.operator, [(delivery.id, delivery.sink)], counted=counted)
            self._changes.answers.append(delivery)

    def _revive(self, operator: str, dead: Sequence[tuple[int, str]], *, counted: int) -> None:
        """Makes dead deliveries, given as (id, sink), due again; `counted` is how many of them count as dead.

        They are RETRY_SPACING_MS apart, also from those of earlier calls, so that an operator's server that has just
        come back is not flooded.
        """
        gate = self._gate(operator)
        due_at = max(self._now, gate.paced_until_at)
        for number, sink in dead:
            self._changes.revived.append((number, due_at, self._now, retry.held_ms(gate, self._now)))
            self._note_due(operator, sink, due_at)
            due_at += RETRY_SPACING_MS
        self._changes.gates[operator] = replace(gate, paced_until_at=due_at)
        figures = self._changes.figures_of(operator)
        figures.dead -= counted
        figures.pending += len(dead)

    def discard(self, discards: Iterable[Discard]) -> None:
        for one in discards:
            operators = self._looked_up.to_discard
            known = orjson.dumps({"at": self._now, "by": one.by, "note": one.note}).decode()
            self._changes.discarded += [(number, known) for number in operators]
            for operator in operators.values():
                self._changes.figures_of(operator).dead -= 1
            self._changes.answers.append(len(operators))

    def prune(self, prunings: Iterable[Pruning]) -> None:
        for one in prunings:
            old, deliveries = self._looked_up.old, self._looked_up.old_deliveries
            kept = {d.session for d in deliveries if d.state == "pending" or (d.settled_at or 0) >= one.before_at}
            for delivery in deliveries:
                counts = delivery.state == "dead" and delivery.discarded is None
                if counts and delivery.session not in kept:
                    self._changes.figures_of(delivery.operator).dead -= 1
            gone = [number for number, _ in old if number not in kept]
            self._changes.pruned += gone
            last, last_at = old[-1] if old else (0, 0)
            self._changes.answers.append(Pruned(len(gone), (last_at, last) if len(old) == PRUNE_ROWS else None))

    @property
    def _looked_up(self) -> Facts:
        if self._facts is None:
            raise FactsNeeded
        return self._facts

    def add(self, ends: Sequence[Session], sinks: Sequence[Sequence[NewDelivery]], random: RandomHex) -> None:
        """Adds one delivery for each sink of each ended session. Must be called once, after all operations."""
        now, rows = self._now, []
        for session, its in zip(ends, sinks, strict=True):
            if not its:
                continue
            figures, held_ms = (
                self._changes.figures_of(session.operator),
                retry.held_ms(self._gate(session.operator), now),
            )
            for sink, body, impossible in its:
                if impossible is None:
                    figures.pending += 1
                    self._note_due(session.operator, sink, now)
                else:
                    figures.dead += 1
                fate = ("dead", now, now, now) if impossible else ("pending", now, now, None)
                known = (now, held_ms, impossible, _digest_of(body), body.decode())
                rows.append((session.id, session.operator, sink, *fate, *known))
        nonces = random(10, len(rows))
        self._changes.deliveries = [(nonce, *row) for nonce, row in zip(nonces, rows, strict=True)]


_OF_SESSIONS: Mapping[type, Callable[[_Sessions, Any], None]] = {
    Opening: _Sessions.open,
    Touching: _Sessions.touch,
    Closing: _Sessions.end,
    Recording: _Sessions.record,
}
_OF_DELIVERIES: Mapping[type, Callable[[_Deliveries, Any], None]] = {
    Settlement: _Deliveries.settle,
    GateChange: _Deliveries.set_gate,
    RetryDead: _Deliveries.retry_dead,
    RetryOne: _Deliveries.retry_one,
    Discard: _Deliveries.discard,
    Pruning: _Deliveries.prune,
}


# -- helpers


def _touched(touching: Touching, decided: _Decided, active: Iterable[str], ended: Iterable[str]) -> Touched:
    """The answer of a touch. Ids in `decided` have the states that are given there. Other ids are in `active`, in
    `ended`, or unknown.
    """
    session_ids = dict.fromkeys(touching.session_ids)
    if not decided and session_ids.keys() <= set(active):  # the usual case
        return Touched(len(session_ids), [], [])
    states: dict[str, bool | None] = {**dict.fromkeys(active, True), **dict.fromkeys(ended, False), **decided}
    found = {session_id: states.get(session_id) for session_id in session_ids}
    return Touched(
        sum(state is True for state in found.values()),
        [session_id for session_id, state in found.items() if state is None],
        [session_id for session_id, state in found.items() if state is False],
    )


def _attempts(settlement: Settlement) -> int:
    """The number of attempts at the delivery, including this one if it counts."""
    return settlement.delivery.attempts + bool(settlement.attempt and settlement.spent)


def _result(settlement: Settlement, due_at: int, now_at: int) -> tuple[Any, ...]:
    """The values of the columns RESULT for a result."""
    delivery, attempt = settlement.delivery, settlement.attempt or {}
    history = orjson.loads(delivery.history)
    if attempt:
        history.append(attempt)
    return (
        *(delivery.id, settlement.state, due_at, None if settlement.state == "pending" else now_at),
        *(_attempts(settlement), settlement.step),
        attempt.get("status", delivery.last_status),
        attempt.get("code", delivery.last_code),
        attempt.get("error", delivery.last_error),
        orjson.dumps(history[-HISTORY_MAX:]).decode(),
    )


def _tokens_kept(
    tokens: Sequence[str | None], sinks: Sequence[Sequence[NewDelivery]], random: RandomHex
) -> list[str | None]:
    """What is kept of the tokens of ended sessions: the token if it still has to be sent, else only its salted hash."""
    unneeded = [not its or all(one.impossible for one in its) for its in sinks]
    salts = iter(random(8, sum(unneeded)))
    return [
        digest(token, next(salts)) if token and never else token for token, never in zip(tokens, unneeded, strict=True)
    ]


def _gate_set_back(gate: Gate, now_at: int, by_ms: int) -> Gate:
    def back(at: int) -> int:
        return max(now_at, at - by_ms) if at > now_at else at

    return replace(
        gate,
        not_before_at=back(gate.not_before_at),
        probe_at=back(gate.probe_at),
        paced_until_at=back(gate.paced_until_at),
        held_until_at=None if gate.held_until_at is None else back(gate.held_until_at),
    )


def _digest_of(body: bytes) -> str | None:
    """The SHA-256 (hex) of a body, kept as proof of what was sent when the body is deleted; None for an empty body."""
    return hashlib.sha256(body).hexdigest() if body else None


_DIGEST = "\x1f"  # marks the salted hash of a token; a token itself has no control characters


def digest(token: str, salt: str) -> str:
    """The salted hash that replaces a token once it need not be sent any more. `same_token` can still compare it."""
    return f"{_DIGEST}{salt}{hashlib.sha256(f'{salt}{token}'.encode()).hexdigest()}"


def same_token(stored: str | None, given: str | None) -> bool:
    """Compares a stored token, or its salted hash, with a given one in constant time. Two absent tokens are equal."""
    if stored is None or given is None:
        return stored is given
    if stored.startswith(_DIGEST):
        given = digest(given, stored[1:17])
    return hmac.compare_digest(stored.encode(), given.encode())


def least(one: int | None, other: int | None) -> int | None:
    """The smaller of two numbers, either of which may be missing (None)."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
