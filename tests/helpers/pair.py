"""Two daemons on one PostgreSQL database, used as if they were one store. Each call goes to the daemon that does not
own the operator, except the calls that only the owner serves.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from clocks import HandClock
from engines import PostgresEngine
from support import until

from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store.contract import (
    Claim,
    Figures,
    Opening,
    Recording,
    Settled,
    Settlement,
    StoreError,
    StoreObserver,
    Swept,
)
from lmdaemon.store.postgres.store import Store

FIRST_MEMBER = 2  # with members 2 and 3, each of the two daemons owns one of the tests' operators
SETTINGS = ("configured", "sinks_of", "pausing", "grace_ms", "daemon_grace_ms")


class PairEngine(PostgresEngine):
    """A database with two daemons, of which each owns half of the operators."""

    @contextlib.asynccontextmanager
    async def open(
        self, clock: HandClock, *, count_downtime: bool = False, limits: StoreLimits = LIMITS.store
    ) -> AsyncIterator[Any]:
        with self._connection() as sql:
            sql.execute(f"ALTER TABLE lmdaemon.member ALTER COLUMN id RESTART WITH {FIRST_MEMBER}")
        limits = limits._replace(watch_s=0.01)
        async with (
            super().open(clock, count_downtime=count_downtime, limits=limits) as one,
            super().open(clock, limits=limits) as other,
        ):
            yield Pair(clock, one, other)

    async def step_wall(self, clock: HandClock, store: Any, seconds: float) -> None:
        """Sets the server's clock and waits until both daemons have noticed."""
        clock.step_wall(seconds)
        for one in store.stores:
            await one.probe()


