"""Several daemons on one database: they share one service time, each operator has one owner, and no daemon acts on old
knowledge.

Each daemon has a clock that the test moves. A daemon whose clock is not moved is a stopped one.
"""

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import psycopg
import pytest
from clocks import HandClock
from engines import SOON, PostgresEngine, own_name
from operations import BODY, attempt, counted, notice, opening
from support import live, until

from lmdaemon import retry
from lmdaemon.limits import LIMITS, StoreLimits
from lmdaemon.store.contract import Claim, Dead, Figures, NewDelivery, Settlement, StoreError, StoreObserver
from lmdaemon.store.postgres.cluster import AHEAD_MS
from lmdaemon.store.postgres.store import Store

OPERATORS = frozenset(f"o{number}" for number in range(8))
GRACE_MS = 4000


class Heard(StoreObserver):
    """Notes what the loops of a daemon are told. It lets operators go at once, as if no attempt were under way, unless
    `busy`.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.busy = store, False
        self.due: list[tuple[str, str]] = []
        self.gates: list[str] = []
        self.owners: list[str] = []
        self.nearer = 0

    def delivery_due(self, operator: str, sink: str, due_at: int) -> None:
        self.due.append((operator, sink))

    def gate_changed(self, operator: str) -> None:
        self.gates.append(operator)

    def ownership_changed(self, operator: str) -> None:
        self.owners.append(operator)
        if not self.store.owns(operator) and not self.busy:
            self.store.let_go(operator)

    def deadline_nearer(self) -> None:
        self.nearer += 1


class Daemon:
    """A store with its loops running, as a daemon has it."""

    def __init__(self, store: Store, clock: HandClock) -> None:
        self.store, self.clock, self.heard = store, clock, Heard(store)
        store.observe(self.heard)
        self.running = asyncio.create_task(store.run())

    @property
    def mine(self) -> set[str]:
        return {name for name in OPERATORS if self.store.owns(name)}

    async def stop(self) -> None:
        """Stops the loops, as if the daemon were stopped or killed."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    async def go_on(self) -> None:
        self.running = asyncio.create_task(self.store.run())

    async def leave(self) -> None:
        await self.stop()
        await self.store.close()


class Cluster:
    def __init__(self, engine: PostgresEngine, stack: AsyncExitStack) -> None:
        self.engine, self._stack = engine, stack
        self.server: HandClock | None = None  # the server's clock, if the test moves it
        self.daemons: list[Daemon] = []

    async def start(self, operators: frozenset[str] = OPERATORS, limits: StoreLimits = LIMITS.store) -> Daemon:
        clock = HandClock()
        clock.mono += 17 * len(self.daemons)  # the clocks of two machines differ
        store = await Store.open(self.engine.url, clock, name=own_name(), paces=SOON, limits=limits)
        store.configure(operators, lambda session: [NewDelivery("http", BODY)], daemon_grace_ms=GRACE_MS)
        daemon = Daemon(store, clock)
        self._stack.push_async_callback(daemon.leave)
        self.daemons.append(daemon)
        await store.probe()
        return daemon

    def set_up_server_clock(self) -> HandClock:
        """Makes the server's clock move with the test's service time, for daemons that start from now on."""
        self.server = HandClock()
        self.engine.follow(self.server)
        return self.server

    async def pair(self) -> tuple[Daemon, Daemon]:
        """Two daemons of which each owns some of the operators."""
        one = await self.start()
        other = await self.start()
        await until(
            lambda: one.mine and other.mine and one.mine | other.mine == OPERATORS and not one.mine & other.mine
        )
        return one, other

    async def pass_time(self, seconds: float) -> None:
        """Service time passes for all daemons that are not stopped."""
        running = [daemon for daemon in self.daemons if not daemon.running.done()]
        for step in range(1, round(seconds * 20) + 1):
            if self.server is not None:
                self.server.advance(0.05)
            for daemon in running:
                daemon.clock.advance(0.05)
                daemon.store.service_clock.now_ms()
            if step % 10 == 0 or step == round(seconds * 20):
                # Twice: each daemon tells its service time, and then reads what the others have told
                for daemon in running + running:
                    await daemon.store.probe()


@pytest.fixture
async def together(postgres_engine: PostgresEngine) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(postgres_engine, stack)


async def ended(daemon: Daemon) -> int:
    return (await daemon.store.end_due(idle=True)).ended


async def settled(*daemons: Daemon) -> bool:
    """Whether every operator has an owner, and all daemons agree on it."""
    shown = [set(row.operators) for row in await daemons[0].store.daemons()]
    mine = [daemon.mine for daemon in daemons]
    return shown == mine and all(mine) and sum(map(len, mine)) == len(OPERATORS)


def shared_out(daemons: list[Daemon]) -> bool:
    """Whether every operator has exactly one owner among these daemons."""
    return sorted(name for daemon in daemons for name in daemon.mine) == sorted(OPERATORS)


def one_of(daemon: Daemon) -> str:
    """The first of the operators that this daemon owns."""
    return sorted(daemon.mine)[0]


