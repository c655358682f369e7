"""Builds every part of the daemon, runs their loops in one TaskGroup, reloads the configuration, and stops in order.

Everything that is opened is closed by the exit stack, the store last: a connection to the database that stays open
keeps the process from exiting. A loop that raises ends the daemon with an error, and the service manager starts it
again.
"""

import asyncio
import os
import secrets
import signal
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from random import Random
from typing import Any, get_args

from lmdaemon import log, systemd
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Settings
from lmdaemon.config.shown import digest
from lmdaemon.delivery.dispatcher import DRAIN_EXTRA_S, Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.shown import request_of
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.delivery.underway import Underway
from lmdaemon.disk import DiskWatch
from lmdaemon.health import Health
from lmdaemon.listeners import Listeners, address_text
from lmdaemon.metrics import Metrics
from lmdaemon.model import Asker, Reason, Session
from lmdaemon.plugins import CANCEL_S
from lmdaemon.pruner import Pruner
from lmdaemon.readings import Readings
from lmdaemon.reloader import Reloader
from lmdaemon.status import Status, count
from lmdaemon.store.contract import Store, StoreError, StoreObserver
from lmdaemon.store.open import name_of, open_store
from lmdaemon.sweeper import Sweeper
from lmdaemon.trials import Trials
from lmdaemon.version import __version__
from lmdaemon.web.api import Api
from lmdaemon.web.calls import Context
from lmdaemon.web.endpoint import Endpoint
from lmdaemon.web.events import Events
from lmdaemon.web.memory import Bounds
from lmdaemon.web.recent import Recent
from lmdaemon.web.sockets import Hearing

START_S = 60.0  # time that systemd is asked for at a start, besides upgrade and plug-ins
UPGRADE_BYTES_S = 10e6  # bytes a second that a slow disk upgrades
CLOSING_S = 15.0  # time that systemd is asked for at a stop, for the last commit and for copying the WAL into the file

NOBODY = Asker()

events = log.Log("daemon")


