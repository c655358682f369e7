"""Times on the command line: as in RFC 3339, or in words. Times without a zone are in the machine's own.

2026-11-27T18:00:00Z   2026-11-27   2026-11-27 18:00   yesterday   yesterday 18:00   2h ago   now
"""

import argparse
import re
from datetime import UTC, datetime, timedelta

from lmdaemon.clock import Clock
from lmdaemon.commands.arguments import argument
from lmdaemon.commands.shared import Usage, say
from lmdaemon.config.values import duration
from lmdaemon.model import rfc3339
from lmdaemon.web.documents import read_time

FORMS = '2026-01-31T03:00:00Z, "2026-01-31 03:00", 2026-01-31, yesterday, "yesterday 18:00" or "2h ago"'
_DAYS = {"yesterday": -1, "today": 0, "tomorrow": 1}
_LOCAL = re.compile(r"(\d{4}-\d\d-\d\d|yesterday|today|tomorrow)(?:[ T](\d\d:\d\d(?::\d\d)?))?")


def since(what: str) -> tuple[tuple[str, ...], dict[str, object]]:
    """The option --since; `what` says in its help which time is meant."""
    return argument("--since", metavar="TIME", help=f"{what} then or later: {FORMS}")


def until(what: str) -> tuple[tuple[str, ...], dict[str, object]]:
    """The option --until; `what` says in its help which time is meant."""
    return argument("--until", metavar="TIME", help=f"{what} before then (default: now)")


def period(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """The times of --since and --until as wall times (ms); None if not given. Of a time in words, prints how it was
    understood. Raises Usage.
    """
    now_at = Clock().wall_ms()
    since_at, until_at = (read(getattr(args, name), f"--{name}", now_at) for name in ("since", "until"))
    if since_at is not None and since_at > (now_at if until_at is None else until_at):
        raise Usage(f"--since: must not be later than {'now' if until_at is None else '--until'}")
    return since_at, until_at


def read(text: str | None, option: str, now_at: int) -> int | None:
    """One of FORMS as wall time (ms). Raises Usage."""
    if text is None:
        return None
    try:
        return read_time(text)
    except ValueError:
        found = _in_words(text.strip(), datetime.fromtimestamp(now_at / 1000, UTC).astimezone())
    if found is None:
        raise Usage(f"{option}: must be a time such as {FORMS} (got {text!r})")
    at = int(found.timestamp() * 1000)
    say(f"lmdaemon: {option} {text} is {rfc3339(at)}", "INFO")
    return at


def _in_words(text: str, now: datetime) -> datetime | None:
    """The time that the text means; None if it has no known form. `now` has the machine's time zone."""
    try:
        if text == "now":
            return now
        if text.endswith(" ago"):
            return now - timedelta(seconds=duration(text.removesuffix(" ago")))
        if (parts := _LOCAL.fullmatch(text)) is None:
            return None
        day, clock = parts.groups()
        date = day if day not in _DAYS else f"{now.date() + timedelta(days=_DAYS[day])}"
        return datetime.fromisoformat(f"{date}T{clock or '00:00'}").astimezone()
    except (ValueError, OverflowError):
        return None
