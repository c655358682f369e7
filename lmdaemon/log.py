"""Logging: an event and its facts, as text on a terminal and as JSON lines otherwise.

`log.info("delivery.retry", operator="acme", wait_s=8.2)` is the only form. Nothing is formatted into the event's name,
so that lines can be searched by it. Facts must never be secrets: no tokens, keys, bodies or full URLs. Events that a
peer, a plug-in or a disk can cause without end are written a few times a minute and counted otherwise (`LIMITS`).
"""

import asyncio
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit, urlunsplit

import orjson

_ROOT = "lmdaemon"
NOT_A_URL = "(not a URL)"
# syslog priorities, which journald reads from `<N>` at the start of a line
PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

WINDOW_S = 60.0
KINDS_MAX = 1000  # kinds of lines that are counted at the same time; bounds the memory
# A count is written with the first line after its window. If none comes, a timer writes it this long after the window
STRAGGLERS_S = 1.0


class Limit(NamedTuple):
    """At most `lines` of a kind are written in WINDOW_S.

    Two lines of one event are of the same kind if they have the same values of the facts named in `same`.
    """

    lines: int
    same: tuple[str, ...] = ()


# By default journald drops all lines of a service beyond 10,000 in 30 s, errors among them (journald.conf(5),
# RateLimitBurst=). Events that happen for every session must stay below that.
_EACH_SESSION = Limit(1000)
_FLAPS = 10  # lines a minute about a state that changes back and forth

LIMITS = {
    "session.opened": _EACH_SESSION,
    "session.ended": _EACH_SESSION,
    "notice.recorded": _EACH_SESSION,
    "notice.repeated": _EACH_SESSION,
    "delivery.delivered": _EACH_SESSION,
    "delivery.retry": Limit(1, ("operator", "sink", "reason")),
    "delivery.dead": Limit(1, ("operator", "sink", "reason")),
    "delivery.attempt_failed": Limit(1, ("operator", "sink", "error", "where")),
    "delivery.recovered": Limit(10, ("operator", "sink")),
    "delivery.waiting_for_store": Limit(1, ("reason",)),
    # What befalls 1,000 operators at once has one cause, so 100 lines are enough. /health and /metrics name them all
    "operator.mass_expired": Limit(100),
    "operator.touches_stopped": Limit(100),
    "operator.ends_wait": Limit(100),
    "operator.ends_go_on": Limit(100),
    "operator.touches_resumed": Limit(100),
    "operator.paused": Limit(1, ("operator",)),
    "breaker.opened": Limit(_FLAPS, ("operator", "reason")),
    "breaker.closed": Limit(_FLAPS, ("operator",)),
    "notice.refused": Limit(1, ("operator", "dialect", "meaning")),  # not the reason: a peer could vary it
    "notice.not_taken": Limit(1, ("path", "status", "reason")),
    "notice.not_stored": Limit(1, ("operator", "reason")),
    "notice.failed": Limit(1, ("path", "error", "where")),
    "plugin.check_failed": Limit(1, ("plugin", "operator", "reason")),
    "plugin.ignores_cancellation": Limit(1, ("plugin",)),
    "touch.refused": Limit(10, ("operator", "code")),
    "api.failed": Limit(1, ("call", "error", "where")),
    "api.refused": Limit(1, ("status",)),
    "api.unauthorized": Limit(1),
    "tls.handshake_failed": Limit(1, ("listener", "reason")),
    "tls.closed": Limit(1, ("listener",)),
    "http.turned_away": Limit(1, ("listener", "limit")),
    "http.cut": Limit(1, ("listener", "reason")),
    "http.malformed": Limit(1, ("listener", "reason")),
    "http.cannot_accept": Limit(_FLAPS, ("listener", "reason")),
    "http.accepting_again": Limit(_FLAPS, ("listener",)),
    "store.failing": Limit(_FLAPS, ("reason",)),
    "store.hanging": Limit(_FLAPS),
    "store.recovered": Limit(_FLAPS),
    "store.overloaded": Limit(1, ("reason",)),
    "store.reading_failed": Limit(1, ("reason",)),
    "store.operation_failed": Limit(1, ("operation", "error", "where")),
    "clock.stalled": Limit(_FLAPS),
    "daemon.came": Limit(_FLAPS),
    "daemon.left": Limit(_FLAPS),
    "daemon.expelled": Limit(_FLAPS),
    "daemon.joined_again": Limit(_FLAPS),
    "daemon.owns": Limit(_FLAPS),
    "loop.error": Limit(1, ("error", "where")),
}


@dataclass(slots=True)
class _Kind:
    logger: logging.Logger
    level: int
    facts: dict[str, Any]
    until: float
    lines: int = 1
    suppressed: int = 0

    def tell(self, event: str) -> None:
        """Writes how many lines were suppressed, if any were."""
        if self.suppressed:
            self.logger.log(self.level, event, extra={"facts": self.facts | {"suppressed": self.suppressed}})


