"""What a check is given: the target, made-up notices, the connection to it, and the findings of other checks."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator, Policy
from lmdaemon.dialects import Dialect
from lmdaemon.workbench import explain
from lmdaemon.workbench.exchanges import Exchange
from lmdaemon.workbench.notices import Fields, Notices
from lmdaemon.workbench.wire import Wire

Struct = TypeVar("Struct", Operator, Policy)
Verdict = Literal["pass", "warn", "fail", "skipped"]
# When a check runs. A `late` check needs some time to have passed since the first ones, or disturbs other checks; a
# `summary` judges the answers that all other checks got.
Turn = Literal["first", "usual", "late", "summary"]


class Finding(NamedTuple):
    """The result of one check. `evidence` has the exchanges that show it. `hint` says what to do, if more is known than
    in the check's own hint.
    """

    verdict: Verdict
    text: str
    evidence: Sequence[Exchange] = ()
    hint: str = ""


class Skip(Exception):  # noqa: N818 - a result
    """Raised by a check that does not apply or cannot be made; the text says why."""


class Check(NamedTuple):
    """One thing that is tried. `id` is `group.name`, `hint` says what to do when it fails. Reports show the docstring
    of `run`: its first paragraph says what is tried, its second why it matters.
    """

    id: str
    hint: str
    run: "Callable[[Bench], Awaitable[Finding]]"
    turn: Turn = "usual"

    @property
    def group(self) -> str:
        """The part of its id that it shares with similar checks."""
        return self.id.partition(".")[0]

    @property
    def title(self) -> str:
        """What is tried, in a sentence."""
        return self._paragraph(0)

    @property
    def why(self) -> str:
        """Why it matters, in a sentence."""
        return self._paragraph(1)

    def _paragraph(self, number: int) -> str:
        paragraphs = (self.run.__doc__ or "\n\n").split("\n\n")  # python -OO leaves no docstring
        return " ".join(paragraphs[number].split())


class Told(NamedTuple):
    """A valid notice that was sent, and what came back."""

    session: str
    fields: Fields
    body: bytes
    webhook_id: str
    exchange: Exchange


class Limits(NamedTuple):
    """`patience_s`: how long a slow body is sent; `lull_s`: the wait before a notice is repeated as a later attempt;
    `connect_s`: the longest time for a lookup, a connect or a handshake.
    """

    burst: bool = False
    patience_s: float = 15.0
    lull_s: float = 1.1
    connect_s: float = 5.0


class Bench:
    """What a check uses. `found` are the findings so far, by check; `by_check` the exchanges that each has made."""

    def __init__(self, operator: Operator, notices: Notices, wire: Wire, clock: Clock, limits: Limits) -> None:
        self.operator = operator
        self.dialect: Dialect = operator.sends
        self.notices = notices
        self.wire = wire
        self.clock = clock
        self.limits = limits
        self.found: dict[str, Finding] = {}
        self.untried: set[str] = set()  # checks that ended early because no more requests could be sent
        self.by_check: dict[str, list[Exchange]] = {}
        self._first: Told | None = None

    @property
    def host(self) -> str:
        """The host of the endpoint's URL."""
        assert self.operator.target is not None  # noqa: S101 - nobody is checked without a URL
        return self.operator.target.url.raw_host or ""

    @property
    def is_https(self) -> bool:
        """Whether the endpoint is asked over TLS."""
        assert self.operator.target is not None  # noqa: S101
        return self.operator.target.url.scheme == "https"

    def now_s(self) -> float:
        """The wall time in seconds."""
        return self.clock.wall_ms() / 1000

    async def pause(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        await asyncio.sleep(seconds)

    async def post(
        self, body: bytes, *, headers: Mapping[str, str] | None = None, webhook_id: str | None = None, **options: Any
    ) -> Exchange:
        """Sends one request with the headers that the daemon would send; given headers replace them."""
        made = self.notices.headers(body, self.now_s(), webhook_id) | dict(headers or {})
        return await self.wire.send(body, made, **options)

    async def tell(self, fields: Fields | None = None, **options: Any) -> Told:
        """Sends one notice, with its correct hash."""
        fields = fields or self.notices.fields()
        body = self.notices.body(fields)
        webhook_id = self.notices.webhook_id()
        exchange = await self.post(body, webhook_id=webhook_id, **options)
        return Told(str(fields[self.dialect.fields["session"]]), fields, body, webhook_id, exchange)

    async def first(self) -> Told:
        """Sends the first valid notice of the run, on the connection that is kept open."""
        if self._first is None:
            self._first = await self.tell(keep=True)
        return self._first

    async def accepted(self) -> Told:
        """The first valid notice. Raises Skip if it was not accepted: if an endpoint refuses every notice, its refusals
        of bad ones prove nothing.
        """
        told = await self.first()
        if not told.exchange.accepted:
            raise Skip("the valid notice of answer.valid was not accepted, so this check would prove nothing")
        return told

    def said(self, exchange: Exchange) -> str:
        """The answer, or why there is none, in words."""
        return explain.exchange(exchange, self.dialect)


def changed(struct: Struct, **changes: Any) -> Struct:
    """A copy of an operator or a policy with other values."""
    return type(struct)(**{name: getattr(struct, name) for name in struct.__struct_fields__} | changes)


def run_id() -> str:
    """Six random hexadecimal digits, so that the ids of two runs are very unlikely to be the same."""
    return secrets.token_hex(3)


# -- findings that several checks share


def accepted(bench: Bench, *exchanges: Exchange, told: str = "accepted") -> Finding:
    """A failure if one of the exchanges was not accepted."""
    for one in exchanges:
        if not one.accepted:
            return Finding("fail", bench.said(one), (one,))
    return Finding("pass", told)


def refused(bench: Bench, cases: Sequence[tuple[str, Exchange]], *meanings: str) -> Finding:
    """Each case must be refused. A code that the dialect has for something else than these meanings is a warning; one
    that it does not have passes. No code, code 0, a status of 500 or more and the code for "please retry" are failures:
    a sender would repeat the same notice for days.
    """
    codes = {bench.dialect.codes.of(meaning) for meaning in meanings}
    wanted = " or ".join(explain.named(code, bench.dialect) for code in sorted(codes))
    worst = Finding("pass", "refused" if len(cases) == 1 else f"all {len(cases)} are refused")
    for case, one in cases:
        where = f"{case}: " if case else ""
        said = bench.said(one)
        if one.accepted:
            return Finding("fail", f"{where}it was accepted, where `error` {wanted} is expected", (one,))
        if one.code is None or one.code == 0 or (one.status or 0) >= 500:
            return Finding("fail", f"{where}{said}, where 200 with `error` {wanted} is expected", (one,))
        if one.code == bench.dialect.codes.of("retry"):
            return Finding("fail", f"{where}{said}: a sender would repeat it for days, to no effect", (one,))
        named = explain.meaning_of(one.code, bench.dialect)
        if one.code not in codes and named and worst.verdict == "pass":
            worst = Finding("warn", f"{where}{said}, where `error` {wanted} is expected", (one,))
    return worst