class TestOwners:
    """Each operator has exactly one owner, which is a running daemon."""

    async def test_operators_are_shared_out_and_each_has_one_owner(self, together: Cluster) -> None:
        one, other = await together.pair()
        third = await together.start()
        await until(lambda: settled(one, other, third))
        assert [row.is_self for row in await other.store.daemons()] == [False, True, False]

    async def test_one_that_leaves_in_order_hands_over_at_once(self, together: Cluster) -> None:
        one, other = await together.pair()
        await other.leave()
        await until(lambda: one.mine == OPERATORS)
        assert len(await one.store.daemons()) == 1
        assert one.store.expulsions == 0

    async def test_an_operator_is_handed_over_when_nothing_of_it_is_under_way(self, together: Cluster) -> None:
        one = await together.start()
        one.heard.busy = True
        other = await together.start()
        await until(lambda: one.mine != OPERATORS)
        moving = OPERATORS - one.mine
        for _ in range(20):
            await other.store.look()
        assert other.mine == set()  # attempts of the first daemon are still under way
        for operator in moving:
            one.store.let_go(operator)
        await until(lambda: other.mine == moving)

    async def test_an_operator_that_one_daemon_alone_knows_stays_there(self, together: Cluster) -> None:
        """While settings are changed on one machine after the other, only one daemon may know a new operator."""
        one = await together.start()
        other = await together.start(frozenset({"o0"}))
        for _ in range(20):
            await one.store.look()
            await other.store.look()
        assert one.mine | other.mine == OPERATORS
        assert OPERATORS - {"o0"} <= one.mine
        other.store.configure(OPERATORS, lambda session: ())
        await until(lambda: settled(one, other))


async def test_what_a_daemon_tells_of_itself_anew_is_shown_by_the_others(together: Cluster) -> None:
    """A reload changes what a daemon tells. Otherwise the others would warn of settings that it no longer has."""
    one, other = await together.pair()
    other.store.introduce("10.0.0.2:8081", "of other settings")

    async def shown() -> bool:
        (row,) = (row for row in await one.store.daemons() if not row.is_self)
        return (row.address, row.digest) == ("10.0.0.2:8081", "of other settings")

    await until(shown)


class TestServiceTime:
    """No session ends while a daemon may hold a touch of it."""

    async def test_an_end_waits_until_every_daemon_has_heard_past_the_deadline(self, together: Cluster) -> None:
        one, other = await together.pair()
        name = one_of(one)
        await one.store.open_session(opening(operator=name))
        await together.pass_time(9)
        await other.stop()
        await together.pass_time(4)
        assert 10_000 < one.store.service_clock.now_ms() < 11_000  # the first daemon's clock waits for the other daemon
        assert await ended(one) == 0
        await other.go_on()
        await together.pass_time(1.2)
        await until(lambda: ended(one))

    async def test_a_touch_through_any_daemon_keeps_a_session_alive(self, together: Cluster) -> None:
        one, other = await together.pair()
        name = one_of(one)
        await one.store.open_session(opening(operator=name))
        await together.pass_time(8)
        assert (await other.store.touch(name, ["s"])).touched == 1
        await together.pass_time(8)
        await other.store.probe()
        assert await ended(one) == 0
        await together.pass_time(3)
        await until(lambda: ended(one))

    async def test_a_touch_in_hand_wins_while_its_daemon_is_stopped(self, together: Cluster) -> None:
        one, other = await together.pair()
        name = one_of(one)
        await one.store.open_session(opening(operator=name))
        await together.pass_time(9.5)
        await other.store.probe()
        await other.stop()
        await together.pass_time(3)  # the touch has arrived at the other daemon, and is not stored yet
        assert await ended(one) == 0
        await other.go_on()
        assert (await other.store.touch(name, ["s"])).touched == 1
        await together.pass_time(8)
        assert await ended(one) == 0

    async def test_the_latest_touch_is_shown_whatever_wall_clocks_say(self, together: Cluster) -> None:
        """The time shown never goes back: not by a touch through a daemon that does not know yet that the clock of the
        server was set ahead.
        """
        server = together.set_up_server_clock()
        one, other = await together.pair()
        await other.stop()
        server.step_wall(60)  # the other daemon is stopped and does not learn of this step
        await one.store.probe()
        await one.store.open_session(opening())
        latest_at = server.wall_ms()
        other.running = asyncio.create_task(other.store.writer.run())
        assert (await other.store.touch("acme", ["s"])).touched == 1
        found = await other.store.session("acme", "s")
        assert found is not None
        assert found[0].seen_at == latest_at

    async def test_a_touch_is_not_older_than_any_clock(self, together: Cluster) -> None:
        """A touch that comes through a daemon whose clock is behind does not make the session older."""
        one, other = await together.pair()
        await until(lambda: one.store.membership.company.others and other.store.membership.company.others)
        await other.stop()
        await together.pass_time(1.4)
        await one.store.probe()
        ahead_ms = one.store.service_clock.now_ms()
        await other.go_on()
        await other.store.open_session(opening(operator="o1"))
        known = await other.store.session("o1", "s")
        assert known is not None
        assert known[0].seen_ms >= ahead_ms > 1000

    async def test_a_clock_follows_the_others(self, together: Cluster) -> None:
        _, other = await together.pair()
        await other.stop()
        await together.pass_time(1.2)
        assert other.store.service_clock.now_ms() < 100
        await other.go_on()
        await until(lambda: other.store.service_clock.now_ms() > 1100)

    async def test_one_that_cannot_accept_connections_is_not_waited_for_for_long(self, together: Cluster) -> None:
        """For the lease its clock stands still, and so do all. Then its clients have the grace to reach another one."""
        one, other = await together.pair()
        for daemon in (one, other):
            await daemon.store.open_session(opening(operator=one_of(daemon), idle_ms=3000))
        other.store.service_clock.freeze("listening")
        await together.pass_time(4.5)
        for daemon in (one, other):
            await daemon.store.look()
        assert one.store.service_clock.now_ms() - other.store.service_clock.now_ms() == AHEAD_MS
        assert [await ended(daemon) for daemon in (one, other)] == [0, 0]
        await together.pass_time(1.5)
        for daemon in (other, one):
            await daemon.store.look()
        assert one.store.hold_until_ms >= GRACE_MS
        await together.pass_time(GRACE_MS / 1000 - 1)
        assert [await ended(daemon) for daemon in (one, other)] == [0, 0]
        await together.pass_time(5)
        await until(lambda: ended(one))
        await until(lambda: ended(other))
        other.store.service_clock.thaw("listening")
        await together.pass_time(1)
        assert not other.store.membership.has_made_way  # the next time, the others wait for it again

    async def test_one_that_joins_takes_up_the_time_and_imposes_no_pause(self, together: Cluster) -> None:
        one = await together.start()
        await one.store.open_session(opening(operator="o0"))
        await together.pass_time(9)
        other = await together.start()
        assert other.store.joined_others
        assert other.store.service_clock.now_ms() >= 8900
        await until(lambda: settled(one, other))
        await together.pass_time(1.2)
        owner = one if "o0" in one.mine else other
        await until(lambda: ended(owner))


