"""Checks of requests that must be refused, and of unusual ones that must be accepted."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from lmdaemon.config.settings import Operator
from lmdaemon.workbench.bench import Bench, Check, Finding, Skip, accepted, changed, refused
from lmdaemon.workbench.exchanges import Exchange
from lmdaemon.workbench.notices import HOSTILE_IDS, LONG_ID

LARGE = 17 * 1024


async def malformed(bench: Bench) -> Finding:
    """A body that cannot be parsed is refused as bad parameters.

    A 500 or an HTML page makes the sender repeat the notice for days. Even the sample on the provider's page lacks its
    commas.
    """
    await bench.accepted()
    return refused(
        bench, [(case, await bench.post(body)) for case, body in bench.notices.malformed()], "bad_parameters"
    )


async def not_object(bench: Bench) -> Finding:
    """An empty body, a list and null are refused as bad parameters.

    They are valid or nearly valid JSON, so they often pass the parser and then cause an internal error.
    """
    _need_json(bench)
    await bench.accepted()
    cases = (("the body is empty", b""), ("the body is a list", b"[]"), ("the body is null", b"null"))
    return refused(bench, [(case, await bench.post(body)) for case, body in cases], "bad_parameters")


async def missing(bench: Bench) -> Finding:
    """Each required field that is missing is refused.

    A notice without its session or token means nothing; an endpoint that accepts it does not check its fields.
    """
    await bench.accepted()
    cases = []
    for meaning in bench.dialect.required:
        name = bench.dialect.fields[meaning]
        hashed = bench.notices.hashed({n: v for n, v in bench.notices.fields().items() if n != name})
        body = bench.notices.written({n: v for n, v in hashed.items() if n != name})
        cases.append((f"without {name}", await bench.post(body)))
    return refused(bench, cases, "bad_parameters", "bad_hash")


async def empty(bench: Bench) -> Finding:
    """Each required field that is empty is refused.

    In many database queries an empty id matches everything or nothing.
    """
    await bench.accepted()
    cases = []
    for meaning in bench.dialect.required:
        name = bench.dialect.fields[meaning]
        body = bench.notices.body(bench.notices.fields() | ({name: ""} if meaning != "hash" else {}))
        if meaning == "hash":
            body = bench.notices.written(bench.notices.hashed(bench.notices.fields()) | {name: ""})
        cases.append((f"{name} is empty", await bench.post(body)))
    return refused(bench, cases, "bad_parameters", "bad_hash", "bad_token")


async def types(bench: Bench) -> Finding:
    """A session id that is null, true, a list or an object is refused.

    Loosely typed code turns them into texts ("null", "Array"), or fails with an internal error.
    """
    _need_json(bench)
    await bench.accepted()
    name = bench.dialect.fields["session"]
    wrong: tuple[Any, ...] = (None, True, ["a"], {"a": 1})
    cases = []
    for value in wrong:
        body = bench.notices.body(bench.notices.fields() | {name: value})
        cases.append((f"{name} is {_NAMES[type(value)]}", await bench.post(body)))
    return refused(bench, cases, "bad_parameters")


_NAMES = {type(None): "null", bool: "true", list: "a list", dict: "an object"}


async def twice(bench: Bench) -> Finding:
    """A session id that stands twice with different values is refused.

    Parsers differ in which value they take: a proxy may check one, and the endpoint use the other.
    """
    await bench.accepted()
    body = bench.notices.twice(bench.notices.fields(), "session", bench.notices.unknown_session())
    return refused(bench, [("", await bench.post(body))], "bad_parameters", "bad_hash")


async def other_player(bench: Bench) -> Finding:
    """A notice of the same session for another player is refused.

    Somebody has confused sessions, and ending the wrong player's session is worse than an error.
    """
    told = await bench.accepted()
    fields = bench.notices.fields(told.session, player=f"{bench.notices.player}-other")
    other = (await bench.tell(fields)).exchange
    if other.accepted:
        return Finding("warn", "another player's notice of the same session was accepted", (other,))
    return refused(bench, [("", other)], "player_mismatch", "bad_parameters", "unknown_session")


async def other_provider(bench: Bench) -> Finding:
    """A notice of another provider is refused.

    Session ids are only unique within one provider.
    """
    await bench.accepted()
    told = await bench.tell(bench.notices.fields(provider="lmcheck-nobody"))
    return refused(bench, [("", told.exchange)], "bad_parameters")


async def provider_case(bench: Bench) -> Finding:
    """The provider's id is accepted in upper and lower case.

    The provider's own pages write it in more than one way.
    """
    await bench.accepted()
    provider = bench.operator.provider_id
    other = provider.swapcase()
    if other == provider:
        raise Skip("the provider id has no letters")
    one = (await bench.tell(bench.notices.fields(provider=other))).exchange
    if one.accepted:
        return Finding("pass", "accepted")
    return Finding("warn", f"{other!r} instead of {provider!r}: {bench.said(one)}", (one,))


async def extra_fields(bench: Bench) -> Finding:
    """Fields that are not on the provider's page are ignored.

    The page changed fifteen times in fourteen months; the next version must not break your endpoint.
    """
    if not bench.dialect.extra:
        raise Skip(f"dialect {bench.dialect.name} takes no other fields")
    await bench.accepted()
    more: dict[str, Any] = {"lmcheckExtra": "1"}
    if bench.dialect.content == "json":
        more |= {"lmcheckNested": {"a": [1, None]}}
    one = (await bench.tell(bench.notices.fields() | more)).exchange
    if bench.notices.is_hashed and one.code == bench.dialect.codes.of("bad_hash"):
        return Finding("skipped", "the hash does not cover them: see authenticity.hash-whole", (one,))
    return accepted(bench, one)


async def long_ids(bench: Bench) -> Finding:
    """A session id of 256 characters is accepted.

    Ids are opaque; a column that is too short truncates or fails.
    """
    await bench.accepted()
    unique = bench.notices.unknown_session()
    one = (await bench.tell(bench.notices.fields(LONG_ID[: -len(unique)] + unique))).exchange
    if bench.notices.has_known and not one.accepted:
        return refused(bench, [("", one)], "unknown_session", "bad_parameters")
    return accepted(bench, one)


async def hostile_ids(bench: Bench) -> Finding:
    """Ids with quotes, percent signs, markup, SQL and other scripts are handled as data.

    An id is somebody else's text: put into a statement or a page it becomes code.

    Each id may be accepted or refused, but the answer must be an ordinary one, and not a fault or an error page.
    """
    await bench.accepted()
    codes = {bench.dialect.codes.of(meaning) for meaning in ("bad_parameters", "unknown_session", "player_mismatch")}
    # A value that is hashed cannot have these characters
    ids = [text.replace("=", "").replace("&", "") for text in HOSTILE_IDS]
    for text in ids:
        one = (await bench.tell(bench.notices.fields(f"{bench.notices.unknown_session()} {text}"))).exchange
        if not one.accepted and (one.code not in codes or (one.status or 500) >= 500):
            return Finding("fail", f"a session id with {text}: {bench.said(one)}", (one,))
    return Finding("pass", "all are handled as data")


async def charset(bench: Bench) -> Finding:
    """A Content-Type with a charset is accepted.

    Many HTTP clients add `; charset=UTF-8` by themselves.
    """
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    one = await bench.post(body, headers={"Content-Type": f"{bench.dialect.content_type}; charset=UTF-8"})
    return accepted(bench, one)


async def content_type(bench: Bench) -> Finding:
    """Another Content-Type is refused.

    Any web page can make a browser send text/plain to your endpoint without asking it first.
    """
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    one = await bench.post(body, headers={"Content-Type": "text/plain"})
    if one.accepted:
        return Finding("warn", "text/plain was accepted", (one,))
    return _not_taken(bench, one, 415)


async def method(bench: Bench) -> Finding:
    """A GET is refused.

    Crawlers, previews and prefetchers send GET; it must not end sessions.
    """
    await bench.accepted()
    one = await bench.post(b"", method="GET")
    if one.accepted:
        return Finding("fail", "a GET is answered with success", (one,))
    return _not_taken(bench, one, 405)


def _not_taken(bench: Bench, one: Exchange, status: int) -> Finding:
    """The request must be refused, with the HTTP status for its fault, or with a code in the body."""
    if one.answer is None or (one.status or 500) >= 500:
        return Finding("fail", f"{bench.said(one)}, where {status} is expected", (one,))
    if one.status == status or one.code:
        return Finding("pass", bench.said(one))
    return Finding("warn", f"{bench.said(one)}, where {status} is expected", (one,))


async def large_body(bench: Bench) -> Finding:
    """A body of 17 KiB is refused without hanging.

    A notice has some hundred bytes. A server that accepts any size can run out of memory.
    """
    await bench.accepted()
    name = "lmcheckExtra"
    body = bench.notices.body(bench.notices.fields() | {name: "x" * LARGE})
    one = await bench.post(body)
    if one.accepted:
        return Finding("warn", f"{len(body)} bytes were accepted", (one._replace(asked=one.asked._replace(body=b"")),))
    short = one._replace(asked=one.asked._replace(body=body[:100] + b"..."))
    if one.cause == "timeout" or ((one.status or 0) >= 500):
        return Finding("fail", f"{bench.said(one)}, where 413 is expected", (short,))
    return Finding("pass", bench.said(one))


async def slow_body(bench: Bench) -> Finding:
    """A body that comes byte by byte delays no other request, and is cut off.

    A few such connections are enough to block a server that handles one connection at a time.
    """
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    patience_s = bench.limits.patience_s
    cut = asyncio.Event()

    async def drip() -> AsyncIterator[bytes]:
        for at in range(len(body) - 1):
            yield body[at : at + 1]
            await asyncio.sleep(1)

    await bench.wire.take(2)
    headers = bench.notices.headers(body, bench.now_s()) | {"Content-Length": str(len(body))}
    slow = asyncio.create_task(
        bench.wire.send_now(body, headers, operator=_patient(bench, patience_s), slowly=drip(), silence_counts=False)
    )
    slow.add_done_callback(lambda _: cut.set())
    await asyncio.sleep(min(1, patience_s / 2))
    try:
        told = bench.notices.body(bench.notices.fields())
        other = await bench.wire.send_now(told, bench.notices.headers(told, bench.now_s()))
    finally:
        await asyncio.wait([slow], timeout=patience_s + 1)
        slow.cancel()
    if not other.accepted:
        return Finding("fail", f"another notice meanwhile: {bench.said(other)}", (other,))
    if slow.done() and not slow.cancelled() and slow.result().cause != "timeout":
        return Finding("pass", f"cut off within {patience_s:g} s, and others are served meanwhile")
    return Finding("warn", f"not cut off within {patience_s:g} s; others are served meanwhile")


def _patient(bench: Bench, patience_s: float) -> Operator:
    return changed(bench.operator, policy=changed(bench.operator.policy, timeout_s=patience_s))


def _need_json(bench: Bench) -> None:
    if bench.dialect.content != "json":
        raise Skip(f"dialect {bench.dialect.name} is a form, where everything is text")


CHECKS = (
    Check(
        "strictness.malformed",
        "Catch the parser's error and answer 200 with the code for bad parameters, not the framework's own page.",
        malformed,
    ),
    Check(
        "strictness.not-object",
        "Check that what was parsed is an object before reading fields.",
        not_object,
    ),
    Check(
        "strictness.missing",
        "Check each required field; answer the code for bad parameters.",
        missing,
    ),
    Check(
        "strictness.empty",
        "Refuse empty texts as missing ones.",
        empty,
    ),
    Check(
        "strictness.types",
        "Take a text (or a whole number) and nothing else.",
        types,
    ),
    Check(
        "strictness.duplicate-field",
        "Let the parser refuse duplicate names (Python: object_pairs_hook; Jackson: STRICT_DUPLICATE_DETECTION); "
        "where it cannot (PHP, JavaScript), count the name in the raw body.",
        twice,
    ),
    Check(
        "strictness.other-player",
        "Store the player with the session, and compare.",
        other_player,
    ),
    Check(
        "strictness.other-provider",
        "Compare providerId with the one agreed upon.",
        other_provider,
    ),
    Check(
        "strictness.provider-case",
        "Compare providerId without regard to case.",
        provider_case,
    ),
    Check(
        "strictness.extra-fields",
        "Ignore names that you do not know. With a hash, hash all that was received.",
        extra_fields,
    ),
    Check(
        "strictness.long-ids",
        "Make the column 256 characters wide at least.",
        long_ids,
    ),
    Check(
        "strictness.hostile-ids",
        "Use bound parameters, escape output, UTF-8 (utf8mb4) throughout.",
        hostile_ids,
    ),
    Check(
        "strictness.charset",
        "Compare the media type alone, not the whole header.",
        charset,
    ),
    Check(
        "strictness.content-type",
        "Answer 415 to everything but the dialect's type.",
        content_type,
    ),
    Check(
        "strictness.method",
        "Answer 405 with Allow: POST.",
        method,
    ),
    Check(
        "strictness.large-body",
        "Limit the body (16 KiB) in the server or the proxy; answer 413.",
        large_body,
    ),
    Check(
        "strictness.slow-body",
        "Serve several connections at once, with a time limit for the body; or put a proxy before the application that "
        "buffers requests.",
        slow_body,
        "late",
    ),
)
