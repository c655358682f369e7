"""Hides the secrets of a notice in what is shown: in an operator's answer, and in what `lmdaemon send` prints.

An operator may send back what it received, escaped in any way. No part of a secret may remain readable. And masking
must not take long: a hostile operator chooses the text, and may have chosen the token, to keep the event loop busy.
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
from lmdaemon.dialects import content_of_body, encoding_of, without_mark

MASK = "***"
SHOWN_MAX = 256  # characters of an answer that are kept with an attempt
_LOOKED_AT = 8192  # bytes at the beginning of an answer that are searched for secrets to show SHOWN_MAX characters
_SPELLING_MAX = 100  # characters that one character may become when it is escaped several times over
_NOTATIONS_MAX = 4  # levels of escaping that are undone, one within the other
_PART_MIN = 8  # so many characters in a row of a secret are hidden even if the rest of the secret is missing
_UNSEEN_MAX = _PART_MIN * _SPELLING_MAX  # fewer than _PART_MIN characters, and one whose escape was cut off
_READABLE = ("provider", "session", "player", "request")  # the meanings of fields that stay readable
_LETTERS = re.compile(r"[A-Za-z0-9._-]+")  # characters that no notation escapes
# A signature of Standard Webhooks (256 bits in base64) after `_folded` has put it into lower case
_SIGNATURE = re.compile(r"(?<=v1,)[a-z0-9 /]{43}=")


class Mask:
    """Replaces secrets in a text by `***`: as they are, and as JSON, URLs, forms and HTML escape them, also nested.

    The text is unescaped, and secrets are searched for in the result. So are parts of them, because many servers quote
    only a piece of what they could not read.
    """

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._secrets = {secret for secret in secrets if secret}

    def __call__(self, text: str) -> str:
        """The text with the secrets, and parts of them, replaced."""
        found, parts = self._found(text)
        return _masked(text, found + parts)

    @cached_property
    def longest(self) -> int:
        """The most characters that one of the secrets can take up in a text, however it is escaped."""
        return max((len(_LETTERS.sub("", one)) * _SPELLING_MAX + len(one) for one in self._secrets), default=0)

    def text_of(self, body: bytes, *, complete: bool) -> str:
        """The text of an answer, masked. `complete` is False for a body that was cut off.

        The last characters of such a text are left out, because they could be the beginning of a secret. Of those that
        are not recognised there are never more than _UNSEEN_MAX, because a longer beginning is recognised as a part.
        """
        text = without_mark(body).decode(encoding_of(body), "replace")
        found, parts = self._found(text)
        if not complete:
            whole_until = max((end for _, end in found), default=0)
            until = max(whole_until, len(text) - min(self.longest, _UNSEEN_MAX))
            text = text[: min((start for start, end in parts if whole_until <= start < until <= end), default=until)]
        return _masked(text, found + parts)

    def beginning_of(self, body: bytes, *, complete: bool) -> str:
        """The first SHOWN_MAX characters of an answer, masked: what is kept with an attempt."""
        return self.text_of(body[:_LOOKED_AT], complete=complete and len(body) <= _LOOKED_AT)[:SHOWN_MAX]

    @cached_property
    def _looked_for(self) -> Mapping[str, bool]:
        """Each secret as `_folded` changes it, and whether backslashes right after it are a part of it.

        A secret that itself looks escaped is also searched for unescaped, because unescaping the text changes the
        secret in it as well. But not if the result is shorter than four characters, because that would be found
        everywhere.
        """
        found: dict[str, bool] = {}
        for secret in self._secrets:
            for reading in _readings(secret):
                if reading.text == secret or len(reading.text) >= 4:
                    text = _folded(reading).text
                    found[text] = found.get(text, False) or reading.text.endswith("\\")
        return found

    def _found(self, text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Where whole secrets are in the text, and where parts of them are: (start, end) each, in characters."""
        found: list[tuple[int, int]] = []
        parts: list[tuple[int, int]] = []
        for reading in _readings(text):
            folded = _folded(reading)
            rest = folded.text  # whole secrets are overwritten in this text below, so that only parts are found in it
            for secret, with_backslashes in self._looked_for.items():
                if not secret:  # the secret consists of backslashes
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
        """Where at least _PART_MIN characters in a row are the same as in a secret."""
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
    """The mask for the secrets of a notice that was sent, and those it was made with.

    That is its token and hash, the operator's hash key and signing keys, and the secret parts of its URL.
    """
    readable = readable_fields(operator)
    sent = (value for name, value in fields_of(body).items() if name not in readable)
    return Mask((token, *sent, *secrets_of(operator)))


