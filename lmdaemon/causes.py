"""The words for why an attempt failed, a delivery is dead, or an operator is held. docs/delivery.md explains each.

They are shown (`lastError`, `history`, log, `send`) and stored, so the meaning of a word must never change.
"""

from typing import Literal

Cause = Literal[
    # No answer came
    "private_address",
    "invalid_url",
    "dns",
    "connect",
    "tls",
    "timeout",
    "connection_lost",
    # What came is not one whole answer
    "unsolicited_answer",
    "bad_http",
    "headers_too_large",
    "too_many_interim",
    "bad_chunks",
    "incomplete_answer",
    # The answer was read and is not a success; `status_of` and `code_of` make further words of this kind
    "gone",
    "redirect",
    "answer_too_long",
    "bad_answer",
    # Nothing was sent
    "max_age",
    "missing_token",
    "missing_hash",
    "ambiguous_hash",
    "session_gone",
    # The daemon itself is the cause
    "internal_error",
    "interrupted",
]
HoldCause = Literal["by_hand", "gone", "failing_for_days"]


def missing(meaning: str) -> Cause:
    """The word for a required value, token or hash, that was not known when the session ended."""
    return "missing_token" if meaning == "token" else "missing_hash"


def status_of(status: int) -> str:
    """The word for an HTTP status that has no other word."""
    return f"status_{status}"


def code_of(code: float) -> str:
    """The word for an answer code, the `error` of an answer."""
    return f"code_{code}"
