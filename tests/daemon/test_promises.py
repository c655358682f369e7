"""The daemon's promises, tested with random sequences of events and compared with a model.

The real store on a real file, the real sweeper and the real dispatcher run on an event loop whose time is moved by
hand. Meanwhile sessions are opened, touched and closed, operators give all kinds of answers, the disk refuses writes,
the machine stalls, clocks are set, and the process is killed.

Time is simulated exactly: the loop jumps from timer to timer. So no test waits, and no result depends on the machine.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import pytest
from chance import FULL, examples
from clocks import HandClock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support import Commits, load

from lmdaemon import retry
from lmdaemon.clock import STALL_S
from lmdaemon.config.settings import Operator, Settings
from lmdaemon.delivery.dispatcher import DRAIN_EXTRA_S, Dispatcher
from lmdaemon.delivery.sender import Unreachable
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.limits import StoreLimits
from lmdaemon.model import Delivery, SessionEnded
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.store import rules
from lmdaemon.store.contract import Dead, Opening, Recording, StoreError
from lmdaemon.store.sqlite import thread
from lmdaemon.store.sqlite.rows import DELIVERY
from lmdaemon.store.sqlite.store import Store
from lmdaemon.sweeper import Sweeper

CONFIG = """
[delivery]
timeout = "4s"
schedule = ["1s", "3s", "9s"]
[operators.acme]
provider_id = "lm"
notify = true
url = "https://acme.example/V4/SessionExpired"
endpoint = ""
concurrency = 2
[operators.beta]
provider_id = "lm"
notify = true
url = "https://beta.example/V4/SessionExpired"
endpoint = ""
max_lifetime = "30s"
max_age = "90m"
concurrency = 1
[plugins.hook]
use = "nowhere:hook"
operators = ["acme"]
timeout = "4s"
concurrency = 2
"""
OPERATORS = ("acme", "beta")
LIFETIME_MS = {"acme": 0, "beta": 30_000}
IDLE_MS = (1_000, 4_000, 15_000)
CONCURRENCY = {("acme", "http"): 2, ("acme", "plugin:hook"): 2, ("beta", "http"): 1}
TIMEOUT_S = 4.0
LATE_MS = 50  # promise 5
TURNS_MAX = 20_000  # turns of the loop at one instant; a backlog takes some hundreds
# The longest time for which anything may delay a delivery: a Retry-After, then the breaker's longest pauses, then the
# schedule.
LONGEST_WAIT_S = retry.RETRY_AFTER_MAX_S + 3 * retry.PROBE_PAUSE_MAX_S

# Killing a process loses nothing that it wrote, synced to disk or not. So the files can be in memory.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

ANSWERS: Mapping[str, Any] = {
    "ok": (200, {}, b'{"error": 0}', True),
    "failing": (500, {}, b"", True),
    "final": (200, {}, b'{"error": 120}', True),
    "gone": (410, {}, b"", True),
    "slow_down": (429, {"Retry-After": "7"}, b"", True),
    "go_away": (503, {"Retry-After": "9000"}, b"", True),
    "refused": None,
    "garbage": (200, {}, b"<html>", True),
    "hang": None,
}


@cache
def base() -> Settings:
    with tempfile.TemporaryDirectory() as directory:
        return load(Path(directory) / "config.toml", CONFIG)


@cache
def configured(acme: str, beta: str) -> Settings:
    """The settings in which each operator is "on" (is sent notices), "off" (is not), or "gone" (from the file)."""
    wanted = {"acme": acme, "beta": beta}
    operators = {
        name: msgspec.structs.replace(operator, notify=wanted[name] == "on")
        for name, operator in base().operators.items()
        if wanted[name] != "gone"
    }
    return msgspec.structs.replace(base(), operators=operators)


# -- an event loop whose time is moved by hand


class HandLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers follow the hand clock, so that every sleep and time-out of the daemon is simulated."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self._hand = clock
        self._clock_resolution = 1e-6  # times are sums of floats: a timer is due when it is due but for rounding

    def time(self) -> float:
        return self._hand.mono

    def next_timer(self) -> float | None:
        return min((timer.when() for timer in self._scheduled if not timer.cancelled()), default=None)  # type: ignore[attr-defined]

    @property
    def ready(self) -> int:
        return len(self._ready)  # type: ignore[attr-defined]


async def run_at_once(thread: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Replaces `_Thread.run`. It does the same on the same thread, but the loop stands still until the result is there,
    so that each example runs in the same way every time.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, HandLoop)
    answer, before = loop.create_future(), loop.ready
    thread._tx.put_nowait((answer, partial(function, thread._conn, *arguments)))
    while loop.ready == before:
        time.sleep(10e-6)
    return await answer


# -- the model


@dataclass
class Known:
    """A session in the model. `heard` and `sure` are the model's two service clocks at the session's last touch.
    `seen_ms` is the service time that the store noted for that touch; it is None until the model has read it.
    """

    player: str
    token: str | None
    idle_ms: int
    lifetime_at: int | None
    opened_at: int
    heard: float
    sure: float
    seen_ms: int | None = None
    reason: str | None = None
    ended_at: int | None = None
    sinks: frozenset[str] = frozenset()
    not_late_before: float = 0.0
    orphaned: bool = False
    outlived: float | None = None


Sessions = dict[tuple[str, str], Known]


@dataclass(frozen=True)
class Now:
    """What the model judges an operation by: the wall time, its own two service clocks, and the sinks of an end."""

    wall: int
    heard: float
    sure: float
    settings: Settings

    def sinks(self, operator: str) -> frozenset[str]:
        known = self.settings.operators.get(operator)
        if known is None:
            return frozenset()
        plugins = {f"plugin:{name}" for name, plugin in self.settings.plugins.items() if plugin.listens_to(operator)}
        return frozenset(plugins | ({"http"} if known.notify else set()))

    def end(self, operator: str, known: Known, reason: str) -> None:
        known.reason, known.ended_at, known.sinks = reason, self.wall, self.sinks(operator)

    def touch(self, known: Known) -> None:
        known.heard, known.sure, known.seen_ms = self.heard, self.sure, None


class Open(NamedTuple):
    operator: str
    session_id: str
    player: str
    token: str
    idle_ms: int

    async def call(self, db: Store) -> Any:
        lifetime_ms = LIFETIME_MS[self.operator]
        opening = Opening(self.operator, self.session_id, self.player, self.token, None, self.idle_ms, lifetime_ms)
        opened = await db.open_session(opening)
        return opened.outcome, opened.session.reason, opened.session.ended_at

    def expect(self, sessions: Sessions, now: Now) -> Any:
        known = sessions.get((self.operator, self.session_id))
        if known is None:
            lifetime_ms = LIFETIME_MS[self.operator]
            lifetime_at = now.wall + lifetime_ms if lifetime_ms else None
            sessions[self.operator, self.session_id] = Known(
                self.player, self.token, self.idle_ms, lifetime_at, now.wall, now.heard, now.sure
            )
            return "created", None, None
        if known.reason is not None:
            return "ended", known.reason, known.ended_at
        if (known.player, known.token) != (self.player, self.token):
            return "differs", None, None
        now.touch(known)
        return "open", None, None


class Touch(NamedTuple):
    operator: str
    session_ids: Sequence[str]

    async def call(self, db: Store) -> Any:
        return await db.touch(self.operator, self.session_ids)

    def expect(self, sessions: Sessions, now: Now) -> Any:
        unknown, ended, touched = [], [], 0
        for session_id in dict.fromkeys(self.session_ids):
            known = sessions.get((self.operator, session_id))
            if known is None:
                unknown.append(session_id)
            elif known.reason is not None:
                ended.append(session_id)
            else:
                touched += 1
                now.touch(known)
        return touched, unknown, ended


class Close(NamedTuple):
    operator: str
    session_id: str

    async def call(self, db: Store) -> Any:
        session = await db.end(self.operator, self.session_id)
        return None if session is None else (session.reason, session.ended_at)

    def expect(self, sessions: Sessions, now: Now) -> Any:
        known = sessions.get((self.operator, self.session_id))
        if known is None:
            return None
        if known.reason is None:
            now.end(self.operator, known, "closed")
        return known.reason, known.ended_at


class Report(NamedTuple):
    operator: str
    session_id: str
    player: str
    token: str | None
    compare: bool
    accept: bool

    async def call(self, db: Store) -> Any:
        return await db.record(Recording(*self[:4], self.compare, self.accept, None, 15_000))

    def expect(self, sessions: Sessions, now: Now) -> Any:
        known = sessions.get((self.operator, self.session_id))
        if known is None:
            if self.compare:
                return "bad_token"
            if not self.accept:
                return "unknown_session"
            known = Known(self.player, self.token, 15_000, None, now.wall, now.heard, now.sure)
            sessions[self.operator, self.session_id] = known
        elif self.compare and self.token != known.token:
            return "bad_token"
        elif self.player != known.player:
            return "player_mismatch"
        elif known.reason is not None:
            return "repeated"
        known.token = known.token or self.token
        now.end(self.operator, known, "reported")
        return "ended"


Operation = Open | Touch | Close | Report

session_ids = st.sampled_from(["1", "2", "3"])
operators = st.sampled_from(OPERATORS)
players, tokens = st.sampled_from("pppq"), st.sampled_from("tttu")
operations = st.one_of(
    st.builds(Open, operators, session_ids, players, tokens, st.sampled_from(IDLE_MS)),
    st.builds(Open, operators, session_ids, st.just("p"), st.just("t"), st.sampled_from(IDLE_MS)),
    st.builds(Touch, operators, session_ids.map(lambda one: [one])),
    st.builds(Touch, operators, st.lists(st.sampled_from(["1", "2", "3", "never"]), max_size=5)),
    st.builds(Close, operators, session_ids),
    st.builds(Report, operators, session_ids, players, st.sampled_from(["t", "u", None]), st.booleans(), st.booleans()),
)
batches = st.lists(operations, min_size=1, max_size=4)
answers = st.lists(st.sampled_from(sorted(ANSWERS)), min_size=1, max_size=3)


# -- what is seen from outside


class Row(NamedTuple):
    player: str
    token: str | None
    idle_ms: int
    opened_at: int
    lifetime_at: int | None
    seen_ms: int
    reason: str | None
    ended_at: int | None


class Seen(NamedTuple):
    """Everything that is committed, read from the file by the test's own SQL."""

    sessions: dict[tuple[str, str], Row]
    deliveries: dict[str, Delivery]
    figures: dict[str, tuple[int, int, int]]
    gates: dict[str, tuple[int | None, int]]
    service_ms: int
    wall_at: int

    @classmethod
    def read(cls, sql: sqlite3.Connection) -> "Seen":
        columns = "player_id, token, idle_ms, opened_at, lifetime_at, seen_ms, reason, ended_at"
        sessions = sql.execute(f"SELECT operator, session_id, {columns} FROM session").fetchall()
        deliveries = sql.execute(f"SELECT {DELIVERY} FROM delivery d LEFT JOIN session s ON s.id = d.session")
        figures = sql.execute("SELECT name, live, pending, dead, held_at, not_before_at FROM operator").fetchall()
        found = [Delivery(*row) for row in deliveries]
        return cls(
            {(operator, session_id): Row(*row) for operator, session_id, *row in sessions},
            {delivery.webhook_id: delivery for delivery in found},
            {name: (live, pending, dead) for name, live, pending, dead, *_ in figures},
            {name: (held_at, not_before_at) for name, *_, held_at, not_before_at in figures},
            *sql.execute("SELECT service_ms, wall_at FROM clock").fetchone(),
        )


