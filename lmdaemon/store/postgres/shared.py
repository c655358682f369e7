"""The store's part in a database that other daemons use, too: what it keeps in memory of them, and the loops beside its
writer.

It tells the others how far this daemon has heard (beats), looks at what they have done, expels those that are gone,
and takes, asks for and hands over operators. What it knows of others may be old by a look; what must be true is
asked again in the statement that depends on it.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any, NamedTuple

import orjson
import psycopg

from lmdaemon.clock import Clock
from lmdaemon.log import Log
from lmdaemon.model import Gate, Member, Session
from lmdaemon.store.contract import Figures, Operation, Probe, Pruned, StoreError, Sweep, Swept, Wish
from lmdaemon.store.postgres import asking, hints, members
from lmdaemon.store.postgres.asking import Question
from lmdaemon.store.postgres.batch import GATE, NEXT, Batch, Place, Present, fetch_all
from lmdaemon.store.postgres.cluster import LEASE_S
from lmdaemon.store.postgres.company import NOW, OTHERS, Company, Seen, seen
from lmdaemon.store.postgres.deadlines import Deadlines
from lmdaemon.store.postgres.hints import Hints
from lmdaemon.store.postgres.members import Introduction, Joined
from lmdaemon.store.postgres.owners import CLAIM, HAND_OVER, OWNERS, WANT, Owners, Wishes
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.postgres.writer import Server
from lmdaemon.store.projection import Loaded
from lmdaemon.store.rules import least
from lmdaemon.store.verbs import Verbs
from lmdaemon.store.writer import BATCH_MAX

TOLD_MAX = 10  # operators that a line of the log names

BEAT_S = 0.5  # between two transactions, while sessions are live
IDLE_BEAT_S = 2.5  # the same while none is
BEAT_MIN_S = 0.02  # between two beats, when deadlines follow each other closely
BEAT_AFTER_S = 0.002  # after a deadline of the others' operators
IDLE_HINTED_S = 30.0  # the same where hints arrive
LOOK_S = 0.2  # between two looks at what others have done
LOOK_HINTED_S = 1.5  # the same where hints arrive
AGAIN_S = 1.0  # before a look or a hint is tried again that has failed
HINT_MIN_S = 0.05  # between two hints
STILL_S = 1.5  # a daemon that has had no transaction for so long is given a hint that others watch it
RELEASE_S = 5.0  # for the owner of an operator to let its ends go on
TELL_TOUCHES_S = 1.0  # how often the others are told when operators were touched
WAITS_S = (0.004, 0.008, 0.015, 0.03, 0.06, 0.12)  # for others to hear past a deadline, before it is given up for now
BLOCK = 10_000  # numbers of sessions that are taken at a time, as schema.sql says; more than a batch can use

# The service clock, and when it was kept: of those that are there, and of the last one that has gone.
CLOCK = """
SELECT max(service_ms), max(wall_at)
FROM (SELECT service_ms, wall_at FROM lmdaemon.clock
      UNION ALL SELECT heard_ms, wall_at FROM lmdaemon.member) AS known"""
# Figures of every operator.
FIGURES = (
    "SELECT operator, sum(live)::bigint, sum(pending)::bigint, sum(dead)::bigint FROM lmdaemon.figure GROUP BY operator"
)
# The parts of them that are not this daemon's.
OTHERS_FIGURES = """
SELECT operator, sum(live)::bigint, sum(pending)::bigint, sum(dead)::bigint, sum(opened)::bigint, sum(made)::bigint,
       max(touched_ms)
