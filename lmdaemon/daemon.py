"""Builds every part of the daemon, runs their loops in one TaskGroup, reloads the configuration, and stops in order.

Everything that is opened is closed by the exit stack, the store last: a connection to the database that stays open
keeps the process from exiting. A loop that raises ends the daemon with an error, and the service manager starts it
again.
"""

import asyncio
import os
import resource
import secrets
import signal
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from random import Random
from typing import Any, TypeVar, get_args

from aiohttp import web

from lmdaemon import log, plugins, systemd
from lmdaemon.clock import Clock
from lmdaemon.config import reader
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Plugin, Settings, changes
from lmdaemon.config.shown import NEEDS_RESTART
from lmdaemon.config.values import Listen
from lmdaemon.delivery.dispatcher import DRAIN_EXTRA_S, Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.delivery.underway import Underway
from lmdaemon.disk import DiskWatch
from lmdaemon.health import Health
from lmdaemon.metrics import Metrics
from lmdaemon.model import Asker, Reason, Session
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.pruner import Pruner
from lmdaemon.readings import Readings
from lmdaemon.store.contract import Store, StoreError, StoreObserver
from lmdaemon.store.open import name_of, open_store
from lmdaemon.sweeper import Sweeper
from lmdaemon.version import __version__
from lmdaemon.web import api, endpoint
from lmdaemon.web.api import Api
from lmdaemon.web.calls import Context
from lmdaemon.web.endpoint import Endpoint
from lmdaemon.web.events import Events
from lmdaemon.web.listener import (
    Acceptor,
    Bounds,
    Connection,
    Hearing,
    Site,
    connections_max,
    private_request,
    public_request,
    turn_away,
)
from lmdaemon.web.recent import Recent
from lmdaemon.web.requests import address_of, bind

STATUS_EVERY_S = 10.0
START_S = 60.0  # time that systemd is asked for at a start, besides upgrade and plug-ins
UPGRADE_BYTES_S = 10e6  # bytes a second that a slow disk upgrades
CUT_S = 0.5  # how long a handler may take whose connection was cut at a stop; aiohttp waits twice as long
CLOSING_S = 15.0  # time that systemd is asked for at a stop, for the last commit and for copying the WAL into the file

NOBODY = Asker()

events = log.Log("daemon")

_T = TypeVar("_T")


def _connection_type() -> type[Connection]:
    """The class that serves connections: the fast one of `web.hot`, if that module exists."""
    try:
        from lmdaemon.web import hot
    except ImportError:  # without it everything works as well, only slower
        return Connection
    return hot.connection_type()