class Peer:
    """All recipients of deliveries during one life of the daemon (from a start to its end). It replaces the sender and
    the plug-in's hook, answers as the rules chose, and notes what a recipient must never see.
    """

    def __init__(self, machine: "Promises") -> None:
        self._machine = machine
        self.under_way: dict[tuple[str, str], set[str]] = {}
        self.hanging: list[asyncio.Future[str]] = []
        self.succeeded: set[str] = set()  # during this life; none of these may be sent again before it ends

    async def close(self) -> None:
        pass

    async def post(self, operator: Operator, webhook_id: str, body: bytes, reached: Any = None) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._attempt(operator.name, "http", webhook_id, body))
            try:
                async with asyncio.timeout(operator.policy.timeout_s):
                    answer = await self._answer(operator.name, "http")
            except TimeoutError:
                raise Unreachable("timeout") from None
            if answer == "ok":
                self._delivered(webhook_id)
            if answer == "refused":
                raise Unreachable("connect")
            self._asks_for_rest(operator.name, ANSWERS[answer][1].get("Retry-After"))
            return ANSWERS[answer]

    async def hook(self, event: SessionEnded) -> None:
        with self._attempt(event.operator, "plugin:hook", event.id, event):
            answer = await self._answer(event.operator, "plugin:hook")
            if answer == "garbage":
                raise SystemExit
            if answer != "ok":
                raise OSError
            self._delivered(event.id)

    async def _answer(self, operator: str, sink: str) -> str:
        script = self._machine.scripts[operator, sink]
        script.append(script.pop(0))
        if script[-1] != "hang":
            return script[-1]
        future = asyncio.get_running_loop().create_future()
        self.hanging.append(future)
        try:
            return await future
        finally:
            self.hanging.remove(future)

    def _asks_for_rest(self, operator: str, retry_after: str | None) -> None:
        if retry_after is not None:
            until = self._machine.clock.wall_ms() + int(min(float(retry_after), retry.RETRY_AFTER_MAX_S) * 1000)
            self._machine.rests[operator] = max(until, self._machine.rests.get(operator, 0))

    def _delivered(self, webhook_id: str) -> None:
        self.succeeded.add(webhook_id)
        self._machine.successes.add(webhook_id)

    @contextlib.contextmanager
    def _attempt(self, operator: str, sink: str, webhook_id: str, body: Any) -> Any:
        machine, lane = self._machine, self.under_way.setdefault((operator, sink), set())
        never = {
            "sent while an attempt for it is under way": webhook_id in lane,
            "sent again in the life in which it succeeded": webhook_id in self.succeeded,
            "sent again after its success was stored": webhook_id in machine.delivered,
            "sent with another body": machine.bodies.setdefault(webhook_id, body) != body,
            "sent beyond the concurrency": len(lane) >= CONCURRENCY[operator, sink],
            "sent to a held operator": sink == "http" and operator in machine.held,
            "sent before Retry-After was over": sink == "http" and machine.too_soon(operator),
        }
        machine.broken += [f"{webhook_id} to {operator} {sink}: {what}" for what, is_so in never.items() if is_so]
        machine.attempts[webhook_id] += 1
        lane.add(webhook_id)
        try:
            yield
        finally:
            lane.discard(webhook_id)


