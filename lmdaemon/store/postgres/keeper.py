"""Keeps in memory what the writer needs of the tables. It gives the state on which a batch is decided, and takes over
what a batch has changed, or what was read anew after joining or an outage.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lmdaemon.log import Log
from lmdaemon.model import Session
from lmdaemon.store.contract import SWEEP_ROWS, Operation, Sweep
from lmdaemon.store.postgres import members
from lmdaemon.store.postgres.batch import Batch, Moved, Place, Present
from lmdaemon.store.postgres.foreign import Foreign
from lmdaemon.store.postgres.membership import Membership
from lmdaemon.store.postgres.owners import CLAIM, OWNERS, Owners
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.tables import NEXT_BLOCK, Found, read
from lmdaemon.store.postgres.telling import Telling
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.postgres.wall import ServerClock
from lmdaemon.store.projection import Projection
from lmdaemon.store.rules import least
from lmdaemon.store.writer import BATCH_MAX

READING_S = 5.0  # the longest time that reading the tables takes: what was read is no older than this
TELL_TOUCHES_S = 1.0  # how often the others are told when operators were touched
BLOCK = 10_000  # session numbers taken at a time, as many as in schema.sql; more than a batch can use

_OPERATOR, _IDLE_MS, _SEEN_MS, _LIFETIME_AT, _REASON = map(
    Session._fields.index, ("operator", "idle_ms", "seen_ms", "lifetime_at", "reason")
)

log = Log("daemon")


class Keeper:
    """Keeps in memory what the tables say, for the writer. Everything is called on the event loop, unless a method says
    otherwise.
    """

    def __init__(
        self,
        projection: Projection,
        clock: ServerClock,
        membership: Membership,
        foreign: Foreign,
        signals: Signals,
        telling: Telling,
    ) -> None:
        self._projection = projection
        self._clock = clock
        self._membership = membership
        self._foreign = foreign
        self._signals = signals
        self._telling = telling
        self._expect_known = False  # whether the last batch was to add sessions that were known already
        self._block_ends = 0
        self._told_touches = float("-inf")  # when the others were last told of touches (monotonic s)

    # -- joining, and reading the tables again

    def joining(self, database: str) -> Callable[[Connection], tuple[Place, Found]]:
        """Returns a function that joins the daemons on the database and reads the tables, to be run on the connection's
        thread. `database` is its name in messages.
        """
        projection, membership = self._projection, self._membership
        own_ms, wall_at, who = projection.service_clock.now_ms(), self._clock.wall_ms(), membership.introduction
        configured, grace_ms, now_s = projection.configured, projection.grace_ms, self._clock.monotonic()
        membership.introduced = who

        def run(sql: Connection) -> tuple[Place, Found]:
            joined = members.join(sql, who, own_ms, wall_at, grace_ms, database)
            owners = Owners()
            owners.load(joined.member, [row[:3] for row in sql.execute(OWNERS)])
            claim = owners.wishes(configured, [joined.member, *joined.seen.others], now_s).claim
            if claim:
                sql.execute(CLAIM, (joined.member, claim))
            return Place(joined.member, joined.batch + 1), read(sql, joined.member, joined)

        return run

    def take_over(self, found: Found) -> None:
        """Takes over what was read after joining, or after an outage."""
        asked = self._clock.ask()
        self._clock.told(found.at, asked._replace(at_s=asked.at_s - READING_S))
        if found.joined is not None:
            self._note_joining(found.joined)
        self.load(found)
        due_ms, lifetime_at = self._membership.deadlines.earliest
        self._projection.reload(found.loaded._replace(next_due_ms=due_ms, next_lifetime_at=lifetime_at))

    def _note_joining(self, joined: members.Joined) -> None:
        membership, others = self._membership, len(joined.seen.others)
        if membership.owners.me:
            log.warning("daemon.joined_again", name=membership.introduction.name, others=others)
        else:
            log.info("daemon.joined", name=membership.introduction.name, others=others)
        membership.company.begin(joined.heard_ms, joined.seen)
        membership.note_claims(self._projection.configured)
        self._signals.look.set()
        self._signals.hint.set()

    def load(self, found: Found) -> None:
        """Takes over what the projection does not keep: owners and their deadlines, the other daemons' part of the
        figures, and numbers for sessions.
        """
        membership = self._membership
        self._foreign.load(found)
        self._take_block(found.loaded.last_session + 1)
        membership.take_owners(found.owners, membership.owners.me if found.joined is None else found.joined.member)
        for deadline in found.next:
            membership.deadlines.set(*deadline)

    # -- numbers of sessions

    @property
    def is_short_of_numbers(self) -> bool:
        """Whether the next batch may need more numbers for sessions than are left."""
        return self._block_ends - self._projection.last_session < BATCH_MAX

    def take_numbers(self, sql: Connection) -> None:
        """Takes numbers for the next sessions, on the connection's thread."""
        row = sql.execute(NEXT_BLOCK).fetchone()
        assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
        self._take_block(row[0])

    def _take_block(self, first: int) -> None:
        self._projection.last_session = first - 1
        self._block_ends = first + BLOCK - 1

    # -- batches

    def begin(self, operations: Sequence[Operation[Any]]) -> Batch:
        """Makes a batch of the operations, with what is in memory to decide it on."""
        present, when_sent = self._present(operations), self._telling.when_sent()
        return Batch(operations, present, expect_known=self._expect_known, when_sent=when_sent)

    def renew(self, work: Batch) -> None:
        """Has a batch decided again, on what is in memory now."""
        work.renew(self._present(work.operations))

    def _present(self, operations: Sequence[Operation[Any]]) -> Present:
        projection, company, owners = self._projection, self._membership.company, self._membership.owners
        passed_at = company.passed_at(self._clock.monotonic())  # before the service clock is read
        world = projection.world()._replace(elsewhere=owners.is_elsewhere, moves_waits=self._membership.moves_waits)
        present = Present(
            world,
            self._foreign.versions,
            next_due_ms=projection.next_due_ms,
            asked=self._clock.ask(),
            known_at=passed_at,
        )
        sweeps = [one for one in operations if isinstance(one, Sweep)]
        if sweeps:
            as_of_ms = max((one.as_of_ms for one in sweeps if one.as_of_ms is not None), default=None)
            present = present._replace(due=self._membership.deadlines.due(as_of_ms, world.wall_at))
        if company.others:
            tells = self._clock.monotonic() - self._told_touches >= TELL_TOUCHES_S
            hints_as = self._membership.introduction.name if projection.is_idle else None
            present = present._replace(has_company=True, tells_touches=tells, hints_as=hints_as)
        if world.set_back_ms:
            of_others = self._membership.is_first
            present = present._replace(moved=Moved(owners.elsewhere if of_others else owners.mine, others=of_others))
        return present

    def committed(self, work: Batch) -> None:
        """Takes over what a batch has changed."""
        projection, membership, changes = self._projection, self._membership, work.changes
        if work.looked_up and (changes.met_known or changes.sessions):
            self._expect_known = changes.met_known
        self._foreign.committed(work)
        if changes.pauses:
            self._signals.look.set()  # the next look tells the other daemons
        if changes.sessions:
            self._note_opened(work)
        for deadline in work.next:
            membership.deadlines.set(*deadline)
        if changes.swept:
            changes.next_due_ms, changes.next_lifetime_at = membership.deadlines.earliest
        membership.company.told_ms, membership.proven_s = changes.world.service_ms, work.asked.at_s
        if work.tells_touches and changes.touched:
            self._told_touches = self._clock.monotonic()
        was_idle = projection.is_idle
        projection.take_over(changes)
        self._telling.now()
        if _is_followed(work):
            self._telling.put_off(changes)
        else:
            projection.tell_of_ends(changes)
        is_idle = projection.is_idle
        if was_idle != is_idle:
            self._signals.beat.set()
            self._signals.look.set()
        if work.seen is not None:
            membership.learn(work.seen, work.asked)
        if membership.company.others:
            concerns_others = any(membership.owners.is_elsewhere(operator) for operator in changes.figures)
            if changes.gates or concerns_others:
                self._signals.hint.set()

    def _note_opened(self, work: Batch) -> None:
        """Notes the deadlines of newly opened sessions. In `changes` it leaves only those that are the next ones of
        this daemon's operators, because this daemon's sweeper waits for no others.
        """
        changes = work.changes
        changes.next_due_ms = changes.next_lifetime_at = None
        for row in changes.sessions:
            if row[_REASON] is None:
                due_ms, lifetime_at = row[_SEEN_MS] + row[_IDLE_MS], row[_LIFETIME_AT]
                if self._membership.deadlines.nearer(row[_OPERATOR], due_ms, lifetime_at):
                    changes.next_due_ms = least(changes.next_due_ms, due_ms)
                    changes.next_lifetime_at = least(changes.next_lifetime_at, lifetime_at)

    def available(self, available: bool) -> None:
        """Is called when the engine stops accepting writes, and when it accepts them again."""
        self._projection.available(available)

    def measured(self, operations: int, took_s: float) -> None:
        """Is called with the duration of each transaction, in seconds."""
        self._projection.measured(operations, took_s)


def _is_followed(work: Batch) -> bool:
    """Whether the batch is one of many sweeps that follow each other (`Sweep.crowd`), and not the last of them."""
    return any(
        isinstance(one, Sweep) and one.crowd and answer.looked_at >= SWEEP_ROWS
        for one, answer in zip(work.operations, work.changes.answers, strict=True)
    )
