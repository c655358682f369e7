"""`/health` from signs of life: what the store, the loops, the operators and the last reload show, never a constant.

Called by both listeners and by the watchdog. It looks at figures and single rows through an index; it never scans a
table. The one thing it does is a tiny write, at most once a second, for a disk that is full shows only then.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from lmdaemon import retry
from lmdaemon.clock import Clock
from lmdaemon.config import Settings
from lmdaemon.model import rfc3339
from lmdaemon.pulse import LATE_S, Pulse
from lmdaemon.store import Store, StoreError
from lmdaemon.version import __version__

PROBE_EVERY_S = 1.0
PROBE_WITHIN_S = 2.0
OLD_BACKLOG_S = 900.0  # a delivery pending for longer is worth a look

_ORDER = ("pass", "warn", "fail")
Check = dict[str, Any]


class Health:
    """`settings` gives those in force; `reload_error` what was wrong with the last reload, or None."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        pulses: dict[str, Pulse],
        settings: Callable[[], Settings],
        reload_error: Callable[[], str | None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._pulses = pulses
        self._settings = settings
        self._reload_error = reload_error
        self._probed = float("-inf")
        self._probe_failure: str | None = None

    @property
    def alive(self) -> bool:
        """Whether every loop runs when it should and no write hangs: what the watchdog is fed from. A disk that refuses
        is outlived, so it is no reason to be restarted.
        """
        return self._writing_s() <= LATE_S and not any(pulse.stuck for pulse in self._pulses.values())

    async def status(self) -> str:
        """pass, warn or fail."""
        status: str = (await self.report())["status"]
        return status

    async def report(self) -> dict[str, Any]:
        """Every check with its figures, in the shape of `application/health+json`."""
        await self._probe()
        checks = {
            "store": self._check_store(),
            **{name: self._check_pulse(pulse) for name, pulse in self._pulses.items()},
            "deliveries": await self._check_deliveries(),
            "operators": self._check_operators(),
            "config": self._check_config(),
        }
        status = max((check["status"] for check in checks.values()), key=_ORDER.index)
        time = rfc3339(self._clock.wall_ms())
        return {
            "status": status,
            "version": __version__,
            "description": "lmdaemon",
            "checks": {name: [check | {"time": time}] for name, check in checks.items()},
        }

    async def _probe(self) -> None:
        now = self._clock.monotonic()
        if now - self._probed < PROBE_EVERY_S:
            return
        self._probed = now
        try:
            async with asyncio.timeout(PROBE_WITHIN_S):
                await self._store.probe()
        except StoreError as error:
            self._probe_failure = str(error)
        except TimeoutError:
            self._probe_failure = f"a write took longer than {PROBE_WITHIN_S:g} s"
        else:
            self._probe_failure = None

    def _writing_s(self) -> float:
        since = self._store.writing_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    def _check_store(self) -> Check:
        failure = self._store.failure or self._probe_failure
        check: Check = {"status": "fail" if failure else "pass", "sessions": self._store.live}
        return check | {"output": failure} if failure else check

    @staticmethod
    def _check_pulse(pulse: Pulse) -> Check:
        late_s = round(pulse.late_s, 3)
        return {"status": "fail" if pulse.stuck else "pass", "observedValue": late_s, "observedUnit": "s late"}

    async def _check_deliveries(self) -> Check:
        figures = self._store.figures
        pending = sum(one.pending for one in figures.values())
        dead = sum(one.dead for one in figures.values())
        oldest_at = None
        if pending:
            waiting = [name for name, one in figures.items() if one.pending]
            try:
                found = await self._store.oldest_pending(waiting)
                oldest_at = min((at for at in found.values() if at is not None), default=None)
            except StoreError as error:
                return {"status": "fail", "output": str(error)}
        oldest_s = 0.0 if oldest_at is None else max(0, self._clock.wall_ms() - oldest_at) / 1000
        warn = dead > 0 or oldest_s > OLD_BACKLOG_S
        return {
            "status": "warn" if warn else "pass",
            "pending": pending,
            "dead": dead,
            "oldestPendingSeconds": oldest_s,
        }

    def _check_operators(self) -> Check:
        now_at = self._clock.wall_ms()
        gates = {name: self._store.gate(name) for name in self._settings().operators}
        held = [name for name, gate in gates.items() if gate.held_at is not None]
        broken = [name for name, gate in gates.items() if retry.breaker(gate, now_at) != "closed"]
        return {"status": "warn" if held or broken else "pass", "held": held, "broken": broken}

    def _check_config(self) -> Check:
        error = self._reload_error()
        return {"status": "warn", "output": error} if error else {"status": "pass"}
