"""Starts the parts of the daemon, runs their loops in one TaskGroup, and stops them in order.

Everything that is opened is closed by the exit stack, the store last: a connection to the database that stays open
keeps the process from exiting. A loop that raises ends the daemon with an error, and the service manager starts it
again.
"""

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from random import Random
from typing import Any

from lmdaemon import log, systemd
from lmdaemon.clock import Clock
from lmdaemon.config import shown
from lmdaemon.config.settings import Settings
from lmdaemon.limits import LIMITS, Limits
from lmdaemon.parts import Parts
from lmdaemon.plugins import CANCEL_S
from lmdaemon.status import count
from lmdaemon.store.contract import StoreError
from lmdaemon.store.open import name_of
from lmdaemon.threads import on_a_thread
from lmdaemon.version import __version__

START_S = 60.0  # time that systemd is asked for at a start, besides upgrade and plug-ins
UPGRADE_BYTES_S = 10e6  # bytes of the database that are upgraded in a second on a slow disk
CLOSING_S = 15.0  # time that systemd is asked for at a stop, for the last commit and for copying the WAL into the file

events = log.Log("daemon")


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
        limits: Limits = LIMITS,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        self._started_with = settings
        self._parts = Parts(clock or Clock(), rng or Random(), limits)  # noqa: S311 - jitter, not secrets
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Event()
        self.serving = asyncio.Event()
        self._on_serving = on_serving
        self._name = f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._parts.settings

    @property
    def addresses(self) -> Mapping[str, Any]:
        """Where "server" and "api" listen, as `socket.getsockname` says it."""
        return self._parts.listeners.addresses

    def stop(self) -> None:
        """Asks `run` to shut everything down in its order and then to return. Does not wait for it."""
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
        settings, parts = self._started_with, self._parts
        self._notifier.starting(_start_limit_s(settings), f"Starting. Opening {name_of(settings)}.")
        await parts.build(stack, settings, self._name, self._notifier)
        await parts.listeners.start(stack, handed_over, settings, parts.dispatcher.lanes.attempts_max, parts.drain_s)
        # On a thread, because with 1,000 operators it takes 0.1 s
        parts.introduce(await on_a_thread(shown.digest, settings))

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
        parts = self._parts
        parts.store.service_clock.thaw("starting")
        self._handle_signals()
        async with asyncio.TaskGroup() as group:
            loops = {
                name: group.create_task(loop, name=name)
                for name, loop in {
                    "writer": parts.store.run(),
                    "sweeper": parts.sweeper.run(),
                    "dispatcher": parts.dispatcher.run(),
                    "pruner": parts.pruner.run(),
                    "reloader": self._reload_for_ever(),
                    "status": parts.status.report_for_ever(),
                }.items()
            }
            self._announce()
            await self._stopping.wait()
            await self._shut_down(loops)

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
        self._parts.warn()
        self._parts.status.ready()
        events.info(
            "daemon.serving",
            version=__version__,
            server=self.settings.server.listen.text,
            api=self.settings.api.listen.text,
            database=name_of(self.settings),
            live=self._parts.store.live,
            restart_grace_s=self.settings.restart_grace_s,
        )
        self.serving.set()
        self._on_serving()

    # -- stopping

    async def _shut_down(self, loops: Mapping[str, "asyncio.Task[None]"]) -> None:
        """Stops accepting, finishes what is in flight within a bound, stores the service clock, ends the loops."""
        parts = self._parts
        within_s = parts.drain_s
        self._notifier.stopping(
            within_s + _plugins_s(self.settings) + CLOSING_S,
            f"Stopping. {count(parts.dispatcher.in_flight, 'delivery', 'deliveries')} in flight.",
        )
        parts.events.stop()
        events.info("daemon.stopping", in_flight=parts.dispatcher.in_flight, within_s=within_s)
        stays = {"writer"}
        # Other daemons still hear touches. So that they need not wait for this one, its clock goes on, and it ends due
        # sessions
        if await self._others_hear():
            stays.add("sweeper")
        else:  # from here on no touch can be received, so no idle time passes and nothing ends
            parts.store.service_clock.freeze("stopping")
        for name, loop in loops.items():
            if name not in stays:
                loop.cancel()
        await asyncio.gather(parts.dispatcher.drain(within_s), parts.listeners.close(), parts.trials.stop())
        loops["sweeper"].cancel()
        try:
            await parts.store.probe()
        except StoreError as error:
            events.warning("daemon.clock_not_kept", reason=str(error))
        loops["writer"].cancel()

    async def _others_hear(self) -> bool:
        """Whether another daemon on the database hears touches when this one stops."""
        try:
            return len(await self._parts.health.look_for_daemons()) > 1
        except StoreError:
            return False

    # -- loops

    async def _reload_for_ever(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            self._notifier.reloading()
            await self.reload_once()
            self._parts.status.ready()

    async def reload_once(self) -> None:
        """Reads the configuration again. Takes it over whole, or changes nothing and logs why."""
        if not await self._parts.reloader.reload():
            self._parts.metrics.reloaded(None)


def _plugins_s(settings: Settings) -> float:
    """How long it may take (s) to start or to stop all plug-ins, one after the other."""
    return sum(plugin.policy.timeout_s + CANCEL_S for plugin in settings.plugins.values())


def _start_limit_s(settings: Settings) -> float:
    """How long a start may take (s), considering that an upgrade may have to rewrite the whole database."""
    size = 0
    with suppress(OSError):  # there is no database yet; other errors are reported when it is opened
        size = settings.database.stat().st_size
    return START_S + size / UPGRADE_BYTES_S + _plugins_s(settings)