class TestWallTime:
    """All daemons use the server's wall time."""

    async def test_a_lifetime_ends_at_its_time_whatever_the_hosts_believe(self, together: Cluster) -> None:
        """One host's clock is ten minutes behind and the other's ten minutes ahead; each daemon is the owner once."""
        server = together.set_up_server_clock()
        one, other = await together.pair()
        one.clock.step_wall(-600)
        other.clock.step_wall(600)
        for daemon, by in ((one, other), (other, one)):
            name = one_of(daemon)
            opened = (await by.store.open_session(opening(operator=name, lifetime_ms=60_000, idle_ms=10**8))).session
            assert (opened.opened_at, opened.lifetime_at) == (server.wall_ms(), server.wall_ms() + 60_000)
            await until(lambda daemon=daemon: daemon.store.next_lifetime_at is not None)
        await together.pass_time(59.5)
        assert [await ended(daemon) for daemon in (one, other)] == [0, 0]
        await together.pass_time(0.5)
        assert [await ended(daemon) for daemon in (one, other)] == [1, 1]
        for name in (one_of(one), one_of(other)):
            found = await one.store.session(name, "s")
            assert found is not None
            assert found[0].ended_at == server.wall_ms() == found[0].lifetime_at
            assert found[1][0].created_at == found[1][0].due_at == server.wall_ms()

    async def test_a_server_clock_that_is_set_ends_each_once_and_in_order(self, together: Cluster) -> None:
        server = together.set_up_server_clock()
        one, other = await together.pair()
        name = one_of(one)
        for number in range(3):
            await other.store.open_session(opening(f"s{number}", operator=name, lifetime_ms=(number + 1) * 60_000))
        await until(lambda: one.store.next_lifetime_at is not None)
        server.step_wall(-3600)
        await together.pass_time(1)
        assert await ended(one) == 0
        server.step_wall(3600 + 61)
        for daemon in (one, other):
            await daemon.store.probe()
        assert [await ended(daemon) for daemon in (one, other, one)] == [1, 0, 0]
        server.step_wall(120)
        await one.store.probe()
        assert await ended(one) == 2
        rows = [await one.store.session(name, f"s{number}") for number in range(3)]
        assert [(row[0].reason, len(row[1])) for row in rows if row] == [("max_lifetime", 1)] * 3
        ended_at = [row[0].ended_at for row in rows if row]
        assert ended_at == sorted(ended_at)

    async def test_a_wait_is_as_long_at_a_daemon_that_takes_over(self, together: Cluster) -> None:
        """The clock of the new owner's host is ten minutes ahead. By that clock, the delivery would have been due long
        ago.
        """
        server = together.set_up_server_clock()
        one, other = await together.pair()
        other.clock.step_wall(600)
        name = one_of(one)
        await one.store.open_session(opening(operator=name))
        await one.store.end(name, "s")
        found = await one.store.session(name, "s")
        assert found is not None
        await one.store.settle(Settlement(found[1][0], "pending", 300_000, 1, attempt(status=500)))
        await one.leave()
        await until(lambda: other.mine == OPERATORS)
        ((delivery,),) = await other.store.claimable([Claim(name, "http", [], 1)])
        assert delivery.due_at - other.store.clock.wall_ms() == 300_000
        assert other.store.clock.wall_ms() == server.wall_ms()

    async def test_a_server_clock_that_is_set_back_moves_each_wait_once(self, together: Cluster) -> None:
        """Each wait is moved once, not once by each daemon. One of the operators is owned by nobody, because it has
        left the settings.
        """
        server = together.set_up_server_clock()
        one, other = await together.pair()
        names = {"of the first": one_of(one), "of the other": one_of(other), "of nobody": sorted(one.mine)[1]}
        due_at, until_at = server.wall_ms() + 7_200_000, server.wall_ms() + 10_000_000
        for name in names.values():
            await one.store.open_session(opening(operator=name))
            await one.store.end(name, "s")
            found = await one.store.session(name, "s")
            assert found is not None
            by = one if name in one.mine else other
            await by.store.settle(Settlement(found[1][0], "pending", 7_200_000, 1, attempt(status=500)))
            await one.store.set_gate(name, lambda gate: dataclasses.replace(gate, not_before_at=until_at))
        for daemon in (one, other):
            daemon.store.configure(OPERATORS - {names["of nobody"]}, lambda session: [])
        await until(lambda: not (one.store.owns(names["of nobody"]) or other.store.owns(names["of nobody"])))
        for daemon in (one, other):
            await daemon.store.look()
        server.step_wall(-3600)
        for daemon in (one, other, one, other):
            # A daemon learns the new time with its first transaction, and moves waits with the next
            await daemon.store.probe()
        rows = {row["operator"]: row["due_at"] for row in together.engine.rows("delivery")}
        assert {what: rows[name] for what, name in names.items()} == dict.fromkeys(names, due_at - 3_600_000)
        gates = {row["name"]: row["not_before_at"] for row in together.engine.rows("operator")}
        assert {what: gates[name] for what, name in names.items()} == dict.fromkeys(names, until_at - 3_600_000)

    async def test_an_export_waits_for_the_daemon_that_is_furthest_behind(self, together: Cluster) -> None:
        """Ends that the slower daemon has dated may not be stored yet."""
        server = together.set_up_server_clock()
        one, other = await together.pair()
        until_at = server.wall_ms()
        await other.stop()
        await together.pass_time(1)
        with together.engine.archive() as archive:
            assert archive.now_at() == until_at + 1000
            assert archive.committed_at() <= until_at
            await other.go_on()
            other.clock.advance(1)
            await other.store.probe()
            assert archive.committed_at() > until_at
            await one.leave()
            await other.leave()
            server.advance(60)
            assert archive.committed_at() == until_at + 61_000


