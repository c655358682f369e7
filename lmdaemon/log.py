"""Logging: an event and its facts, as text on a terminal and as JSON lines otherwise.

`log.info("delivery.retry", operator="acme", wait_s=8.2)` is the only form; nothing is formatted into the event, so a
line can be searched by its name. It must never be given a secret: tokens, keys, bodies and full URLs stay out.
"""

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit, urlunsplit

import orjson

_ROOT = "lmdaemon"
# syslog priorities, which journald reads from `<N>` at the start of a line
PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


class Log:
    """A named source of events. Facts are keyword arguments; a fact that is None is left out."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")

    def debug(self, event: str, **facts: Any) -> None:
        self._emit(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: Any) -> None:
        self._emit(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._emit(logging.WARNING, event, facts)

    def error(self, event: str, **facts: Any) -> None:
        self._emit(logging.ERROR, event, facts)

    def exception(self, event: str, **facts: Any) -> None:
        """An error with the traceback of the exception being handled, its text left out: see `stack`."""
        self._emit(logging.ERROR, event, facts, exc_info=True)

    def _emit(self, level: int, event: str, facts: dict[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, exc_info=exc_info, extra={"facts": facts})


class TextFormatter(logging.Formatter):
    """`2026-11-24 03:05:01.123 info session.ended operator=acme reason=inactivity`"""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {name}={_shown(value)}" for name, value in _facts(record))
        line = f"{record.levelname.lower()} {record.getMessage()}{facts}"
        if record.exc_info:
            line += "\n" + stack(record.exc_info[1])
        if self._journal:  # journald adds the time itself; each line of a traceback carries the priority
            priority = PRIORITY.get(record.levelname, 6)
            return "\n".join(f"<{priority}>{part}" for part in line.splitlines())
        at = datetime.fromtimestamp(record.created, UTC)
        return f"{at:%Y-%m-%d %H:%M:%S}.{int(record.msecs):03d} {line}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, then the facts."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(_facts(record))
        if record.exc_info:
            line["traceback"] = stack(record.exc_info[1])
        try:
            text = orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate, an integer beyond 64 bits: better all as text than no line
            text = json.dumps({name: _writable(str(value)) for name, value in line.items()}, ensure_ascii=False)
        return f"<{PRIORITY.get(record.levelname, 6)}>{text}" if self._journal else text


def stack(error: BaseException | None) -> str:
    """Where an exception comes from, and its causes and parts, without any text of theirs: that may hold what a peer
    has sent, or a URL with its query.
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
    return [(name, value) for name, value in facts.items() if value is not None]


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    # Quoted wherever a reader could take it for more than one fact; escaped where a character could break the line,
    # as U+2028 does, or could not be written, as a lone surrogate
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


def is_journal(stream: TextIO) -> bool:
    """Whether the stream goes to journald: $JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def safe_url(url: str) -> str:
    """The URL without user info, query and fragment: those may carry secrets."""
    try:
        parts = urlsplit(url)
        whole = parts.netloc and parts.port != -1  # asking raises for a port that is none: half a password with a `/`
    except ValueError:
        whole = False
    if not whole:  # what is user info cannot be told
        return "(not a URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
