"""Reads bodies and queries into the types of `shapes`, or says what is wrong: place, rule, value. Pure, no I/O. No body
keeps the event loop busy for long, whatever is in it.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

import msgspec
import orjson
from msgspec import inspect

from lmdaemon.dialects import BadNotice, json_object, kind_of, without_mark
from lmdaemon.model import ID_MAX, id_problem
from lmdaemon.shapes import BULK_BODY_MAX, BULK_IDS_MAX, PLAIN, BulkOpen, BulkTouch, OpeningOfMany, Request

BODY_MAX = 64 * 1024
SHOWN_MAX = 40  # characters of a value in an error

_BULK = {BulkTouch, BulkOpen}
_DECODER = msgspec.json.Decoder(BulkTouch)
_QUOTES_MAX = 2 * (BULK_IDS_MAX + 1)  # most quotes in a valid body: two for each id, and two for the key

_Asked = TypeVar("_Asked", bound=Request)


def longest(kind: type[Request]) -> int:
    """The limit in bytes of a body that is read as this type."""
    return BULK_BODY_MAX if kind in _BULK else BODY_MAX


def required(kind: type[Request]) -> list[str]:
    """The members that must be given."""
    return _Members.of(kind).required


def of_body(kind: type[Request], body: bytes) -> Request:
    """A body of at most `longest(kind)` bytes; an empty one has no fields. Raises ValueError: place, rule, value."""
    if kind is BulkTouch:
        return BulkTouch(session_ids=session_ids(body))
    if kind is BulkOpen:
        return BulkOpen(sessions=_openings(body))
    try:
        fields = json_object(body) if required(kind) or without_mark(body) else {}
    except BadNotice as error:
        raise ValueError(error.description) from error
    return _read(kind, _whole(fields), fields, "field")


def _whole(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, with 90 instead of 90.0: JSON Schema counts such a number as an integer, and msgspec does not."""
    if float not in map(type, fields.values()):  # the usual case
        return fields
    return {name: int(one) if type(one) is float and one.is_integer() else one for name, one in fields.items()}


def of_query(kind: type[_Asked], query: Mapping[str, str]) -> _Asked:
    """The parameters of a query. Raises ValueError with place, rule, value."""
    numbers = _Members.of(kind).numbers
    digits = {name: int(query[name]) for name in numbers if re.fullmatch("[0-9]{1,9}", query.get(name, ""))}
    return _read(kind, {**query, **digits}, query, "parameter")


def _read(kind: type[_Asked], fields: Mapping[str, Any], given: Mapping[str, Any], noun: str) -> _Asked:
    members = _Members.of(kind)
    if not fields.keys() <= members.all.keys():
        name = next(name for name in fields if name not in members.all)
        known = ", ".join(sorted(members.all)) or "none"
        raise ValueError(f"{name[:ID_MAX]}: is no {noun} of this call; known are {known}")
    for name in members.required:
        if name not in fields:
            raise ValueError(f"{name}: is required")
    try:
        found = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ValueError(members.complaint(fields, given)) from error
    for name, longest in members.texts.items():
        if name in fields and (problem := id_problem(fields[name], longest)):
            raise ValueError(f"{name}: {problem}")
    return found


class _Members:
    """The rules for the members of a type that msgspec does not check, or whose violation it does not report in plain
    words.
    """

    def __init__(self, kind: type[Request]) -> None:
        info = inspect.type_info(kind)
        hints = get_type_hints(kind, include_extras=True)
        self.all: dict[str, Any] = {}
        self.texts: dict[str, int] = {}  # maximum length of each id and token, by the member's name
        self.required: list[str] = []
        self.numbers: list[str] = []
        self._rules: dict[str, str] = {}
        self._secret: set[str] = set()
        assert isinstance(info, inspect.StructType)  # noqa: S101 - of a Request
        for field in info.fields:
            name, kind_of = field.encode_name, field.type
            extra: dict[str, Any] = {}
            schema: dict[str, Any] = {}
            while isinstance(kind_of, inspect.Metadata):
                extra, schema = (kind_of.extra or {}) | extra, (kind_of.extra_json_schema or {}) | schema
                kind_of = kind_of.type
            self.all[name] = hints[field.name]
            self._rules[name] = extra.get("rule") or _rule(kind_of)
            if "maxLength" in schema:
                self.texts[name] = schema["maxLength"]
            if extra.get("secret"):
                self._secret.add(name)
            if field.required:
                self.required.append(name)
            if isinstance(kind_of, inspect.IntType):
                self.numbers.append(name)

    @staticmethod
    @cache
    def of(kind: type[Request]) -> "_Members":
        return _Members(kind)

    def complaint(self, fields: Mapping[str, Any], given: Mapping[str, Any]) -> str:
        """What is wrong with the first member that cannot be read."""
        for name, value in fields.items():
            try:
                msgspec.convert(value, self.all[name])
            except msgspec.ValidationError:
                got = "" if name in self._secret else f" (got {self._shown(given[name])})"
                return f"{name}: {self._rules[name]}{got}"
        raise AssertionError("each member can be read, all of them cannot")

    def _shown(self, value: Any) -> str:
        """A value for an error. Of lists, objects and, in a body that may have a secret, texts only the kind is named:
        a client may have put the secret into the wrong member.
        """
        if isinstance(value, list | dict) or (self._secret and isinstance(value, str)):
            return kind_of(value)
        return orjson.dumps(value).decode()[:SHOWN_MAX]


