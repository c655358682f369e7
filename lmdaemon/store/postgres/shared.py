"""The store of a daemon whose database other daemons may use, too: it connects the parts, runs their loops, and has the
verbs of `Store` that concern the other daemons.

The owner of an operator is the daemon that ends its sessions and delivers for it. A look reads what the others have
done; a hint, by NOTIFY, lets them look at once; a beat is a transaction that only tells them how far this daemon has
heard touches. What this daemon knows of the others may be as old as its last look. So a statement that depends on it
checks it again.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psycopg

from lmdaemon.limits import StoreLimits
from lmdaemon.model import Member
from lmdaemon.store.contract import SWEEP_ROWS, Probe, Pruned, StoreError, Sweep, Swept, Wish
from lmdaemon.store.postgres import members
from lmdaemon.store.postgres.asking import Asking
from lmdaemon.store.postgres.batch import Batch
from lmdaemon.store.postgres.beats import Beats
from lmdaemon.store.postgres.foreign import Foreign
from lmdaemon.store.postgres.hints import Hints
from lmdaemon.store.postgres.keeper import Keeper
from lmdaemon.store.postgres.looks import Looks
from lmdaemon.store.postgres.members import Introduction
from lmdaemon.store.postgres.membership import Membership
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.strains import Strains, unsafe_settings
from lmdaemon.store.postgres.tables import Found, shown, who_is_there
from lmdaemon.store.postgres.telling import Telling
from lmdaemon.store.postgres.thread import Database, NoAnswerError, Thread
from lmdaemon.store.postgres.wall import ServerClock
from lmdaemon.store.postgres.writer import Server
from lmdaemon.store.verbs import Verbs
from lmdaemon.store.writer import Writer

LEAVE_S = 3.0  # the longest time that leaving the database may take at a stop
STRAINS_S = 60.0  # between two searches for what strains the server
ASK_S = 2.5  # how long the writer's connection may take to tell its settings, besides the job that it is doing
RELEASE_S = 5.0  # how long the daemon that owns an operator may take to answer that the ends wait no longer
# Pauses before the others' rows are read again, in which they may hear past a deadline. At first none, because what is
# known of them is as old as the last transaction; after the last one the sweep is given up for now.
WAITS_S = (0.0, 0.004, 0.004, 0.004, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08)


class Shared(Verbs):
    """The part of the store that knows of other daemons on the database. `store.Store` is its subclass and has the
    reads.
    """

    def __init__(
        self,
        clock: ServerClock,
        name: str,
        database: Database,
        thread: Thread,
        found: Found,
        restart_grace_ms: int,
        paces: Paces,
        limits: StoreLimits,
    ) -> None:
        """`thread` is the writer's connection, and `found` is what it has read of the tables before this daemon joins.
        If no other daemon is there when it joins, nothing ends for inactivity for `restart_grace_ms`, or for the time
        that `configure` has given since.
        """
        super().__init__(clock, name, limits)
        self.grace_ms = restart_grace_ms
        self.load(found.loaded)
        self._thread = thread
        self.strained: str | None = None
        self._crowd_rows = limits.crowd_rows
        self._strains = Strains()
        self._signals = Signals()
        introduction = Introduction(name, self._since_at)
        self.membership = Membership(self, clock, self._signals, introduction, limits.lease_s)
        self._foreign = foreign = Foreign(self)
        self._telling = Telling(self.tell_of_ends, limits.told_s)
        keeper = Keeper(self, clock, self.membership, foreign, self._signals, self._telling)
        keeper.load(found)
        self._server = Server(database, thread, keeper, limits.write_s)
        self.writer: Writer[Batch] = Writer(keeper, self._server, limits)
        self._reads = Reads(database, self.writer.refused, limits)
        self._hints = Hints(database, name, self._reads, self._signals, paces)
        self._beats = Beats(self, self.membership.company, self.writer, self._hints, self._signals, paces)
        self._asking = Asking(self, self._reads, self._signals)
        self._looks = Looks(
            self,
            self.membership,
            foreign,
            self._asking,
            writer=self.writer,
            server=self._server,
            reads=self._reads,
            hints=self._hints,
            signals=self._signals,
            paces=paces,
        )

    async def run(self) -> None:
        """Runs the writer, and the loops that concern the other daemons, for ever."""
        async with asyncio.TaskGroup() as group:
            loops = (self._beats.run, self._looks.run, self._hints.send_for_ever, self._look_for_strains_for_ever)
            for loop in (self.writer.run, *loops):
                group.create_task(loop())
            group.create_task(self._hints.listen_for_ever(self._looks.hinted))
            with suppress(StoreError):
                await self.writer.write(Probe())  # the first transaction joins the daemons on the database

    async def _look_for_strains_for_ever(self) -> None:
        while True:
            await self.look_for_strains()
            await asyncio.sleep(STRAINS_S)

    async def look_for_strains(self) -> None:
        """Finds out what endangers the daemon's promises, and keeps it in `strained`. If the server does not answer,
        `strained` stays as it was.
        """
        with suppress(StoreError, psycopg.Error, NoAnswerError):
            # Asked on the writer's connection, because its settings count; a connection made at another time may have
            # others
            found = await self._thread.run(unsafe_settings, within_s=ASK_S)
            strain = await self._reads.read(self._strains.look, self._clock.monotonic())
            self.strained = "; ".join([*found, *([strain] if strain else [])]) or None

    async def close(self) -> None:
        """Leaves the database in order, so that the others need not wait until they find this daemon gone."""
        self.writer.stop_taking(StoreError("the store is closed"))
        self._telling.now()
        if self._server.member is not None:
            with suppress(psycopg.Error, NoAnswerError):
                await self._thread.run(members.leave, self._server.member, within_s=LEAVE_S)
        self._hints.close()
        self._reads.close()
        self._thread.close()

    async def look(self) -> None:
        """Reads at once what the other daemons have done, and does what follows from it. Raises StoreError."""
        await self._looks.look()

    # -- what the settings say

    def configure(self, *arguments: Any, **named: Any) -> None:
        super().configure(*arguments, **named)
        self._signals.look.set()

    def introduce(self, address: str, digest: str) -> None:
        if (address, digest) != (self._address, self._digest):
            super().introduce(address, digest)
            self.membership.introduction = Introduction(self._name, self._since_at, address, digest)
            self._signals.look.set()

    # -- owners, and the other daemons

    def owns(self, operator: str) -> bool:
        return self.membership.owners.owns(operator)

    @property
    def is_sure(self) -> bool:
        return self.membership.is_sure

    def let_go(self, operator: str) -> None:
        self.membership.owners.let_go(operator)
        self._signals.look.set()

    async def ask_owner(self, operator: str, wish: Wish, within_s: float) -> str:
        return await self._asking.ask(operator, wish, within_s)

    async def answer_probe(self, number: int, webhook_id: str) -> None:
        await self._asking.answer(number, webhook_id)

    def waits_until_ms(self, operator: str) -> int | None:
        if self.membership.owners.has(operator):
            return super().waits_until_ms(operator)
        until_ms = self._foreign.waits.get(operator, 0)
        return until_ms if until_ms > self.service_clock.now_ms() else None

    async def release_ends(self, operator: str) -> bool:
        if operator not in self.pausing or self.owns(operator):
            self._signals.look.set()  # the next look tells the other daemons
            return self.let_ends_go_on(operator)
        await self.look()
        if self.waits_until_ms(operator) is None:
            return False  # nothing to ask for; the owner may be gone, and its answer would be waited for in vain
        return bool(await self.ask_owner(operator, "release_ends", RELEASE_S))

    async def daemons(self) -> Sequence[Member]:
        rows, owners = await self._reads.look(shown)
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

    # -- ends

    @property
    def hold_until_ms(self) -> int:
        return self.membership.company.hold_until_ms

    async def end_due(self, *, idle: bool, crowd: bool = False) -> Swept:
        if not self.membership.has_claimed:
            await self.look()
        as_of_ms = await self._heard_by_all() if idle else None
        is_aged = self.next_lifetime_at is not None and self.next_lifetime_at <= self._clock.wall_ms()
        if idle and as_of_ms is None and not is_aged:
            return Swept(0, 0)
        return await self.writer.write(Sweep(as_of_ms, crowd, self._crowd_rows if crowd else SWEEP_ROWS))

    async def _heard_by_all(self) -> int | None:
        """The service time up to which every daemon has heard; None if nothing may end for inactivity now.

        If the next deadline is over for this daemon and not yet for the others, it waits a little for them.
        """
        company = self.membership.company
        own_ms, waits = self.service_clock.now_ms(), iter(WAITS_S)
        while True:
            slowest_ms, hold_ms = company.slowest_ms, company.hold_until_ms
            as_of_ms = own_ms if slowest_ms is None else min(own_ms, slowest_ms)
            is_heard = self.next_due_ms is None or self.next_due_ms <= as_of_ms or self.next_due_ms > own_ms
            wait_s = next(waits, None)
            if is_heard and hold_ms <= as_of_ms:
                return as_of_ms
            if wait_s is None:
                return None
            await asyncio.sleep(wait_s)
            if company.others:
                asked = self.membership.ask()
                self.membership.learn(await self._reads.read(who_is_there, self._server.member), asked)

    async def prune(self, before_at: int, after: tuple[int, int]) -> Pruned:
        """As `Store.prune`. Of several daemons only the one that joined first prunes."""
        return await super().prune(before_at, after) if self.membership.is_first else Pruned(0, None)
