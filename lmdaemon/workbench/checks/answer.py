"""Checks of the content and form of answers. `valid` judges the first notice's, the others those of the whole run."""

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from lmdaemon.dialects import without_mark
from lmdaemon.workbench import advice, explain
from lmdaemon.workbench.bench import Bench, Check, Finding, Skip
from lmdaemon.workbench.exchanges import Answer, Exchange

CLOCK_OFF_S = 30
TOKEN_MIN = 6
# Checks whose requests may be refused before the body is parsed. Here only `no_echo` judges their answers
_BEFORE_PARSING = (
    "connection.plain-http",
    "strictness.content-type",
    "strictness.method",
    "strictness.large-body",
    "strictness.slow-body",
    "authenticity.credentials",
    "authenticity.client-certificate",
    "behaviour.burst",
)


def _answers(bench: Bench) -> Iterator[tuple[Exchange, Answer]]:
    """The answers of the run, but not those of the checks in _BEFORE_PARSING, nor of checks that have reported a
    failure, so that it is not reported again.
    """
    for check, exchanges in bench.by_check.items():
        finding = bench.found.get(check)
        if check in _BEFORE_PARSING or (finding is not None and _is_blamed(finding)):
            continue
        for one in exchanges:
            if one.answer is not None and one.code is not None:
                yield one, one.answer


def _is_blamed(finding: Finding) -> bool:
    """Whether the check failed, or was skipped because another check has reported the same answer."""
    return finding.verdict == "fail" or (finding.verdict == "skipped" and bool(finding.evidence))


def _some(bench: Bench) -> list[tuple[Exchange, Answer]]:
    found = list(_answers(bench))
    if not found:
        raise Skip("there was no answer to look at")
    return found


def _object(answer: Answer) -> dict[str, Any]:
    return dict(orjson.loads(without_mark(answer.body)))


async def valid(bench: Bench) -> Finding:
    """A valid notice is answered with HTTP 200 and `error` 0.

    Only this is success; after any other answer the sender repeats the notice for days.
    """
    one = (await bench.first()).exchange
    if one.accepted:
        return Finding("pass", bench.said(one))
    if one.answer is not None and 300 <= one.answer.status < 400:
        raise Skip("the answer is a redirect: see connection.no-redirect")
    return Finding("fail", bench.said(one), (one,), advice.of_valid(one, bench.operator))


async def content_type(bench: Bench) -> Finding:
    """Content-Type is application/json.

    Some senders, proxies and logs treat anything else as text or as an error page.
    """
    for one, answer in _some(bench):
        found = answer.headers.get("Content-Type", "")
        if found.partition(";")[0].strip().lower() != "application/json":
            return Finding("warn", f"Content-Type is {found or 'missing'}", (one,))
    return Finding("pass", "application/json")


async def description(bench: Bench) -> Finding:
    """`description` is a text.

    The provider's page defines it, and it is what a person reads when a notice fails.
    """
    for one, answer in _some(bench):
        found = _object(answer).get("description")
        if not isinstance(found, str):
            said = "is missing" if found is None else "is no text"
            return Finding("warn", f"`description` {said}", (one,))
    return Finding("pass", "a text in every answer")


async def error_number(bench: Bench) -> Finding:
    """`error` is written as a whole number.

    The provider's page says number; strict senders do not take "0" or 0.0.
    """
    for one, answer in _some(bench):
        found = _object(answer).get("error")
        if type(found) is not int:
            return Finding("warn", f"`error` is written as {orjson.dumps(found).decode()}", (one,))
    return Finding("pass", "a number in every answer")


async def codes(bench: Bench) -> Finding:
    """Every `error` is a code of the dialect.

    A sender knows what to do only with the codes on the provider's page; after any other it repeats the notice for
    days.
    """
    unknown: dict[float, Exchange] = {}
    for one, _ in _some(bench):
        if one.code is not None and not explain.meaning_of(one.code, bench.dialect):
            unknown.setdefault(one.code, one)
    if unknown:
        listed = ", ".join(f"{code:g}" for code in sorted(unknown))
        return Finding("fail", f"dialect {bench.dialect.name} has no `error` {listed}", tuple(unknown.values())[:2])
    return Finding("pass", "every code is one of the dialect's")


