"""Says in an integrator's words what an answer is: `200, but the body is HTML`, `there is "Error", but no "error"`.

Pure. What it quotes of an answer is short and not masked; the caller must mask it before it is shown.
"""

from lmdaemon.causes import Cause
from lmdaemon.delivery import phrases
from lmdaemon.delivery.phrases import meaning_of as meaning_of
from lmdaemon.delivery.phrases import named as named
from lmdaemon.dialects import BYTE_ORDER_MARK, Dialect
from lmdaemon.workbench.exchanges import Answer, Exchange

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
    """The result of an exchange as one sentence without a full stop."""
    if one.answer is None:
        return no_answer(one.cause, one.detail)
    return answer(one.answer, dialect)


def no_answer(cause: Cause | str, detail: str = "") -> str:
    """Why there was no answer, in words."""
    said = _NO_ANSWER.get(cause, cause)
    return f"{said} ({detail})" if detail else said


def answer(one: Answer, dialect: Dialect) -> str:
    """The status and the content of the body, as far as they decide whether a notice was accepted."""
    body = phrases.of_body(one.body, dialect, complete=one.complete)
    if one.status == 200:
        return f"200, {body}" if body.startswith("`error` is 0") else f"200, but {body}"
    if 300 <= one.status < 400:
        return f"HTTP {one.status}, a redirect, which no sender follows"
    if one.status == 410:
        return "HTTP 410, which stops all sending to this operator"
    return f"HTTP {one.status}, and {body}"


def codes(dialect: Dialect) -> str:
    """What each `error` of the dialect means: `0 success, 7 bad parameters, …`."""
    known = dict.fromkeys((0, *(dialect.codes.of(meaning) for meaning in phrases.MEANINGS)))
    return "; ".join(f"{code} {meaning_of(code, dialect)}" for code in sorted(known))


def starts_with_mark(body: bytes) -> bool:
    """Whether a body begins with a byte-order mark, which JSON may not."""
    return body.startswith(BYTE_ORDER_MARK)
