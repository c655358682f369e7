"""SessionExpired on the wire, both directions: a notice is parsed from bytes and encoded to bytes. Pure, no I/O.

A dialect is data: path, content type, names of the fields, which are required, answer codes. Adding one is one entry in
`SHIPPED` or one `[dialects.NAME]` table; nothing else in the daemon knows a wire name or a code. It must never log, or
raise anything but `BadNotice` and `CannotEncode`. What each rule is for: docs/protocol.md.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from encodings.aliases import aliases
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn
from urllib.parse import parse_qsl, urlencode

import msgspec
import orjson

from lmdaemon.causes import Cause, missing
from lmdaemon.model import ID_MAX, TOKEN_MAX, id_problem

REQUEST_MAX = 36  # characters of a request's uuid; the limit of dialect v4.01
FORM_FIELDS_MAX = 100
EXTRA_MAX = 2048  # bytes of JSON that are kept of fields unknown to the dialect

Meaning = Literal["provider", "session", "player", "token", "request", "hash"]


class BadNotice(Exception):  # noqa: N818 - house name, see docs/architecture.md
    """A notice that is refused: `meaning` picks the answer code, the text names place, rule and value."""

    def __init__(self, meaning: str, description: str) -> None:
        super().__init__(description)
        self.meaning = meaning
        self.description = description
        # The dialect whose codes the answer uses; None if the body did not show which one it is
        self.dialect: Dialect | None = None


class CannotEncode(Exception):  # noqa: N818
    """The notice cannot be sent: a required value is unknown (the token of a session opened without one) or cannot be
    hashed. `cause` is the word for it in docs/delivery.md.
    """

    def __init__(self, cause: Cause, description: str) -> None:
        super().__init__(description)
        self.cause = cause


class Codes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer codes by meaning. Where a dialect has no code of its own for a meaning, it uses `bad_parameters`."""

    bad_parameters: int = 7
    bad_token: int | None = None
    bad_hash: int | None = None
    unknown_session: int | None = None
    player_mismatch: int | None = None
    retry: int = 100
    final: int = 120

    def of(self, meaning: str) -> int:
        """The code for one of `model.MEANINGS`."""
        code: int | None = getattr(self, meaning)
        return self.bad_parameters if code is None else code


class Dialect(msgspec.Struct, frozen=True, dict=True):
    """One published form of SessionExpired. `fields` maps meaning to wire name; `required` lists meanings; `extra` says
    whether fields that the dialect does not know are accepted.
    """

    name: str
    path: str
    fields: Mapping[str, str]
    required: tuple[str, ...]
    content: Literal["json", "form"] = "json"
    codes: Codes = Codes()
    extra: bool = True

    @property
    def content_type(self) -> str:
        """The Content-Type header of what is sent."""
        return _CONTENT_TYPES[self.content]

    @cached_property
    def names(self) -> frozenset[str]:
        """The wire names of all fields."""
        return frozenset(self.fields.values())

    @cached_property
    def required_names(self) -> frozenset[str]:
        """The wire names of the required fields. A body without one of them is refused."""
        return frozenset(self.fields[meaning] for meaning in self.required)

    @cached_property
    def reads(self) -> tuple[tuple[Meaning, str, int, bool], ...]:
        """For each field, in the order of reading: its meaning, its wire name, the most characters of its value, and
        whether it is required.
        """
        return tuple(
            (meaning, self.fields[meaning], longest, meaning in self.required)
            for meaning, longest in _LONGEST.items()
            if meaning in self.fields
        )

    def same_wire(self, other: "Dialect") -> bool:
        """Whether this dialect and the other one read every body alike, so that telling them apart does not matter
        (v4.01, v4.02, v1).
        """
        return (self.fields, set(self.required), self.content, self.codes, self.extra) == (
            other.fields,
            set(other.required),
            other.content,
            other.codes,
            other.extra,
        )


_V4_01_FIELDS = {"provider": "providerId", "session": "sessionId", "player": "userId", "request": "uuid"}
_V4_01_CODES = Codes(57, bad_token=54, unknown_session=55, retry=998, final=999)
_V4_01_REQUIRED = ("provider", "session", "player", "request")