async def refusal_status(bench: Bench) -> Finding:
    """A refusal has HTTP 200 too; its reason is in `error`.

    The status says whether the request arrived, `error` what became of the notice; proxies replace the body of a 4xx or
    5xx.
    """
    refusals = [one for one, answer in _some(bench) if one.code != 0]
    if not refusals:
        raise Skip("nothing was refused")
    for one in refusals:
        if one.status != 200:
            return Finding("fail", f"`error` {one.code:g} came with HTTP {one.status}", (one,))
    return Finding("pass", f"200 with all {len(refusals)} refusals")


async def framing(bench: Bench) -> Finding:
    """The answer has a length, and is not compressed.

    A body without a length cannot be distinguished from one that broke off; and the sender does not ask for
    compression.
    """
    for one, answer in _some(bench):
        if encoding := answer.headers.get("Content-Encoding", ""):
            return Finding("fail", f"Content-Encoding {encoding}, which nobody asked for", (one,))
        if explain.starts_with_mark(answer.body):
            return Finding("warn", "the body begins with a byte-order mark", (one,))
        has_length = "Content-Length" in answer.headers or "Transfer-Encoding" in answer.headers
        if not has_length:
            return Finding("warn", "neither Content-Length nor chunks: the answer ends with the connection", (one,))
    return Finding("pass", "the length is given, nothing is compressed")


async def no_echo(bench: Bench) -> Finding:
    """No answer repeats the token.

    Answers are logged on both sides; a token in one is a leaked credential.
    """
    if "token" not in bench.dialect.fields:
        raise Skip(f"dialect {bench.dialect.name} has no token")
    if len(bench.notices.token) < TOKEN_MIN:
        raise Skip(f"a token of less than {TOKEN_MIN} characters cannot be told from other text")
    if not any(one.answer for one in bench.wire.exchanges):
        raise Skip("there was no answer to look at")
    token = bench.notices.token
    for one in bench.wire.exchanges:
        if one.answer is not None and token.encode() in one.answer.body:
            return Finding("fail", "the answer repeats the token", (one,))
    return Finding("pass", "no answer repeats the token")


async def clock(bench: Bench) -> Finding:
    """The server's clock (its Date header) is right within 30 s.

    Signatures contain a time, and two logs can only be compared when the clocks agree.
    """
    for one, answer in _some(bench)[-1:]:
        text = answer.headers.get("Date")
        if text is None:
            raise Skip("there is no Date header")
        try:
            off_s = parsedate_to_datetime(text).timestamp() - bench.now_s()
        except (ValueError, TypeError, OverflowError):
            return Finding("warn", f"Date is no date: {text[:40]}", (one,))
        if abs(off_s) > CLOCK_OFF_S:
            return Finding("warn", f"its clock is {abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}", (one,))
    return Finding("pass", f"within {CLOCK_OFF_S} s of ours")


CHECKS = (
    Check(
        "answer.valid",
        'Answer {"error": 0, "description": "Success"} with status 200. An endpoint that only takes what it knows '
        "needs a test player (--player, --token-file) and test sessions (--session-file).",
        valid,
        "first",
    ),
    Check(
        "answer.content-type",
        "Set Content-Type: application/json.",
        content_type,
        "summary",
    ),
    Check(
        "answer.description",
        'Add "description" with a few words in every answer.',
        description,
        "summary",
    ),
    Check(
        "answer.error-number",
        "Write 0 without quotes.",
        error_number,
        "summary",
    ),
    Check(
        "answer.codes",
        "Use the codes in the table of answer codes.",
        codes,
        "summary",
    ),
    Check(
        "answer.refusal-status",
        "Answer 200 to every request whose body was read, and put the code into `error` alone.",
        refusal_status,
        "summary",
    ),
    Check(
        "answer.framing",
        "Let the server write Content-Length; switch compression off for this path; write no byte-order mark.",
        framing,
        "summary",
    ),
    Check(
        "answer.no-echo",
        "Do not put the request, or exception texts with it, into the answer.",
        no_echo,
        "summary",
    ),
    Check(
        "answer.clock",
        "Run NTP on the server.",
        clock,
        "summary",
    ),
)