FROM lmdaemon.figure WHERE member <> %s GROUP BY operator"""
# What holds every operator back, with the number of its last change.
OPERATORS = f"SELECT name, version, {', '.join(GATE)} FROM lmdaemon.operator"
# Numbers for the next sessions.
NEXT_BLOCK = "SELECT nextval('lmdaemon.session_block')"
# What others have done: who is there, what they ask, whether owners and gates have changed, and the others' figures.
LOOK = f"""
SELECT {NOW}, {OTHERS}, {asking.UNANSWERED}, (SELECT coalesce(sum(epoch), 0)::bigint FROM lmdaemon.owner),
       (SELECT coalesce(sum(version), 0)::bigint FROM lmdaemon.operator),
       (SELECT json_agg(to_json(f))::text FROM ({OTHERS_FIGURES}) AS f (o, l, p, d, opened, made, touched))"""
# When the earliest pending delivery is due, by operator and sink: a step in the index for each sink.
EARLIEST = """
WITH RECURSIVE its (operator, sink) AS (
    SELECT name, (SELECT min(sink) FROM lmdaemon.delivery WHERE operator = name)
    FROM unnest(%s::text[]) AS name
    UNION ALL
    SELECT its.operator, (
        SELECT min(d.sink) FROM lmdaemon.delivery d WHERE d.operator = its.operator AND d.sink > its.sink)
    FROM its WHERE its.sink IS NOT NULL)
SELECT its.operator, its.sink, (
    SELECT due_at FROM lmdaemon.delivery d
    WHERE d.operator = its.operator AND d.sink = its.sink AND d.state = 'pending' ORDER BY due_at LIMIT 1)