SHIPPED: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "v4",
            "/V4/SessionExpired",
            {"provider": "providerId", "session": "sessionId", "player": "externalPlayerId", "token": "token"},
            ("provider", "session", "player", "token"),
        ),
        Dialect("v4.01", "/V4/SessionExpired", _V4_01_FIELDS, _V4_01_REQUIRED, codes=_V4_01_CODES),
        Dialect("v4.02", "/v4/SessionExpired", _V4_01_FIELDS, _V4_01_REQUIRED, codes=_V4_01_CODES),
        Dialect("v1", "/v1/SessionExpired", _V4_01_FIELDS, _V4_01_REQUIRED, codes=_V4_01_CODES),
        Dialect(
            "pragmatic",
            "/sessionexpired",
            {
                "hash": "hash",
                "provider": "providerId",
                "session": "sessionId",
                "player": "playerId",
                "token": "token",
            },
            ("hash", "provider", "session", "player"),
            content="form",
            codes=Codes(7, bad_token=4, bad_hash=5, player_mismatch=2),
        ),
    )
}


class Parsed(msgspec.Struct, frozen=True):
    """A well-formed notice, not yet authenticated. `received` is every field as received, for the hash."""

    dialect: Dialect
    provider_id: str
    session_id: str
    player_id: str
    token: str | None
    request: str | None
    hash: str | None
    received: Mapping[str, Any]


class Extra(NamedTuple):
    """What is kept of the fields that a dialect does not know.

    `fields` are their values, `text` the same as JSON (None: nothing is kept), `left_out` the number of fields of which
    all or a part was dropped.
    """

    fields: dict[str, Any]
    text: str | None
    left_out: int


_SECRET_NAME = re.compile(
    "auth|bearer|cookie|credential|hash|hmac|jwt|key|passcode|passphrase|passw|pincode|pwd|secret|sign|token"
)
# These are parts of harmless words (bypass, spin), so they count only as whole words: of userPass, PINCode or card_pin
_SECRET_WORDS = {"otp", "pass", "pin", "psk", "pw"}
_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def extra_of(parsed: Parsed, secret_names: Container[str] = ()) -> Extra:
    """The fields that the dialect does not know, in the order received, as long as they fit into EXTRA_MAX bytes.

    These fields stay in the database for months and go to plug-ins. So nothing is kept whose name looks like a secret's
    or is one of `secret_names` (casefolded), at any depth, and no number that was rounded when it was read. Raises
    BadNotice for a field that is nested too deeply.
    """
    unknown = parsed.received.keys() - parsed.dialect.names
    if not unknown:  # the usual case
        return Extra({}, None, 0)  # a new one, because plug-ins get its fields
    kept: dict[str, Any] = {}
    parts: list[bytes] = []
    left_out, room = 0, EXTRA_MAX - len("{}")
    for name, value in parsed.received.items():
        if name not in unknown:
            continue
        field = {name: value}
        _written(field)  # refuses deep nesting, on which the recursion in the next line would fail
        shown = _without_secrets(field, secret_names)
        part = _written(shown)[1:-1]
        fits = bool(shown) and len(part) <= room and not rounded(shown, part)
        left_out += not fits or shown != field
        if fits:
            kept |= shown
            parts.append(part)
            room -= len(part) + len(",")
    return Extra(kept, f"{{{b','.join(parts).decode()}}}" if kept else None, left_out)