class _Recorder(StoreObserver):
    """Counts and logs what was committed."""

    def __init__(self, store: Store, metrics: Metrics, closing: Mapping[tuple[str, str], Asker]) -> None:
        self._store = store
        self._metrics = metrics
        self._closing = closing  # who is closing which session, by operator and id

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Counts and logs ends (StoreObserver)."""
        now_ms = self._store.service_clock.now_ms()
        for (operator, reason), count in Counter((one.operator, one.reason) for one in sessions if one.reason).items():
            self._metrics.ended(operator, reason, count)
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
        self.settings = settings
        self._started_with = settings  # its addresses, database and clock settings are in use to the end
        self._clock = clock or Clock()
        self._rng = rng or Random()  # noqa: S311 - jitter, not secrets
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Event()
        self._reload_error: str | None = None
        self._plugins: dict[str, LoadedPlugin] = {}
        self._sites: dict[str, Site] = {}
        self.serving = asyncio.Event()
        self._on_serving = on_serving
        self.addresses: dict[str, Any] = {}
        self._closing: dict[tuple[str, str], Asker] = {}
        self._name = f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(4)}"

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
            runners = await self._unless_stopped(self._start(stack))
            if runners is not None:
                await self._serve(runners)
        events.info("daemon.stopped")

    async def _start(self, stack: AsyncExitStack) -> list[web.BaseRunner]:
        handed_over = systemd.listening_sockets()
        await self._build(stack)
        return await self._listen(stack, handed_over)

    async def _unless_stopped(self, start: Coroutine[Any, Any, _T]) -> _T | None:
        """The result of the start; None if a stop was asked for before it was over, and the start is cancelled then."""
        starting, stopping = asyncio.ensure_future(start), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return starting.result() if starting.done() else None
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    async def _serve(self, runners: list[web.BaseRunner]) -> None:
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
                    "status": self._report_for_ever(),
                }.items()
            }
            self._announce()
            await self._stopping.wait()
            await self._shut_down(runners, loops)

    # -- building

    async def _build(self, stack: AsyncExitStack) -> None:
        settings = self.settings
        self._notifier.starting(self._start_limit_s(), f"Starting. Opening {name_of(settings)}.")
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
        loaded = [plugins.load(plugin, self._dispatcher.wake) for plugin in settings.plugins.values()]
        await plugins.start_all(loaded)
        self._plugins = {plugin.name: plugin for plugin in loaded}
        stack.push_async_callback(self._stop_plugins)
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
            lambda: self._reload_error,
            self._sweeper.alarm,
            self._sweeper.touch_alarm,
            self._hearing.deaf,
            self._disk,
            lambda: self._dispatcher.behind,
        )
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
                recent=self._recent,
                events=self._events,
                read_again=self._read_again,
                closing=self._closing,
            )
        )
        self._measure()
        self._configure()

    def _open_underway(self, stack: AsyncExitStack) -> Underway:
        """The file beside the database that attempts are noted in; in PostgreSQL there is none."""
        database = self.settings.database
        path = database.with_name(f"{database.name}-attempts") if self.settings.postgres is None else None
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
        grace_ms = int(self._started_with.restart_grace_s * 1000)
        self._store.configure(frozenset(operators), partial(sinks_of, self.settings), pausing, grace_ms)
        self._endpoint.configure(self.settings, self._plugins)
        self._api.configure(self.settings)
        self._dispatcher.configure(self.settings, self._plugins)
        self._sweeper.configure({name: operator.idle_s for name, operator in operators.items()})
        self._metrics.configure(operators, self._dispatcher.attempting, get_args(Reason))
        self._events.configured()
        for site in self._sites.values():
            self._configure_site(site)

    def _introduce(self) -> None:
        """Tells the other daemons on the database where the private side listens."""
        at = self.addresses["api"]
        address = _text(at[:2] if isinstance(at, tuple) else os.fsdecode(at))
        self._store.introduce(address, "")

    def _configure_site(self, site: Site) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        site.most = connections_max(files, self._dispatcher.attempts_max)
        site.trusted_proxies = self.settings.server.trusted_proxies
        spoken = self.settings.tls.get(site.listener)
        site.tls = None if spoken is None else spoken.context  # for new connections; open ones keep their context
        site.stop_within_s = self._longest_timeout_s() + DRAIN_EXTRA_S - 2 * CUT_S
        if site is self._sites.get("api"):
            site.knows = self._api.knows
        else:
            site.keepalive_s = self.settings.server.keepalive

    async def _listen(
        self, stack: AsyncExitStack, handed_over: list[tuple[str, socket.socket]]
    ) -> list[web.BaseRunner]:
        wanted = {"server": self.settings.server.listen, "api": self.settings.api.listen}
        assigned, unused = systemd.assign(
            handed_over, {name: address_of(listen) for name, listen in wanted.items()} if handed_over else {}
        )
        _check_reach(assigned, wanted)
        for needless in unused:
            self._turn_away(stack, needless)
        public = web.Server(self._endpoint.handle, request_factory=public_request)
        runners: dict[str, web.BaseRunner] = {
            "server": web.ServerRunner(public, shutdown_timeout=CUT_S),
            "api": web.AppRunner(self._api.application(), shutdown_timeout=CUT_S),
        }
        malformed = {"server": endpoint.malformed, "api": api.malformed}
        connection = _connection_type()
        for name, runner in runners.items():
            listening = assigned.get(name) or bind(wanted[name])
            stack.callback(listening.close)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            if name == "api" and runner.server is not None:
                runner.server.request_handler = self._api.shortcut(runner.server.request_handler)
                runner.server.request_factory = private_request(runner.server.request_factory)
            site = Site(runner, listening, malformed[name], name, self._hearing, self._bounds, connection=connection)
            site.direct = self._api.direct if name == "api" else self._endpoint.direct
            self._sites[name] = site
            self._configure_site(site)
            await site.start()
            self.addresses[name] = listening.getsockname()
        self._introduce()
        return list(runners.values())

    def _turn_away(self, stack: AsyncExitStack, needless: socket.socket) -> None:
        """Refuses the clients of a socket that no listener uses.

        Closing it would not do that: systemd keeps it open, and clients would wait in it for ever.
        """
        events.warning(
            "socket.unused",
            address=_text(systemd.address_of(needless)),
            note="systemd hands it over, but no listener of the configuration has this address: clients there get 503. "
            "Make them agree (systemctl edit lmdaemon.socket), then: systemctl restart lmdaemon.socket",
        )
        acceptor = Acceptor(needless, turn_away)
        acceptor.start()
        stack.callback(acceptor.close)

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
        self._notifier.send(READY="1", STATUS=self._status())
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

    async def _shut_down(self, runners: list[web.BaseRunner], loops: Mapping[str, "asyncio.Task[None]"]) -> None:
        """Stops accepting, finishes what is in flight within a bound, stores the service clock, ends the loops."""
        within_s = self._longest_timeout_s() + DRAIN_EXTRA_S
        self._notifier.stopping(
            within_s + self._plugins_s() + CLOSING_S,
            f"Stopping. {_count(self._dispatcher.in_flight, 'delivery', 'deliveries')} in flight.",
        )
        self._events.stop()
        events.info("daemon.stopping", in_flight=self._dispatcher.in_flight, within_s=within_s)
        # From here on no touch can be received, so no idle time passes and nothing ends
        self._store.service_clock.freeze("stopping")
        for name, loop in loops.items():
            if name != "writer":
                loop.cancel()
        await asyncio.gather(self._dispatcher.drain(within_s), *(runner.cleanup() for runner in runners))
        try:
            await self._store.probe()
        except StoreError as error:
            events.warning("daemon.clock_not_kept", reason=str(error))
        loops["writer"].cancel()

    def _longest_timeout_s(self) -> float:
        policies = [operator.policy for operator in self.settings.operators.values()]
        policies += [plugin.policy for plugin in self.settings.plugins.values()]
        return max((policy.timeout_s for policy in policies), default=0.0)

    def _plugins_s(self) -> float:
        """How long it may take (s) to start or to stop all plug-ins, one after the other."""
        return sum(plugin.policy.timeout_s + plugins.CANCEL_S for plugin in self.settings.plugins.values())

    def _start_limit_s(self) -> float:
        """How long a start may take (s), considering that an upgrade may have to rewrite the whole database."""
        size = 0
        with suppress(OSError):  # there is none yet; other errors are reported when it is opened
            size = self.settings.database.stat().st_size
        return START_S + size / UPGRADE_BYTES_S + self._plugins_s()

    async def _stop_plugins(self) -> None:
        await plugins.stop_all(list(self._plugins.values()))

    # -- loops

    async def _reload_for_ever(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            self._notifier.reloading()
            await self.reload_once()
            self._notifier.send(READY="1", STATUS=self._status())

    async def reload_once(self) -> None:
        """Reads the configuration again. Takes it over whole, or changes nothing and logs why."""
        try:
            new = await asyncio.to_thread(self._read_again)
            fresh = await self._fresh_plugins(new)
        except ConfigError as error:
            file = f"{self.settings.file}: "  # findings about plug-ins come without it
            findings = [file + finding.removeprefix(file) for finding in error.findings]
            self._reload_error = log.writable("\n".join(findings))
            self._metrics.reloaded(None)
            for finding in findings:
                events.error("config.reload_failed", finding=finding)
            return
        changed, since_start = await asyncio.to_thread(self._changes_to, new)
        for key in since_start:
            if key in NEEDS_RESTART:
                events.warning("config.needs_restart", key=key)
        gone = [plugin for name, plugin in self._plugins.items() if fresh.get(name) is not plugin]
        self.settings, self._plugins, self._reload_error = new, fresh, None
        log.setup(new.log.level, new.log.format)
        self._configure()
        await plugins.stop_all(gone)
        self._metrics.reloaded(self._clock.wall_ms() / 1000)
        self._warn()
        note = f"as systemd handed them over at the start: {', '.join(new.handed_over)}" if new.handed_over else None
        events.info("config.reloaded", changed=",".join(changed) or "nothing", note=note)

    def _read_again(self) -> Settings:
        """The configuration as it is now. Must run on a thread: with 1,000 operators it takes 0.2 s.

        Raises ConfigError.
        """
        return reader.load(self.settings.file, found=self.settings.found)

    def _changes_to(self, new: Settings) -> tuple[list[str], list[str]]:
        """The keys that differ from the settings in force, and those that differ from the settings at the start."""
        return list(changes(self.settings, new)), list(changes(self._started_with, new))

    async def _fresh_plugins(self, new: Settings) -> dict[str, LoadedPlugin]:
        """The plug-ins of new settings: unchanged ones are kept, the others are made and started.

        Raises ConfigError.
        """
        kept = {
            name: plugin
            for name, plugin in self._plugins.items()
            if name in new.plugins and _same_hook(plugin.settings, new.plugins[name])
        }
        made = [plugins.load(plugin, self._dispatcher.wake) for name, plugin in new.plugins.items() if name not in kept]
        await plugins.start_all(made)
        for name, plugin in kept.items():
            plugin.settings = new.plugins[name]
        by_name = kept | {plugin.name: plugin for plugin in made}
        return {name: by_name[name] for name in new.plugins}

    async def _report_for_ever(self) -> None:
        """Feeds the watchdog and updates STATUS, if there is a service manager."""
        if not self._notifier.listening:
            return
        every_s = min(self._notifier.watchdog_s or STATUS_EVERY_S, STATUS_EVERY_S)
        before: list[str] = []
        while True:
            stuck = self._health.stuck
            if stuck and not before:
                events.error("watchdog.withheld", stuck=",".join(stuck), note="systemd restarts us if that lasts")
            elif before and not stuck:
                events.info("watchdog.resumed")
            before = stuck
            self._notifier.send(STATUS=self._status(stuck), **({} if stuck else {"WATCHDOG": "1"}))
            await asyncio.sleep(every_s)

    def _status(self, stuck: Sequence[str] = ()) -> str:
        """The sentences that `systemctl status` shows."""
        figures = self._store.figures.values()
        pending, dead = sum(one.pending for one in figures), sum(one.dead for one in figures)
        said = [f"Stuck: {', '.join(stuck)}."] if stuck else ["Serving."]
        if self._store.failure:
            said = [f"Refusing, for nothing can be stored: {self._store.failure}."]
        live, waiting = _count(self._store.live, "session"), _count(pending, "delivery", "deliveries")
        said.append(f"{live} live, {waiting} pending, {dead} dead.")
        if self._reload_error:
            said.append("The last reload failed: see the log.")
        return " ".join(said)

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
            sites=self._sites,
        )
        metrics.watch(readings.read)


def _check_reach(assigned: Mapping[str, socket.socket], wanted: Mapping[str, Listen]) -> None:
    """Raises ConfigError if a handed-over socket is reachable by other machines though `listen` is a loopback address.

    The configuration was not checked by the rules for addresses that other machines can reach.
    """
    for name, handed_over in assigned.items():
        at = systemd.address_of(handed_over)
        if isinstance(at, tuple) and wanted[name].loopback and not Listen("", *at).loopback:
            rule = f"systemd hands over {_text(at)}, which other machines can reach: write that here, for it has rules"
            raise ConfigError([f"{name}.listen: {rule} (got {wanted[name].text!r})"])


def _text(address: systemd.Address) -> str:
    """An address in the form of the setting `listen`."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _same_hook(one: Plugin, other: Plugin) -> bool:
    return (one.use, dict(one.options)) == (other.use, dict(other.options))
