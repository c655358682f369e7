"""The words for why an attempt failed, a delivery is dead, or an operator is held. docs/delivery.md explains them.

They are shown (`lastError`, `history`, log, `send`) and stored, so a word keeps its meaning for ever.
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
    # The answer was read and is no success; `status_of` and `code_of` make the others
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
    # A fault of the daemon itself
    "internal_error",
]
HoldCause = Literal["by_hand", "gone", "failing_for_days"]


def missing(meaning: str) -> Cause:
    """A fact that the dialect must send was not known when the session ended."""
    return "missing_token" if meaning == "token" else "missing_hash"


def status_of(status: int) -> str:
    """An HTTP status that means nothing else."""
    return f"status_{status}"


def code_of(code: float) -> str:
    """An answer's own `error`."""
    return f"code_{code}"