def _written(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:  # orjson reads 1024 levels, but writes 254
        raise BadNotice("bad_parameters", "a field is nested too deeply") from error


def _without_secrets(value: Any, secret_names: Container[str]) -> Any:
    if isinstance(value, list):
        return [_without_secrets(one, secret_names) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_secrets(inner, secret_names)
        for name, inner in value.items()
        if not _looks_secret(name) and name.casefold() not in secret_names
    }


def _looks_secret(name: str) -> bool:
    found = _SECRET_NAME.search(name.casefold())
    return found is not None or not _SECRET_WORDS.isdisjoint(word.lower() for word in _WORD.findall(name))


_CONTENT_TYPES: Mapping[Literal["json", "form"], str] = {
    "json": "application/json",
    "form": "application/x-www-form-urlencoded",
}
_CONTENTS = {content_type: content for content, content_type in _CONTENT_TYPES.items()}
# Names of charsets. Some senders write one into Content-Encoding, where it means nothing. Python's table has the names
# of its own charsets; its codecs that are none (zlib, base64, …) have names in `_codec`, apart from rot_13.
_CHARSETS = {name for pair in aliases.items() if not pair[1].endswith(("_codec", "rot_13")) for name in pair}
_CHARSET = (
    r"utf[-_]?(7|8|16|32)(le|be)?|(us-)?ascii|iso[-_]?8859[-_]?[0-9]{1,2}(-[ie])?|latin[-_]?[0-9]{1,2}"
    r"|(windows|cp)[-_]?[0-9]{3,5}|koi8[-_]?[ru]|gb(k|2312|18030)|big5|shift[-_]?jis|euc[-_]?(jp|kr|tw)|viscii"
)
_UNCODED = re.compile(f"(identity|{_CHARSET})?", re.IGNORECASE)


def content_of(content_type: str) -> Literal["json", "form"] | None:
    """The content that a Content-Type header names; None for a type that no dialect has (answered with 415).

    Its parameters are ignored: senders name all sorts of charsets, and the bytes must be UTF-8 in any case.
    """
    return _CONTENTS.get(content_type) or _CONTENTS.get(content_type.partition(";")[0].strip().lower())


def uncoded(content_encodings: Iterable[str]) -> bool:
    """Whether a body with these Content-Encoding headers can be read as it is, because none of them compresses."""
    return all(_packs_nothing(one.strip()) for header in content_encodings for one in header.split(","))


def _packs_nothing(coding: str) -> bool:
    known = coding.lower().removeprefix("x-").replace("-", "_") in _CHARSETS
    return known or _UNCODED.fullmatch(coding) is not None


def parse(body: bytes, content: str, accepted: Sequence[Dialect]) -> Parsed:
    """Reads one body as a notice of one of the `accepted` dialects: at least one, all with this `content`.

    The dialect is the one of whose required names the fewest are missing, the first of `accepted` on a tie. Raises
    BadNotice (meaning bad_parameters) and nothing else.
    """
    received = json_object(body) if content == "json" else _form_fields(body)
    dialect = recognise(received, accepted)
    try:
        return _read(received, dialect)
    except BadNotice as refusal:
        refusal.dialect = dialect
        raise


def recognise(received: Mapping[str, Any], accepted: Sequence[Dialect]) -> Dialect:
    """The accepted dialect with the fewest required names that are missing in `received`; the first of them on a
    tie.
    """
    if len(accepted) == 1:
        return accepted[0]

    def missing(dialect: Dialect) -> int:
        return len([meaning for meaning in dialect.required if dialect.fields[meaning] not in received])

    return min(accepted, key=missing)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def without_mark(body: bytes) -> bytes:
    """The body without a byte-order mark, which some libraries write before JSON. Source: RFC 8259 §8.1."""
    return body.removeprefix(BYTE_ORDER_MARK)


def encoding_of(body: bytes) -> str:
    """The encoding of JSON, or other text that begins with ASCII, by its first four bytes; UTF-8 by default."""
    return json.detect_encoding(body[:4])


_NOT_UTF8 = "not UTF-8"


def not_utf8(body: bytes) -> str:
    """The encoding that a text has instead of UTF-8, in words for an error; empty where it is UTF-8."""
    encoding = encoding_of(body)
    if encoding.startswith(("utf-16", "utf-32")):
        return f"{encoding[:6].upper()}, not UTF-8"
    try:
        body.decode()
    except UnicodeDecodeError:
        return _NOT_UTF8
    return ""


def unreadable(body: bytes) -> str:
    """Why a body cannot be read as JSON, if people cannot see the reason in its text: it is compressed, or not UTF-8.
    Else empty.
    """
    return "compressed with gzip" if body.startswith(b"\x1f\x8b") else not_utf8(body)


def json_object(body: bytes) -> Mapping[str, Any]:
    """A JSON object, strictly: no key twice with different values. Raises BadNotice (bad_parameters)."""
    body = without_mark(body)
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        _refuse(_json_complaint(body, error))
    if not isinstance(found, dict):
        _refuse(f"body must be a JSON object (got {kind_of(found)})")
    # With as many colons as keys, no key can stand twice. Only other bodies cost a second, slower reading.
    if body.count(b":") != len(found):
        _refuse_contradicting_keys(body)
    return found


# orjson writes a number beyond 2^53 with 16 digits or an exponent. A text may match too, so a match alone proves
# nothing.
_PERHAPS_ROUNDED = re.compile(rb"[0-9]{16}|[0-9]e")


def rounded(value: object, written: bytes) -> bool:
    """Whether a number in a JSON value may have been rounded when read. `written` is the value as orjson writes it.

    Integers beyond 64 bits are rounded; numbers with a fraction or an exponent may be if they are beyond 2^53.
    """
    return bool(_PERHAPS_ROUNDED.search(written)) and _has_rounded(value)


def _has_rounded(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_rounded, value.values()))
    if isinstance(value, list):
        return any(map(_has_rounded, value))
    return isinstance(value, float) and abs(value) > 2**53