class _Recorder(StoreObserver):
    """Counts and logs what was committed."""

    def __init__(self, store: Store, metrics: Metrics, closing: Mapping[tuple[str, str], Asker]) -> None:
        self._store = store
        self._metrics = metrics
        self._closing = closing  # who is closing which session, by operator and id

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Counts and logs ends (StoreObserver)."""
        now_ms = self._store.service_clock.now_ms()
        for (operator, reason), many in Counter((one.operator, one.reason) for one in sessions if one.reason).items():
            self._metrics.ended(operator, reason, many)
        for session in sessions:
            if session.reason == "inactivity":
                self._metrics.lag.observe(max(0, now_ms - session.deadline_ms) / 1000)
            facts = {"operator": session.operator, "session": session.session_id, "reason": session.reason}
            by, request_id = NOBODY
            if session.reason == "closed":
                by, request_id = self._closing.get((session.operator, session.session_id), NOBODY)
            events.info("session.ended", **facts, by=by, request_id=request_id)

    def committed(self, operations: int, took_s: float) -> None:
        self._metrics.committed(operations, took_s)


class _Attempts:
    """Passes attempts on to the metrics, and their results to the clients of `/v1/events`."""

    def __init__(self, metrics: Metrics, heard: Events) -> None:
        self.awoke = metrics.awoke
        self.attempted = metrics.attempted
        self.settled = heard.settled


class Daemon:
    """One daemon: `await Daemon(settings).run()` serves until SIGTERM or `stop()`. `on_serving` is called when it is
    ready.

    `run` raises ConfigError (plug-ins), DatabaseError, OSError (addresses), and an ExceptionGroup when a loop has
    failed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        rng: Random | None = None,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        self._started_with = settings
        self._clock = clock or Clock()
        self._rng = rng or Random()  # noqa: S311 - jitter, not secrets
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Event()
        self.serving = asyncio.Event()
        self._on_serving = on_serving
        self._closing: dict[tuple[str, str], Asker] = {}
        self._name = f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._reloader.settings

    @property
    def addresses(self) -> Mapping[str, Any]:
        """Where "server" and "api" listen, as `socket.getsockname` says it."""
        return self._listeners.addresses

    def stop(self) -> None:
        """Asks `run` to stop in order and return."""
        self._stopping.set()

    def reload(self) -> None:
        """Asks for the configuration file to be read again."""
        self._reloading.set()

    async def run(self) -> None:
        """Starts, serves and stops."""
        async with AsyncExitStack() as stack:
            stack.callback(log.repeats.flush, everything=True)
            self._notifier = systemd.Notifier()
            stack.callback(self._notifier.close)
            if await self._unless_stopped(self._start(stack)):
                await self._serve()
        events.info("daemon.stopped")

    async def _start(self, stack: AsyncExitStack) -> None:
        handed_over = systemd.listening_sockets()
        await self._build(stack)
        await self._listeners.start(
            stack, handed_over, self.settings, self._dispatcher.attempts_max, _drain_s(self.settings)
        )
        self._introduce()

    async def _unless_stopped(self, start: Coroutine[Any, Any, None]) -> bool:
        """Waits for the start and returns True; if a stop is asked for before it is over, cancels it, returns False."""
        starting, stopping = asyncio.ensure_future(start), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            return starting.done()
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    async def _serve(self) -> None:
        self._store.service_clock.thaw("starting")
        self._handle_signals()
        async with asyncio.TaskGroup() as group:
            loops = {
                name: group.create_task(loop, name=name)
                for name, loop in {
                    "writer": self._store.run(),
                    "sweeper": self._sweeper.run(),
                    "dispatcher": self._dispatcher.run(),
                    "pruner": self._pruner.run(),
                    "reloader": self._reload_for_ever(),
                    "status": self._status.report_for_ever(),
                }.items()
            }
            self._announce()
            await self._stopping.wait()
            await self._shut_down(loops)

    # -- building

    async def _build(self, stack: AsyncExitStack) -> None:
        settings = self._started_with
        self._notifier.starting(_start_limit_s(settings), f"Starting. Opening {name_of(settings)}.")
        self._store: Store = await open_store(settings, self._clock, self._name)
        stack.push_async_callback(self._store.close)
        self._store.service_clock.freeze("starting")  # plug-ins may take long to start, and no touch arrives meanwhile
        self._sender = Sender(self._clock)
        stack.push_async_callback(self._sender.close)
        self._metrics = Metrics(self._store.engine)
        totals = self._metrics.totals
        self._recent = Recent(totals, self._store.service_clock.now_ms, self._clock)
        self._events = Events(self._store, self._clock, totals, lambda: self.settings.operators)
        for observer in (self._recent, self._events):
            self._store.observe(observer)
        attempts = _Attempts(self._metrics, self._events)
        self._dispatcher = Dispatcher(
            self._store, self._clock, self._sender, self._rng, attempts, self._open_underway(stack)
        )
        self._reloader = Reloader(settings, self._clock, self._take_over, self._dispatcher.wake)
        await self._reloader.start_plugins()
        stack.push_async_callback(self._reloader.stop_plugins)
        self._disk = DiskWatch(self._store, self._clock.monotonic)
        self._store.observe(self._disk)
        self._hearing = Hearing(self._store.service_clock)
        self._bounds = Bounds()
        self._sweeper = Sweeper(self._store, self._clock, settings.restart_grace_s, self._metrics)
        self._pruner = Pruner(self._store, self._clock, lambda: self.settings.keep_ended_s)
        pulses = {"sweeper": self._sweeper.pulse, "dispatcher": self._dispatcher.pulse}
        self._health = Health(
            self._store,
            self._clock,
            pulses,
            lambda: self.settings,
            lambda: self._reloader.error,
            self._sweeper.alarm,
            self._sweeper.touch_alarm,
            self._hearing.deaf,
            self._disk,
            lambda: self._dispatcher.behind,
        )
        self._trials = Trials()
        self._endpoint = Endpoint(self._store, self._clock, self._health.status, self._metrics)
        self._api = Api(
            Context(
                store=self._store,
                clock=self._clock,
                health=self._health,
                metrics=self._metrics,
                expires_at=self._sweeper.expires_at,
                under_way_since=self._dispatcher.under_way_since,
                probe=self._dispatcher.probe,
                request_of=request_of,
                trials=self._trials,
                recent=self._recent,
                events=self._events,
                read_again=self._reloader.read_again,
                closing=self._closing,
            )
        )
        self._listeners = Listeners(self._endpoint, self._api, self._hearing, self._bounds)
        self._status = Status(self._notifier, self._store, self._health, lambda: self._reloader.error)
        self._measure()
        self._configure()

    def _open_underway(self, stack: AsyncExitStack) -> Underway:
        """The file beside the database that attempts are noted in; in PostgreSQL there is none."""
        database = self._started_with.database
        path = database.with_name(f"{database.name}-attempts") if self._started_with.postgres is None else None
        try:
            underway = Underway(path)
        except OSError as error:
            events.warning("delivery.not_noted", path=str(path), reason=error.strerror or str(error))
            return Underway(None)
        stack.callback(underway.close)
        if underway.crashed:
            events.warning("daemon.crashed_before", attempts=len(underway.lost))
        return underway

    def _configure(self) -> None:
        """Gives the settings in force to every part; each uses them from its next step on."""
        operators = self.settings.operators
        pausing = frozenset(name for name, operator in operators.items() if operator.mass_expiry == "pause")
        grace_ms = int(self.settings.restart_grace_s * 1000)
        daemon_grace_ms = int(self.settings.daemon_grace_s * 1000)
        self._store.configure(
            frozenset(operators), partial(sinks_of, self.settings), pausing, grace_ms, daemon_grace_ms
        )
        self._endpoint.configure(self.settings, self._reloader.plugins)
        self._api.configure(self.settings)
        self._dispatcher.configure(self.settings, self._reloader.plugins)
        self._sweeper.configure({name: operator.idle_s for name, operator in operators.items()})
        self._metrics.configure(operators, self._dispatcher.attempting, get_args(Reason))
        self._events.configured()
        self._listeners.configure(self.settings, self._dispatcher.attempts_max, _drain_s(self.settings))
        if "api" in self.addresses:  # at a reload
            self._introduce()

    def _introduce(self) -> None:
        """Tells the other daemons on the database where the private side listens, and what to compare settings by."""
        at = self.addresses["api"]
        address = address_text(at[:2] if isinstance(at, tuple) else os.fsdecode(at))
        self._store.introduce(address, digest(self.settings))

    def _handle_signals(self) -> None:
        """Handles signals until the event loop is closed, so that a second SIGTERM does not interrupt the stop."""
        loop = asyncio.get_running_loop()
        for number, handler in (
            (signal.SIGTERM, self.stop),
            (signal.SIGINT, self.stop),
            (signal.SIGHUP, self.reload),
        ):
            loop.add_signal_handler(number, handler)

    def _announce(self) -> None:
        self._warn()
        self._status.ready()
        events.info(
            "daemon.serving",
            version=__version__,
            server=self.settings.server.listen.text,
            api=self.settings.api.listen.text,
            database=name_of(self.settings),
            live=self._store.live,
            restart_grace_s=self.settings.restart_grace_s,
        )
        self.serving.set()
        self._on_serving()

    def _warn(self) -> None:
        """Logs warnings about the settings in force."""
        for warning in self.settings.warnings:
            events.warning("config.warned", finding=warning)
        if not self.settings.operators:
            events.warning("config.warned", finding="no operator is configured: nothing can be opened or received")
        gone = [name for name, figures in self._store.figures.items() if figures.live or figures.pending]
        for name in sorted(set(gone) - self.settings.operators.keys()):
            events.warning("operator.not_configured", operator=name, note="its sessions and deliveries wait")

    # -- stopping

    async def _shut_down(self, loops: Mapping[str, "asyncio.Task[None]"]) -> None:
        """Stops accepting, finishes what is in flight within a bound, stores the service clock, ends the loops."""
        within_s = _drain_s(self.settings)
        self._notifier.stopping(
            within_s + _plugins_s(self.settings) + CLOSING_S,
            f"Stopping. {count(self._dispatcher.in_flight, 'delivery', 'deliveries')} in flight.",
        )
        self._events.stop()
        events.info("daemon.stopping", in_flight=self._dispatcher.in_flight, within_s=within_s)
        stays = {"writer"}
        if await self._others_hear():  # and so that they need not wait, its clock goes on and it ends what is due
            stays.add("sweeper")
        else:  # from here on no touch can be received, so no idle time passes and nothing ends
            self._store.service_clock.freeze("stopping")
        for name, loop in loops.items():
            if name not in stays:
                loop.cancel()
        await asyncio.gather(self._dispatcher.drain(within_s), self._listeners.close(), self._trials.stop())
        loops["sweeper"].cancel()
        try:
            await self._store.probe()
        except StoreError as error:
            events.warning("daemon.clock_not_kept", reason=str(error))
        loops["writer"].cancel()

    async def _others_hear(self) -> bool:
        """Whether touches are received by another daemon on the database when this one stops."""
        try:
            return len(await self._health.look_for_daemons()) > 1
        except StoreError:
            return False

    # -- loops

    async def _reload_for_ever(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            self._notifier.reloading()
            await self.reload_once()
            self._status.ready()

    async def reload_once(self) -> None:
        """Reads the configuration again. Takes it over whole, or changes nothing and logs why."""
        if not await self._reloader.reload():
            self._metrics.reloaded(None)

    def _take_over(self) -> None:
        """Puts a new reading of the configuration into force."""
        self._configure()
        self._metrics.reloaded(self._clock.wall_ms() / 1000)
        self._warn()

    # -- metrics

    def _measure(self) -> None:
        """Connects the metrics to the parts that they count."""
        metrics = self._metrics
        self._store.observe(_Recorder(self._store, metrics, self._closing))
        metrics.reloaded(self._clock.wall_ms() / 1000)
        readings = Readings(
            store=self._store,
            clock=self._clock,
            settings=lambda: self.settings,
            sweeper=self._sweeper,
            disk=self._disk,
            dispatcher=self._dispatcher,
            health=self._health,
            hearing=self._hearing,
            bounds=self._bounds,
            sites=self._listeners.sites,
        )
        metrics.watch(readings.read)


def _drain_s(settings: Settings) -> float:
    """How long a stop waits (s) for deliveries, calls of plug-ins and answers that are under way."""
    policies = [operator.policy for operator in settings.operators.values()]
    policies += [plugin.policy for plugin in settings.plugins.values()]
    return max((policy.timeout_s for policy in policies), default=0.0) + DRAIN_EXTRA_S


def _plugins_s(settings: Settings) -> float:
    """How long it may take (s) to start or to stop all plug-ins, one after the other."""
    return sum(plugin.policy.timeout_s + CANCEL_S for plugin in settings.plugins.values())


def _start_limit_s(settings: Settings) -> float:
    """How long a start may take (s), considering that an upgrade may have to rewrite the whole database."""
    size = 0
    with suppress(OSError):  # there is none yet; other errors are reported when it is opened
        size = settings.database.stat().st_size
    return START_S + size / UPGRADE_BYTES_S + _plugins_s(settings)