class _HandsOver(StoreObserver):
    """Confirms at once that an operator may be handed over: here no attempt is ever under way."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ownership_changed(self, operator: str) -> None:
        if not self._store.owns(operator):
            self._store.let_go(operator)


class Pair:
    """Makes one call at a time. Before each call, both daemons are told that the other has heard up to this moment.
    After it, each reads from the database what the other has done.
    """

    def __init__(self, clock: HandClock, *stores: Store) -> None:
        self._clock, self.stores = clock, stores
        self._turn = asyncio.Lock()
        self._told_at: tuple[float, float] | None = None
        self.service_clock = self
        for store in stores:
            store.observe(_HandsOver(store))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            for store in self.stores:
                setattr(store, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """An attribute or method of both daemons. The values of an attribute must agree."""
        found = [getattr(store, name) for store in self.stores]
        if callable(found[0]):
            return lambda *arguments, **named: self._call(name, *arguments, **named)
        assert found[0] == found[1], name
        return found[0]

    # -- time

    def now_ms(self) -> int:
        """The service time. Neither daemon waits to hear from the other while it passes."""
        for store in self.stores:
            store.service_clock.limit_ms = None
        return max(store.service_clock.now_ms() for store in self.stores)

    async def _tell(self) -> None:
        moved = (self._clock.mono, self._clock.wall)
        if moved != self._told_at:
            self.now_ms()
            for store in self.stores * 2:
                await store.probe()
            self._told_at = moved

    async def _look(self) -> None:
        # the first daemon looks again, to see what the second one wrote
        for store in (*self.stores, *self.stores[:-1]):
            await store.look()

    # -- calls

    def _asked(self, operator: str | None) -> Store:
        """The daemon to call: one that does not own the operator."""
        one, other = self.stores
        return other if operator is not None and one.owns(operator) else one

    def _owner(self, operator: str) -> Store:
        one, other = self.stores
        return one if one.owns(operator) else other

    async def _alone(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async with self._turn:
            await self._tell()
            try:
                return await call()
            except StoreError:
                self._told_at = None
                await asyncio.gather(*(store.probe() for store in self.stores), return_exceptions=True)
                raise
            finally:
                with contextlib.suppress(StoreError):
                    await self._look()

    async def _call(self, verb: str, *arguments: Any, of: str | None = None, **named: Any) -> Any:
        return await self._alone(lambda: getattr(self._asked(of), verb)(*arguments, **named))

    async def open_session(self, opening: Opening) -> Any:
        return await self._call("open_session", opening, of=opening.operator)

    async def record(self, recording: Recording) -> Any:
        return await self._call("record", recording, of=recording.operator)

    async def touch(self, operator: str, session_ids: Sequence[str]) -> Any:
        return await self._call("touch", operator, session_ids, of=operator)

    async def end(self, operator: str, *arguments: Any) -> Any:
        return await self._call("end", operator, *arguments, of=operator)

    async def set_gate(self, operator: str, change: Callable[[Gate], Gate]) -> Any:
        return await self._call("set_gate", operator, change, of=operator)

    async def release_ends(self, operator: str) -> bool:
        return await self._call("release_ends", operator, of=operator)

    async def retry_dead(self, operator: str, *arguments: Any) -> Any:
        return await self._call("retry_dead", operator, *arguments, of=operator)

    async def discard(self, operator: str, *arguments: Any) -> Any:
        return await self._call("discard", operator, *arguments, of=operator)

    async def find_dead(self, operator: str, *arguments: Any) -> Any:
        return await self._call("find_dead", operator, *arguments, of=operator)

    async def session(self, operator: str, session_id: str) -> Any:
        return await self._call("session", operator, session_id, of=operator)

    async def sessions(self, operator: str, **named: Any) -> Any:
        return await self._call("sessions", operator, **named, of=operator)

    async def prune(self, *arguments: Any) -> Any:
        """Only the daemon that joined first prunes."""
        return await self._alone(lambda: self.stores[0].prune(*arguments))

    # -- what only the owner does

    async def end_due(self, **named: Any) -> Swept:
        async def sweep() -> Swept:
            await self._share_out()
            swept = [await store.end_due(**named) for store in self.stores]
            return Swept(sum(one.ended for one in swept), sum(one.looked_at for one in swept))

        return await self._alone(sweep)

    async def _share_out(self) -> None:
        configured = self.stores[0].configured

        async def shared_out() -> bool:
            await self._look()
            owners = [{name for name in configured if store.owns(name)} for store in self.stores]
            return owners[0] | owners[1] == configured and not owners[0] & owners[1]

        await until(shared_out)

    async def settle(self, settlement: Settlement) -> Settled:
        return await self._alone(lambda: self._owner(settlement.delivery.operator).settle(settlement))

    async def claimable(self, lanes: Sequence[Claim]) -> list[list[Delivery]]:
        found = [await self._owner(lane.operator).claimable([lane]) for lane in lanes]
        return [rows for (rows,) in found]

    # -- what they have in memory

    def configure(self, operators: frozenset[str], *arguments: Any, **named: Any) -> None:
        for store in self.stores:
            store.configure(operators, *arguments, **named)

    def observe(self, observer: StoreObserver) -> None:
        for store in self.stores:
            store.observe(observer)

    def gate(self, operator: str) -> Gate:
        return self._agreed(store.gate(operator) for store in self.stores)

    def figures_of(self, operator: str) -> Figures:
        return self._agreed(store.figures_of(operator) for store in self.stores)

    def waits_until_ms(self, operator: str) -> int | None:
        return self._agreed(store.waits_until_ms(operator) for store in self.stores)

    def ends_at_ms(self, session: Session) -> int:
        return self._agreed(store.ends_at_ms(session) for store in self.stores)

    @property
    def next_due_ms(self) -> int | None:
        return min((store.next_due_ms for store in self.stores if store.next_due_ms is not None), default=None)

    @property
    def next_lifetime_at(self) -> int | None:
        known = (store.next_lifetime_at for store in self.stores)
        return min((at for at in known if at is not None), default=None)

    @property
    def set_back_ms(self) -> int:
        return max(store.set_back_ms for store in self.stores)

    @staticmethod
    def _agreed(found: Iterable[Any]) -> Any:
        one, other = found
        assert one == other
        return one
