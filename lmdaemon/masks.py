"""Hides the secrets of a notice in what may be shown to anybody: what its operator answered, what `send` prints.

An operator may send back what it got, in any notation. It must never leave a part of a secret behind.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from html.entities import codepoint2name
from itertools import groupby
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from lmdaemon.config import Operator
from lmdaemon.dialects import without_mark

MASK = "***"
SHOWN_MAX = 256  # characters of an answer that are kept with an attempt
_SPELLING_MAX = 100  # what a character that is no letter may become
_LETTERS = re.compile(r"[A-Za-z0-9._-]+")  # what every notation leaves as it is


class Mask:
    """Replaces secrets as they are, and as JSON, URLs, forms and HTML write them, also within one another."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        pattern = self._pattern(text)
        return text if pattern is None else pattern.sub(MASK, text)

    def _pattern(self, text: str) -> re.Pattern[str] | None:
        """Finds those that may be in the text, if any: making it costs far more than seeing that no letters of theirs
        are there.
        """
        folded = text.casefold()
        found = [_pattern(secret) for secret in self._secrets if _letters(secret).casefold() in folded]
        if "v1" in folded:
            found.append(_SIGNATURE)
        return re.compile("|".join(found), re.IGNORECASE) if found else None

    @cached_property
    def longest(self) -> int:
        """Characters that a secret may have in the text."""
        return max((len(_LETTERS.sub("", one)) * _SPELLING_MAX + len(one) for one in self._secrets), default=0)

    def text_of(self, body: bytes, *, complete: bool) -> str:
        """The text of an answer. Of one that was cut off, without an end that could be the beginning of a secret."""
        text = without_mark(body).decode("utf-8", "replace")
        pattern = self._pattern(text)
        if not complete:
            whole = pattern.finditer(text) if pattern is not None else ()
            whole_until = max((match.end() for match in whole), default=0)
            text = text[: max(whole_until, len(text) - self.longest)]
        return text if pattern is None else pattern.sub(MASK, text)


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


# -- spellings


def _letters(secret: str) -> str:
    """The longest part of it that every notation leaves as it is."""
    return max(_LETTERS.findall(secret), key=len, default="")


def _pattern(secret: str) -> str:
    return "".join(_spelt(character, len(list(run))) for character, run in groupby(secret))


# All repetition is bounded, for the text is a stranger's. A notation within another doubles backslashes, writes % as
# %25 and & as &amp;, and the characters of the inner one in its own way: up to three of them are known.
_PERCENT = "%(?:25){0,3}"
_PLAIN_BACKSLASH = rf"(?:\\|{_PERCENT}5c|&(?:amp;){{0,3}}\#(?:0{{0,5}}92|x0{{0,5}}5c);)"
_BACKSLASH = f"(?:{_PLAIN_BACKSLASH}{{1,8}}(?:u005c){{1,3}}|{_PLAIN_BACKSLASH})"
_AMPERSAND = r"(?:&|\\{0,8}u0026)(?:amp;){0,3}"
_ENTITIES = {ord("'"): "apos"} | codepoint2name


def _spelt(character: str, times: int) -> str:
    """A character that stands so many times in a row, in every notation."""
    if _LETTERS.fullmatch(character):
        return character * times
    if character == "\\":  # all of a row at once: how many stand for one is not known
        return f"{_BACKSLASH}{{{times},{8 * times}}}+"
    point, units = ord(character), character.encode("utf-16-be", "surrogatepass")
    entities = [rf"\#0{{0,5}}{point}", rf"\#x0{{0,5}}{point:x}", *([_ENTITIES[point]] if point in _ENTITIES else [])]
    ways = [  # the longest first
        f"{_AMPERSAND}(?:{'|'.join(entities)});",  # HTML
        "".join(f"{_PERCENT}{byte:02x}" for byte in character.encode("utf-8", "surrogatepass")),  # URL
        *([rf"\+|{_PERCENT}2b"] if character == " " else []),  # form
        f"{_BACKSLASH}{{0,8}}".join(f"u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)),  # JSON
        re.escape(character),
    ]
    return f"(?:{_BACKSLASH}{{0,8}}(?:{'|'.join(ways)})){{{times}}}"


# One of Standard Webhooks: 256 bits in base64
_SIGNATURE = rf"(?:(?<=v1,)|(?<=v1%2c))(?:[A-Za-z0-9]|{_spelt('+', 1)}|{_spelt('/', 1)}){{43}}{_spelt('=', 1)}"