FROM its WHERE its.sink IS NOT NULL"""


# The daemons by their numbers.
NAMES = "SELECT id, name FROM lmdaemon.member"

log = Log("daemon")


class Part(NamedTuple):
    """The others' part of an operator's figures; `opened` and `made` count what its owner has to find out."""

    live: int = 0
    pending: int = 0
    dead: int = 0
    opened: int = 0
    made: int = 0
    touched_ms: int = 0


NO_PART = Part()


class Found(NamedTuple):
    """What was read of the tables, and who is there, if this daemon has joined just before."""

    loaded: Loaded
    joined: Joined | None
    parts: dict[str, Part]
    owners: list[tuple[str, int, int | None, int]]
    versions: dict[str, int]
    next: list[tuple[str, int | None, int | None]]  # deadlines of its operators; before it has joined, of all


class Shared(Verbs):
    """A store that may be one of several on its database. The engine's store is a subclass."""

    _server: Server[Found]
    _reads: Reads

    def __init__(self, clock: Clock, name: str) -> None:
        super().__init__(clock, name)
        self._owners = Owners()
        self._deadlines = Deadlines()
        self._parts: dict[str, Part] = {}
        self._versions: dict[str, int] = {}
        self._expect_known = False
        self._block_ends = 0
        self._company: Company
        self._rng = Random()  # noqa: S311 - jitter, not secrets
        self._claimed_for: frozenset[str] | None = None  # `configured` when operators were claimed last
        self._introduced: Introduction | None = None  # as this daemon's row has it
        self._told_touches = float("-inf")  # monotonic seconds
        self._must_look = asyncio.Event()
        self._must_beat = asyncio.Event()
        self._must_hint = asyncio.Event()
        self._must_prove = False  # that this daemon is there, with a transaction before the next look
        self._opened: set[str] = set()  # operators of which others have opened sessions that were not looked at yet
        self._made: set[str] = set()  # the same of deliveries
        self._hints: Hints
        self._looking = asyncio.Lock()
        self._answering: set[int] = set()  # questions of others that this daemon sees to
        self._epochs = 0  # sum of all owners' numbers
        self._names: dict[int, str] = {}  # of the other daemons, as the log has told them

    # -- what the settings say

    def configure(self, *arguments: Any, **named: Any) -> None:
        super().configure(*arguments, **named)
        self._must_look.set()

    def introduce(self, address: str, digest: str) -> None:
        if (address, digest) != (self._address, self._digest):
            super().introduce(address, digest)
            self._must_look.set()

    @property
    def _introduction(self) -> Introduction:
        return Introduction(self._name, self._since_at, self._address, self._digest)

    # -- owners

    def owns(self, operator: str) -> bool:
        return self._owners.owns(operator)

    @property
    def hold_until_ms(self) -> int:
        return self._company.hold_until_ms

    def let_go(self, operator: str) -> None:
        self._owners.let_go(operator)
        self._must_look.set()

    def _take_owners(self, found: Sequence[tuple[str, int, int | None, int]], member: int) -> list[str]:
        """Takes over the rows of `owner`. Returns the operators of which no deadline is known yet."""
        before = self._owners.delivers_for
        self._epochs = sum(epoch for *_, epoch in found)
        self._owners.load(member, [row[:3] for row in found])
        new = self._deadlines.keep(self._owners.mine)
        self._tell_owners(before)
        return new

    def _tell_owners(self, before: frozenset[str]) -> None:
        now = self._owners.delivers_for
        if before != now:
            changed = sorted(before ^ now)
            named = ",".join(changed[:TOLD_MAX]) + (",…" if len(changed) > TOLD_MAX else "")
            counts = {"operators": len(now), "gained": len(now - before), "lost": len(before - now)}
            log.info("daemon.owns", **counts, changed=named)
        for operator in sorted(before ^ now):
            for observer in self.observers:
                observer.ownership_changed(operator)

    # -- what the writer asks

    def joining(self) -> Callable[[Connection], tuple[Place, Found]]:
        own_ms, wall_at, who = self.service_clock.now_ms(), self._clock.wall_ms(), self._introduction
        configured, title, now_s = self.configured, self._server.database, self._clock.monotonic()
        self._introduced = who

        def run(sql: Connection) -> tuple[Place, Found]:
            joined = members.join(sql, who, own_ms, wall_at, title)
            owners = Owners()
            owners.load(joined.member, [row[:3] for row in sql.execute(OWNERS)])
            claim = owners.wishes(configured, [joined.member, *joined.seen.others], now_s).claim
            if claim:
                sql.execute(CLAIM, (joined.member, claim))
            return Place(joined.member, joined.batch + 1), read(sql, joined.member, joined)

        return run

    def reading(self) -> Callable[[Connection], Found]:
        member = self._server.member or 0
        return lambda sql: read(sql, member)

    def take_over(self, found: Found) -> None:
        if found.joined is not None:
            others = len(found.joined.seen.others)
            if self._owners.me:
                log.warning("daemon.joined_again", name=self._name, others=others)
            else:
                log.info("daemon.joined", name=self._name, others=others)
            self._company.begin(found.joined.heard_ms, found.joined.seen)
            self._claimed_for = self.configured
            self._must_look.set()
            self._must_hint.set()
        self._keep(found)
        self.reload(self._with_deadlines(found.loaded))

    def _keep(self, found: Found) -> None:
        self._versions, self._parts = found.versions, found.parts
        self._take_block(found.loaded.last_session + 1)
        self._take_owners(found.owners, found.joined.member if found.joined is not None else self._owners.me)
        for deadline in found.next:
            self._deadlines.set(*deadline)

    def _with_deadlines(self, loaded: Loaded) -> Loaded:
        due_ms, lifetime_at = self._deadlines.earliest
        return loaded._replace(next_due_ms=due_ms, next_lifetime_at=lifetime_at)

    @property
    def is_short_of_numbers(self) -> bool:
        """Whether the next batch may need more numbers for sessions than are left."""
        return self._block_ends - self._last_session < BATCH_MAX

    def take_numbers(self, sql: Connection) -> None:
        """Takes numbers for the next sessions."""
        row = sql.execute(NEXT_BLOCK).fetchone()
        assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
        self._take_block(row[0])

    def _take_block(self, first: int) -> None:
        self._last_session = first - 1
        self._block_ends = first + BLOCK - 1

    def begin(self, operations: Sequence[Operation[Any]]) -> Batch:
        return Batch(operations, self._present(operations), expect_known=self._expect_known)

    def renew(self, work: Batch) -> None:
        work.renew(self._present(work.operations))

    def _present(self, operations: Sequence[Operation[Any]]) -> Present:
        world = self.world()._replace(elsewhere=self._owners.is_elsewhere)
        present = Present(world, self._versions, known_at=self._company.known_at, next_due_ms=self.next_due_ms)
        sweeps = [one for one in operations if isinstance(one, Sweep)]
        if sweeps:
            as_of_ms = max((one.as_of_ms for one in sweeps if one.as_of_ms is not None), default=None)
            present = present._replace(due=self._deadlines.due(as_of_ms, world.wall_at))
        if self._company.others:
            tells = self._clock.monotonic() - self._told_touches >= TELL_TOUCHES_S
            present = present._replace(has_company=True, tells_touches=tells, elsewhere=self._owners.elsewhere)
        return present

    def committed(self, work: Batch) -> None:
        changes = work.changes
        if work.looked_up and (changes.met_known or changes.sessions):
            self._expect_known = changes.met_known
        self._take_versions(work)
        if changes.sessions:
            self._note_opened(work)
        for deadline in work.next:
            self._deadlines.set(*deadline)
        if changes.swept:
            changes.next_due_ms, changes.next_lifetime_at = self._deadlines.earliest
        self._company.told_ms = changes.world.service_ms
        if work.tells_touches and changes.touched:
            self._told_touches = self._clock.monotonic()
        was_live = self.live > 0
        self.absorb(changes)
        if was_live != (self.live > 0):
            self._must_beat.set()
            self._must_look.set()
        if work.seen is not None:
            self._learn(work.seen)
        if self._company.others:
            concerns_others = any(self._owners.is_elsewhere(operator) for operator in changes.figures)
            if changes.gates or concerns_others or (self.live and not was_live):
                self._must_hint.set()

    def _take_versions(self, work: Batch) -> None:
        """Of the gates that a batch has changed; one that another daemon has changed since is known already."""
        for name in list(work.changes.gates):
            version = work.versions.get(name, 0) + 1
            if self._versions.get(name, 0) > version:
                del work.changes.gates[name]
            else:
                self._versions = {**self._versions, name: version}

    def _note_opened(self, work: Batch) -> None:
        """Leaves only those deadlines of what a batch has opened that this daemon is to keep."""
        changes = work.changes
        changes.next_due_ms = changes.next_lifetime_at = None
        for row in changes.sessions:
            if row[_REASON] is None:
                due_ms, lifetime_at = row[_SEEN_MS] + row[_IDLE_MS], row[_LIFETIME_AT]
                if self._deadlines.nearer(row[_OPERATOR], due_ms, lifetime_at):
                    changes.next_due_ms = least(changes.next_due_ms, due_ms)
                    changes.next_lifetime_at = least(changes.next_lifetime_at, lifetime_at)

    # -- ends

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        if self.configured is not self._claimed_for:
            await self.look()
        as_of_ms = await self._heard_by_all() if idle else None
        is_aged = self.next_lifetime_at is not None and self.next_lifetime_at <= self._clock.wall_ms()
        if idle and as_of_ms is None and not is_aged:
            return Swept(0, 0)
        return await self._writer.write(Sweep(as_of_ms, crowd))

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        """As `Store.prune`; of several daemons, the one that has been there the longest does it."""
        if any(member < self._owners.me for member in self._company.others):
            return Pruned(0, None)
        return await super().prune(before_at, after)

    async def _heard_by_all(self) -> int | None:
        """The service time past which every daemon has heard; None while nothing can end.

        Waits a little for the others if the next deadline is not past for them, too.
        """
        own_ms, waits = self.service_clock.now_ms(), iter(WAITS_S)
        while True:
            slowest_ms, hold_ms = self._company.slowest_ms, self._company.hold_until_ms
            as_of_ms = own_ms if slowest_ms is None else min(own_ms, slowest_ms)
            is_heard = self.next_due_ms is None or self.next_due_ms <= as_of_ms or self.next_due_ms > own_ms
            wait_s = next(waits, None)
            if is_heard and hold_ms <= as_of_ms:
                return as_of_ms
            if wait_s is None:
                return None
            await asyncio.sleep(wait_s)
            if self._company.others:
                self._learn(await self._reads.read(who_is_there, self._server.member))

    # -- beside the writer, for ever

    async def beat_for_ever(self) -> None:
        """Tells the others how far this daemon has heard, when nothing else does."""
        loop, commits, waiting = asyncio.get_running_loop(), -1, self._company.waiting
        last_at = soon_at = loop.time()
        soon_s, jitter = BEAT_MIN_S, 1.0
        while True:
            if self._writer.commits != commits:
                commits, last_at, jitter = self._writer.commits, loop.time(), self._rng.uniform(0.6, 1.4)
                soon_at = last_at + soon_s
            regular_at = last_at + (BEAT_S if self.live else self._idle_s) * jitter
            if self._company.waiting != waiting:
                waiting, soon_s = self._company.waiting, BEAT_MIN_S
                soon_at = min(soon_at, loop.time() + soon_s)
            due_in_s = self._others_due_in_s()
            beat_at = regular_at if due_in_s is None else min(regular_at, max(loop.time() + due_in_s, soon_at))
            self._must_beat.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(beat_at + BEAT_AFTER_S):
                    await self._must_beat.wait()
                continue
            if beat_at < regular_at:  # again for the same deadline: the owner is not ready, so less and less often
                soon_s = min(soon_s * 2, BEAT_S)
            if self._writer.commits != commits and self._company.told_ms >= (waiting[0] or 0):
                continue
            if self._writer.failure is not None:
                await asyncio.sleep(BEAT_S)
                continue
            with suppress(StoreError):
                await self._writer.write(Probe())

    @property
    def _idle_s(self) -> float:
        """Between two beats, or looks, while nothing is live or pending."""
        return IDLE_HINTED_S if self._hints.works else IDLE_BEAT_S

    def _others_due_in_s(self) -> float | None:
        """Seconds until this daemon has heard past the next deadline of the others' operators. 0 also when it has told
        them so: the owner ends something, and the next deadline may be near.
        """
        due_ms = self._company.next_due_ms
        if due_ms is None or not self.live:
            return None
        return max(0.0, (due_ms - self.service_clock.now_ms()) / 1000)

    async def look_for_ever(self) -> None:
        """Finds out what the others have done."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_after_s()):
                    await self._must_look.wait()
            self._must_look.clear()
            try:
                await self.look()
            except StoreError:
                self._must_look.set()
                await asyncio.sleep(AGAIN_S)
            await asyncio.sleep(LOOK_S / 2)  # a hint that comes meanwhile waits for so long

    def _look_after_s(self) -> float | None:
        """Seconds to the next look without a hint; None: for a hint."""
        if not self._company.others:
            return None
        if not self._owners.is_settled:
            return LOOK_S
        if self.live or any(one.pending for one in self.figures.values()):
            return LOOK_HINTED_S if self._hints.works else LOOK_S / 2
        return self._idle_s if self._hints.works else LOOK_S / 2

    async def hint_for_ever(self) -> None:
        """Lets the others know when there is something for them to look at."""
        while True:
            await self._must_hint.wait()
            self._must_hint.clear()
            try:
                await self._reads.read(hints.send, self._name)
            except StoreError:
                await asyncio.sleep(AGAIN_S)
            await asyncio.sleep(HINT_MIN_S)

    def _hinted(self) -> None:
        """There is something to look at. And somebody may have begun to watch who is there."""
        self._must_look.set()
        if not self.live:
            self._must_prove = True

    async def look(self) -> None:
        """Finds it out once, and does what follows from it. Raises StoreError."""
        async with self._looking:
            if self._server.member is None or self._must_prove:
                self._must_prove = False
                await self._writer.write(Probe())  # joins
            member, live = self._server.member, self.live
            if self._introduced != (who := self._introduction):
                await self._reads.read(_introduce, member or 0, who)
                self._introduced = who
            found = await self._reads.read(_look, member)
            if member != self._server.member:
                return  # it was expelled and has joined again meanwhile, and read everything
            self._note_others_parts(found.parts)
            self._learn(found.seen)
            if self._company.still_s > STILL_S:
                self._must_hint.set()  # it may not know that it has to beat
            if bool(live) != bool(self.live):
                self._must_beat.set()
            if found.versions != sum(self._versions.values()):
                self._take_gates(await self._reads.read(_gates))
            await self._find_what_others_did()
            await self._see_to(found.asked)
            await self._look_after_owners(member or 0, found.epochs)
            await self._expel_who_is_gone(member or 0)
            if self._company.others.keys() != self._names.keys():
                await self._tell_who_is_there()

    def _learn(self, found: Seen) -> None:
        due_ms = self._company.next_due_ms
        if self._company.learn(found, self._clock.monotonic(), watch=self.live > 0):
            self._owners.is_settled = False
            self._must_look.set()
        if self._company.next_due_ms != due_ms:
            self._must_beat.set()

    def _note_others_parts(self, parts: dict[str, Part]) -> None:
        """Takes over the others' part of the figures, and notes what has to be found out."""
        before, self._parts = self._parts, parts
        for operator in before.keys() | parts.keys():
            old, new = before.get(operator, NO_PART), parts.get(operator, NO_PART)
            if old[:3] != new[:3]:
                total = self.figures.setdefault(operator, Figures())
                total.live += new.live - old.live
                total.pending += new.pending - old.pending
                total.dead += new.dead - old.dead
                self.live += new.live - old.live
            if new.touched_ms > old.touched_ms:
                self.note_touch(operator, new.touched_ms)
            if new.opened > old.opened:
                self._opened.add(operator)
            if new.made > old.made:
                self._made.add(operator)

    def _take_gates(self, rows: list[tuple[Any, ...]]) -> None:
        newer = {name: (version, Gate(*gate)) for name, version, *gate in rows if version > self._versions.get(name, 0)}
        self._versions = {**self._versions, **{name: version for name, (version, _) in newer.items()}}
        self.gates = {**self.gates, **{name: gate for name, (_, gate) in newer.items()}}
        for name in newer:
            for observer in self.observers:
                observer.gate_changed(name)

    async def _find_what_others_did(self) -> None:
        """Deadlines and deliveries of this daemon's operators that others have made."""
        opened, made = self._opened & self._deadlines.operators, self._made & self._owners.delivers_for
        if opened:
            for deadline in await self._reads.read(_next, list(opened)):
                self._deadlines.nearer(*deadline)
        self._opened.clear()  # nothing else has come: only a look adds to it
        self._take_deadlines()
        if made:
            for operator, sink, due_at in await self._reads.read(_earliest, list(made)):
                for observer in self.observers:
                    if due_at is not None:
                        observer.delivery_due(operator, sink, due_at)
        self._made.clear()

    def _take_deadlines(self) -> None:
        before = (self.next_due_ms, self.next_lifetime_at)
        self.next_due_ms, self.next_lifetime_at = self._deadlines.earliest
        if before != (self.next_due_ms, self.next_lifetime_at):
            for observer in self.observers:
                observer.deadline_nearer()

    async def _see_to(self, asked: list[Question]) -> None:
        """Does what other daemons ask of this one, because it owns an operator."""
        self._answering &= {question.number for question in asked}
        for number, operator, what in asked:
            if number in self._answering or not self.owns(operator):
                continue
            self._answering.add(number)
            if what == "release_ends":
                await self._reads.read(asking.answer, number, "yes" if self._release_ends(operator) else "")
                continue
            for observer in self.observers:
                observer.probe_asked(number, operator)

    async def ask_owner(self, operator: str, wish: Wish, within_s: float) -> str:
        number = await self._reads.read(asking.ask, operator, wish)
        self._must_hint.set()
        try:
            async with asyncio.timeout(within_s):
                return await self._answer_to(number)
        except TimeoutError:
            raise StoreError(f"the daemon that owns {operator} has not answered within {within_s:g} s") from None
        finally:
            with suppress(StoreError):
                await self._reads.read(asking.forget, number)

    async def _answer_to(self, number: int) -> str:
        while True:
            answer = await self._reads.read(asking.answer_to, number)
            if answer is not None:
                return answer
            await asyncio.sleep(asking.ANSWER_S)

    async def answer_probe(self, number: int, webhook_id: str) -> None:
        await self._reads.read(asking.answer, number, webhook_id)

    async def release_ends(self, operator: str) -> bool:
        if operator not in self.pausing or self.owns(operator):
            return self._release_ends(operator)
        return bool(await self.ask_owner(operator, "release_ends", RELEASE_S))

    async def _look_after_owners(self, member: int, epochs: int | None) -> None:
        if epochs != self._epochs:
            await self._read_owners()
        configured = self.configured
        if self._owners.is_settled and configured is self._claimed_for:
            return
        before = self._owners.delivers_for
        wishes = self._owners.wishes(configured, [member, *self._company.others], self._clock.monotonic())
        self._tell_owners(before)
        if any(wishes):
            await self._reads.read(_see_to, member, wishes)
            self._must_hint.set()
            await self._read_owners()
        self._claimed_for = configured

    async def _read_owners(self) -> None:
        self._opened.update(self._take_owners(await self._reads.read(_owners), self._owners.me))
        await self._find_what_others_did()

    async def _expel_who_is_gone(self, member: int) -> None:
        if not self.live:
            return
        for gone, batch in self._company.gone.items():
            name = await self._reads.read(_expel, member, gone, batch, self.daemon_grace_ms)
            if name is not None:
                self.expulsions += 1
                log.warning("daemon.expelled", name=name, silent_s=LEASE_S, grace_s=self.daemon_grace_ms / 1000)
            self._must_look.set()
            self._must_hint.set()

    async def _tell_who_is_there(self) -> None:
        """Logs which daemons have come and gone since the last time."""
        before, now = self._names, dict(await self._reads.read(_names))
        now.pop(self._server.member or 0, None)
        for name in sorted(now[member] for member in now.keys() - before.keys()):
            log.info("daemon.came", name=name, others=len(now))
        for name in sorted(before[member] for member in before.keys() - now.keys()):
            log.info("daemon.left", name=name, others=len(now))
        self._names = now

    async def daemons(self) -> Sequence[Member]:
        rows, owners = await self._reads.look(_shown)
        furthest_ms = max((row.heard_ms for row in rows), default=0)
        owned: dict[int, list[str]] = {row.id: [] for row in rows}
        for operator, member, *_ in owners:
            owned.setdefault(member, []).append(operator)
        return [
            Member(
                row.name,
                row.program,
                row.address,
                row.since_at,
                row.wall_at,
                furthest_ms - row.heard_ms,
                sorted(owned[row.id]),
                row.digest,
                row.id == self._server.member,
            )
            for row in rows
        ]


