"""Builds the parts of the daemon, connects them, and gives them settings, at the start and at each reload."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from random import Random
from typing import get_args

from lmdaemon import log
from lmdaemon.clock import Clock
from lmdaemon.config.settings import Settings
from lmdaemon.delivery.dispatcher import DRAIN_EXTRA_S, Dispatcher
from lmdaemon.delivery.sender import Sender
from lmdaemon.delivery.shown import request_of
from lmdaemon.delivery.sinks import sinks_of
from lmdaemon.delivery.underway import Underway
from lmdaemon.disk import DiskWatch
from lmdaemon.health import Health
from lmdaemon.limits import Limits
from lmdaemon.listeners import Listeners, address_text
from lmdaemon.metrics import Metrics
from lmdaemon.model import Asker, Reason, Session
from lmdaemon.pruner import Pruner
from lmdaemon.readings import Readings
from lmdaemon.reloader import Reloader
from lmdaemon.status import Status
from lmdaemon.store.contract import Store, StoreObserver
from lmdaemon.store.open import open_store
from lmdaemon.sweeper import Sweeper
from lmdaemon.systemd import Notifier
from lmdaemon.trials import Trials
from lmdaemon.web.api import Api
from lmdaemon.web.calls import Context
from lmdaemon.web.endpoint import Endpoint
from lmdaemon.web.events import Events
from lmdaemon.web.memory import Bounds
from lmdaemon.web.recent import Recent
from lmdaemon.web.sockets import Hearing

NOBODY = Asker()

events = log.Log("daemon")


class Parts:
    """All parts of one daemon. They exist after `build`; their loops are run by `daemon.Daemon`."""

    def __init__(self, clock: Clock, rng: Random, limits: Limits) -> None:
        self._clock = clock
        self._limits = limits
        self._rng = rng
        self._closing: dict[tuple[str, str], Asker] = {}

    async def build(self, stack: AsyncExitStack, settings: Settings, name: str, notifier: Notifier) -> None:
        """Builds every part, with settings that stay in force until a reload. `stack` closes what was opened.

        `name` is the daemon's, by which others on the database know it. Raises ConfigError (plug-ins), DatabaseError.
        """
        self.store: Store = await open_store(settings, self._clock, name, self._limits.store)
        stack.push_async_callback(self.store.close)
        self._clock = self.store.clock
        self.store.service_clock.freeze("starting")  # plug-ins may take long to start, and no touch arrives meanwhile
        self.sender = Sender(self._clock)
        stack.push_async_callback(self.sender.close)
        self.metrics = Metrics(self.store.engine)
        totals = self.metrics.totals
        self.recent = Recent(totals, self.store.service_clock.now_ms, self._clock, self._limits.charted_max)
        self.events = Events(self.store, self._clock, totals, lambda: self.settings.operators, self._limits)
        for observer in (self.recent, self.events):
            self.store.observe(observer)
        attempts = _Attempts(self.metrics, self.events)
        self.dispatcher = Dispatcher(
            self.store, self._clock, self.sender, self._rng, attempts, _open_underway(stack, settings)
        )
        self.reloader = Reloader(settings, self._clock, self._take_over, self.dispatcher.wake)
        await self.reloader.start_plugins()
        stack.push_async_callback(self.reloader.stop_plugins)
        self.disk = DiskWatch(self.store, self._clock.monotonic, self._limits.low_share)
        self.store.observe(self.disk)
        self.hearing = Hearing(self.store.service_clock)
        self.bounds = Bounds(self._limits)
        self.sweeper = Sweeper(self.store, self._clock, settings.restart_grace_s, self.metrics)
        self.pruner = Pruner(self.store, self._clock, lambda: self.settings.keep_ended_s)
        pulses = {"sweeper": self.sweeper.pulse, "dispatcher": self.dispatcher.pulse}
        self.health = Health(
            self.store,
            self._clock,
            pulses,
            lambda: self.settings,
            lambda: self.reloader.error,
            self.sweeper.alarm,
            self.sweeper.touch_alarm,
            self.hearing.deaf,
            self.disk,
            lambda: self.dispatcher.lanes.behind,
            answer_within_s=self._limits.answer_within_s,
        )
        self.trials = Trials()
        self.endpoint = Endpoint(self.store, self._clock, self.health.status, self.metrics, self._limits.body_s)
        self.api = Api(
            Context(
                store=self.store,
                clock=self._clock,
                health=self.health,
                metrics=self.metrics,
                expires_at=self.sweeper.expires_at,
                under_way_since=self.dispatcher.under_way_since,
                probe=self.dispatcher.probe,
                request_of=request_of,
                trials=self.trials,
                recent=self.recent,
                events=self.events,
                read_again=self.reloader.read_again,
                body_s=self._limits.body_s,
                closing=self._closing,
                settings=self.settings,
            )
        )
        self.listeners = Listeners(self.endpoint, self.api, self.hearing, self.bounds)
        self.status = Status(notifier, self.store, self.health, lambda: self.reloader.error)
        self._measure()
        self._configure()

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.reloader.settings

    @property
    def drain_s(self) -> float:
        """How long a stop waits (s) for deliveries, calls of plug-ins and answers that are under way."""
        policies = [operator.policy for operator in self.settings.operators.values()]
        policies += [plugin.policy for plugin in self.settings.plugins.values()]
        return max((policy.timeout_s for policy in policies), default=0.0) + DRAIN_EXTRA_S

    def _configure(self) -> None:
        """Gives the settings in force to every part; each uses them from its next step on."""
        operators = self.settings.operators
        pausing = frozenset(name for name, operator in operators.items() if operator.mass_expiry == "pause")
        grace_ms = round(self.settings.restart_grace_s * 1000)
        daemon_grace_ms = round(self.settings.daemon_grace_s * 1000)
        self.store.configure(frozenset(operators), partial(sinks_of, self.settings), pausing, grace_ms, daemon_grace_ms)
        self.endpoint.configure(self.settings, self.reloader.plugins)
        self.api.configure(self.settings)
        self.dispatcher.configure(self.settings, self.reloader.plugins)
        self.sweeper.configure({name: operator.idle_s for name, operator in operators.items()})
        self.metrics.configure(operators, self.dispatcher.lanes.attempting, get_args(Reason))
        self.events.configured()
        self.listeners.configure(self.settings, self.dispatcher.lanes.attempts_max, self.drain_s)

    def introduce(self, digest: str) -> None:
        """Tells the other daemons on the database where the private side listens, and the digest by which they compare
        settings (config.shown.digest).
        """
        at = self.listeners.addresses["api"]
        address = address_text(at[:2] if isinstance(at, tuple) else os.fsdecode(at))
        self.store.introduce(address, digest)

    def _take_over(self, digest: str) -> None:
        """Puts a new reading of the configuration into force."""
        self._configure()
        self.introduce(digest)
        self.metrics.reloaded(self._clock.wall_ms() / 1000)
        self.warn()

    def warn(self) -> None:
        """Logs warnings about the settings in force."""
        for warning in self.settings.warnings:
            events.warning("config.warned", finding=warning)
        if not self.settings.operators:
            events.warning("config.warned", finding="no operator is configured: nothing can be opened or received")
        for name in sorted(self.health.not_configured):
            events.warning("operator.not_configured", operator=name, note="its sessions and deliveries wait")

    def _measure(self) -> None:
        """Connects the metrics to the parts that they count."""
        metrics = self.metrics
        self.store.observe(_Recorder(self.store, metrics, self._closing))
        metrics.reloaded(self._clock.wall_ms() / 1000)
        readings = Readings(
            store=self.store,
            clock=self._clock,
            settings=lambda: self.settings,
            sweeper=self.sweeper,
            disk=self.disk,
            dispatcher=self.dispatcher,
            health=self.health,
            hearing=self.hearing,
            bounds=self.bounds,
            sites=self.listeners.sites,
        )
        metrics.watch(readings.read)


def _open_underway(stack: AsyncExitStack, settings: Settings) -> Underway:
    """The file beside the database in which attempts are noted; with PostgreSQL there is none."""
    database = settings.database
    path = database.with_name(f"{database.name}-attempts") if settings.postgres is None else None
    try:
        underway = Underway(path)
    except OSError as error:
        events.warning("delivery.not_noted", path=str(path), reason=error.strerror or str(error))
        return Underway(None)
    stack.callback(underway.close)
    if underway.crashed:
        events.warning("daemon.crashed_before", attempts=len(underway.lost))
    return underway


class _Attempts:
    """Passes attempts on to the metrics, and their results to the clients of `/v1/events`."""

    def __init__(self, metrics: Metrics, heard: Events) -> None:
        self.awoke = metrics.awoke
        self.attempted = metrics.attempted
        self.settled = heard.settled


class _Recorder(StoreObserver):
    """Counts and logs what was committed."""

    def __init__(self, store: Store, metrics: Metrics, closing: Mapping[tuple[str, str], Asker]) -> None:
        self._store = store
        self._metrics = metrics
        self._closing = closing  # who is closing a session just now, by its operator and id

    def sessions_ended(self, sessions: Sequence[Session]) -> None:
        """Counts and logs ends (StoreObserver)."""
        now_ms = self._store.service_clock.now_ms()
        for (operator, reason), many in Counter((one.operator, one.reason) for one in sessions if one.reason).items():
            self._metrics.ended(operator, reason, many)
        for session in sessions:
            if session.reason == "inactivity":
                self._metrics.lag.observe(max(0, now_ms - session.deadline_ms) / 1000)
            if events.suppresses("session.ended"):
                continue
            facts = {"operator": session.operator, "session": session.session_id, "reason": session.reason}
            by, request_id = NOBODY
            if session.reason == "closed":
                by, request_id = self._closing.get((session.operator, session.session_id), NOBODY)
            events.info("session.ended", **facts, by=by, request_id=request_id)

    def committed(self, operations: int, took_s: float) -> None:
        self._metrics.committed(operations, took_s)
