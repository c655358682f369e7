"""This daemon's place among those on its database: who is there, which operators are its own, and when the next session
of those ends. It does no I/O.
"""

from collections.abc import Sequence

from lmdaemon.log import Log
from lmdaemon.store.postgres.company import Company, Seen
from lmdaemon.store.postgres.deadlines import Deadlines
from lmdaemon.store.postgres.members import Introduction
from lmdaemon.store.postgres.owners import Owners, Wishes
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.wall import Asked, ServerClock
from lmdaemon.store.projection import Projection

SURE_S = 0.5  # until so long before the end of its lease, a daemon is sure that no other can take it to be gone
TOLD_MAX = 10  # most operators that a line of the log names

log = Log("daemon")


class Membership:
    """What a daemon knows of the others, and of what it owns among them."""

    def __init__(
        self,
        projection: Projection,
        clock: ServerClock,
        signals: Signals,
        introduction: Introduction,
        lease_s: float,
    ) -> None:
        self.lease_s = lease_s
        self._projection = projection
        self._clock = clock
        self._signals = signals
        self.company = Company(projection.service_clock, lease_s)
        self.owners = Owners()
        self.deadlines = Deadlines()
        self.introduction = introduction
        self.introduced: Introduction | None = None  # what this daemon's row says of it
        self.proven_s = float("-inf")  # when its last transaction began (elapsed s): then its row was there
        self._deaf_since_s: float | None = None  # since when this daemon cannot accept connections (monotonic s)
        self.has_made_way = False  # whether clients were given time to reach other daemons since then
        self.epochs = 0  # sum of the column `epoch` of all owners: it tells whether any owner has changed
        # The operators of the settings when it was last worked out which ones to take
        self._claimed_for: frozenset[str] | None = None

    def ask(self) -> Asked:
        """Is called when the server is asked for what `learn` takes over."""
        return self._clock.ask()

    def learn(self, found: Seen, asked: Asked) -> None:
        """Takes over who is there and how far each of them has heard. `asked` is what `ask` returned before."""
        self._clock.told(found.at, asked)
        due_ms = self.company.next_due_ms
        # While this daemon can store nothing, as in an outage of the database, the others may not be able to either,
        # and a row that stands still proves nothing
        watch = not self._projection.is_idle and "store" not in self._projection.service_clock.frozen
        now_s = self._clock.monotonic()
        self._note_whether_deaf(now_s)
        follow = self._deaf_since_s is None or self.has_made_way
        if self.company.learn(found, now_s, watch=watch, follow=follow):
            self.owners.is_settled = False
            self._signals.look.set()
        if self.company.next_due_ms != due_ms:
            self._signals.beat.set()

    def _note_whether_deaf(self, now_s: float) -> None:
        if "listening" not in self._projection.service_clock.frozen:
            self._deaf_since_s, self.has_made_way = None, False
        elif self._deaf_since_s is None:
            self._deaf_since_s = now_s

    @property
    def must_make_way(self) -> bool:
        """Whether this daemon has been unable to accept connections for so long that, had it been silent, it would have
        been expelled. Once its clients have been given time to reach other daemons, these no longer wait for its clock.
        """
        if self._deaf_since_s is None or self.has_made_way:
            return False
        return self._clock.monotonic() - self._deaf_since_s >= self.lease_s

    @property
    def is_sure(self) -> bool:
        """Whether nobody can have expelled this daemon: its row has not stood still for long enough."""
        return self._clock.elapsed() - self.proven_s < self.lease_s - SURE_S

    @property
    def is_first(self) -> bool:
        """Whether this daemon joined before all others that are there. The first daemon does what only one may do."""
        return not any(member < self.owners.me for member in self.company.others)

    # -- operators

    def moves_waits(self, operator: str) -> bool:
        """Whether this daemon moves the operator's stored waits when the wall clock was set back. The owner moves them;
        if nobody owns the operator, the first daemon.
        """
        return self.owners.has(operator) or (self.is_first and not self.owners.is_elsewhere(operator))

    @property
    def has_claimed(self) -> bool:
        """Whether it has been worked out for the settings in force which operators to take."""
        return self._projection.configured is self._claimed_for

    def note_claims(self, configured: frozenset[str]) -> None:
        """Notes that it has been worked out for these settings which operators to take."""
        self._claimed_for = configured

    def wishes(self, member: int, configured: frozenset[str]) -> Wishes:
        """What to do about the rows of `owner` now; `member` is this daemon's row."""
        before = self.owners.delivers_for
        found = self.owners.wishes(configured, [member, *self.company.others], self._clock.monotonic())
        self._tell_owners(before)
        return found

    def take_owners(self, found: Sequence[tuple[str, int, int | None, int]], member: int) -> list[str]:
        """Takes over the rows of `owner`. Returns this daemon's operators of which no deadline is known yet."""
        before = self.owners.delivers_for
        self.epochs = sum(epoch for *_, epoch in found)
        self.owners.load(member, [row[:3] for row in found])
        new = self.deadlines.keep(self.owners.mine)
        self._tell_owners(before)
        return new

    def _tell_owners(self, before: frozenset[str]) -> None:
        now = self.owners.delivers_for
        if before != now:
            changed = sorted(before ^ now)
            named = ",".join(changed[:TOLD_MAX]) + (",…" if len(changed) > TOLD_MAX else "")
            counts = {"operators": len(now), "gained": len(now - before), "lost": len(before - now)}
            log.info("daemon.owns", **counts, changed=named)
        for operator in sorted(before ^ now):
            for observer in self._projection.observers:
                observer.ownership_changed(operator)

    def take_deadlines(self) -> None:
        """Has the sweeper wait for the next deadline of this daemon's operators, and for no other."""
        projection = self._projection
        before = (projection.next_due_ms, projection.next_lifetime_at)
        projection.next_due_ms, projection.next_lifetime_at = self.deadlines.earliest
        if before != (projection.next_due_ms, projection.next_lifetime_at):
            for observer in projection.observers:
                observer.deadline_nearer()
