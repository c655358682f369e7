"""Errors of the private side as problem documents (RFC 9457), each with a type that a client can decide by. Pure.

Several errors can have the same status and need different reactions, so each has a `code`.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from aiohttp import web
from msgspec import UNSET

from lmdaemon import shapes
from lmdaemon.web.documents import to_json
from lmdaemon.web.requests import RETRY_AFTER_S

TYPE = "urn:lmdaemon:problem:"


class Kind(NamedTuple):
    """A kind of error: its status, what it means, and what a client does then."""

    status: int
    meaning: str
    to_do: str


_MISTAKE = "Mend the client: the same request is refused again."
KINDS = {
    "invalid": Kind(400, "Something in the request breaks its rule; `detail` has place, rule and value.", _MISTAKE),
    "unauthorized": Kind(401, "No valid bearer token was given, and one is configured.", "Give the token."),
    "read-only": Kind(403, "The token may only read.", "Use a token of `token_file`."),
    "cross-origin": Kind(
        403, "A change with the Origin of another address, and no token is configured.", "Configure a token."
    ),
    "unknown-path": Kind(404, "Nothing is served at this path.", _MISTAKE),
    "unknown-operator": Kind(
        404,
        "No operator of this name is configured.",
        "Compare the name with the configuration; do not open the session again. Go on with touches.",
    ),
    "unknown-session": Kind(
        404,
        "No session has this id. After a restore, those opened since the backup are unknown.",
        "If the game is still played, open it again with the same id.",
    ),
    "unknown-delivery": Kind(404, "No delivery has this id.", "Look it up again; old ones are pruned."),
    "method-not-allowed": Kind(405, "The path has other methods; `Allow` names them.", _MISTAKE),
    "too-slow": Kind(408, "The body came too slowly or broke off.", "Try again."),
    "differs": Kind(
        409,
        "The session is open with another playerId or token.",
        "Use a new id: ids must be unique, and a session keeps the token that it was opened with.",
    ),
    "ended": Kind(
        409,
        "The session has ended; `session` shows it. 409 to an opening, 410 to a touch.",
        "Stop playing under this id. A player who goes on needs a session with a new id.",
    ),
    "busy": Kind(
        409,
        "Another call of this kind is under way for this operator, or for too many operators.",
        "Wait until it has ended.",
    ),
    "not-dead": Kind(409, "Only a dead delivery can be retried; `detail` has its state.", "Nothing."),
    "cannot-be-sent": Kind(409, "A fact that the dialect must send is not known.", "Nothing: it can never be sent."),
    "no-url": Kind(409, "The operator has no URL to send to.", "Configure `url`."),
    "nothing-to-send": Kind(
        409, "No delivery to the operator's URL waits, except those under way already.", "Nothing."
    ),
    "too-large": Kind(413, "The body is too long.", "Send less at once."),
    "unsupported-media-type": Kind(415, "The body is not application/json, or is compressed.", _MISTAKE),
    "expectation-failed": Kind(417, "An `Expect` other than `100-continue`.", _MISTAKE),
    "misdirected": Kind(
        421,
        "Host is neither loopback nor the configured address, and no token is configured.",
        "Use such a Host, or configure a token.",
    ),
    "internal-error": Kind(500, "A bug; the log has its traceback.", "Try again, with growing waits. Report it."),
    "too-many-listeners": Kind(
        503,
        "Too many clients listen to events already, or the daemon is stopping.",
        "Try again after `Retry-After` seconds.",
    ),
    "cannot-store": Kind(
        503,
        "Nothing can be stored or read now, and this call has stored nothing. No session gets idle meanwhile.",
        "Try again after `Retry-After` seconds, until it succeeds.",
    ),
}


NO_URL = "no url is configured for this operator"  # detail of `no-url`


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An answer that is an error: a code of KINDS, a detail for people, and the session that it is about. `status`
    is used instead of the status of the code's kind.
    """

    def __init__(
        self, code: str, detail: str, session: shapes.Session | None = None, *, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status or KINDS[code].status
        self.body = shapes.Problem(
            type=TYPE + code,
            title=HTTPStatus(self.status).phrase.replace("Request Entity Too Large", "Content Too Large"),
            status=self.status,
            detail=detail,
            code=code,
            session=UNSET if session is None else session,
        )

    def answer(self, headers: Mapping[str, str] | None = None) -> web.Response:
        """The problem as an HTTP answer, with the headers of its status and those given."""
        of_status = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": RETRY_AFTER_S}}.get(self.status, {})
        return web.Response(
            body=to_json(self.body),
            status=self.status,
            headers={**of_status, **(headers or {})},
            content_type="application/problem+json",
        )


def invalid(detail: str) -> Problem:
    """400: the request is malformed."""
    return Problem("invalid", detail)


def unknown_session() -> Problem:
    """404: there is no such session."""
    return Problem("unknown-session", "no session has this id")


def ended(session: shapes.Session | None, status: int) -> Problem:
    """409 to an opening, 410 to a touch: the session has ended."""
    return Problem("ended", "the session has ended", session, status=status)
