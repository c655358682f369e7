"""Notices what looks as if game servers could not reach the daemon: many sessions that end at once, and touches that
stop.

Both are watched for each operator, because in the sum of all a single operator would not be noticed. Ends are watched
for all operators together, too.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from lmdaemon.log import Log
from lmdaemon.store import silence
from lmdaemon.store.contract import Figures

# An alarm is raised if inactivity or the maximum lifetime ends, within MASS_S, more than MASS_SHARE of the live
# sessions and more than MASS_SESSIONS; for one operator, more than MASS_SESSIONS_OF_OPERATOR of its own. That so many
# players leave at once is less likely than that game servers cannot reach the daemon.
MASS_SESSIONS = 1000
MASS_SESSIONS_OF_OPERATOR = 100
MASS_SHARE = 0.2
MASS_S = 10.0
MASS_SHOWN_S = 600.0  # how long /health shows an alarm
SLOT_S = 0.1  # ends within this time are counted as one entry, which bounds the memory

log = Log("sweeper")


class Burst:
    """Counts ends within MASS_S: of all sessions, or of one operator's. All times are seconds of the monotonic
    clock.
    """

    def __init__(self, more_than: int) -> None:
        self._more_than = more_than
        self._lately: deque[tuple[float, int]] = deque()  # (time, number ended) of the entries within MASS_S
        self._raised_at = float("-inf")
        self.began_at = float("-inf")  # when the alarm that is shown was first raised
        self.ended = 0  # sessions that had ended within MASS_S when the alarm was last raised
        self.of = 0  # sessions that were live before these ended

    def active(self, now: float) -> bool:
        """Whether the alarm was raised within MASS_SHOWN_S."""
        return now - self._raised_at < MASS_SHOWN_S

    def over(self, now: float) -> bool:
        """Whether nothing is left to be counted or shown."""
        return not self.active(now) and (not self._lately or now - self._lately[-1][0] > MASS_S)

    def note(self, now: float, ended: int, live: int) -> bool:
        """Counts sessions that have just ended; `live` is how many are left. Returns whether an alarm begins."""
        if self._lately and now - self._lately[-1][0] < SLOT_S:
            slot, before = self._lately.pop()
            self._lately.append((slot, before + ended))
        else:
            self._lately.append((now, ended))
        while now - self._lately[0][0] > MASS_S:
            self._lately.popleft()
        ended = sum(one for _, one in self._lately)
        if ended <= self._more_than or ended <= (live + ended) * MASS_SHARE:
            return False
        begins = now - self._raised_at > MASS_S  # an alarm is logged once, however long it goes on
        self.began_at = now if begins else self.began_at
        self._raised_at, self.ended, self.of = now, ended, live + ended
        return begins


class Mass(NamedTuple):
    """Sessions that ended at once: how many, of how many that were live, and how long ago that began."""

    ended: int
    of: int
    ago_s: float


class ExpiryAlarm:
    """Notices when a large part of an operator's sessions, or of all, ends within MASS_S. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._all = Burst(MASS_SESSIONS)
        self._operators: dict[str, Burst] = {}  # by name, those whose sessions have ended lately

    @property
    def active(self) -> bool:
        """Whether the alarm of all operators together was raised within MASS_SHOWN_S."""
        return self._all.active(self._monotonic())

    @property
    def mass(self) -> Mass:
        """The ends of all operators together, when their alarm was last raised."""
        return self._told(self._all, self._monotonic())

    def of_operators(self) -> dict[str, Mass]:
        """The operators whose alarm was raised within MASS_SHOWN_S."""
        now = self._monotonic()
        return {name: self._told(one, now) for name, one in self._operators.copy().items() if one.active(now)}

    @staticmethod
    def _told(burst: Burst, now: float) -> Mass:
        return Mass(burst.ended, burst.of, now - burst.began_at)

    def note(self, ended: Mapping[str, int], live_of: Callable[[str], int], live: int) -> None:
        """Counts sessions, by operator, that have just ended by inactivity or maximum lifetime. `live` sessions are
        left, and `live_of(name)` of one operator.
        """
        now = self._monotonic()
        for name in [name for name, one in self._operators.items() if name not in ended and one.over(now)]:
            del self._operators[name]
        for name, count in ended.items():
            burst = self._operators.setdefault(name, Burst(MASS_SESSIONS_OF_OPERATOR))
            if burst.note(now, count, live_of(name)):
                log.warning("operator.mass_expired", operator=name, ended=burst.ended, of=burst.of, within_s=MASS_S)
        if self._all.note(now, sum(ended.values()), live):
            most = Counter({name: one.ended for name, one in self._operators.items() if one.active(now)})
            named = ",".join(name for name, _ in most.most_common(10)) or None
            log.error("sweeper.mass_expired", ended=self._all.ended, of=self._all.of, within_s=MASS_S, operators=named)


class Silent(NamedTuple):
    """An operator whose touches have stopped: the service time (ms) of the latest touch, and how many sessions were
    live when that was noticed.
    """

    touched_ms: int
    live: int


class TouchAlarm:
    """Notices when the touches of an operator stop while many of its sessions are live."""

    def __init__(self) -> None:
        self.silent: dict[str, Silent] = {}  # the operators whose touches had stopped at the last look

    def look(
        self, now_ms: int, touched_ms: Mapping[str, int], idle_ms: Mapping[str, int], figures: Mapping[str, Figures]
    ) -> None:
        """Compares the latest touches (service time) with the idle times, both by operator. Logs for which operators
        touches have stopped or come again.
        """
        for name, own_idle_ms in idle_ms.items():
            touched, its = touched_ms.get(name), figures.get(name)
            if touched is None or its is None:
                continue
            if silence.stopped(touched, now_ms, own_idle_ms, its.live):
                if name not in self.silent:
                    self.silent[name] = Silent(touched, its.live)
                    for_s = round((now_ms - touched) / 1000, 1)
                    log.warning("operator.touches_stopped", operator=name, live=its.live, for_s=for_s)
            elif name in self.silent:
                before = self.silent.pop(name)
                if touched > before.touched_ms:
                    for_s = round((touched - before.touched_ms) / 1000, 1)
                    log.info("operator.touches_resumed", operator=name, live=its.live, after_s=for_s)
        self._forget(idle_ms.keys())

    def _forget(self, configured: Iterable[str]) -> None:
        for name in self.silent.keys() - set(configured):
            del self.silent[name]
