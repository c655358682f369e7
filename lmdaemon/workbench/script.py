"""The script of a simulated operator: rules in a small language, written as text or as TOML. The first rule that fits a
notice decides its answer; if none fits, the answer is `ok`. A rule is `[CONDITIONS:] ANSWER [xN] [then ANSWER [xN]] …`.
docs/workbench.md has the language with examples; the tests run them.
"""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from random import Random
from typing import Any, NamedTuple

from lmdaemon.config.values import duration
from lmdaemon.dialects import answered_code

SIZE_MAX = 64 * 1024 * 1024
TIMES_MAX = 999_999_999
TLS_FAULTS = ("expired", "wrong-name", "refuse")
EVER = 1 << 62
SEED_MAX = 999_999_999


class ScriptError(ValueError):
    """A script that cannot be read; the text names place, rule and value."""


class Answer(NamedTuple):
    """One way to answer a notice. `kind` says which; the other fields are its arguments."""

    kind: str
    number: int = 0
    span_s: float = 0.0
    text: str = ""
    retry_after: str = ""
    after_s: float = 0.0  # how long to wait before the answer

    @property
    def accepts(self) -> bool:
        """Whether the answer reports success. A sender may count it as a failure all the same, as after a time-out."""
        if self.kind in ("body", "json"):
            return answered_code(self.body) == 0
        return self.kind in ("ok", "interim", "drip") or (self.kind == "error" and self.number == 0)

    @property
    def body(self) -> bytes:
        """The body of an answer of kind `body` or `json`. `text` is the whole body; for `json` only the `error`."""
        text = self.text if self.kind == "body" else f'{{"error":{self.text},"description":"Simulated"}}'
        return text.encode()


OK = Answer("ok")


class Span(NamedTuple):
    """A range of counts, beginning at 1; both ends belong to it."""

    first: int
    last: int

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number <= self.last


@dataclass
class Rule:
    """One rule. `steps` has its answers, and to how many notices each is given. After that many notices, the rule is
    used up; `taken` is how many it has answered.
    """

    steps: Sequence[tuple[Answer, int]]
    session: str | None = None
    attempt: Span | None = None
    count: Span | None = None
    chance: float | None = None
    taken: int = 0

    @property
    def knows_no_session(self) -> bool:
        """Whether the rule has no condition on session, attempt or chance."""
        return self.session is None and self.attempt is None and self.chance is None

    def current(self) -> Answer | None:
        """The answer for the next notice; None if the rule is used up."""
        before = 0
        for answer, times in self.steps:
            before += times
            if self.taken < before:
                return answer
        return None

    def fits(self, session: str, attempt: int, count: int, rng: Random) -> bool:
        """Whether the conditions are met. `attempt` is the number of the attempt for this session, `count` the number
        of the request in the run.
        """
        if self.session is not None and not fnmatchcase(session, self.session):
            return False
        if self.attempt is not None and attempt not in self.attempt:
            return False
        if self.count is not None and count not in self.count:
            return False
        return self.chance is None or rng.random() < self.chance


@dataclass
class Script:
    """The rules and their state. With equal seeds, equal notices in the same order get equal answers."""

    rules: Sequence[Rule] = ()
    seed: int = 0
    count: int = 0  # how many notices have come; spoiled handshakes count as well
    _rng: Random = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self._rng = Random(self.seed)  # noqa: S311 - must be repeatable, not secret

    def next(self, session: str, attempt: int) -> Answer:
        """The answer for one notice; `attempt` counts from 1."""
        self.count += 1
        for rule in self.rules:
            answer = rule.current()
            if answer is None or answer.kind == "tls":
                continue
            if rule.fits(session, attempt, self.count, self._rng):
                rule.taken += 1
                return answer
        return OK

    def next_handshake(self) -> str:
        """The fault for the TLS handshake that begins now, one of TLS_FAULTS; empty for none. No notice is known
        during a handshake, so only `count` can be a condition.
        """
        for rule in self.rules:
            answer = rule.current()
            if answer is not None and rule.knows_no_session and (rule.count is None or self.count + 1 in rule.count):
                if answer.kind != "tls":
                    return ""
                rule.taken += 1
                self.count += 1
                return answer.text
        return ""

    @property
    def needs_tls(self) -> bool:
        """Whether the script spoils TLS handshakes, for which the server must speak TLS."""
        return any(answer.kind == "tls" for rule in self.rules for answer, _ in rule.steps)


# -- reading


