"""Runs checks against one target, within bounds of traffic and time, and returns a report, whatever the target does."""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, NamedTuple

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator
from lmdaemon.delivery.shown import shown_url
from lmdaemon.workbench.bench import Bench, Check, Finding, Limits, Skip, Turn, run_id
from lmdaemon.workbench.checks import BY_HAND, CHECKS, GROUPS
from lmdaemon.workbench.exchanges import shown
from lmdaemon.workbench.notices import NoSession, Notices
from lmdaemon.workbench.wire import PER_SECOND, Stopped, Wire

RUN_MAX_S = 600.0
BASE = "answer.valid"  # the check whose success most other checks need
_TURNS: Sequence[Turn] = ("first", "usual", "late", "summary")


class Result(NamedTuple):
    """The result of one check, ready to be shown. `evidence` has exchanges with secrets masked."""

    check: Check
    verdict: str
    text: str
    evidence: Sequence[dict[str, Any]]
    requests: int
    duration_ms: int
    hint: str  # what to do if the check fails

    def as_json(self) -> dict[str, Any]:
        """The result of one check, for a report."""
        return {
            "id": self.check.id,
            "title": self.check.title,
            "verdict": self.verdict,
            "text": self.text,
            "why": self.check.why,
            "hint": self.hint if self.verdict in ("warn", "fail") else None,
            "requests": self.requests,
            "durationMs": self.duration_ms,
            "evidence": list(self.evidence),
        }


class Report(NamedTuple):
    """All findings in the order of docs/check.md. `stopped` says why some were not tried; else empty."""

    url: str
    dialect: str
    run: str
    started_at: datetime
    duration_ms: int
    requests: int
    stopped: str
    results: Sequence[Result]

    @property
    def counts(self) -> dict[str, int]:
        """The number of checks by verdict."""
        verdicts = [result.verdict for result in self.results]
        return {verdict: verdicts.count(verdict) for verdict in ("pass", "warn", "fail", "skipped")}

    @property
    def is_good(self) -> bool:
        """Whether nothing failed, and no check was left out because answers or time were missing."""
        return not self.stopped and not self.counts["fail"]

    def as_json(self) -> dict[str, Any]:
        """The whole report."""
        return {
            "url": self.url,
            "dialect": self.dialect,
            "run": self.run,
            "startedAt": self.started_at.isoformat().replace("+00:00", "Z"),
            "durationMs": self.duration_ms,
            "requests": self.requests,
            "stopped": self.stopped or None,
            "counts": self.counts,
            "checks": [result.as_json() for result in self.results],
            "byHand": list(BY_HAND),
        }


def chosen(only: Collection[str], skip: Collection[str]) -> tuple[Check, ...]:
    """The checks of these ids and groups, and BASE; all of them where `only` is empty. Raises ValueError."""
    known = {check.id for check in CHECKS} | set(GROUPS)
    for name in (*only, *skip):
        if name not in known:
            meant = get_close_matches(name, known, 1)
            hint = f"did you mean {meant[0]}? Groups" if meant else "groups"
            raise ValueError(f"no check and no group is called {name!r}; {hint} are {', '.join(GROUPS)}")
    if BASE in skip:
        raise ValueError(f"--skip: {BASE} is always tried, because the other checks need its result")
    return tuple(
        check
        for check in CHECKS
        if check.id == BASE
        or ((not only or {check.id, check.group} & set(only)) and not {check.id, check.group} & set(skip))
    )


class Progress(NamedTuple):
    """How far a run has come. `check` is the id of the check under way, empty between two checks; `result` is the
    result of the check that has just ended, as in the report.
    """

    done: int
    total: int
    check: str
    result: dict[str, Any] | None


def obstacle(operator: Operator) -> str:
    """The reason, in words, why this operator cannot be checked; empty if it can."""
    if not operator.url:
        return "it has no url"
    if "hash" in operator.sends.required and operator.hash_key is None:
        return f"dialect {operator.sends.name} needs a hash key"
    return ""