class TestPutOut:
    """A daemon whose row stands still for 5 s is expelled. It joins again by itself."""

    async def watch(self, watcher: Daemon, together: Cluster) -> None:
        for _ in range(round(LIMITS.store.lease_s / 0.25) + 2):
            await together.pass_time(0.25)
            await watcher.store.look()

    async def test_its_operators_go_to_others_and_ends_wait_for_its_clients(self, together: Cluster) -> None:
        one, other = await together.pair()
        theirs = one_of(other)
        await one.store.open_session(opening(operator=theirs))
        await together.pass_time(9.9)
        await other.store.probe()
        await other.stop()
        await self.watch(one, together)
        await until(lambda: one.mine == OPERATORS)
        assert one.store.expulsions == 1
        await together.pass_time(GRACE_MS / 1000 - 0.5)
        assert await ended(one) == 0
        assert (await one.store.touch("o0", ["none"])).unknown == ["none"]  # touches are accepted during the pause
        await together.pass_time(2)
        await until(lambda: ended(one))

    async def test_its_deliveries_go_on_though_no_session_is_live(self, together: Cluster) -> None:
        one, other = await together.pair()
        theirs = one_of(other)
        await other.store.open_session(opening(operator=theirs))
        await other.store.end(theirs, "s")
        await until(lambda: one.store.figures_of(theirs).pending == 1)
        assert one.store.live == 0
        await other.stop()
        await self.watch(one, together)
        await until(lambda: one.mine == OPERATORS)
        assert one.store.expulsions == 1

    async def test_it_writes_nothing_until_it_has_joined_again(self, together: Cluster) -> None:
        one, other = await together.pair()
        theirs = one_of(other)
        await other.store.open_session(opening("live", operator=theirs))
        await other.store.open_session(opening("over", operator=theirs))
        await until(lambda: one.store.live == 2)
        before = [row.name for row in await one.store.daemons()]
        await other.stop()
        await self.watch(one, together)
        await until(lambda: one.mine == OPERATORS)
        await one.store.end(theirs, "over")
        # This touch waits from the moment when the daemon was stopped
        touched = asyncio.create_task(other.store.touch(theirs, ["live", "over"]))
        await asyncio.sleep(0)
        await other.go_on()
        assert await touched == (1, [], ["over"])
        assert sorted(row.name for row in await one.store.daemons()) == sorted(before)
        assert other.store.figures_of(theirs).live == 1
        await until(lambda: settled(one, other))

    async def test_one_that_joins_again_during_a_look_gets_operators(
        self, together: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the look has read of the daemons is from before, when this one was not among them."""
        one, other = await together.pair()
        theirs = one_of(other)
        await other.store.open_session(opening("live", operator=theirs))
        await until(lambda: one.store.live == 1)
        await other.stop()
        await self.watch(one, together)
        await until(lambda: one.mine == OPERATORS)
        looks = other.store._looks
        looks._must_prove = False  # else a hint from before the stop has the look wait for a transaction
        find = looks._find_what_others_did

        async def find_and_join_again() -> None:
            monkeypatch.undo()
            await find()
            await other.go_on()
            assert (await other.store.touch(theirs, ["live"])).touched == 1

        monkeypatch.setattr(looks, "_find_what_others_did", find_and_join_again)
        await other.store.look()
        await until(lambda: settled(one, other))

    async def test_one_that_was_stopped_halfway_through_a_batch_is_expelled_too(self, together: Cluster) -> None:
        """The open transaction of the stopped daemon locks its own row and a session. A third daemon can still start in
        the meantime.
        """
        one, other = await together.pair()
        await other.store.open_session(opening(operator=one_of(other)))
        await until(lambda: one.store.live == 1)
        (name,) = (row.name for row in await other.store.daemons() if row.is_self)
        await other.stop()
        with psycopg.connect(together.engine.url, application_name=f"lmdaemon {name}") as halfway:
            halfway.execute("SELECT 1 FROM lmdaemon.member WHERE name = %s FOR UPDATE", (name,))
            halfway.execute("UPDATE lmdaemon.session SET seen_at = seen_at")
            await self.watch(one, together)
            await until(lambda: one.mine == OPERATORS)
            assert (await one.store.touch(one_of(other), ["s"])).touched == 1
            with pytest.raises(psycopg.OperationalError):
                halfway.execute("SELECT 1")

    async def test_one_that_may_have_been_expelled_is_sure_of_nothing(self, together: Cluster) -> None:
        """No other daemon expels it within 5 s of its last transaction. After that, only a new transaction can tell."""
        one, other = await together.pair()
        await one.stop()
        one.running = asyncio.create_task(one.store.writer.run())
        await one.store.probe()
        one.clock.advance(LIMITS.store.lease_s - 0.6)
        assert one.store.is_sure
        one.clock.advance(0.2)
        assert not one.store.is_sure
        await one.store.probe()
        assert one.store.is_sure
        await one.stop()
        await other.store.open_session(opening(operator="o0"))
        await self.watch(other, together)
        await until(lambda: other.mine == OPERATORS)
        one.clock.advance(LIMITS.store.lease_s)
        assert one.mine
        assert not one.store.is_sure
        one.running = asyncio.create_task(one.store.writer.run())
        await one.store.probe()
        assert one.store.is_sure
        assert not one.mine

    async def test_of_a_late_result_only_a_success_counts(self, together: Cluster) -> None:
        one, other = await together.pair()
        theirs = one_of(other)
        for name in ("good", "bad"):
            await other.store.open_session(opening(name, operator=theirs))
            await other.store.end(theirs, name)
        await other.store.open_session(opening("live", operator=theirs))
        rows = {name: await other.store.session(theirs, name) for name in ("good", "bad")}
        sent = {name: row[1][0] for name, row in rows.items() if row}
        await until(lambda: one.store.live == 1)
        await other.stop()
        await self.watch(one, together)
        await until(lambda: one.mine == OPERATORS)
        for _ in range(2):  # the new owner attempts it as well
            row = await one.store.session(theirs, "good")
            assert row is not None
            await one.store.settle(Settlement(row[1][0], "pending", 0, 1, attempt(status=500)))
        results = [
            Settlement(sent["good"], "delivered", 0, 0, attempt(status=200)),
            Settlement(sent["bad"], "pending", 5000, 1, attempt(status=500), gate=counted(failed=True)),
        ]
        told = [asyncio.ensure_future(other.store.settle(result)) for result in results]
        await asyncio.sleep(0)
        other.heard.busy = True
        await other.go_on()
        await asyncio.gather(*told)
        states = {name: await one.store.session(theirs, name) for name in ("good", "bad")}
        assert [(row[1][0].state, row[1][0].attempts) for row in states.values() if row] == [
            ("delivered", 2),
            ("pending", 0),
        ]
        assert one.store.gate(theirs).failures == 0

    async def test_nobody_is_expelled_after_an_outage_or_a_stall_of_the_watcher(self, together: Cluster) -> None:
        one, other = await together.pair()
        await one.store.open_session(opening(operator="o0"))
        await other.stop()
        await one.store.look()
        one.clock.advance(60)  # the watching daemon itself did not look during this time
        await one.store.look()
        await one.store.look()
        assert len(await one.store.daemons()) == 2

    async def test_nobody_is_expelled_after_a_time_in_which_nobody_could_write(self, together: Cluster) -> None:
        """As while the server's disk is full: rows can be read, but all of them stand still."""
        one, other = await together.pair()
        await one.store.open_session(opening(operator="o0"))
        with together.engine.outage():
            await until(lambda: one.store.failure and other.store.failure, within_s=20)
            await other.stop()  # the second daemon tries to write later than the first one does
            for _ in range(round(LIMITS.store.lease_s / 0.5) + 2):
                one.clock.advance(0.5)
                with contextlib.suppress(StoreError):
                    await one.store.look()
        await until(lambda: not one.store.failure, within_s=20)
        for _ in range(3):
            await one.store.look()
        assert one.store.expulsions == 0
        assert len(await one.store.daemons()) == 2

    async def test_all_of_them_gone_is_as_a_restart(self, together: Cluster) -> None:
        one, other = await together.pair()
        await one.store.open_session(opening(operator="o0"))
        await together.pass_time(2)
        await one.store.probe()
        for daemon in (one, other):
            await daemon.stop()
        last = await together.start(limits=StoreLimits(lease_s=0.3, watch_s=0.05))
        assert not last.store.joined_others
        assert last.mine == OPERATORS
        assert last.store.hold_until_ms <= last.store.service_clock.now_ms()  # no pause besides the restart grace
        assert last.store.service_clock.now_ms() >= 1900
        assert last.store.live == 1


def waiting_for_locks(engine: PostgresEngine) -> int:
    with psycopg.connect(engine.url) as sql:
        found = sql.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
    return 0 if found is None else int(found[0])


class TestAtTheSameTime:
    """Two daemons change the same rows at the same time."""

    async def test_batches_that_lock_rows_the_other_way_round_are_both_stored(self, together: Cluster) -> None:
        """Each touches the session that the other one ends. A third connection stops both of them in the middle."""
        with psycopg.connect(together.engine.url, autocommit=True) as sql:
            sql.execute(f"ALTER DATABASE {together.engine.name} SET deadlock_timeout = '50ms'")
        one, other = await together.pair()
        for name in ("first", "second", "a", "b"):
            await one.store.open_session(opening(name))
        with psycopg.connect(together.engine.url) as holder:
            holder.execute("SELECT 1 FROM lmdaemon.session WHERE session_id IN ('first', 'second') FOR UPDATE")
            asked = [
                asyncio.ensure_future(asking)
                for daemon, gate, touched, ended in ((one, "first", "a", "b"), (other, "second", "b", "a"))
                for asking in (
                    daemon.store.touch("acme", [touched]),
                    daemon.store.end("acme", gate),
                    daemon.store.end("acme", ended),
                )
            ]
            await until(lambda: waiting_for_locks(together.engine) == 2)
        touched, first, b, _, second, a = await asyncio.gather(*asked)
        assert touched.touched + len(touched.ended) == 1
        assert [one.reason for one in (first, b, second, a)] == ["closed"] * 4
        assert [daemon.store.failure for daemon in (one, other)] == [None, None]

    async def test_half_of_a_batch_of_a_stopped_daemon_keeps_nobody_waiting(self, together: Cluster) -> None:
        """A daemon that is stopped while it sends a batch leaves rows locked. The others end its connection, which
        undoes what was sent. Here, a connection that is named like a daemon's plays it.
        """
        one, other = await together.pair()
        await one.store.open_session(opening("a"))
        url = psycopg.conninfo.make_conninfo(together.engine.url, application_name="lmdaemon stopped:1-2")
        with (
            contextlib.closing(psycopg.connect(url)) as half,
            psycopg.connect(together.engine.url, autocommit=True) as sql,
        ):
            half.pgconn.enter_pipeline_mode()
            half.pgconn.send_query_params(b"UPDATE lmdaemon.session SET seen_at = 0", [])
            while half.pgconn.flush():
                pass
            state = "SELECT state, wait_event FROM pg_stat_activity WHERE pid = %s"
            await until(lambda: sql.execute(state, (half.info.backend_pid,)).fetchone() == ("active", "ClientRead"))
            touched = await asyncio.gather(*(daemon.store.touch("acme", ["a"]) for daemon in (one, other)))
            assert [one.touched for one in touched] == [1, 1]
            assert [daemon.store.failure for daemon in (one, other)] == [None, None]
        found = await one.store.session("acme", "a")
        assert found is not None
        assert found[0].seen_at > 0  # what the half had changed is undone

    async def test_sessions_are_ended_in_the_order_in_which_others_lock_them(
        self, postgres_engine: PostgresEngine, clock: HandClock
    ) -> None:
        """That is the order of their ids, whichever is due first. Here somebody has locked the one with the least."""
        patient = LIMITS.store._replace(write_s=60.0, statement_s=60.0, lock_s=60.0)
        async with postgres_engine.open(clock, limits=patient) as db:
            db.configure(OPERATORS, lambda session: ())
            await db.open_session(opening("first", operator="o0", idle_ms=2000))
            await db.open_session(opening("second", operator="o0", idle_ms=1000))
            live(clock, db, 3)
            with psycopg.connect(postgres_engine.url) as holder, psycopg.connect(postgres_engine.url) as another:
                holder.execute("SELECT 1 FROM lmdaemon.session WHERE session_id = 'first' FOR UPDATE")
                sweep = asyncio.ensure_future(db.end_due(idle=True))
                await until(lambda: waiting_for_locks(postgres_engine) == 1)
                another.execute("SELECT 1 FROM lmdaemon.session WHERE session_id = 'second' FOR UPDATE NOWAIT")
            assert (await sweep).ended == 2

    async def test_figures_are_true_though_another_one_commits_while_they_are_read(self, together: Cluster) -> None:
        """A third connection stops the joining daemon in the middle of its reading."""
        one = await together.start()
        await one.store.open_session(opening("a"))
        with psycopg.connect(together.engine.url) as holder:
            holder.execute("LOCK TABLE lmdaemon.operator")
            clock = HandClock()
            opening_store = asyncio.create_task(Store.open(together.engine.url, clock, name=own_name(), paces=SOON))
            await until(lambda: waiting_for_locks(together.engine) == 1)
            await one.store.open_session(opening("b"))
        store = await opening_store
        running = asyncio.create_task(store.run())
        with psycopg.connect(together.engine.url) as holder:
            holder.execute("LOCK TABLE lmdaemon.operator")
            await until(lambda: waiting_for_locks(together.engine) >= 1)
            await one.store.open_session(opening("c"))
        await store.probe()
        await store.look()
        assert store.figures_of("acme").live == store.live == 3
        running.cancel()
        await store.close()

    @pytest.mark.parametrize("seed", range(6))
    async def test_whatever_two_daemons_do_at_once_each_session_ends_once(self, together: Cluster, seed: int) -> None:
        """Sessions are opened, touched, closed and reported, and deliveries settled, retried and held, at both daemons
        in random batches.
        """
        random = Random(seed)
        with psycopg.connect(together.engine.url, autocommit=True) as sql:
            sql.execute(f"ALTER DATABASE {together.engine.name} SET deadlock_timeout = '20ms'")
        one, other = await together.pair()
        names = [f"s{number}" for number in range(6)]

        async def do(daemon: Daemon) -> None:
            store, operator, name = daemon.store, random.choice(["o0", "o1"]), random.choice(names)
            kind = random.randrange(8)
            if kind == 0:
                await store.open_session(opening(name, operator=operator))
            elif kind == 1:
                await store.touch(operator, random.sample(names, 4))
            elif kind == 2:
                await store.end(operator, name)
            elif kind == 3:
                await store.record(notice(name, operator=operator))
            elif kind == 4:
                await store.set_gate(operator, lambda gate: counted(failed=True)(gate, 0))
            elif kind == 5:
                await store.retry_dead(operator, Dead())
            else:
                ((*rows,),) = await store.claimable([Claim(operator, "http", [], 3)])
                state = random.choice(["pending", "delivered", "dead"])
                for row in rows:
                    await store.settle(Settlement(row, state, 0, 1, attempt(status=500)))

        for _ in range(25):
            await asyncio.gather(*(do(random.choice([one, other])) for _ in range(12)))
        assert [daemon.store.failure for daemon in (one, other)] == [None, None]
        for daemon in (one, other):
            await daemon.store.look()
        sessions, deliveries = together.engine.rows("session"), together.engine.rows("delivery")
        ended = sorted((row["operator"], row["session_id"]) for row in sessions if row["reason"] is not None)
        assert sorted((row["operator"], row["session_id"]) for row in deliveries) == ended
        for operator in ("o0", "o1"):
            states = Counter(row["state"] for row in deliveries if row["operator"] == operator)
            live = sum(row["operator"] == operator and row["reason"] is None for row in sessions)
            for daemon in (one, other):
                assert daemon.store.figures_of(operator) == Figures(live, states["pending"], states["dead"])


class TestStarts:
    """At a start: which daemons are there already, and whether a restart grace is needed."""

    LIMITS = StoreLimits(lease_s=1.0, watch_s=0.02)

    async def crashed(self, together: Cluster, *names: str) -> None:
        """Adds rows of daemons that were killed. These rows stand still."""
        with psycopg.connect(together.engine.url, autocommit=True) as sql:
            for name in names:
                sql.execute(
                    "INSERT INTO lmdaemon.member (name, program, since_at, heard_ms, wall_at, known_at, batch) "
                    "VALUES (%s, '1', 0, 7000, 1, 0, 5)",
                    (name,),
                )

    async def test_all_that_start_at_once_after_a_crash_of_all_start(self, together: Cluster) -> None:
        """As after a power cut: each daemon finds the rows of the last run, and one of them deletes the rows first."""
        await self.crashed(together, "x", "y")
        stores = await asyncio.gather(*(self.open(together) for _ in range(4)))
        assert all(store.service_clock.now_ms() == 7000 for store in stores)
        running = [asyncio.create_task(store.run()) for store in stores]
        for store in stores:
            await store.probe()
        assert len(await stores[0].daemons()) == 4
        assert {store.hold_until_ms for store in stores} == {7000 + 60_000}
        for task, store in zip(running, stores, strict=True):
            task.cancel()
            await store.close()

    async def open(self, together: Cluster, **options: Any) -> Store:
        return await Store.open(
            together.engine.url, HandClock(), name=own_name(), restart_grace_ms=60_000, limits=self.LIMITS, **options
        )

    async def test_one_that_joins_while_others_wait_is_not_taken_for_gone(self, together: Cluster) -> None:
        """The daemon that joins has nothing to do. So it makes no transaction for longer than the others watch the rows
        of the last run.
        """
        first = await Store.open(together.engine.url, HandClock(), name=own_name(), limits=self.LIMITS)
        await self.crashed(together, "x")
        second = asyncio.create_task(self.open(together))
        await until(lambda: connections(together.engine) > 1)
        running = asyncio.create_task(first.run())
        await first.probe()
        (mine,) = (row.name for row in await first.daemons() if row.is_self)
        store = await second
        assert store.joined_others
        assert mine in [row.name for row in await first.daemons()]
        running.cancel()
        for one in (first, store):
            await one.close()

    async def test_one_that_joins_when_the_others_have_just_left_gives_the_grace(self, together: Cluster) -> None:
        """Between the end of the others and its joining, no daemon could hear touches."""
        one = await together.start(limits=self.LIMITS)
        await one.store.open_session(opening(operator="o0"))
        await together.pass_time(2)
        store = await self.open(together)
        assert store.joined_others
        await one.leave()
        running = asyncio.create_task(store.run())
        await store.probe()
        assert store.hold_until_ms == store.service_clock.now_ms() + 60_000
        running.cancel()
        await store.close()

    async def test_one_that_wakes_up_when_all_others_have_gone_gives_the_grace(self, together: Cluster) -> None:
        """The daemon was expelled while it was stopped, and the other daemons have left since."""
        stopped = await self.open(together)
        running = asyncio.create_task(stopped.run())
        await stopped.probe()
        other = await together.start(limits=self.LIMITS)
        await other.store.open_session(opening(operator="o0"))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for _ in range(8):
            await together.pass_time(0.25)
            await other.store.look()
        assert other.store.expulsions == 1
        await other.leave()
        running = asyncio.create_task(stopped.run())
        await stopped.probe()
        assert stopped.live == 1
        assert stopped.hold_until_ms == stopped.service_clock.now_ms() + 60_000
        running.cancel()
        await stopped.close()

    @pytest.mark.parametrize("days", [0, 3])
    @pytest.mark.parametrize("counts", [False, True])
    async def test_after_a_crash_of_the_last_one_idleness_goes_on_where_it_was(
        self, together: Cluster, days: int, counts: bool
    ) -> None:
        """How long ago the crash was does not matter. With `downtime = "count"`, the time since the last transaction is
        added.
        """
        server = together.set_up_server_clock()
        last = await together.start(limits=self.LIMITS)
        await last.store.open_session(opening(idle_ms=10**9))
        await together.pass_time(2)
        kept_ms = last.store.service_clock.now_ms()
        assert kept_ms >= 1990
        await last.stop()
        together.daemons.clear()
        server.advance(days * 86_400)
        store = await self.open(together, count_downtime=counts)
        expected_ms = kept_ms + (days * 86_400_000 if counts else 0)
        assert store.service_clock.now_ms() == expected_ms
        assert not store.joined_others
        running = asyncio.create_task(store.run())
        await store.probe()
        assert store.hold_until_ms == expected_ms + 60_000
        assert store.live == 1
        running.cancel()
        await store.close()

    async def test_a_restart_of_one_after_the_other_pauses_nothing(self, together: Cluster) -> None:
        """Three daemons are restarted in turn. Each leaves in good order and comes back, and the daemons that run own
        all operators throughout.
        """
        daemons = [await together.start(limits=self.LIMITS) for _ in range(3)]
        await until(lambda: shared_out(daemons))
        await daemons[0].store.open_session(opening(operator="o0"))
        await together.pass_time(2)
        for _ in range(3):
            left = daemons.pop(0)
            await left.leave()
            together.daemons.remove(left)
            await together.pass_time(1)
            daemons.append(await together.start(limits=self.LIMITS))
            assert daemons[-1].store.joined_others
            await until(lambda: shared_out(daemons))
        assert [daemon.store.hold_until_ms for daemon in daemons] == [0, 0, 0]
        assert [daemon.store.expulsions for daemon in daemons] == [0, 0, 0]
        await together.pass_time(4.8)
        assert [await ended(daemon) for daemon in daemons] == [0, 0, 0]
        await together.pass_time(1)

        async def one_has_ended() -> bool:
            return sum([await ended(daemon) for daemon in daemons]) == 1

        await until(one_has_ended)  # at once, unless its operator is just being handed over


def connections(engine: PostgresEngine) -> int:
    with psycopg.connect(engine.url) as sql:
        found = sql.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND application_name LIKE 'lmdaemon %'"
        ).fetchone()
    return 0 if found is None else int(found[0])