def read_text(text: str, seed: int = 0) -> Script:
    """A script as text: rules separated by line breaks or semicolons, and comments after a #. Raises ScriptError."""
    rules = []
    for number, line in enumerate(_lines(text), 1):
        conditions, answers = _split(line)
        try:
            rules.append(_rule(_conditions(conditions), answers))
        except ValueError as error:
            raise ScriptError(f"rule {number} ({line.strip()!r}): {error}") from None
    return Script(rules, seed)


def read_toml(text: str, seed: int | None = None) -> Script:
    """A script in TOML: `seed`, and `[[rule]]` tables of session, attempt, count, chance and answer. Raises
    ScriptError.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScriptError(str(error)) from None
    if unknown := document.keys() - {"seed", "rule"}:
        raise ScriptError(f"{min(unknown)}: is not known; known are seed and [[rule]]")
    if type(given := document.get("seed", 0)) is not int or not 0 <= given <= SEED_MAX:
        raise ScriptError(f"seed must be a whole number from 0 to {SEED_MAX} (got {given!r})")
    tables = document.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ScriptError("rule must be an array of tables ([[rule]])")
    rules = []
    for number, table in enumerate(tables, 1):
        if unknown := table.keys() - {"answer", "session", "attempt", "count", "chance"}:
            raise ScriptError(f"rule {number}: {min(unknown)}: is not known")
        try:
            answers = table.get("answer")
            if not isinstance(answers, str):
                raise ValueError("answer must be a text such as 'ok x2 then error 100'")  # noqa: TRY004
            conditions = {name: str(value) for name, value in table.items() if name != "answer"}
            rules.append(_rule(conditions, answers))
        except ValueError as error:
            raise ScriptError(f"rule {number}: {error}") from None
    return Script(rules, given if seed is None else seed)


def _lines(text: str) -> Iterator[str]:
    """Each rule without its comment."""
    for line in text.splitlines():
        uncommented = _parts(line, "#")[0]
        yield from (part for part in _parts(uncommented, ";") if part.strip())


def _parts(text: str, border: str, most: int = -1) -> list[str]:
    """The text split at a character outside quotes, `most` times at most."""
    parts, quote = [""], ""
    for character in text:
        if character == border and not quote and most != len(parts) - 1:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        parts[-1] += character
    return parts


def _split(line: str) -> tuple[str, str]:
    """The conditions before the first colon, if there is one that is followed by white space, and the answers."""
    before, *after = _parts(line, ":", 1)
    return (before, after[0]) if after and after[0][:1].isspace() else ("", line)


def _conditions(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for one in filter(None, (part.strip() for part in _parts(text, ","))):
        if one.endswith("%"):
            given["chance"] = one
            continue
        words = shlex.split(one)
        if len(words) != 2 or words[0] not in ("session", "attempt", "count") or words[0] in given:
            raise ValueError(f"must be session PATTERN, attempt RANGE, count RANGE or N%, each once (got {one!r})")
        given[words[0]] = words[1]
    return given


def _rule(given: Mapping[str, str], answers: str) -> Rule:
    steps = _steps(answers)
    if not given.get("session", "*"):
        raise ValueError("session must be a pattern such as bad-* (got '')")
    rule = Rule(
        steps,
        given.get("session"),
        _range(given["attempt"], "attempt") if "attempt" in given else None,
        _range(given["count"], "count") if "count" in given else None,
        _chance(given["chance"]) if "chance" in given else None,
    )
    if any(answer.kind == "tls" for answer, _ in steps) and not rule.knows_no_session:
        raise ValueError("tls happens before a notice is known, so its rule can have no condition but count")
    return rule


def _range(text: str, what: str) -> Span:
    found = re.fullmatch(r"([0-9]{1,9})(?:(\+)|-([0-9]{1,9}))?", text.strip())
    if found is None or int(found[1]) < 1 or (found[3] and int(found[3]) < int(found[1])):
        raise ValueError(f"{what} must be N, N-M or N+, from 1 (got {text!r})")
    return Span(int(found[1]), EVER if found[2] else int(found[3] or found[1]))


def _chance(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%", text.strip())
    if found is None or float(found[1]) > 100:
        raise ValueError(f"a chance must be 0% to 100% (got {text!r})")
    return float(found[1]) / 100


def _steps(text: str) -> list[tuple[Answer, int]]:
    """The answers in their order, each with the number of notices that get it: N if `xN` stands after it, otherwise 1.
    The last answer without `xN` is given to all further notices.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{error}: {text.strip()!r}") from None
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            parts.append([])
        else:
            parts[-1].append(word)
    steps = []
    for at, part in enumerate(parts):
        times = EVER if at == len(parts) - 1 else 1
        if part and re.fullmatch("x-?[0-9]+", part[-1]):
            times = _times(part[-1])
            part = part[:-1]
        if not part:
            raise ValueError("an answer is missing")
        steps.append((_answer(part), times))
    return steps