def _json_complaint(body: bytes, error: json.JSONDecodeError) -> str:
    where, what = f"line {error.lineno} column {error.colno}", error.msg
    # orjson's position counts characters of the decoded text, so it gives none for a body that is not UTF-8
    if otherwise := not_utf8(body):
        return f"malformed JSON at {_undecodable(body) if otherwise == _NOT_UTF8 else where}: {otherwise}"
    text = body.decode()
    before = text[: error.pos].rstrip()
    if "expected ','" in what and before[-1:] not in ("", ",", "{", "["):
        # In a string with quotes that are not escaped, a word or a number usually follows directly
        start, named = (r"\s*[\"\[{]|\s+(-?[0-9]|true|false|null)", "value") if "']'" in what else (r'\s*"', "field")
        if re.compile(start).match(text, len(before)):
            what = f"a comma is missing before this {named}"
    return f"malformed JSON at {where}: {what}"


def _undecodable(body: bytes) -> str:
    """Where the first byte is that is not UTF-8."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        lines = body[: error.start].decode().split("\n")
        return f"line {len(lines)} column {len(lines[-1]) + 1}"
    raise AssertionError("the body is not UTF-8")


def _refuse_contradicting_keys(body: bytes) -> None:
    """Refuses a key that stands twice with different values. With equal values it passes, because the protocol's
    published table lists sessionId twice.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            # Compared by repr, because 1, true and 1.0 are equal by ==. Only for repeated keys: for every value of a
            # deeply nested body of 16 KiB, repr would block the event loop for a second.
            if key in fields and repr(fields[key]) != repr(value):
                _refuse(f"field {key[:ID_MAX]!r} stands twice with different values")
            fields[key] = value
        return fields

    try:
        json.loads(body, object_pairs_hook=checked)
    except (ValueError, RecursionError) as error:  # nested more deeply, or a longer number, than `json` can read
        raise BadNotice("bad_parameters", "malformed JSON: nested too deeply or a number too long") from error


def _form_fields(body: bytes) -> Mapping[str, Any]:
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=FORM_FIELDS_MAX)
    except UnicodeDecodeError:
        _refuse("body must be a form in UTF-8")
    except ValueError:
        _refuse(f"body must be a form of at most {FORM_FIELDS_MAX} fields")
    fields: dict[str, str] = {}
    for key, value in pairs:
        if fields.setdefault(key, value) != value:
            _refuse(f"field {key[:ID_MAX]!r} stands twice with different values")
    return fields


# The most characters of each value. Values are checked in this order.
_LONGEST: Mapping[Meaning, int] = {
    "provider": ID_MAX,
    "session": ID_MAX,
    "player": ID_MAX,
    "token": TOKEN_MAX,
    "request": REQUEST_MAX,
    "hash": ID_MAX,
}


def _read(received: Mapping[str, Any], dialect: Dialect) -> Parsed:
    if not dialect.required_names <= received.keys():
        missing = next(name for meaning in dialect.required if (name := dialect.fields[meaning]) not in received)
        _refuse(f"field {missing!r} is missing")
    if not dialect.extra and (unknown := received.keys() - dialect.names):
        _refuse(f"field {min(unknown)[:ID_MAX]!r} is not known in dialect {dialect.name}")
    if "hash" in dialect.fields:
        _check_borders(received, dialect.fields["hash"])

    facts: dict[Meaning, str] = {}
    for meaning, name, longest, is_required in dialect.reads:
        value = received.get(name)
        # An optional field that is null or empty counts as absent
        if is_required or (value is not None and value != ""):
            if type(value) is str and 0 < len(value) <= longest and value.isprintable():  # the usual case
                facts[meaning] = value
            else:
                facts[meaning] = _text(name, value, longest)
    fact = facts.get
    return Parsed(
        dialect,
        fact("provider", ""),
        fact("session", ""),
        fact("player", ""),
        fact("token"),
        fact("request"),
        fact("hash"),
        received,
    )


def _check_borders(received: Mapping[str, Any], hash_name: str) -> None:
    for name, value in received.items():
        if name != hash_name and value is not None and breaks_hash(name + _plain(value)):
            _refuse(f"field {name[:ID_MAX]!r} must have no & and no =, which separate the fields that are hashed")


def _text(name: str, value: object, longest: int) -> str:
    """An id as a string: strings as they are, integers exactly, nothing else."""
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        _refuse(f"field {name!r} must be a string (got {kind_of(value)})")
    problem = id_problem(value, longest)
    if problem:
        _refuse(f"field {name!r} {problem}")
    return value


_KINDS = {
    dict: "an object",
    list: "an array",
    bool: "a boolean",
    float: "a fraction or a number too long",
    int: "a number",
}


def kind_of(value: object) -> str:
    """The kind of a JSON value, in words for an error."""
    return "null" if value is None else _KINDS.get(type(value), "a string")


