"""Says in an integrator's words what an answer is: `200, but the body is HTML`, `there is "Error", but no "error"`.

Pure. What it quotes of an answer is short and not masked: whoever shows it masks it.
"""

import json
from typing import Any

from lmdaemon.causes import Cause
from lmdaemon.delivery.sender import ANSWER_MAX
from lmdaemon.dialects import BYTE_ORDER_MARK, Dialect, not_utf8, without_mark
from lmdaemon.workbench.exchanges import Answer, Exchange

QUOTED_MAX = 80  # characters of a description that are repeated
_MEANINGS = {
    "bad_parameters": "bad parameters",
    "bad_token": "bad or expired token",
    "bad_hash": "bad hash",
    "unknown_session": "unknown session",
    "player_mismatch": "another player",
    "retry": "internal error, please retry",
    "final": "internal error, do not retry",
}
_NO_ANSWER: dict[str, str] = {
    "private_address": "not sent: the address is private, or this machine's own",
    "dns": "the host name cannot be looked up",
    "connect": "no connection could be made",
    "tls": "TLS failed",
    "timeout": "no whole answer came in time",
    "connection_lost": "the connection was closed before an answer came",
    "unsolicited_answer": "bytes of an answer were there before the request",
    "bad_http": "what came is no HTTP answer",
    "headers_too_large": "the headers of the answer are too large",
    "too_many_interim": "too many 1xx answers before the final one",
    "bad_chunks": "the chunks of the answer are broken",
    "incomplete_answer": "the answer broke off",
    "answer_too_long": "the answer does not end",
}


def exchange(one: Exchange, dialect: Dialect) -> str:
    """What came back, in a sentence's length, without a full stop."""
    if one.answer is None:
        return no_answer(one.cause, one.detail)
    return answer(one.answer, dialect)


def no_answer(cause: Cause | str, detail: str = "") -> str:
    said = _NO_ANSWER.get(cause, cause)
    return f"{said} ({detail})" if detail else said


def answer(one: Answer, dialect: Dialect) -> str:
    """The status and what stands in the body, as far as it decides whether a notice was taken."""
    body = body_of(one, dialect)
    if one.status == 200:
        return f"200, {body}" if body.startswith("`error` is 0") else f"200, but {body}"
    if 300 <= one.status < 400:
        return f"HTTP {one.status}, a redirect, which no sender follows"
    if one.status == 410:
        return "HTTP 410, which stops all sending to this operator"
    return f"HTTP {one.status}, and {body}"


def body_of(one: Answer, dialect: Dialect) -> str:
    if not one.complete:
        return f"the body is longer than {ANSWER_MAX // 1024} KiB"
    body = without_mark(one.body)
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
    return _error(found["error"], found.get("description"), dialect)


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


def _error(value: object, description: object, dialect: Dialect) -> str:
    if value is None or isinstance(value, bool | list | dict) or (isinstance(value, str) and not _number(value)):
        return f"`error` is {_kind(value)}, where a number is expected"
    number = float(value) if isinstance(value, str | int | float) else 0.0
    meaning = meaning_of(number, dialect)
    said = f' ("{description[:QUOTED_MAX]}")' if number and isinstance(description, str) and description else ""
    code = f"{number:g}" if isinstance(value, str | float) else str(value)
    return f"`error` is {code}" + (f", {meaning}" if number and meaning else "") + said


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def meaning_of(code: float, dialect: Dialect) -> str:
    """What the dialect means by a code; nothing where the code is none of its own."""
    for meaning, said in _MEANINGS.items():
        if dialect.codes.of(meaning) == code:
            return said
    return "" if code else "success"


def starts_with_mark(body: bytes) -> bool:
    return body.startswith(BYTE_ORDER_MARK)


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {json.dumps(value[:QUOTED_MAX], ensure_ascii=False)}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return "a number"