def _times(word: str) -> int:
    number = word.removeprefix("x")
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) < 1:
        raise ValueError(f"how many notices an answer is given to must be x1 to x{TIMES_MAX} (got {word!r})")
    return int(number)


def _answer(words: Sequence[str]) -> Answer:
    kind, rest = words[0], list(words[1:])
    if kind == "delay":
        if not rest:
            raise ValueError("delay needs a time such as 500ms")
        after_s = _span(rest.pop(0), "delay")
        if rest and rest[0] == "delay":
            raise ValueError("delay must stand once in an answer; add the times up")
        return (_answer(rest) if rest else OK)._replace(after_s=after_s)
    if kind.endswith("%") or kind in ("session", "attempt", "count"):
        raise ValueError(f"a condition ends with a colon and a space, as in '5%: hang' (got {kind!r})")
    if kind not in KINDS:
        raise ValueError(f"must be one of {', '.join(('delay', *KINDS))} (got {kind!r})")
    reads: Callable[[str, list[str]], tuple[Answer, list[str]]] = KINDS[kind]
    answer, left = reads(kind, rest)
    if left:
        raise ValueError(f"{kind}: {' '.join(left)!r} is too much")
    return answer


def _span(text: str, what: str) -> float:
    try:
        return float(duration(text))
    except ValueError as error:
        raise ValueError(f"{what} {error} (got {text!r})") from None


def _header(text: str, what: str) -> str:
    """The text, if it can be the value of a header. Raises ValueError."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"{what} must have no control characters (got {text!r})")
    return text


def _number(words: list[str], what: str, first: int, last: int) -> int:
    text = words.pop(0) if words else ""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not first <= int(text) <= last:
        raise ValueError(f"{what} needs a number from {first} to {last} (got {text!r})")
    return int(text)


def _plain(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    return Answer(kind), words


def _error(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    number = _number(words, kind, 0, 999_999_999)
    return Answer(kind, number, text=words.pop(0) if words else ""), words


def _status(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    number, retry_after = _number(words, kind, 200, 599), ""
    if words and words[0] == "retry-after":
        words.pop(0)
        if not words:
            raise ValueError("retry-after needs seconds or a date")
        retry_after = _header(words.pop(0), "retry-after")
    return Answer(kind, number, retry_after=retry_after), words


def _counted(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    return Answer(kind, _number(words, kind, 1 if kind == "interim" else 0, 1000)), words


def _timed(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    if not words:
        raise ValueError(f"{kind} needs a time such as 1s")
    return Answer(kind, span_s=_span(words.pop(0), kind)), words


def _sized(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    text = words.pop(0) if words else ""
    found = re.fullmatch(r"([0-9]{1,9})(KiB|MiB)?", text)
    size = int(found[1]) * {None: 1, "KiB": 1024, "MiB": 1024**2}[found[2]] if found else 0
    if not 0 < size <= SIZE_MAX:
        raise ValueError(f"{kind} needs a size such as 17KiB, from 1 to 64MiB (got {text!r})")
    return Answer(kind, size), words


def _worded(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    if not words and kind != "redirect":
        raise ValueError(f"{kind} needs a text")
    text = words.pop(0) if words else "/elsewhere"
    return Answer(kind, text=_header(text, kind) if kind == "redirect" else text), words


def _tls(kind: str, words: list[str]) -> tuple[Answer, list[str]]:
    if not words or words[0] not in TLS_FAULTS:
        raise ValueError(f"tls needs one of {', '.join(TLS_FAULTS)} (got {' '.join(words[:1])!r})")
    return Answer(kind, text=words.pop(0)), words


KINDS: dict[str, Any] = {
    "ok": _plain,
    "error": _error,
    "status": _status,
    "json": _worded,
    "body": _worded,
    "empty": _plain,
    "html": _plain,
    "garbage": _plain,
    "redirect": _worded,
    "hang": _plain,
    "reset": _plain,
    "close": _plain,
    "truncate": _counted,
    "drip": _timed,
    "big": _sized,
    "gzip-bomb": _sized,
    "interim": _counted,
    "down": _timed,
    "tls": _tls,
}