# -- the machine


class Promises(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.loop = HandLoop(self.clock)
        self.root = Path(tempfile.mkdtemp(prefix="promises-", dir=MEMORY))
        self.lives = 0
        self.states = {"acme": "on", "beta": "on"}
        self.played = 0
        self.blocker: sqlite3.Connection | None = None
        self.known: Sessions = {}
        self.broken: list[str] = []
        # The model's two service clocks, in ms. The daemon's service clock is never ahead of `heard`, and hardly behind
        # `sure`.
        self.heard = self.sure = 0.0
        self.committed = (0.0, 0.0, 0)  # heard, sure and wall time at the last commit
        self.checked = 0  # how many commits of this life have been checked
        self.lenient_until = 0.0
        self.closing = False
        self.service_ms = self.stored_ms = 0.0
        # What was seen of deliveries during all lives of the daemon.
        self.seen: dict[str, Delivery] = {}
        self.attempts: Counter[str] = Counter()
        self.bodies: dict[str, Any] = {}
        self.successes: set[str] = set()
        self.delivered: set[str] = set()
        self.held: set[str] = set()
        # By operator, the wall time in ms until which its Retry-After asked for no requests
        self.rests: dict[str, int] = {}

    @property
    def settings(self) -> Settings:
        return configured(self.states["acme"], self.states["beta"])

    @property
    def now(self) -> Now:
        return Now(self.clock.wall_ms(), self.heard, self.sure, self.settings)

    def too_soon(self, operator: str) -> bool:
        """Whether a Retry-After of the operator still applies. After the wall clock was set back, it may look longer
        than any can be; such a wait is ignored.
        """
        rest_ms = self.db.gate(operator).not_before_at - self.clock.wall_ms()
        return 0 < rest_ms <= retry.RETRY_AFTER_MAX_S * 1000

    # -- lives of the daemon

    @initialize(grace_s=st.sampled_from([0, 3, 8]), scripts=st.fixed_dictionaries(dict.fromkeys(CONCURRENCY, answers)))
    def start(self, grace_s: int, scripts: dict[tuple[str, str], list[str]]) -> None:
        self.scripts = {lane: list(script) for lane, script in scripts.items()}
        (self.root / "0").mkdir()
        self.begin(grace_s, count=False)
        self.settled()

    def begin(self, grace_s: int, *, count: bool) -> None:
        path = self.root / str(self.lives) / "lm.sqlite3"
        self.grace_ms = grace_s * 1000
        self.db: Store = self.loop.run_until_complete(
            Store.open(path, self.clock, count_downtime=count, limits=StoreLimits(busy_timeout_s=0))
        )
        self.peer = Peer(self)
        self.sweeper = Sweeper(self.db, self.clock, grace_s)
        self.dispatcher = Dispatcher(self.db, self.clock, self.peer, Random(self.lives))  # type: ignore[arg-type]
        self.plugins = {name: LoadedPlugin(plugin, self.peer.hook) for name, plugin in base().plugins.items()}
        self.returned: dict[str, float] = {}  # when operators were configured again in this life
        self.operators = frozenset(self.settings.operators)
        self.configure()
        self.loops = {
            name: self.loop.create_task(coroutine, name=name)
            for name, coroutine in {
                "writer": self.db.run(),
                "sweeper": self.sweeper.run(),
                "dispatcher": self.dispatcher.run(),
            }.items()
        }
        self.rests.clear()  # an answer that was not stored is lost with the life
        self.commits, self.checked = Commits(self.db), 0
        self.service_ms = self.db.service_clock.last_ms
        assert self.service_ms >= self.stored_ms
        self.started = self.heard
        self.lenient_until = self.sure + LATE_MS
        self.closing = False

    def configure(self) -> None:
        operators = frozenset(self.settings.operators)
        self.db.configure(operators, partial(sinks_of, self.settings), grace_ms=self.grace_ms)
        for name in operators - self.operators:
            self.returned[name] = self.heard
        self.operators = operators
        self.dispatcher.configure(self.settings, self.plugins)

    def finish(self) -> None:
        """Ends a life: everything that still runs is dropped."""
        self.unblock()

        async def drop() -> None:
            while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            await self.db.close()

        self.loop.run_until_complete(drop())

    def next_life(self, down_s: float, grace_s: int, *, count: bool) -> None:
        self.clock.advance(down_s)
        heard, sure, wall = self.committed
        counted = max(0, self.clock.wall_ms() - wall) if count and wall else 0
        self.heard, self.sure = heard + counted, sure + counted - 1
        self.begin(grace_s, count=count)

    # -- time

    async def quiet(self) -> None:
        """Lets the loop run until nothing more happens at this instant."""
        for turn in range(1, TURNS_MAX):
            await asyncio.sleep(0)
            if not self.loop.ready:
                return
            if turn % 1000 == 0:  # work takes time, too, and a sleep of 1e-12 s must end some time
                self.clock.advance(0.001)
                self.heard += 1
        raise AssertionError("the daemon never comes to rest")

    def settled(self) -> None:
        self.loop.run_until_complete(self.quiet())
        for task in self.loops.values():
            if task.done():
                task.result()
        if self.commits.made != self.checked:
            self.checked = self.commits.made
            self.committed = (self.heard, self.sure, self.clock.wall_ms())
            self.check()
        self.check_clock()
        assert not self.broken, self.broken

    def move(self, seconds: float) -> None:
        """Lets time pass while the daemon runs, from one timer to the next."""
        target = self.clock.mono + seconds
        while self.clock.mono < target - 1e-6:
            timer = self.loop.next_timer()
            step = max(0.001, min(target if timer is None else timer, target) - self.clock.mono)
            failing = self.db.failure is not None
            ticking = self.db.live > 0
            self.clock.mono += step
            self.clock.wall += step * 1000
            if not failing and not self.closing:
                self.heard += step * 1000
                self.loop.run_until_complete(self.quiet())
                if ticking and self.db.failure is None:
                    self.sure += step * 1000
            self.settled()
            if failing and self.db.failure is None:
                # Operations that were refused are tried again after a second
                self.lenient_until = self.sure + 1000 + LATE_MS
            self.check_lateness()

    # -- checks of the promises

    def check(self) -> None:
        seen: Seen = self.loop.run_until_complete(self.db.db.reads.read(Seen.read))
        assert seen.service_ms >= self.stored_ms
        self.stored_ms = seen.service_ms
        self.reconcile(seen, self.known)
        self.check_deliveries(seen)
        counted = {}
        for name in OPERATORS:
            live = sum(row.reason is None for (operator, _), row in seen.sessions.items() if operator == name)
            states = [delivery.state for delivery in seen.deliveries.values() if delivery.operator == name]
            counted[name] = (live, states.count("pending"), states.count("dead"))
        none = (0, 0, 0)
        assert {name: seen.figures.get(name, none) for name in OPERATORS} == counted
        assert {name: dataclasses.astuple(self.db.figures_of(name)) for name in OPERATORS} == counted
        for name in OPERATORS:
            held_at, not_before = seen.gates.get(name, (None, 0))
            assert held_at is not None or name not in self.held, f"{name} is held no more"
            if held_at is not None:
                self.held.add(name)
            gate = self.db.gate(name)
            assert (gate.held_at, gate.not_before_at) == (held_at, not_before)
            if not self.dispatcher.in_flight:  # every answer has been stored
                assert not_before >= self.rests.get(name, 0), f"{name} asked for rest, and nobody knows"

    def reconcile(self, seen: Seen, known: Sessions) -> None:
        """Compares what is stored with what was acknowledged. Adds to the model the ends that only the sweeper
        makes.
        """
        now = self.now
        assert seen.sessions.keys() == known.keys()
        for key, row in seen.sessions.items():
            one = known[key]
            assert (row.player, row.idle_ms, row.opened_at) == (one.player, one.idle_ms, one.opened_at), key
            assert rules.same_token(row.token, one.token), key
            mine = [d for d in seen.deliveries.values() if (d.operator, d.session_id) == key]
            needed = row.reason is None or any(d.state != "delivered" and not self.impossible(d) for d in mine)
            assert row.token is None or (row.token == one.token) is needed, f"{key}: a token that nothing needs"
            if one.seen_ms is None:  # touched just now
                assert seen.service_ms <= row.seen_ms <= seen.service_ms + 1, key
                one.seen_ms = row.seen_ms
            assert row.seen_ms == one.seen_ms, key
            if one.reason is None and row.reason in ("inactivity", "max_lifetime"):
                assert row.ended_at == now.wall
                assert key[0] in self.settings.operators, f"{key} ended though nobody knows its sinks"
                self.may_end(key, one, row.reason)
                now.end(key[0], one, row.reason)
            assert (row.reason, row.ended_at) == (one.reason, one.ended_at), key
            assert sorted(d.sink for d in mine) == sorted(one.sinks), key

    def may_end(self, key: tuple[str, str], one: Known, reason: str) -> None:
        if reason == "max_lifetime":
            assert one.lifetime_at is not None
            assert self.clock.wall_ms() >= one.lifetime_at, f"{key} lived too short"
            return
        assert self.heard - one.heard >= one.idle_ms - 1e-3, f"{key} ended early: {self.heard - one.heard} ms heard"
        assert self.heard - self.started >= self.grace_ms - 1e-3, f"{key} ended during the restart grace"
        returned = self.returned.get(key[0], 0.0)
        if one.heard < returned:
            assert self.heard - returned >= self.grace_ms - 1e-3, f"{key} ended before it could be touched again"
        assert not self.closing, f"{key} ended for inactivity while stopping"

    def check_deliveries(self, seen: Seen) -> None:
        for webhook_id, row in seen.deliveries.items():
            known = self.seen.get(webhook_id, row)
            assert (row.operator, row.session_id, row.sink) == (known.operator, known.session_id, known.sink)
            if row.state == "delivered":  # so the body, which has the player's token, is not needed any more
                assert row.body == b""
            elif row.sink == "http":
                assert self.bodies.setdefault(webhook_id, row.body) == row.body
            assert row.attempts <= self.attempts[webhook_id]
            assert (row.state == "pending") == (row.settled_at is None)
            if webhook_id in self.delivered:
                assert row.state == "delivered"
            if row.state == "delivered":
                assert webhook_id in self.successes
                self.delivered.add(webhook_id)
            if row.state == "dead":
                assert row.attempts or row.last_error == "max_age" or self.impossible(row)
        self.seen |= seen.deliveries

    @staticmethod
    def impossible(row: Delivery) -> bool:
        return row.sink == "http" and not row.body

    def check_clock(self) -> None:
        """The service clock never decreases, and stays between the model's two clocks."""
        service_ms = self.db.service_clock.last_ms  # in whole milliseconds
        unread_ms = (self.clock.mono - self.db.service_clock._read_at) * 1000
        assert service_ms <= self.heard + 1e-3, f"{service_ms} ms counted, {self.heard} ms heard"
        assert self.db.failure or self.closing or service_ms + 1 + unread_ms >= self.sure - 1e-3
        assert service_ms >= self.service_ms
        self.service_ms = service_ms

    def check_lateness(self) -> None:
        """Each session that is due has ended, while the daemon runs and the store accepts writes."""
        wall = self.clock.wall_ms()
        for key, one in self.known.items():
            if one.reason is not None:
                continue
            if one.lifetime_at is None or wall < one.lifetime_at:
                one.outlived = None
            elif one.outlived is None:
                one.outlived = self.sure
            if self.db.failure is not None or self.closing or key[0] not in self.settings.operators:
                continue
            if self.sure <= max(self.lenient_until, one.not_late_before):
                continue
            if one.outlived is not None and not one.orphaned:  # the sweeper checks the wall time once a second
                assert self.sure - one.outlived <= 1000 + LATE_MS, f"{key} outlived its longest life"
            if self.sweeper.hold_s == 0:
                assert self.sure - one.sure <= one.idle_ms + LATE_MS, f"{key} is idle for too long"

    # -- rules: sessions

    async def attempt(self, operation: Operation) -> Any:
        try:
            return await operation.call(self.db)
        except StoreError as error:
            return error

    def served(self, batch: Sequence[Operation]) -> list[Operation]:
        return [operation for operation in batch if operation.operator in self.settings.operators]

    def acknowledged(self, batch: Sequence[Operation], results: Sequence[Any]) -> None:
        for operation, result in zip(batch, results, strict=True):
            if isinstance(result, StoreError):
                assert self.blocker is not None
            else:
                assert result == operation.expect(self.known, self.now), operation

    @rule(batch=batches)
    def act(self, batch: list[Operation]) -> None:
        batch = self.served(batch)

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*map(self.attempt, batch))

        self.acknowledged(batch, self.loop.run_until_complete(all_at_once()))
        self.settled()

    @rule(operator=operators, count=st.integers(1, 5))
    def play(self, operator: str, count: int) -> None:
        """Opens sessions and closes them at once, which makes a backlog of deliveries."""
        self.played += count
        names = [f"n{number}" for number in range(self.played - count, self.played)]
        self.act([Open(operator, name, "p", "t", 15_000) for name in names] + [Close(operator, name) for name in names])

    @rule(operator=operators, keep_s=st.sampled_from([0, 10, 60]))
    def prune(self, operator: str, keep_s: int) -> None:
        before_at = self.clock.wall_ms() - keep_s * 1000
        mine = [d for d in self.seen.values() if (d.operator, d.session_id) in self.known]
        busy = {(d.operator, d.session_id) for d in mine if d.settled_at is None or d.settled_at >= before_at}
        old = {key for key, one in self.known.items() if one.ended_at is not None and one.ended_at < before_at} - busy
        with contextlib.suppress(StoreError):
            count, _ = self.loop.run_until_complete(self.db.prune(before_at, (0, 0)))
            assert count == len(old)
            self.known = {key: one for key, one in self.known.items() if key not in old}
            self.seen = {name: d for name, d in self.seen.items() if (d.operator, d.session_id) not in old}
        self.settled()

    # -- rules: time

    @rule(seconds=st.sampled_from([0.05, 0.25, 1, 3, 8, 20]))
    def advance(self, seconds: float) -> None:
        self.move(seconds)

    @rule(seconds=st.sampled_from([0.05, 0.7, 1.2, 1.6, 4, 90, 4000]))
    def stall(self, seconds: float) -> None:
        """The daemon does nothing for a while, as on a stalled machine, but time passes."""
        self.clock.advance(seconds)
        if seconds <= STALL_S and self.db.failure is None:
            self.heard += seconds * 1000
        self.sure -= 1000  # after a stall, the time since the last reading of the clock does not count
        self.settled()

    @rule(seconds=st.integers(-7200, 7200))
    def set_wall(self, seconds: int) -> None:
        self.clock.step_wall(seconds)
        self.rests.clear()  # the moments in `rests` were of the former wall time

    @rule()
    def wake(self) -> None:
        self.sweeper.wake()
        self.dispatcher.wake()
        self.settled()

    # -- rules: operators

    @rule(lane=st.sampled_from(sorted(CONCURRENCY)), script=answers)
    def answer(self, lane: tuple[str, str], script: list[str]) -> None:
        self.scripts[lane] = list(script)

    @precondition(lambda self: self.peer.hanging)
    @rule(which=st.integers(0, 3), answer=st.sampled_from(sorted(set(ANSWERS) - {"hang"})))
    def answer_hanging(self, which: int, answer: str) -> None:
        self.peer.hanging[which % len(self.peer.hanging)].set_result(answer)
        self.settled()

    @rule(operator=operators, states=st.lists(st.sampled_from(["on", "off", "gone"]), min_size=1, max_size=2))
    def reload(self, operator: str, states: list[str]) -> None:
        for state in states:
            self.states[operator] = state
            self.configure()
            for (name, _), one in self.known.items():
                # If the sweeper has looked at a session in the meantime, it looks again after some time. When the
                # operator is back, its sessions have a grace
                if name == operator:
                    long_ms = min((self.heard - one.sure) * rules.REVISIT_SHARE, rules.REVISIT_MAX_MS)
                    revisit_ms = max(min(one.idle_ms, rules.REVISIT_MS), long_ms)
                    one.not_late_before = self.sure + max(revisit_ms, self.grace_ms) + LATE_MS
                    one.orphaned |= state == "gone"
            self.settled()

    @rule(operator=operators)
    def hold(self, operator: str) -> None:
        with contextlib.suppress(StoreError):
            alter = partial(retry.hold, now_at=self.clock.wall_ms(), reason="by_hand")
            self.loop.run_until_complete(self.db.set_gate(operator, alter))
            self.held.add(operator)
        self.dispatcher.wake()
        self.settled()

    @rule(operator=operators)
    def release(self, operator: str) -> None:
        with contextlib.suppress(StoreError):
            before = set(self.held)
            self.held.discard(operator)
            try:
                alter = partial(retry.release, now_at=self.clock.wall_ms())
                self.loop.run_until_complete(self.db.set_gate(operator, alter))
            except StoreError:
                self.held = before
                raise
            self.rests.pop(operator, None)
        self.dispatcher.wake()
        self.settled()

    @precondition(lambda self: self.seen)
    @rule(which=st.integers(0, 20))
    def retry_one(self, which: int) -> None:
        webhook_id = sorted(self.seen)[which % len(self.seen)]
        known = self.seen[webhook_id]
        with contextlib.suppress(StoreError):
            before = self.loop.run_until_complete(self.db.retry_one(webhook_id))
            assert before is not None
            assert before.state == known.state
        self.settled()

    @rule(operator=operators)
    def retry_all(self, operator: str) -> None:
        dead = [d for d in self.seen.values() if (d.operator, d.state) == (operator, "dead") and not self.impossible(d)]
        with contextlib.suppress(StoreError):
            assert self.loop.run_until_complete(self.db.retry_dead(operator, Dead())) == len(dead)
        self.settled()

    # -- rules: the disk and the process

    @precondition(lambda self: self.blocker is None)
    @rule()
    def block(self) -> None:
        """From now on the store refuses every write."""
        self.blocker = sqlite3.connect(self.db.path, isolation_level=None)
        self.blocker.execute("BEGIN IMMEDIATE")

    @rule()
    def unblock(self) -> None:
        if self.blocker is not None:
            self.blocker.close()
            self.blocker = None

    @rule(
        batch=batches,
        turns=st.integers(0, 8),
        down_s=st.sampled_from([0, 2, 30, 5000]),
        grace_s=st.sampled_from([0, 3, 8]),
        count=st.booleans(),
    )
    def crash(self, batch: list[Operation], turns: int, down_s: float, grace_s: int, count: bool) -> None:
        """Kills the daemon while operations are under way. They need not be acknowledged, and may be stored or not."""
        batch = self.served(batch)
        tasks = [self.loop.create_task(self.attempt(operation)) for operation in batch]
        self.turn(turns)
        self.lives += 1
        old, new = (self.root / str(life) for life in (self.lives - 1, self.lives))
        new.mkdir()
        for name in ("lm.sqlite3", "lm.sqlite3-wal", "lm.sqlite3.lock"):
            shutil.copy(old / name, new / name)
        answered = sum(task.done() for task in tasks)
        self.acknowledged(batch[:answered], [task.result() for task in tasks[:answered]])
        doubtful = [] if self.blocker is not None else batch[answered:]
        self.finish()
        self.adopt(new / "lm.sqlite3", doubtful)
        shutil.rmtree(old)
        self.next_life(down_s, grace_s, count=count)
        self.settled()

    def turn(self, turns: int) -> None:
        """Runs a few turns of the loop, so that what follows comes in the middle of some work."""

        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(some())

    def adopt(self, path: Path, doubtful: Sequence[Operation]) -> None:
        """Operations that were not acknowledged may be stored or not, but only in the order in which they were asked
        for.
        """
        with contextlib.closing(sqlite3.connect(path)) as sql:
            seen = Seen.read(sql)
        _, sure, wall = self.committed
        if seen.wall_at != wall:  # something was stored just now
            assert seen.wall_at == self.clock.wall_ms()
            self.committed = (self.heard, self.sure, seen.wall_at)
        elif doubtful:
            self.committed = (self.heard, sure, wall)
        self.stored_ms = seen.service_ms
        for count in range(len(doubtful) + 1):
            candidate = {key: replace(one) for key, one in self.known.items()}
            for operation in doubtful[:count]:
                operation.expect(candidate, self.now)
            try:
                self.reconcile(seen, candidate)
            except AssertionError:
                if count == len(doubtful):
                    raise
            else:
                self.known = candidate
                self.check_deliveries(seen)
                return

    @rule(
        batch=st.just([]) | batches,
        turns=st.integers(0, 8),
        down_s=st.sampled_from([0, 2, 30, 5000]),
        grace_s=st.sampled_from([0, 3, 8]),
        count=st.booleans(),
        recovers=st.booleans(),
    )
    def stop(
        self, batch: list[Operation], turns: int, down_s: float, grace_s: int, count: bool, recovers: bool
    ) -> None:
        """Stops the store as the daemon does, while operations are under way, and opens it again."""
        batch = self.served(batch)
        tasks = [self.loop.create_task(self.attempt(operation)) for operation in batch]
        self.turn(turns)
        self.db.service_clock.freeze("stopping")
        self.closing = True
        for name, task in self.loops.items():
            if name != "writer":
                task.cancel()
        ended = [task for name, task in self.loops.items() if name != "writer"]
        self.loops = {"writer": self.loops["writer"]}
        self.loop.run_until_complete(self.quiet())
        assert all(task.done() for task in ended), "a loop does not end when it is told to"
        self.acknowledged(batch, [task.result() for task in tasks])
        draining = self.loop.create_task(self.dispatcher.drain(TIMEOUT_S + DRAIN_EXTRA_S))
        self.settled()
        if recovers:
            self.unblock()
        while not draining.done():
            self.move(0.5)
        with contextlib.suppress(StoreError):
            self.loop.run_until_complete(self.db.probe())
        self.settled()
        self.finish()
        self.next_life(down_s, grace_s, count=count)
        self.settled()

    # -- the end: once everything works again, no delivery is stuck

    def teardown(self) -> None:
        try:
            if sys.exception() is None and self.lives_begun:
                self.check_liveness()
        finally:
            if self.lives_begun:
                self.finish()
            self.loop.close()
            shutil.rmtree(self.root)

    @property
    def lives_begun(self) -> bool:
        return hasattr(self, "loops")

    def check_liveness(self) -> None:
        self.unblock()
        for lane in self.scripts:
            self.scripts[lane] = ["ok"]
        for hanging in list(self.peer.hanging):
            hanging.set_result("ok")
        self.move(2)  # results that the store refused are stored now, perhaps with a hold
        for name in OPERATORS:
            if self.states[name] != "on":
                self.reload(name, ["on"])
            if name in self.held:
                self.release(name)
        self.move((max(IDLE_MS) + rules.REVISIT_MAX_MS + self.grace_ms) / 1000 + 5)
        assert [key for key, one in self.known.items() if one.reason is None] == []
        self.move(LONGEST_WAIT_S)
        self.check_nothing_pends()
        for name in OPERATORS:  # deliveries that are dead can still be sent
            self.retry_all(name)
        self.move(LONGEST_WAIT_S)  # a Retry-After may not be over yet
        self.check_nothing_pends()
        assert all(self.impossible(d) for d in self.seen.values() if d.state == "dead")

    def check_nothing_pends(self) -> None:
        stuck = [d for d in self.seen.values() if d.state == "pending"]
        assert not stuck, stuck


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread.Thread, "run", run_at_once)


