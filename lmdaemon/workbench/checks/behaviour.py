"""Checks of a burst, and of the time after it."""

import asyncio

from lmdaemon.workbench.bench import Bench, Check, Finding, Skip, accepted

BURST = 50
RESERVED = 2  # requests that are left for the checks after the burst


async def burst(bench: Bench) -> Finding:
    """Fifty notices at once are accepted, or asked to come later.

    After an outage, all notices that waited come within seconds.
    """
    if not bench.limits.burst:
        raise Skip("only with --burst")
    await bench.accepted()
    count = min(BURST, bench.wire.left - RESERVED)
    await bench.wire.take(count)
    bodies = [bench.notices.body(bench.notices.fields()) for _ in range(count)]
    now_s = bench.now_s()
    all_of_them = await asyncio.gather(
        *(bench.wire.send_now(body, bench.notices.headers(body, now_s)) for body in bodies)
    )
    slowed = 0
    for one in all_of_them:
        if one.accepted:
            continue
        if one.status in (429, 503) and one.answer is not None and "Retry-After" in one.answer.headers:
            slowed += 1
            continue
        return Finding("fail", f"{bench.said(one)}, where success, or 429 or 503 with Retry-After is expected", (one,))
    return Finding(
        "pass", f"{count - slowed} of {count} accepted" + (f", {slowed} asked to come later" if slowed else "")
    )


async def recovered(bench: Bench) -> Finding:
    """After the burst a notice is accepted as before.

    A pool of connections that a burst has used up may stay empty until somebody restarts the server.
    """
    if not bench.limits.burst:
        raise Skip("only with --burst")
    await bench.accepted()
    return accepted(bench, (await bench.tell()).exchange)


CHECKS = (
    Check(
        "behaviour.burst",
        "Accept the notices, or answer 429 or 503 with Retry-After; do not let connections hang.",
        burst,
        "late",
    ),
    Check(
        "behaviour.recovered",
        "Bound the pool and the queue, and give connections back in a finally.",
        recovered,
        "late",
    ),
)
