"""Checks of repeats: a sender that delivers at least once may send a notice twice."""

import asyncio

from lmdaemon.workbench.bench import Bench, Check, Finding, accepted
from lmdaemon.workbench.exchanges import Exchange

RACE = 10  # equal notices at the same moment, where so many are allowed


def _again(bench: Bench, *exchanges: Exchange, told: str = "accepted") -> Finding:
    """As `accepted`. But if the check fails with the same text as idempotence.repeat did, the verdict is `skipped`, so
    that one cause is reported once.
    """
    finding, plain = accepted(bench, *exchanges, told=told), bench.found.get("idempotence.repeat")
    if finding.verdict == "fail" and plain is not None and (plain.verdict, plain.text) == ("fail", finding.text):
        return Finding("skipped", "it fails as idempotence.repeat does", finding.evidence)
    return finding


async def repeat(bench: Bench) -> Finding:
    """The same notice again, at once, is answered with success.

    An answer can get lost on the way; then the sender must repeat, and an error would make it repeat for days.
    """
    told = await bench.accepted()
    return accepted(bench, await bench.post(told.body), told="the same success")


async def attempt(bench: Bench) -> Finding:
    """A further attempt (same webhook-id, new time-stamp) is answered with success.

    This is how a sender repeats a notice; an endpoint that refuses a known webhook-id would refuse every repeat.
    """
    told = await bench.accepted()
    await bench.pause(bench.limits.lull_s)  # so that the repeat has another time stamp
    again = await bench.post(told.body, webhook_id=told.webhook_id)
    return _again(bench, again, told="the same success for the same webhook-id")


async def rewritten(bench: Bench) -> Finding:
    """The same notice with its fields in another order is answered with success.

    Order and white space have no meaning; proxies and new versions of a sender change them.
    """
    told = await bench.accepted()
    return _again(bench, await bench.post(bench.notices.rewritten(told.fields)))


async def race(bench: Bench) -> Finding:
    """Equal notices at the same moment, five or with `--burst` ten, are all answered with success.

    Attempts of two senders can overlap; when two threads insert the same row, the second often fails with a 500.
    """
    await bench.accepted()
    body = bench.notices.body(bench.notices.fields())
    webhook_id = bench.notices.webhook_id()
    count = bench.wire.at_once(RACE)
    await bench.wire.take(count)
    headers = bench.notices.headers(body, bench.now_s(), webhook_id)
    together = await asyncio.gather(*(bench.wire.send_now(body, headers) for _ in range(count)))
    return _again(bench, *together, told=f"all {count} succeed")


async def unknown(bench: Bench) -> Finding:
    """A session of an unknown player is accepted, or refused with its code.

    Sessions that you never saw, or have deleted, end too; a 500 would be repeated for days.
    """
    await bench.accepted()
    told = await bench.tell(bench.notices.fields(player=f"lmcheck-nobody-{bench.notices.unknown_session()}"))
    one, codes = told.exchange, bench.dialect.codes
    if one.accepted:
        return Finding("pass", "accepted")
    meanings = ("unknown_session", "player_mismatch", "bad_parameters", "bad_token")
    if one.code in {codes.of(meaning) for meaning in meanings} and (one.status or 500) < 500:
        return Finding("pass", bench.said(one))
    return Finding("fail", bench.said(one), (one,))


async def later(bench: Bench) -> Finding:
    """The first notice once more at the end of the run is answered with success.

    A cache of some seconds or a lock does not make an endpoint idempotent; repeats come for days.
    """
    told = await bench.accepted()
    return _again(bench, await bench.post(told.body, webhook_id=told.webhook_id), told="the same success at the end")


CHECKS = (
    Check(
        "idempotence.repeat",
        'Answer "Success" when the session has already ended, whoever ended it.',
        repeat,
    ),
    Check(
        "idempotence.attempt",
        "Remember the webhook-id to do the work once, and answer success all the same.",
        attempt,
    ),
    Check(
        "idempotence.rewritten",
        "Read fields by name with a real parser; compare sessions by id, not by the bytes of the body.",
        rewritten,
    ),
    Check(
        "idempotence.race",
        "Let the database decide: insert or ignore (ON CONFLICT DO NOTHING), not look and then insert.",
        race,
    ),
    Check(
        "idempotence.unknown",
        "Answer success, because there is nothing to end, or the code for an unknown session.",
        unknown,
    ),
    Check(
        "idempotence.later",
        "Keep the end of a session as long as the sender repeats (days), not in a cache of minutes.",
        later,
        "late",
    ),
)