_OPERATOR, _IDLE_MS, _SEEN_MS, _LIFETIME_AT, _REASON = map(
    Session._fields.index, ("operator", "idle_ms", "seen_ms", "lifetime_at", "reason")
)


class _Look(NamedTuple):
    """`versions` and `epochs` are the sums of all gates' and all owners' numbers."""

    seen: Seen
    asked: list[Question]
    epochs: int
    versions: int
    parts: dict[str, Part]


# -- on a connection's thread


def read(sql: Connection, member: int, joined: Joined | None = None) -> Found:
    """What the tables say; also numbers for sessions. `member` is this daemon's row; 0: it has not joined."""
    wanted: list[tuple[str, Sequence[Any]]] = [(CLOCK, ()), (FIGURES, ()), (OPERATORS, ()), (NEXT_BLOCK, ())]
    wanted += [(OTHERS_FIGURES, (member,)), (OWNERS, ())]
    (clock,), figures, gates, (block,), parts, owners = fetch_all(sql, wanted)
    known = {name: Figures(*counts) for name, *counts in figures}
    held = {name: Gate(*gate) for name, _, *gate in gates}
    mine = [operator for operator, owner, *_ in owners if owner == member] if member else list(known)
    return Found(
        loaded=Loaded(
            service_ms=clock[0],
            committed_at=clock[1],
            operators={name: (known.get(name, Figures()), held.get(name, Gate())) for name in {**known, **held}},
            next_due_ms=None,
            next_lifetime_at=None,
            last_session=block[0] - 1,
        ),
        joined=joined,
        parts={name: Part(*part) for name, *part in parts},
        owners=owners,
        versions={row[0]: row[1] for row in gates},
        next=_next(sql, mine) if mine else [],
    )


