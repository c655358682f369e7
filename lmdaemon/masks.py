"""Hides the secrets of a notice in what may be shown to anybody: what its operator answered, what `send` prints.

An operator may send back what it got, in any notation. It must never leave a part of a secret behind, nor take long:
text and secrets may both be made by one that wants the event loop to wait.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, unquote_plus, unquote_to_bytes, urlsplit

from lmdaemon.config.settings import Operator
from lmdaemon.dialects import encoding_of, without_mark

MASK = "***"
SHOWN_MAX = 256  # characters of an answer that are kept with an attempt
_LOOKED_AT = 8192  # bytes of it that are read for them, as long as secrets are no longer
_SPELLING_MAX = 100  # what a character that is no letter may become
_NOTATIONS_MAX = 4  # within one another
_PART_MIN = 8  # characters of a secret in a row that are hidden where the rest of it is not there
_LETTERS = re.compile(r"[A-Za-z0-9._-]+")  # what every notation leaves as it is
# A signature of Standard Webhooks, 256 bits in base64, as `_folded` has it
_SIGNATURE = re.compile(r"(?<=v1,)[a-z0-9 /]{43}=")


class Mask:
    """Replaces secrets as they are, and as JSON, URLs, forms and HTML write them, also within one another.

    What is escaped in the text is read, and the secrets are looked for in what was read. So are parts of them: many a
    server quotes no more than the beginning, or the surroundings, of what it could not read.
    """

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._secrets = {secret for secret in secrets if secret}

    def __call__(self, text: str) -> str:
        found, parts = self._found(text)
        return _masked(text, found + parts)

    @cached_property
    def longest(self) -> int:
        """Characters that a secret may have in the text."""
        return max((len(_LETTERS.sub("", one)) * _SPELLING_MAX + len(one) for one in self._secrets), default=0)

    def text_of(self, body: bytes, *, complete: bool) -> str:
        """The text of an answer. Of one that was cut off, without an end that could be the beginning of a secret."""
        text = without_mark(body).decode(encoding_of(body), "replace")
        found, parts = self._found(text)
        if not complete:
            whole_until = max((end for _, end in found), default=0)
            text = text[: max(whole_until, len(text) - self.longest)]
        return _masked(text, found + parts)

    def beginning_of(self, body: bytes, *, complete: bool) -> str:
        """What is kept of an answer."""
        return self.text_of(body[:_LOOKED_AT], complete=complete and len(body) <= _LOOKED_AT)[:SHOWN_MAX]

    @cached_property
    def _looked_for(self) -> Mapping[str, bool]:
        """Secrets as `_folded` has them, and whether backslashes behind them belong to them.

        Of one that looks like something escaped also what it stands for: so it reads in a text in which other things
        are escaped too. But not if that is short, for then it stands everywhere.
        """
        found: dict[str, bool] = {}
        for secret in self._secrets:
            for reading in _readings(secret):
                if reading.text == secret or len(reading.text) >= 4:
                    text = _folded(reading).text
                    found[text] = found.get(text, False) or reading.text.endswith("\\")
        return found

    def _found(self, text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Where secrets stand in the text, and where parts of them do."""
        found: list[tuple[int, int]] = []
        parts: list[tuple[int, int]] = []
        for reading in _readings(text):
            folded = _folded(reading)
            rest = folded.text  # without the whole secrets
            for secret, with_backslashes in self._looked_for.items():
                if not secret:  # it consists of backslashes
                    found += (reading.span(*run.span()) for run in re.finditer(r"\\+", reading.text))
                    continue
                at = folded.text.find(secret)
                while at >= 0:
                    found.append(folded.span(at, at + len(secret), with_backslashes=with_backslashes))
                    at = folded.text.find(secret, at + len(secret))
                rest = rest.replace(secret, "\0" * len(secret))
            found += (folded.span(*match.span()) for match in _SIGNATURE.finditer(folded.text))
            parts += (folded.span(start, end) for start, end in self._parts_in(rest))
        return found, parts

    @cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset(
            secret[at : at + _PART_MIN] for secret in self._looked_for for at in range(len(secret) - _PART_MIN + 1)
        )

    def _parts_in(self, text: str) -> Iterator[tuple[int, int]]:
        """Where at least _PART_MIN characters stand in a row that do so in a secret."""
        start, end = 0, -1
        for at in range(len(text) - _PART_MIN + 1) if self._parts else ():
            if text[at : at + _PART_MIN] in self._parts:
                if at > end >= 0:
                    yield start, end
                start = at if at > end else start
                end = at + _PART_MIN
        if end > 0:
            yield start, end


def _masked(text: str, places: Iterable[tuple[int, int]]) -> str:
    parts, last = [], 0
    for start, end in sorted(places):
        if start >= len(text):
            break
        if start >= last:
            parts += [text[last:start], MASK]
        last = max(last, end)
    return "".join([*parts, text[last:]])


def of_notice(operator: Operator, token: str | None, body: bytes) -> Mask:
    """Hides what was sent and must stay a secret, and what it was made with."""
    fields = fields_of(operator, body)
    sent = (fields.get(operator.sends.fields.get(meaning, "")) for meaning in ("token", "hash"))
    keys = (base64.b64encode(key).decode() for key in operator.signing_keys)
    return Mask((token, *sent, operator.hash_key, *keys, *_of_url(operator)))