class Repeats:
    """Writes the first lines of a kind in each window and counts the others. `monotonic` gives seconds.

    The count is the fact `suppressed` of a line of its own after the window, with what all of the kind have in common:
    a line that names a session says nothing of others. A timer runs only while something is counted, so that an idle
    daemon is not woken.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        window_s: float = WINDOW_S,
        stragglers_s: float = STRAGGLERS_S,
    ) -> None:
        self._monotonic = monotonic
        self._window_s = window_s
        self._stragglers_s = stragglers_s
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        # Events without `same` of which no more lines are written in this window. They are looked up first, because
        # that costs little
        self._full: dict[str, _Kind] = {}
        self._timer: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None
        self.suppressed = 0  # number of suppressed lines of all kinds

    def suppresses(self, event: str) -> bool:
        """Whether it is known that `admit` would refuse a line of this event now. If so, counts the line."""
        kind = self._full.get(event)
        if kind is None or self._monotonic() >= kind.until:
            return False
        kind.suppressed += 1
        self.suppressed += 1
        return True

    def admit_all(self) -> None:
        """Has `admit` asked for every line again: the level has changed, and at `debug` all lines are written."""
        self._full.clear()

    def admit(self, logger: logging.Logger, level: int, event: str, facts: dict[str, Any], limit: Limit) -> bool:
        """Whether the line is to be written. Writes how many of its kind were suppressed in the window before it."""
        now = self._monotonic()
        key = (event, *map(facts.get, limit.same))
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) >= KINDS_MAX:
            self.flush()
            if len(self._kinds) >= KINDS_MAX:
                key = (event,)
                kind = self._kinds.get(key)
        if kind is None:
            # Empty if there are too many kinds; then all lines of this event are counted together
            same = dict(zip(limit.same, key[1:], strict=False))
            self._kinds[key] = _Kind(logger, level, same, now + self._window_s)
            return True
        if now >= kind.until:
            self._full.pop(event, None)
            kind.tell(event)
            kind.until, kind.lines, kind.suppressed = now + self._window_s, 1, 0
            return True
        if kind.lines < limit.lines:
            kind.lines += 1
            return True
        kind.suppressed += 1
        self.suppressed += 1
        if not limit.same:
            self._full[event] = kind
        if kind.suppressed == 1:
            self._arm(kind.until - now + self._stragglers_s)
        return False

    def flush(self, *, everything: bool = False) -> None:
        """Writes the counts of the windows that are over, or of all windows, and forgets these windows."""
        now = self._monotonic()
        for key, kind in list(self._kinds.items()):
            if everything or now >= kind.until:
                del self._kinds[key]
                self._full.pop(key[0], None)
                kind.tell(key[0])

    def _arm(self, wait_s: float) -> None:
        if self._timer is not None and not self._timer[0].is_closed():
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop: the next line of the kind, or a flush, writes the count
            return
        self._timer = loop, loop.call_later(wait_s, self._elapsed)

    def _elapsed(self) -> None:
        self._timer = None
        self.flush()
        ends = [kind.until for kind in self._kinds.values() if kind.suppressed]
        if ends:
            self._arm(min(ends) - self._monotonic() + self._stragglers_s)


repeats = Repeats()
happened = {"warning": 0, "error": 0}  # events of these levels since the start, suppressed ones included


class Log:
    """A named source of events. Facts are keyword arguments; a fact that is None is left out."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")

    def suppresses(self, event: str) -> bool:
        """Whether it is known that a line of this event would not be written now. If so, counts the line, which must
        not be logged then. Saves the time to collect the facts of frequent events; not for warnings and errors, which
        `happened` counts too.
        """
        return repeats.suppresses(event)

    def debug(self, event: str, **facts: Any) -> None:
        """An event for `level = "debug"` only."""
        self._emit(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: Any) -> None:
        """An event that needs nobody's attention."""
        self._emit(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """An event that somebody should look at within days; it has an entry in docs/operating.md."""
        self._emit(logging.WARNING, event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """An event that somebody should look at now; it has an entry in docs/operating.md."""
        self._emit(logging.ERROR, event, facts)

    def exception(self, event: str, **facts: Any) -> None:
        """An error with the traceback of the exception that is being handled, without its text: see `stack`."""
        self._emit(logging.ERROR, event, facts, exc_info=True)

    def _emit(self, level: int, event: str, facts: dict[str, Any], *, exc_info: bool = False) -> None:
        if level >= logging.WARNING:
            happened["warning" if level == logging.WARNING else "error"] += 1
        if repeats.suppresses(event):
            return
        if not self._logger.isEnabledFor(level):
            return
        limit = LIMITS.get(event)
        is_limited = limit is not None and not self._logger.isEnabledFor(logging.DEBUG)
        if limit is not None and is_limited and not repeats.admit(self._logger, level, event, facts, limit):
            return
        self._logger.log(level, event, exc_info=exc_info, extra={"facts": facts})


class TextFormatter(logging.Formatter):
    """Lines like `2026-11-24 03:05:01.123Z info session.ended operator=acme reason=inactivity`."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the traceback below it where there is one."""
        facts = "".join(f" {name}={_shown(value)}" for name, value in _facts(record))
        line = f"{record.levelname.lower()} {record.getMessage()}{facts}"
        if record.exc_info:
            line += "\n" + stack(record.exc_info[1])
        if self._journal:  # journald adds the time itself; each line of a traceback carries the priority
            priority = PRIORITY.get(record.levelname, 6)
            return "\n".join(f"<{priority}>{part}" for part in line.splitlines())
        at = datetime.fromtimestamp(record.created, UTC)
        return f"{at:%Y-%m-%d %H:%M:%S}.{int(record.msecs):03d}Z {line}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, then the facts."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line as JSON; a traceback is one of its members."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(_facts(record))
        if record.exc_info:
            line["traceback"] = stack(record.exc_info[1])
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, as in a path that is not UTF-8, or an integer beyond 64 bits
            text = json.dumps({name: _carried(value) for name, value in line.items()}, ensure_ascii=False)
        return f"<{PRIORITY.get(record.levelname, 6)}>{text}" if self._journal else text


def _carried(value: Any) -> Any:
    return value if isinstance(value, int | float) and abs(value) < 2**63 else writable(str(value))


def stack(error: BaseException | None) -> str:
    """The traceback of an exception with its causes and, for a group, its parts, by the names of their types only.

    Their texts are left out because they may quote what a peer has sent, or a URL with its query.
    """
    if error is None:
        return ""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = [stack(before), "which led to"] if before is not None else []
    parts += ["Traceback (most recent call last):", *"".join(traceback.format_tb(error.__traceback__)).splitlines()]
    parts.append(type(error).__name__)
    if isinstance(error, BaseExceptionGroup):
        parts += ["  " + line for one in error.exceptions for line in stack(one).splitlines()]
    return "\n".join(parts)


def place(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


def _facts(record: logging.LogRecord) -> list[tuple[str, Any]]:
    facts: dict[str, Any] = getattr(record, "facts", {})
    return [(name, _rounded(value)) for name, value in facts.items() if value is not None]


def _rounded(value: Any) -> Any:
    """A fraction with one decimal, or below 1 with two significant digits: more digits would only look exact."""
    if not isinstance(value, float) or not value or not math.isfinite(value):
        return value
    return round(value, max(1, 1 - math.floor(math.log10(abs(value)))))


def writable(text: str) -> str:
    """The text with lone surrogates escaped, which UTF-8 cannot express; a file's name with any bytes may have them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.15g}"  # 3.0 is written as 3
    text = str(value)
    # Quoted where it could be read as more than one fact. Escaped where a character could break the line (U+2028) or
    # could not be written (a lone surrogate).
    printable = text.isprintable()
    return text if printable and text and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=not printable)


def setup(level: str, form: str, stream: TextIO | None = None) -> None:
    """Sends the daemon's events to `stream` (stderr): `form` is "text", "json" or "auto" (text on a terminal)."""
    stream = stream or sys.stderr
    journal = is_journal(stream)
    text = form == "text" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter(journal=journal) if text else JsonFormatter(journal=journal))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level.upper())
    repeats.admit_all()


def is_journal(stream: TextIO) -> bool:
    """Whether the stream leads to journald: $JOURNAL_STREAM has its device and inode (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# What is certainly a host: an address or a name with a dot, without a port, and then a path. No colon may come before
# the last `@`, because the password of user info comes after one.
_PLAIN = re.compile(r"(\[[0-9a-f:.]+\]|([0-9]+\.){3}[0-9]+|([\w-]+\.)+[^\W\d_]{2,})/[^:#]*", re.IGNORECASE)
_PERHAPS_HOST = re.compile(r"@[^/@]*[.:\[]")


def stray_at(url: str) -> bool:
    """Whether an `@` comes after the host, and may be the end of user info with an unescaped `/`, `?` or `#` in it.

    What is parsed as host, port and path is then really user and password. The `@` is allowed if what is parsed as host
    is certainly one (_PLAIN), and an `@` in the path is not followed by what may be the real host.
    """
    whole = url.partition("//")[2]
    _, *rest = re.split(r"[/?#]", whole, maxsplit=1)
    if not any("@" in part for part in rest):
        return False
    return not _PLAIN.fullmatch(whole.rpartition("@")[0]) or bool(_PERHAPS_HOST.search(whole.partition("?")[0]))


def safe_url(url: str) -> str:
    """The URL without user info, query and fragment: those may carry secrets."""
    try:
        parts = urlsplit(url)
        # `port` raises ValueError for text that is not a port
        whole = parts.netloc and parts.port != -1 and not stray_at(url)
    except ValueError:
        whole = False
    if not whole:  # it is unknown where the user info ends, so no part of the text is safe
        return NOT_A_URL
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