def _refuse(description: str) -> NoReturn:
    raise BadNotice("bad_parameters", description)


def answer(code: int, description: str) -> bytes:
    """The body of an answer to a notice: `{"error": code, "description": description}`."""
    return orjson.dumps({"error": code, "description": description})


SUCCESS = answer(0, "Success")


def hash_of(received: Iterable[tuple[str, Any]], hash_name: str, key: str) -> str:
    """The hash of dialect `pragmatic`: MD5, in lower-case hex, of the parameters without the hash, then the key.

    The parameters are sorted by name and written as `name=value`, joined by `&`. Values are decoded ones; an empty
    value counts, null does not. The protocol prescribes MD5. See docs/protocol.md, "The hash".
    """
    pairs = sorted((name, _plain(value)) for name, value in received if name != hash_name and value is not None)
    text = "&".join(f"{name}={value}" for name, value in pairs) + key
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _plain(value: object) -> str:
    return value if isinstance(value, str) else _written(value).decode()


def breaks_hash(text: str) -> bool:
    """Whether a name or value contains `&` or `=`. The hash joins fields with these, so such a value could pass for
    several fields.
    """
    return "&" in text or "=" in text


def check_hash(parsed: Parsed, key: str) -> None:
    """Raises BadNotice (bad_hash) unless the hash is right. Compares in constant time and never shows the right one."""
    expected = hash_of(parsed.received.items(), parsed.dialect.fields["hash"], key)
    if not hmac.compare_digest(expected.encode(), (parsed.hash or "").lower().encode()):
        raise BadNotice("bad_hash", "the hash does not fit the parameters")


def encode(
    dialect: Dialect,
    *,
    provider_id: str,
    session_id: str,
    player_id: str,
    token: str | None,
    request_id: str,
    hash_key: str | None,
) -> bytes:
    """The body of one SessionExpired: the dialect's fields in its order, optional ones only if they are known.

    Raises CannotEncode when a required value is unknown, or when a value to be hashed has `&` or `=` in it.
    """
    facts = {
        "provider": provider_id,
        "session": session_id,
        "player": player_id,
        "token": token,
        "request": request_id,
        "hash": None if hash_key is None else "",
    }
    for meaning in dialect.required:
        if facts[meaning] is None:
            text = f"dialect {dialect.name} must send {dialect.fields[meaning]!r}, which is not known here"
            raise CannotEncode(missing(meaning), text)
    fields = {name: facts[meaning] for meaning, name in dialect.fields.items() if facts[meaning] is not None}
    if "hash" in dialect.fields and hash_key is not None:
        for name, value in fields.items():
            if breaks_hash(value or ""):
                text = f"dialect {dialect.name} hashes {name!r}, so it must have no & and no ="
                raise CannotEncode("ambiguous_hash", text)
        name = dialect.fields["hash"]
        fields[name] = hash_of(fields.items(), name, hash_key)
    if dialect.content == "json":
        return orjson.dumps(fields)
    return urlencode(fields).encode()


def content_of_body(body: bytes) -> Literal["json", "form"]:
    """The content of a body that `encode` has made, perhaps for a dialect that is no longer in force. In JSON it begins
    with `{`, which a form escapes.
    """
    return "json" if body.startswith(b"{") else "form"


def type_of_body(body: bytes) -> str:
    """The Content-Type of a body that `encode` has made."""
    return _CONTENT_TYPES[content_of_body(body)]


_NUMERIC = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")  # \d would also match the digits of other scripts


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def _json(body: bytes) -> Any:
    """The value of an answer's JSON. Raises orjson.JSONDecodeError.

    An escaped lone surrogate, which orjson refuses, is replaced: a description cut to a length may end with half of a
    pair (RFC 8259 §8.2).
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        readable = _SURROGATE.sub(rb"\\ufffd", body)
        if readable == body:
            raise
        return orjson.loads(readable)


def answered_code(body: bytes) -> int | float | None:
    """The `error` of an answer as a number, whether it was sent as a number or as text; None if it is anything else."""
    try:
        error = _json(without_mark(body)).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    if type(error) is int and abs(error) < 2**53:
        return error  # the usual case
    if isinstance(error, str) and len(error) <= 32 and _NUMERIC.fullmatch(error.strip()):
        error = float(error)
    if isinstance(error, bool) or not isinstance(error, int | float):
        return None
    number = float(error)
    # 120.0 becomes 120. A number beyond 2^53 stays a float: such a float is not an exact integer, and SQLite stores no
    # integer beyond 2^63.
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