async def check_operator(
    operator: Operator,
    *,
    player: str | None = None,
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Runs every check against an operator of the configuration and returns the report as `check --json` prints it.

    `player` and `token` are a test player's; values that are not given are made up. `on_progress` is called in the
    event loop at the beginning and at the end of each check. Run it in a task of its own: if that task is cancelled, it
    returns the report of what was found so far, with `stopped` set. Takes about half a minute, and RUN_MAX_S at most.
    Raises ValueError if the operator has an `obstacle`.
    """
    problem = obstacle(operator)
    if problem:
        raise ValueError(f"operators.{operator.name} cannot be checked: {problem}")
    total, ended = len(CHECKS), 0

    def began(check: Check, number: int) -> None:
        on_progress(Progress(ended, total, check.id, None))

    def came(result: Result) -> None:
        nonlocal ended
        ended += 1
        on_progress(Progress(ended, total, "", result.as_json()))

    runner = Runner(operator, player=player, token=token, limits=limits, on_begin=began, on_result=came)
    return (await runner.run()).as_json()


class Runner:
    """One run. `sessions` has open sessions that the endpoint knows; without them ids are made up. `on_begin` is called
    with each check that begins, `on_result` with the result of each that has ended.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        checks: Sequence[Check] = CHECKS,
        player: str | None = None,
        token: str | None = None,
        sessions: Sequence[str] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        per_second: int | None = PER_SECOND,
        clock: Clock | None = None,
        on_begin: Callable[[Check, int], None] = lambda check, number: None,
        on_result: Callable[[Result], None] = lambda result: None,
    ) -> None:
        self.operator = operator
        self.checks = checks
        self.id = run_id()
        clock = clock or Clock()
        self._wire = Wire(operator, clock, per_second=None if limits.burst else per_second)
        notices = Notices(operator, run=self.id, player=player, token=token, sessions=sessions)
        self._bench = Bench(operator, notices, self._wire, clock, limits)
        self._on_begin = on_begin
        self._on_result = on_result
        self._results: dict[str, Result] = {}
        self._stopped = ""

    async def run(self) -> Report:
        """Runs the checks and returns the report. It raises nothing, whatever the target does. If it is cancelled, it
        returns the report of what was found so far.
        """
        started_at, began = datetime.now(UTC), time.monotonic()
        try:
            async with asyncio.timeout(RUN_MAX_S):
                await self._try_all()
        except TimeoutError:
            self._stopped = f"the limit of {RUN_MAX_S:g} s is reached"
        except asyncio.CancelledError:
            self._stopped = "interrupted"
        finally:
            await self._wire.close()
        for check in self.checks:
            if check.id not in self._results:
                self._keep(check, Finding("skipped", self._stopped or "not tried"), 0)
        return Report(
            shown_url(self.operator.url),
            self.operator.sends.name,
            self.id,
            started_at,
            round((time.monotonic() - began) * 1000),
            self._wire.sent,
            self._stopped,
            [self._results[check.id] for check in self.checks],
        )

    async def _try_all(self) -> None:
        in_turn = [check for turn in _TURNS for check in self.checks if check.turn == turn]
        for number, check in enumerate(in_turn, 1):
            self._on_begin(check, number)
            await self._try(check)

    async def _try(self, check: Check) -> None:
        began, before = time.monotonic(), len(self._wire.exchanges)
        try:
            finding = await check.run(self._bench)
        except Skip as reason:
            finding = Finding("skipped", str(reason))
        except (Stopped, NoSession) as reason:
            self._stopped = self._stopped or str(reason)
            self._bench.untried.add(check.id)
            finding = Finding("skipped", str(reason))
        except Exception as error:  # a bug in a check must not lose the findings of others
            finding = Finding("skipped", f"the check itself failed: {type(error).__name__}: please report it")
        self._bench.by_check[check.id] = self._wire.exchanges[before:]
        self._keep(check, finding, round((time.monotonic() - began) * 1000))

    def _keep(self, check: Check, finding: Finding, took_ms: int) -> None:
        self._bench.found[check.id] = finding
        mask = self._bench.notices.mask()
        result = Result(
            check,
            finding.verdict,
            mask(finding.text),
            [shown(one, mask) for one in finding.evidence],
            len(self._bench.by_check.get(check.id, ())),
            took_ms,
            mask(finding.hint) or check.hint,
        )
        self._results[check.id] = result
        self._on_result(result)
