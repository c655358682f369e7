"""Plays game servers against a running daemon: players open, touch, close or abandon sessions, and every end is judged.

Ids begin with `lmsim-`. The time at which a session ended, as the daemon reports it, is compared with the times at
which the daemon's acknowledgements arrived here. Each opening shows how far the daemon's clock is off from this
machine's, so the two clocks need not agree.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime
from random import Random
from typing import Any, NamedTuple

from lmdaemon.workbench.bench import run_id
from lmdaemon.workbench.figures import Figures

PROMISES = {
    "early": "a session ended for inactivity before its idle time had passed since an acknowledged touch",
    "late": "a session ended later than it may",
    "lost": "a session that was acknowledged is unknown, or has not ended at all",
    "doubled": "a session ended twice, or has two deliveries for one sink",
    "failed": "a call got no answer, or one that it must not get",
}
WATCH_EVERY_S = 0.2
REPEAT_EVERY_S = 0.2
NOT_NOW = (0, 503)  # statuses of a call that is to be repeated: no answer, or a 503
SINKS_PENDING = "pending"
_ROUNDING_S = 0.002  # the daemon reports times in milliseconds

# method, words of the path, body → status (0: no answer) and JSON
Call = Callable[..., Awaitable[tuple[int, Any]]]


class Load(NamedTuple):
    """What the players do. Spans are in seconds; `abandon` is the part of sessions that nobody closes.

    `away_s` is how long the daemon may be away at a time (0: it may not). For `grace_s` after each absence, the daemon
    ends no session for inactivity.
    """

    players: int = 200
    span_s: float = 30.0
    play_s: float = 10.0
    heartbeat_s: float = 1.0
    abandon: float = 0.5
    idle_s: int = 3
    late_s: float = 1.0
    deliver_within_s: float = 30.0
    away_s: float = 0.0
    grace_s: float = 0.0


class Session:
    """What the daemon has acknowledged for one session. Times are this machine's monotonic clock."""

    def __init__(self, id: str, player: str) -> None:  # noqa: A002 - as everywhere in the project
        self.id = id
        self.player = player
        self.opened_between = (0.0, 0.0)  # when the request was sent, and when its answer came
        self.touched_between = (0.0, 0.0)  # the same for the latest touch that was acknowledged
        self.closed = False
        self.ended: dict[str, Any] | None = None


class Away:
    """When the daemon was away, as its callers saw it: from the first call without an answer to the next answer."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self._since: float | None = None

    def note(self, sent: float, now: float, *, answered: bool) -> None:
        """Notes a call that was sent at `sent` and was answered, or given up, at `now` (s)."""
        if not answered:
            self._since = sent if self._since is None else self._since
        elif self._since is not None:
            self.spans.append((self._since, now))
            self._since = None

    def meets(self, first: float, last: float, grace_s: float) -> bool:
        """Whether the daemon was away, or back for less than the grace, at any moment between `first` and `last`."""
        return any(since <= last and until + grace_s >= first for since, until in self.spans)

    def total_s(self, grace_s: float) -> float:
        """How long (s) an end may have been delayed by the daemon's absences, a grace after each included."""
        return sum(until - since + grace_s for since, until in self.spans)