def who_is_there(sql: Connection, member: int | None) -> Seen:
    """The other daemons on the database; `member` is this one's own row, None before it has one."""
    row = sql.execute(members.LOOK, (member,)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    return seen(*row)


def _look(sql: Connection, member: int | None) -> _Look:
    row = sql.execute(LOOK, (member, member)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    at, others, hold_until_ms, asked, epochs, versions, figures = row
    questions = [Question(*one) for one in orjson.loads(asked or "[]")]
    parts = {one["o"]: Part(*list(one.values())[1:]) for one in orjson.loads(figures or "[]")}
    return _Look(seen(at, others, hold_until_ms), questions, epochs, versions, parts)


def _gates(sql: Connection) -> list[tuple[Any, ...]]:
    return sql.execute(OPERATORS).fetchall()


def _owners(sql: Connection) -> list[tuple[Any, ...]]:
    return sql.execute(OWNERS).fetchall()


def _next(sql: Connection, operators: list[str]) -> list[tuple[Any, ...]]:
    return sql.execute(NEXT, (operators,)).fetchall()


def _earliest(sql: Connection, operators: list[str]) -> list[tuple[Any, ...]]:
    return sql.execute(EARLIEST, (operators,)).fetchall()


def _see_to(sql: Connection, member: int, wishes: Wishes) -> None:
    if wishes.claim:
        sql.execute(CLAIM, (member, wishes.claim))
    if wishes.want:
        sql.execute(WANT, (member, wishes.want))
    if wishes.hand_over:
        sql.execute(HAND_OVER, (wishes.hand_over, member))


def _names(sql: Connection) -> list[tuple[Any, ...]]:
    return sql.execute(NAMES).fetchall()


def _introduce(sql: Connection, member: int, who: Introduction) -> None:
    sql.execute(members.INTRODUCE, (who.address, who.digest, member))


def _expel(sql: Connection, me: int, member: int, batch: int, grace_ms: int) -> str | None:
    """Returns the name of the daemon that was expelled; None: it has moved on, or another one has been faster."""
    name = dict(_names(sql)).get(member)
    try:
        members.expel(sql, me, member, batch, grace_ms)
    except psycopg.errors.DivisionByZero:
        return None
    return name


def _shown(sql: Connection) -> tuple[list[members.Shown], list[tuple[Any, ...]]]:
    return [members.Shown(*row) for row in sql.execute(members.SHOWN)], sql.execute(OWNERS).fetchall()