def test_every_promise_is_kept_whatever_happens(simulated: None) -> None:
    run_state_machine_as_test(
        Promises,
        settings=settings(
            stateful_step_count=30,
            max_examples=700 if FULL else examples(100),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


# -- sequences that the random test once failed on, each as short as possible


@contextlib.contextmanager
def playing(**scripts: list[str]) -> Iterator[Promises]:
    """A machine whose rules the test calls itself. All promises are checked as above."""
    machine = Promises()
    try:
        machine.start(0, {lane: scripts.get(lane[0], ["ok"]) for lane in CONCURRENCY})
        yield machine
    finally:
        machine.teardown()


@pytest.mark.parametrize("turns", range(8))
def test_a_loop_that_was_just_woken_still_ends_when_it_is_told_to(simulated: None, turns: int) -> None:
    """In Python 3.11, asyncio.wait_for loses a cancellation that comes at the same time as the result."""
    with playing() as machine:
        machine.act([Open("acme", "live", "p", "t", 15_000)])
        batch = [Open("acme", "1", "p", "t", 1_000), Close("acme", "1"), Open("beta", "1", "p", "t", 1_000)]
        machine.stop(batch, turns=turns, down_s=0, grace_s=0, count=False, recovers=False)


@pytest.mark.parametrize("state", ["gone", "off"])
def test_what_is_in_flight_is_not_sent_again_when_its_operator_comes_back(simulated: None, state: str) -> None:
    with playing(acme=["hang"]) as machine:
        machine.play("acme", 1)
        machine.reload("acme", [state, "on"])


def test_service_time_passes_for_the_first_session_of_an_operator(simulated: None) -> None:
    """The sweeper sleeps until the deadline of a session that has ended already, and no other part reads the service
    clock.
    """
    with playing() as machine:
        machine.play("acme", 1)
        machine.act([Open("acme", "1", "p", "t", 15_000)])
        machine.advance(20)


def test_a_pause_and_a_rest_before_a_wall_clock_that_was_set_back_end(simulated: None) -> None:
    """At the present wall time, the breaker's pause counts as over, because it is too far in the future. At the end of
    the Retry-After, it does not.
    """
    with playing(beta=["failing"]) as machine:
        machine.play("beta", 5)
        machine.advance(8)
        machine.answer(("beta", "http"), ["slow_down"])
        machine.advance(8)
        machine.set_wall(-2660)
        machine.advance(8)


def test_a_retry_by_hand_after_the_wall_clock_was_set_back_is_sent(simulated: None) -> None:
    """Retries by hand are spaced out, each after the last one. A last one at a time before the clock was set back
    delays nothing.
    """
    with playing(beta=["final"]) as machine:
        machine.play("beta", 1)
        machine.retry_all("beta")
        machine.set_wall(-7000)