def secrets_of(operator: Operator) -> list[str | None]:
    """The secrets with which every request to the operator is made."""
    keys = (base64.b64encode(key).decode() for key in operator.signing_keys)
    return [operator.hash_key, *keys, *_of_url(operator)]


def readable_fields(operator: Operator) -> set[str | None]:
    """The wire names of the fields that hold no secret. A field that the dialect does not name may hold one: a delivery
    may be older than the dialect in force.
    """
    return {operator.sends.fields.get(meaning) for meaning in _READABLE} - {None}


def fields_of(body: bytes) -> Mapping[str, str]:
    """The fields of a notice that was sent, by their wire names."""
    if content_of_body(body) == "json":
        fields: Mapping[str, str] = json.loads(body)
        return fields
    return dict(parse_qsl(body.decode(), keep_blank_values=True))


def query_of(url: str) -> list[tuple[str, str]]:
    """The names and values in a URL's query, not decoded.

    A part without `=` is returned as a value without a name, because it may be a secret.
    """
    parts = url.partition("#")[0].partition("?")[2].split("&")
    return [
        (name, value) if equals else ("", name)
        for part in parts
        if part
        for name, equals, value in [part.partition("=")]
    ]


def _of_url(operator: Operator) -> list[str]:
    """User, password and query values of the operator's URL: as written there, and decoded."""
    user_info = urlsplit(operator.url).netloc.rpartition("@")[0]
    written = [*user_info.split(":", 1), *(value for _, value in query_of(operator.url))]
    basic = operator.target.authorization if operator.target is not None else None
    found = [*written, *map(unquote, written), *map(unquote_plus, written), (basic or "").removeprefix("Basic ")]
    return [value for value in found if len(value) >= 4]  # shorter values would be found everywhere


# -- undoing escapes


class _Reading(NamedTuple):
    """A text, unescaped to some level, and where each of its characters, and its end, is in the original text."""

    text: str
    at: Sequence[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        return self.at[start], self.at[end]


class _Folded(NamedTuple):
    """A text without the differences between notations: without backslashes, in lower case, with a space for each `+`.

    For each of its characters, positions in the original text: `begins`, where the backslashes before it begin; `ends`,
    where it ends; `beyond`, where the backslashes after it end.
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
    """The text as it is, then unescaped once, twice and so on, until nothing changes or _NOTATIONS_MAX is reached."""
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
    """The characters that an escape sequence stands for, each with how many characters of the sequence it takes."""
    if escaped[0] == "%":
        for character in unquote_to_bytes(escaped).decode("utf-8", "surrogateescape"):
            yield character, 3 * len(character.encode("utf-8", "surrogateescape"))
    elif escaped[0] == "\\":
        yield chr(int(escaped[2:], 16)), len(escaped)
    else:
        characters = html.unescape(escaped)
        if len(characters) == 1:
            yield characters, len(escaped)
        else:  # not an entity of HTML, or one for several characters, which no secret has
            yield from ((character, 1) for character in escaped)


def _folded(reading: _Reading) -> _Folded:
    text, at = reading
    if text and max(text) > "\uffff":  # JSON escapes such a character as two surrogates
        pairs = [(unit, place) for character, place in zip(text, at, strict=False) for unit in _units(character)]
        text, at = "".join(unit for unit, _ in pairs), [*(place for _, place in pairs), at[-1]]
    begins: Sequence[int] = at[:-1]
    ends: Sequence[int] = at[1:]
    beyond = ends
    if "\\" in text:
        begins, ends, beyond = _without_backslashes(text, at)
        text = text.replace("\\", "")
    lower = text.casefold()
    if len(lower) > len(text):  # casefold turns some characters into several; those are left as they are
        lower = "".join(one if len(one.casefold()) > 1 else one.casefold() for one in text)
    return _Folded(lower.replace("+", " "), begins, ends, beyond)


def _units(character: str) -> str:
    """The UTF-16 code units of a character, as one or two characters."""
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
