"""Tells the service manager that the daemon is ready, in which state it is, and that it is alive."""

import asyncio
from collections.abc import Callable, Sequence

from lmdaemon import log
from lmdaemon.health import Health
from lmdaemon.store.contract import Store
from lmdaemon.systemd import Notifier

STATUS_EVERY_S = 10.0

events = log.Log("daemon")


class Status:
    """Sends READY, STATUS and WATCHDOG. `reload_error` returns why the last reload failed, if it did."""

    def __init__(
        self, notifier: Notifier, store: Store, health: Health, reload_error: Callable[[], str | None]
    ) -> None:
        self._notifier = notifier
        self._store = store
        self._health = health
        self._reload_error = reload_error

    def ready(self) -> None:
        """Says that the daemon serves, after its start or a reload."""
        self._notifier.send(READY="1", STATUS=self._text())

    async def report_for_ever(self) -> None:
        """Feeds the watchdog and updates STATUS, if there is a service manager."""
        if not self._notifier.listening:
            return
        every_s = min(self._notifier.watchdog_s or STATUS_EVERY_S, STATUS_EVERY_S)
        before: list[str] = []
        while True:
            stuck = self._health.stuck
            if stuck and not before:
                events.error("watchdog.withheld", stuck=",".join(stuck), note="systemd restarts the daemon if it lasts")
            elif before and not stuck:
                events.info("watchdog.resumed")
            before = stuck
            self._notifier.send(STATUS=self._text(stuck), **({} if stuck else {"WATCHDOG": "1"}))
            await asyncio.sleep(every_s)

    def _text(self, stuck: Sequence[str] = ()) -> str:
        """The sentences that `systemctl status` shows."""
        figures = self._store.figures.values()
        pending, dead = sum(one.pending for one in figures), sum(one.dead for one in figures)
        said = [f"Stuck: {', '.join(stuck)}."] if stuck else ["Serving."]
        if self._store.failure:
            said = [f"Refusing, because nothing can be stored: {self._store.failure}."]
        live, waiting = count(self._store.live, "session"), count(pending, "delivery", "deliveries")
        said.append(f"{live} live, {waiting} pending, {dead} dead.")
        if self._reload_error():
            said.append("The last reload failed: see the log.")
        return " ".join(said)


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 session`, `2 sessions`."""
    return f"{number} {one if number == 1 else many or one + 's'}"
