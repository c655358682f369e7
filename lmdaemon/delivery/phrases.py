"""Says in words what is in the body of an answer: `the body is HTML`, `there is "Error", but no "error"`.

Pure. What it quotes of an answer is not masked: code that shows or keeps its result must mask it.
"""

import json
from typing import Any

from lmdaemon.delivery.sender import ANSWER_MAX
from lmdaemon.dialects import Dialect, not_utf8, without_mark

QUOTED_MAX = 80  # most characters of the answer's own texts that are quoted
MEANINGS = {
    "bad_parameters": "bad parameters",
    "bad_token": "bad or expired token",
    "bad_hash": "bad hash",
    "unknown_session": "unknown session",
    "player_mismatch": "another player",
    "retry": "internal error, please retry",
    "final": "internal error, do not retry",
}


def of_body(body: bytes, dialect: Dialect, *, complete: bool = True, quoted_max: int = QUOTED_MAX) -> str:
    """Says what is in the body, as far as it decides whether the notice was accepted. `complete` is False if the body
    was longer than what was read. Of the answer's `description`, at most `quoted_max` characters are quoted.
    """
    if not complete:
        return f"the body is longer than {ANSWER_MAX // 1024} KiB"
    body = without_mark(body)
    if not body.strip():
        return "the body is empty"
    if otherwise := _not_text(body):
        return f"the body is {otherwise}"
    text = body.decode()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _no_json(text)
    if not isinstance(found, dict):
        return f"the body is {_kind(found)}, where a JSON object is expected"
    if "error" not in found:
        return _no_error(found)
    return _error(found["error"], found.get("description"), dialect, quoted_max)


def _not_text(body: bytes) -> str:
    if body.startswith(b"\x1f\x8b"):
        return "compressed with gzip, which nobody asked for"
    return not_utf8(body)


def _no_json(text: str) -> str:
    start = text.lstrip()[:200].lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body", "<h1", "<br")):
        return "the body is HTML"
    if start.startswith("<"):
        return "the body is XML"
    if start.startswith(("{", "[")):
        return "the body is malformed JSON"
    return "the body is text, not JSON"


def _no_error(found: dict[str, Any]) -> str:
    likely = ("errorcode", "error_code", "code", "status", "result", "success", "statuscode")
    for name in found:
        if name.strip().casefold() == "error":
            return f'there is "{name.strip()}", but no "error"'
    for name in found:
        if name.casefold() in likely:
            return f'there is "{name}", but no "error"'
    return 'there is no "error"' if found else "the object is empty"


def _error(value: object, description: object, dialect: Dialect, quoted_max: int) -> str:
    if value is None or isinstance(value, bool | list | dict) or (isinstance(value, str) and not _number(value)):
        return f"`error` is {_kind(value)}, where a number is expected"
    try:
        number = float(value) if isinstance(value, str | int | float) else 0.0
    except OverflowError:
        return "`error` is a number beyond every code"
    meaning = meaning_of(number, dialect)
    said = f' ("{description[:quoted_max]}")' if number and isinstance(description, str) and description else ""
    code = f"{number:g}" if isinstance(value, str | float) else str(value)
    return f"`error` is {code}" + (f", {meaning}" if number and meaning else "") + said


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def meaning_of(code: float, dialect: Dialect) -> str:
    """What the dialect means by a code; empty if it is none of the dialect's codes."""
    for meaning, said in MEANINGS.items():
        if dialect.codes.of(meaning) == code:
            return said
    return "" if code else "success"


def named(code: float, dialect: Dialect) -> str:
    """A code with what it means: `7 (bad parameters)`."""
    meaning = meaning_of(code, dialect)
    return f"{code:g} ({meaning})" if meaning else f"{code:g}"


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {json.dumps(value[:QUOTED_MAX], ensure_ascii=False)}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return "a number"