def fields_of(operator: Operator, body: bytes) -> Mapping[str, str]:
    """A notice's fields by their names on the wire."""
    text = body.decode()
    return json.loads(text) if operator.sends.content == "json" else dict(parse_qsl(text, keep_blank_values=True))


def query_of(url: str) -> list[tuple[str, str]]:
    """The query's names and values as they stand; a part without `=` may be a secret, so it is a value without name."""
    parts = url.partition("#")[0].partition("?")[2].split("&")
    return [
        (name, value) if equals else ("", name)
        for part in parts
        if part
        for name, equals, value in [part.partition("=")]
    ]


def _of_url(operator: Operator) -> list[str]:
    """User, password and the query's values, as they are written in the URL and decoded."""
    user_info = urlsplit(operator.url).netloc.rpartition("@")[0]
    written = [*user_info.split(":", 1), *(value for _, value in query_of(operator.url))]
    basic = operator.target.authorization if operator.target is not None else None
    found = [*written, *map(unquote, written), *map(unquote_plus, written), (basic or "").removeprefix("Basic ")]
    return [value for value in found if len(value) >= 4]  # a shorter one is no secret, and stands everywhere


# -- what a text means


class _Reading(NamedTuple):
    """A text as it reads where something in it is escaped, and where each of its characters stands, and its end."""

    text: str
    at: Sequence[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        return self.at[start], self.at[end]


class _Folded(NamedTuple):
    """A text without what notations differ in: backslashes, the case, + for a space. Where each character stands: the
    backslashes before it begin, it ends, and the backslashes behind it end.
    """

    text: str
    begins: Sequence[int]
    ends: Sequence[int]
    beyond: Sequence[int]

    def span(self, start: int, end: int, *, with_backslashes: bool = False) -> tuple[int, int]:
        return self.begins[start], (self.beyond if with_backslashes else self.ends)[end - 1]


_ESCAPED = re.compile(
    r"(?:%[0-9a-f]{2})+|\\u[0-9a-f]{4}|&(?:#[0-9]{1,9}|#x[0-9a-f]{1,9}|[a-z][a-z0-9]{1,31});", re.IGNORECASE
)


def _readings(text: str) -> Iterator[_Reading]:
    """The text as it stands, and what that means, and what that means in turn."""
    reading = _Reading(text, range(len(text) + 1))
    yield reading
    for _ in range(_NOTATIONS_MAX):
        before, reading = reading, _unescaped(reading)
        if reading.text == before.text:
            return
        yield reading


def _unescaped(reading: _Reading) -> _Reading:
    text, at = reading
    parts: list[str] = []
    places: list[int] = []
    last = 0
    for match in _ESCAPED.finditer(text):
        start = match.start()
        parts.append(text[last:start])
        places += at[last:start]
        for character, size in _meaning(match[0]):
            parts.append(character)
            places.append(at[start])
            start += size
        last = match.end()
    return _Reading("".join((*parts, text[last:])), [*places, *at[last:]])


def _meaning(escaped: str) -> Iterator[tuple[str, int]]:
    """The characters that it stands for, and how much of it each of them takes."""
    if escaped[0] == "%":
        for character in unquote_to_bytes(escaped).decode("utf-8", "surrogateescape"):
            yield character, 3 * len(character.encode("utf-8", "surrogateescape"))
    elif escaped[0] == "\\":
        yield chr(int(escaped[2:], 16)), len(escaped)
    else:
        characters = html.unescape(escaped)
        if len(characters) == 1:
            yield characters, len(escaped)
        else:  # it has no meaning, or a rare one that no secret has
            yield from ((character, 1) for character in escaped)


def _folded(reading: _Reading) -> _Folded:
    text, at = reading
    if text and max(text) > "\uffff":  # JSON writes such a character as two
        pairs = [(unit, place) for character, place in zip(text, at, strict=False) for unit in _units(character)]
        text, at = "".join(unit for unit, _ in pairs), [*(place for _, place in pairs), at[-1]]
    begins: Sequence[int] = at[:-1]
    ends: Sequence[int] = at[1:]
    beyond = ends
    if "\\" in text:
        begins, ends, beyond = _without_backslashes(text, at)
        text = text.replace("\\", "")
    lower = text.casefold()
    if len(lower) > len(text):  # there are characters that become several
        lower = "".join(one if len(one.casefold()) > 1 else one.casefold() for one in text)
    return _Folded(lower.replace("+", " "), begins, ends, beyond)


def _units(character: str) -> str:
    """The character in UTF-16."""
    if character <= "\uffff":
        return character
    high, low = divmod(ord(character) - 0x10000, 0x400)
    return chr(0xD800 + high) + chr(0xDC00 + low)


def _without_backslashes(text: str, at: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    begins: list[int] = []
    ends: list[int] = []
    beyond: list[int] = []
    before = 0
    for run in re.finditer(r"[^\\]+", text):
        start, end = run.span()
        if beyond:
            beyond[-1] = at[start]
        begins += (at[before], *at[start + 1 : end])
        ends += at[start + 1 : end + 1]
        beyond += at[start + 1 : end + 1]
        before = end
    if beyond:
        beyond[-1] = at[-1]
    return begins, ends, beyond
