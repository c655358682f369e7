"""The look: a daemon reads at intervals what the other daemons on its database have done, and does what follows from
it.
"""

import asyncio
from contextlib import suppress

from lmdaemon.log import Log
from lmdaemon.store.contract import Probe, StoreError
from lmdaemon.store.postgres import tables
from lmdaemon.store.postgres.asking import Asking
from lmdaemon.store.postgres.batch import Batch
from lmdaemon.store.postgres.foreign import Foreign
from lmdaemon.store.postgres.hints import Hints
from lmdaemon.store.postgres.membership import Membership
from lmdaemon.store.postgres.paces import Paces
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.writer import Server
from lmdaemon.store.projection import Projection
from lmdaemon.store.writer import Writer

LOOK_HINTED_S = 1.5  # between two looks while hints arrive
AGAIN_S = 1.0  # before a look that has failed is repeated
# A daemon without a transaction for so long gets a hint, so that it beats: others watch whether it is there
STILL_S = 1.5

log = Log("daemon")


class Looks:
    """Looks at what the others have done, takes it over, and does what follows from it: takes and hands over operators,
    answers questions, expels daemons that are gone.
    """

    def __init__(
        self,
        projection: Projection,
        membership: Membership,
        foreign: Foreign,
        asking: Asking,
        *,
        writer: Writer[Batch],
        server: Server,
        reads: Reads,
        hints: Hints,
        signals: Signals,
        paces: Paces,
    ) -> None:
        self._projection = projection
        self._membership = membership
        self._foreign = foreign
        self._asking = asking
        self._writer = writer
        self._server = server
        self._reads = reads
        self._hints = hints
        self._signals = signals
        self._paces = paces
        self._must_prove = False  # whether a transaction must prove, before the next look, that this daemon is there
        self._looking = asyncio.Lock()
        self._names: dict[int, str] = {}  # names of the other daemons by their rows, as they were last logged

    async def run(self) -> None:
        """Looks, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_after_s()):
                    await self._signals.look.wait()
            self._signals.look.clear()
            try:
                await self.look()
            except StoreError:
                self._signals.look.set()
                await asyncio.sleep(AGAIN_S)
            await asyncio.sleep(self._paces.look_s / 2)  # the least time between two looks, also if hints come

    def _look_after_s(self) -> float | None:
        """Seconds after which to look if no hint comes; None: only when a hint comes."""
        if not self._membership.company.others:
            return None
        if not self._membership.owners.is_settled:
            return self._paces.look_s
        if not self._projection.is_idle:
            return LOOK_HINTED_S if self._hints.works else self._paces.look_s / 2
        return self._hints.idle_s if self._hints.works else self._paces.look_s / 2

    def hinted(self) -> None:
        """Is called when a hint has come: there is something to look at. Another daemon may also have begun to watch
        whether this one is there. If this daemon has nothing else to do, it proves that with a transaction.
        """
        self._signals.look.set()
        if self._projection.is_idle:
            self._must_prove = True

    async def look(self) -> None:
        """Looks once, and does what follows from it. Raises StoreError."""
        async with self._looking:
            if self._server.member is None or self._must_prove:
                self._must_prove = False
                await self._writer.write(Probe())  # the first transaction joins the daemons on the database
            member, was_idle = self._server.member, self._projection.is_idle
            await self._introduce(member or 0)
            asked = self._membership.ask()
            found = await self._reads.read(tables.look, member)
            if member != self._server.member:
                return  # this daemon was expelled and has joined again meanwhile, which has read everything
            self._foreign.take_parts(found.parts)
            self._membership.learn(found.seen, asked)
            if self._membership.must_make_way:
                await self._reads.read(tables.hold, self._projection.daemon_grace_ms)
                self._membership.has_made_way = True
            if self._membership.company.still_s > STILL_S:
                self._signals.hint.set()  # the daemon whose row stands still may not know that it has to beat
            if was_idle != self._projection.is_idle:
                self._signals.beat.set()
            if not self._foreign.has_all_gates(found.versions):
                self._foreign.take_gates(await self._reads.read(tables.gates))
            await self._find_what_others_did()
            await self._asking.see_to(found.asked)
            await self._tell_waits(member or 0, found.waits)
            await self._look_after_owners(member or 0, found.epochs)
            await self._expel_who_is_gone(member or 0)
            if self._membership.company.others.keys() != self._names.keys():
                await self._tell_who_is_there()

    async def _introduce(self, member: int) -> None:
        who = self._membership.introduction
        if self._membership.introduced != who:
            await self._reads.read(tables.introduce, member, who)
            self._membership.introduced = who

    async def _find_what_others_did(self) -> None:
        """Reads the deadlines of sessions that others have opened, and the due times of deliveries that they have made,
        for this daemon's operators.
        """
        deadlines, foreign = self._membership.deadlines, self._foreign
        opened = foreign.opened & deadlines.operators
        made = foreign.made & self._membership.owners.delivers_for
        if opened:
            for deadline in await self._reads.read(tables.next_deadlines, list(opened)):
                deadlines.nearer(*deadline)
        foreign.opened.clear()  # nothing was added meanwhile, because only a look adds to it
        self._membership.take_deadlines()
        if made:
            for operator, sink, due_at in await self._reads.read(tables.earliest, list(made)):
                for observer in self._projection.observers:
                    if due_at is not None:
                        observer.delivery_due(operator, sink, due_at)
        foreign.made.clear()

    async def _tell_waits(self, member: int, told: dict[str, int]) -> None:
        """Tells the others until when ends of this daemon's operators wait, if the table says something else. `told` is
        what the table says, for all operators.
        """
        projection, has = self._projection, self._membership.owners.has
        mine = {one: projection.waits_until_ms(one) for one in {*projection.pausing, *told} if has(one)}
        changed = {operator: until_ms for operator, until_ms in mine.items() if until_ms != told.get(operator)}
        if changed:
            await self._reads.read(tables.tell_waits, member, changed)
            self._signals.hint.set()
        self._foreign.waits = told

    async def _look_after_owners(self, member: int, epochs: int) -> None:
        membership = self._membership
        if epochs != membership.epochs:
            await self._read_owners()
        configured = self._projection.configured
        # If this daemon was expelled and has joined again meanwhile, it is not among the daemons that this look has
        # found: it would wish for nothing, and take itself to be settled
        if member != (self._server.member or 0) or (membership.owners.is_settled and membership.has_claimed):
            return
        wishes = membership.wishes(member, configured)
        if any(wishes):
            await self._reads.read(tables.fulfil, member, wishes)
            self._signals.hint.set()
            await self._read_owners()
        membership.note_claims(configured)

    async def _read_owners(self) -> None:
        rows = await self._reads.read(tables.owners)
        self._foreign.opened.update(self._membership.take_owners(rows, self._membership.owners.me))
        await self._find_what_others_did()

    async def _expel_who_is_gone(self, member: int) -> None:
        if self._projection.is_idle:
            return
        grace_ms = self._projection.daemon_grace_ms
        for gone, batch in self._membership.company.gone.items():
            name = await self._reads.read(tables.expel, member, gone, batch, grace_ms)
            if name is not None:
                self._projection.expulsions += 1
                log.warning("daemon.expelled", name=name, silent_s=self._membership.lease_s, grace_s=grace_ms / 1000)
            self._signals.look.set()
            self._signals.hint.set()

    async def _tell_who_is_there(self) -> None:
        """Logs which daemons have come and gone since the last time."""
        before, now = self._names, dict(await self._reads.read(tables.names))
        now.pop(self._server.member or 0, None)
        for name in sorted(now[member] for member in now.keys() - before.keys()):
            log.info("daemon.came", name=name, others=len(now))
        for name in sorted(before[member] for member in before.keys() - now.keys()):
            log.info("daemon.left", name=name, others=len(now))
        self._names = now