class Players:
    """One run against one operator of a daemon. `call` makes a call of the private API. Equal seeds make equal runs."""

    def __init__(
        self,
        call: Call,
        operator: str,
        load: Load,
        seed: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._call = call
        self._operator = operator
        self._load = load
        self._clock = clock
        self._tell = tell
        self._seed = seed
        self._run = run_id()
        self._away = Away()
        self.figures = Figures()
        self.sessions: dict[str, Session] = {}

    async def run(self) -> dict[str, Any]:
        """Plays, waits for every end, and returns the report. If it is cancelled, returns a report of what was seen so
        far.
        """
        began = self._clock()
        try:
            await self._play(began)
            await self._watch()
        except asyncio.CancelledError:
            self.figures.counts["interrupted"] = 1
        if self._load.away_s:
            self.figures.counts["times_away"] = len(self._away.spans)
        return self.figures.shown(PROMISES, self._clock() - began)

    async def _play(self, began: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._load.players):
                group.create_task(self._player(number, began))
            group.create_task(self._progress(began))

    async def _progress(self, began: float) -> None:
        while (passed := self._clock() - began) < self._load.span_s:
            counts = self.figures.counts
            self._tell(
                f"{passed:.0f} s of {self._load.span_s:g}: {counts['opened']} opened, {counts['touched']} touches"
            )
            await asyncio.sleep(min(1.0, self._load.span_s - passed))

    async def _player(self, number: int, began: float) -> None:
        rng = Random(f"{self._seed} {number}")  # noqa: S311 - must be repeatable, not secret
        until = began + self._load.span_s
        # Waits for a random time, so that the players begin at different moments
        await asyncio.sleep(rng.uniform(0, min(self._load.heartbeat_s, self._load.span_s)))
        game = 0
        while self._clock() < until:
            game += 1
            session = Session(f"lmsim-{self._run}-{number}-{game}", f"lmsim-player-{number}")
            if await self._open(session):
                await self._stay(session, min(until, self._clock() + rng.expovariate(1 / self._load.play_s)), rng)
                if rng.random() >= self._load.abandon:
                    await self._close(session)
            else:
                await asyncio.sleep(self._load.heartbeat_s)

    async def _open(self, session: Session) -> bool:
        body = {"playerId": session.player, "token": f"made-up-{session.id}", "idleTimeoutSeconds": self._load.idle_s}
        status, between = await self._asked("open", "PUT", session.id, body=body)
        if status != 201 and not (status == 200 and self._load.away_s):  # 200: an opening whose answer was lost
            self._failed(f"open {session.id}: {_said(status)}, where 201 is expected")
            return False
        self.figures.counts["opened"] += 1
        session.opened_between = session.touched_between = between
        self.sessions[session.id] = session
        return True

    async def _stay(self, session: Session, until: float, rng: Random) -> None:
        while self._clock() < until:
            await asyncio.sleep(max(0.0, min(self._load.heartbeat_s * rng.uniform(0.8, 1.2), until - self._clock())))
            due_at = session.touched_between[0] + self._load.idle_s
            status, (sent, answered) = await self._asked("touch", "POST", session.id, "touch")
            if status == 204:
                session.touched_between = (sent, answered)
                self.figures.counts["touched"] += 1
                continue
            if status == 410:
                if answered < due_at:  # the answer came before the session could have ended for inactivity
                    early_s = due_at - answered
                    self.figures.broke("early", f"{session.id}: touch answered 410, {early_s * 1000:.0f} ms too soon")
                self.figures.counts["touched_too_late"] += 1
            elif status == 404:
                self.figures.broke("lost", f"{session.id}: touch answered 404 though its opening was acknowledged")
            else:
                self._failed(f"touch {session.id}: {_said(status)}, where 204 is expected")
            if status and status not in NOT_NOW:
                return
            # The touch may have arrived although no answer came
            session.touched_between = (session.touched_between[0], answered)

    async def _close(self, session: Session) -> None:
        status, _ = await self._asked("close", "POST", session.id, "close")
        if status == 200:
            session.closed = True
            self.figures.counts["closed"] += 1
        elif status == 404:
            self.figures.broke("lost", f"{session.id}: close answered 404 though its opening was acknowledged")
        else:
            self._failed(f"close {session.id}: {_said(status)}, where 200 is expected")

    async def _asked(
        self, name: str, method: str, session: str, *verb: str, body: object = None
    ) -> tuple[int, tuple[float, float]]:
        """The status, and two moments between which the daemon must have received the call.

        If the daemon may be away, a call is repeated until it is answered, as game servers do. Already the first
        attempt may have opened a session, so for an opening the first moment is when that was sent.
        """
        path = ("v1", "operators", self._operator, "sessions", session, *verb)
        first = self._clock()
        while True:
            sent = self._clock()
            status, _ = await self._call(method, *path, body=body)
            answered = self._clock()
            if self._load.away_s:
                self._away.note(sent, answered, answered=status not in NOT_NOW)
            if status not in NOT_NOW or answered - first >= self._load.away_s:
                break
            await asyncio.sleep(REPEAT_EVERY_S)
        self.figures.timed(name, answered - sent)
        return status, (first if name == "open" else sent, answered)

    def _failed(self, what: str) -> None:
        self.figures.broke("failed", what)

    # -- the ends

    async def _watch(self) -> None:
        """Reads every session again and again, until all have ended and been delivered, or are overdue."""
        last = max((one.touched_between[1] for one in self.sessions.values()), default=0.0)
        in_time_by = last + self._load.idle_s + self._load.late_s + 5.0
        waiting = dict(self.sessions)
        while waiting:
            now = self._clock()
            ended_by = in_time_by + self._away.total_s(self._load.grace_s)
            delivered_by = ended_by + self._load.deliver_within_s
            for session in list(waiting.values()):
                if await self._look(session) or (session.ended and now > delivered_by):
                    del waiting[session.id]
                elif session.ended is None and now > ended_by:
                    overdue_s = now - session.touched_between[1] - self._load.idle_s
                    self.figures.broke("lost", f"{session.id}: still active, {overdue_s:.1f} s after it was due")
                    del waiting[session.id]
            self._tell(f"{len(waiting)} of {len(self.sessions)} sessions are waited for")
            if waiting:
                await asyncio.sleep(WATCH_EVERY_S)

    async def _look(self, session: Session) -> bool:
        """Reads the session and judges its end. Returns whether nothing more will happen to it."""
        sent = self._clock()
        status, found = await self._call("GET", "v1", "operators", self._operator, "sessions", session.id, body=None)
        if self._load.away_s:
            self._away.note(sent, self._clock(), answered=status not in NOT_NOW)
        if status == 404:
            self.figures.broke("lost", f"{session.id}: unknown though its opening was acknowledged")
            return True
        if status != 200 or found["state"] != "ended":
            return False
        if session.ended is None:
            session.ended = found
            self._judge(session, found)
        elif (found["endedAt"], found["reason"]) != (session.ended["endedAt"], session.ended["reason"]):
            self.figures.broke("doubled", f"{session.id}: ended {session.ended['endedAt']}, then {found['endedAt']}")
        return self._settled(session, found["deliveries"])

    def _judge(self, session: Session, found: dict[str, Any]) -> None:
        self.figures.counts[f"ended_{found['reason']}"] += 1
        if found["reason"] != "inactivity":
            return
        if session.closed:
            return  # it was due before the close arrived, so this is no fault
        # When it ended by this machine's clock: at the opening, the daemon's clock showed `openedAt` at some moment
        # within `opened_between`, so the end was between `earliest` and `latest`
        opened_at, ended_at = _seconds(found["openedAt"]), _seconds(found["endedAt"])
        earliest = session.opened_between[0] + (ended_at - opened_at)
        latest = session.opened_between[1] + (ended_at - opened_at)
        too_early_s = session.touched_between[0] + self._load.idle_s - latest - _ROUNDING_S
        lag_s = ended_at - _seconds(found["lastSeenAt"]) - self._load.idle_s
        waited_for = self._away.meets(session.touched_between[0], earliest, self._load.grace_s)
        if not waited_for:
            self.figures.timed("end_after_deadline", max(0.0, lag_s))
        if too_early_s > 0:
            self.figures.broke(
                "early", f"{session.id}: ended {too_early_s * 1000:.0f} ms before its idle time had passed"
            )
        late_s = earliest - session.touched_between[1] - self._load.idle_s
        if late_s > self._load.late_s and not waited_for:
            self.figures.broke("late", f"{session.id}: ended {late_s * 1000:.0f} ms after its deadline")

    def _settled(self, session: Session, deliveries: Collection[dict[str, Any]]) -> bool:
        sinks = [one["sink"] for one in deliveries]
        for sink in {sink for sink in sinks if sinks.count(sink) > 1}:
            self.figures.broke("doubled", f"{session.id}: {sinks.count(sink)} deliveries for {sink}")
        if any(one["state"] == SINKS_PENDING for one in deliveries):
            return False
        for one in deliveries:
            self.figures.counts[f"{one['state']}_to_{one['sink']}"] += 1
            self.figures.timed("settled_after_end", _seconds(one["settledAt"]) - _seconds(one["createdAt"]))
        return True


def _seconds(time_text: str) -> float:
    return datetime.fromisoformat(time_text.replace("Z", "+00:00")).timestamp()


def _said(status: int) -> str:
    return f"status {status}" if status else "no answer"