def _rule(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType(le=None):
            return f"must be an integer of at least {kind.ge}"
        case inspect.IntType():
            return f"must be an integer from {kind.ge} to {kind.le}"
        case inspect.BoolType():
            return "must be true or false"
        case inspect.LiteralType():
            return f"must be one of {', '.join(map(str, kind.values))}"
        case inspect.StrType(max_length=int(most)):
            plain = ", none of them a control character" if kind.pattern == PLAIN else ""
            return f"must be a string of {kind.min_length or 0} to {most} characters{plain}"
        case inspect.StrType():
            return "must be a string"
    return "must be an object"


def takes_long(kind: type[Request]) -> bool:
    """Whether reading a body of this type may take so long that it must be done on a thread."""
    return kind is BulkOpen


def _openings(body: bytes) -> list[OpeningOfMany]:
    """The sessions of a bulk opening. Each is read as the body of a single opening, so that the same rules hold."""
    try:
        fields = json_object(body)
    except BadNotice as error:
        raise ValueError(error.description) from error
    if unknown := fields.keys() - {"sessions"}:
        raise ValueError(f"{min(unknown)[:ID_MAX]}: is no field of this call; known are sessions")
    found = fields.get("sessions")
    if not isinstance(found, list) or len(found) > BULK_IDS_MAX:
        got = f" (got {len(found)})" if isinstance(found, list) else ""
        raise ValueError(f"sessions: must be a list of at most {BULK_IDS_MAX} sessions{got}")
    openings: list[OpeningOfMany] = []
    for index, one in enumerate(found):
        if not isinstance(one, dict):
            raise ValueError(f"sessions[{index}]: must be an object")  # noqa: TRY004 - as every refusal here
        try:
            openings.append(_read(OpeningOfMany, _whole(one), one, "field"))
        except ValueError as error:
            raise ValueError(f"sessions[{index}].{error}") from error
    return openings


def session_ids(body: bytes) -> list[str]:
    """The ids in the body of a bulk touch. Raises ValueError with place and rule.

    The body is read directly into a list of texts, so that reading stops at the first member of another type. To read a
    million objects, or to check each of their keys, would take a second.
    """
    body = without_mark(body)
    # Each text has two quotes that are not escaped. A body with more quotes than allowed is refused unread, because
    # reading a million texts takes 60 ms.
    if body.count(b'"') > _QUOTES_MAX and body.count(b'"') - body.count(b'\\"') > _QUOTES_MAX:
        raise ValueError(f"sessionIds: must be a list of at most {BULK_IDS_MAX} ids")
    ids = _decoded(body)
    if len(ids) > BULK_IDS_MAX:
        raise ValueError(f"sessionIds: must be a list of at most {BULK_IDS_MAX} ids (got {len(ids)})")
    for index, session_id in enumerate(ids):
        problem = id_problem(session_id)
        if problem:
            raise ValueError(f"sessionIds[{index}]: {problem}")
    if body.count(b":") > 1:  # the key may stand twice
        _refuse_contradiction(body, ids)
    return ids


def _decoded(body: bytes) -> list[str]:
    try:
        return _DECODER.decode(body).session_ids
    except msgspec.ValidationError as error:
        # The message quotes an unknown field, which may be very long
        what, _, place = str(error)[:ID_MAX].partition(" - at `$.")
        raise ValueError(f"{place.rstrip('`') or 'body'}: {what}") from error
    except UnicodeDecodeError as error:
        raise ValueError("body: must be UTF-8") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"malformed JSON: {str(error).removeprefix('JSON is malformed: ')}") from error


def _refuse_contradiction(body: bytes, ids: list[str]) -> None:
    """Refuses a body that has the key `sessionIds` several times with different values. `ids` is the last value, the
    only one that the decoder has kept.
    """
    if any(value != ids for _, value in json.loads(body, object_pairs_hook=list)):
        raise ValueError("field 'sessionIds' stands twice with different values")