class TestLooks:
    """What one daemon does takes effect at the others by their next look at the tables."""

    async def test_what_another_makes_is_found_by_the_owner(self, together: Cluster) -> None:
        one, other = await together.pair()
        mine = one_of(one)
        for daemon in (one, other):
            daemon.heard.due.clear()
        await other.store.open_session(opening("a", operator=mine))
        await until(lambda: one.store.next_due_ms is not None)
        assert one.heard.nearer
        assert other.store.next_due_ms is None
        await other.store.end(mine, "a")
        await until(lambda: (mine, "http") in one.heard.due)
        assert (one.store.figures_of(mine).live, one.store.figures_of(mine).pending) == (0, 1)

    async def test_a_gate_that_one_changes_binds_at_the_other(self, together: Cluster) -> None:
        one, other = await together.pair()
        mine = one_of(one)
        await other.store.set_gate(mine, lambda gate: counted(failed=True)(gate, 0))
        await until(lambda: one.store.gate(mine).failures == 1)
        assert mine in one.heard.gates
        await asyncio.gather(
            *(daemon.store.set_gate(mine, lambda gate: counted(failed=True)(gate, 0)) for daemon in (one, other) * 5)
        )
        await until(lambda: [daemon.store.gate(mine).failures for daemon in (one, other)] == [11, 11])

    async def test_a_hold_binds_where_the_release_was_not_heard_of(self, together: Cluster) -> None:
        """The first daemon still believes that the operator is held, and would find nothing to do."""
        one, other = await together.pair()
        for daemon in (one, other):
            await daemon.stop()
        for daemon in (one, other):  # these daemons write by themselves, but look only when the test says so
            daemon.running = asyncio.create_task(daemon.store.writer.run())
        await one.store.set_gate("o0", lambda gate: retry.hold(gate, 1, "by_hand"))
        await other.store.set_gate("o0", lambda gate: retry.release(gate, 2))
        held = await one.store.set_gate("o0", lambda gate: retry.hold(gate, 3, "by_hand"))
        await other.store.look()
        assert held.held_at == other.store.gate("o0").held_at == 3

    async def test_what_follows_a_batch_that_was_cancelled_is_not_taken_for_it(self, together: Cluster) -> None:
        """The cancelled batch is committed all the same, under the number that the next batch has as well."""
        one, other = await together.pair()
        for daemon in (one, other):
            await daemon.stop()
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        url = together.engine.url
        with psycopg.connect(url) as another, psycopg.connect(url, autocommit=True) as sql:
            another.execute("SELECT 1 FROM lmdaemon.member FOR UPDATE")
            one.running = asyncio.create_task(one.store.writer.run())
            probe = asyncio.create_task(one.store.probe())
            await until(lambda: sql.execute(waiting).fetchall())
            await one.stop()
            with pytest.raises(StoreError, match="stopping"):
                await probe
        for daemon in (one, other):  # these daemons write by themselves, but look only when the test says so
            daemon.running = asyncio.create_task(daemon.store.writer.run())
        await one.store.set_gate("o0", lambda gate: retry.hold(gate, 1, "by_hand"))
        await other.store.look()
        assert other.store.gate("o0").held_at == 1

    async def test_figures_are_those_of_all(self, together: Cluster) -> None:
        one, other = await together.pair()
        for daemon in (one, other):
            for number in range(5):
                await daemon.store.open_session(opening(f"{id(daemon)}-{number}", operator="o1"))
        await until(lambda: [daemon.store.live for daemon in (one, other)] == [10, 10])
        await other.leave()
        await one.store.look()
        assert one.store.figures_of("o1").live == 10

    async def test_touches_elsewhere_are_known_to_the_owner(self, together: Cluster) -> None:
        one, other = await together.pair()
        mine = one_of(one)
        await other.store.open_session(opening(operator=mine))
        await together.pass_time(3)
        await other.store.touch(mine, ["s"])
        await until(lambda: one.store.touched_ms.get(mine, 0) >= 2900)


async def test_what_another_daemon_ends_meanwhile_is_not_answered_as_active(
    postgres_engine: PostgresEngine, clock: HandClock
) -> None:
    """The session is found active. It ends before the touch can lock its row."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with postgres_engine.open(clock) as db:
        await asyncio.gather(*(db.open_session(opening(name)) for name in "ab"))
        with psycopg.connect(postgres_engine.url) as another, psycopg.connect(postgres_engine.url) as sql:
            another.execute("SELECT 1 FROM lmdaemon.session WHERE session_id = 'a' FOR UPDATE")
            asked = asyncio.gather(db.open_session(opening("a")), db.touch("acme", ["a", "b"]))
            await until(lambda: sql.execute(waiting).fetchall())
            another.execute("UPDATE lmdaemon.session SET reason = 'closed', ended_at = 1 WHERE session_id = 'a'")
            another.commit()
            opened, touched = await asked
    assert opened.outcome == "ended"
    assert touched == (1, [], ["a"])
