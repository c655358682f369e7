"""When the touches of an operator count as stopped, and how long its ends for inactivity wait then, or after touches
were refused because the operator was not configured. No SQL, no clock.

`rules` asks this for each session that is due, `alarms` for warnings. Times are service time in milliseconds, so a time
in which the daemon could not hear touches does not count as silence. Nothing of it is stored: after a restart no end
waits for touches, but the restart grace applies.
"""

from typing import NamedTuple

MANY_SESSIONS = 100  # with fewer live sessions a silence is no sign of a fault: all their players may have left
# A silence lasts for this share of the idle time at least. If each session is touched three times in its idle time,
# each has then missed at least one touch
SILENT_SHARE = 0.5
PAUSE_MAX_MS = 600_000  # ends wait no longer than this
# A session whose end waits is looked at again after `grace_ms`, within these bounds: often enough that it does not end
# late when touches have come again, and so rarely that 300,000 waiting sessions take a sixth of the writer's time.
LOOK_AGAIN_MIN_MS = 10_000
LOOK_AGAIN_MAX_MS = 60_000


class Pause(NamedTuple):
    """The ends for inactivity of an operator wait since `since_ms`.

    A gap of `silent_ms` between two touches is a silence. `resumed_ms` is when touches came again after the latest
    silence, None: not yet. `released`: somebody has ended the wait by hand.
    """

    since_ms: int
    silent_ms: int
    resumed_ms: int | None = None
    released: bool = False


def stopped(touched_ms: int | None, now_ms: int, idle_ms: int, live: int) -> bool:
    """Whether touches of an operator with `live` sessions have stopped; the latest came at `touched_ms`.

    If none has come since the start (None), they do not count as stopped: some operators' sessions are never touched.
    """
    return touched_ms is not None and live >= MANY_SESSIONS and now_ms - touched_ms >= silence_of(idle_ms)


def silence_of(idle_ms: int) -> int:
    """How long (ms) no touch must have come to count as silence, if sessions end after `idle_ms` without a touch."""
    return int(idle_ms * SILENT_SHARE)


def waits_until(pause: Pause, touched_ms: int | None, now_ms: int, grace_ms: int) -> int | None:
    """Until when the ends of the operator wait, as far as is known at `now_ms`; None: they do not wait.

    When touches have come again the ends wait for `grace_ms` more, as after a start, so that every game server has time
    to touch its sessions.
    """
    at_most = pause.since_ms + PAUSE_MAX_MS
    if pause.released or now_ms >= at_most:
        return None
    if pause.resumed_ms is None or touched_ms is None or now_ms - touched_ms >= pause.silent_ms:
        return at_most
    until_ms = min(at_most, pause.resumed_ms + grace_ms)
    return until_ms if now_ms < until_ms else None


def touched(pause: Pause, before_ms: int, now_ms: int, grace_ms: int) -> Pause | None:
    """The pause after a touch at `now_ms`; the touch before it came at `before_ms`. None if the pause is over."""
    if pause.released or now_ms >= pause.since_ms + PAUSE_MAX_MS:
        return None
    if pause.resumed_ms is None or now_ms - before_ms >= pause.silent_ms:
        return pause._replace(resumed_ms=now_ms)
    return pause if now_ms < pause.resumed_ms + grace_ms else None


def may_touch_until(seen_ms: int, returned_ms: int | None, grace_ms: int) -> int:
    """Until when a session that was last touched at `seen_ms` does not end, because its operator was not configured
    until `returned_ms` (None: it was all the time) and touches were refused. 0: it need not wait.
    """
    return 0 if returned_ms is None or seen_ms >= returned_ms else returned_ms + grace_ms


def look_again_ms(now_ms: int, until_ms: int, idle_ms: int, grace_ms: int) -> int:
    """When to look again at a session whose end waits: never later than it would end if it were touched now."""
    after_ms = min(max(grace_ms, LOOK_AGAIN_MIN_MS), LOOK_AGAIN_MAX_MS, idle_ms)
    return min(until_ms, now_ms + after_ms)
