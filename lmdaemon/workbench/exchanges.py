"""A request with its answer, and both as they may be shown to anybody: tokens, hashes, signatures, user info and the
values in the URL's query are masked.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lmdaemon.delivery.shown import shown_header, shown_url
from lmdaemon.dialects import answered_code
from lmdaemon.masks import Mask

ANSWER_HEADERS = (
    "Allow",
    "Connection",
    "Content-Encoding",
    "Content-Length",
    "Content-Type",
    "Date",
    "Location",
    "Retry-After",
    "Server",
    "Transfer-Encoding",
    "Via",
    "WWW-Authenticate",
    "X-Request-Id",
)


class Asked(NamedTuple):
    """A request that was sent, with its secrets. Headers that the HTTP client adds by itself may be missing."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """The part of an answer that was read, and whether it is complete. `headers` ignores the case of names."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool


class Exchange(NamedTuple):
    """A request and its answer, or why there is no answer: a word of `causes`, and details if there are any."""

    asked: Asked
    answer: Answer | None
    cause: str = ""
    detail: str = ""
    duration_ms: int = 0
    reused: bool = False  # the connection had carried another request before

    @property
    def status(self) -> int | None:
        """The HTTP status; None where there was no answer."""
        return self.answer.status if self.answer is not None else None

    @property
    def code(self) -> int | float | None:
        """The answer's `error`, whatever the status; None if there is none that a sender can read."""
        if self.answer is None or not self.answer.complete:
            return None
        return answered_code(self.answer.body)

    @property
    def accepted(self) -> bool:
        """Whether a sender takes the answer as success."""
        return self.status == 200 and self.code == 0


def shown(exchange: Exchange, mask: Mask, body: str | None = None) -> dict[str, Any]:
    """Both sides as JSON for a report; `body` is the request's body if the caller has masked it already."""
    asked = exchange.asked
    return {
        "request": {
            "method": asked.method,
            "url": shown_url(asked.url),
            "headers": {name: shown_header(name, value, mask) for name, value in asked.headers.items()},
            "body": mask.text_of(asked.body, complete=True) if body is None else body,
        },
        "answer": None if exchange.answer is None else shown_answer(exchange.answer, mask),
        "cause": exchange.cause or None,
        "detail": mask(exchange.detail) or None,
        "durationMs": exchange.duration_ms,
    }


def shown_answer(answer: Answer, mask: Mask) -> dict[str, Any]:
    """An answer for a report, with secrets masked."""
    return {
        "status": answer.status,
        "headers": {
            name: mask(shown_url(answer.headers[name]) if name == "Location" else answer.headers[name])
            for name in ANSWER_HEADERS
            if name in answer.headers
        },
        "body": mask.text_of(answer.body, complete=answer.complete),
        "complete": answer.complete,
    }
