"""Makes the notices that `check` and `simulate provider` send, valid and invalid, in any dialect. Ids begin with
`lmcheck-` or `lmsim-`, so that people who find one in a database or a log know where it came from.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sender import request_headers
from lmdaemon.dialects import Dialect, hash_of
from lmdaemon.masks import Mask, secrets_of
from lmdaemon.model import ID_MAX

Fields = dict[str, Any]

# The example on the provider's page, which lacks its commas
PAGE_SAMPLE = b"""{
 "providerId": "luckymonaco"
 "sessionId": "6fd2d6f3bb8f4c5a9fadf15d81206af2"
 "externalPlayerId": "123456"
 "token" : "fSYFZMScpZ01FhR26r59GexREh1xHgEY"
}"""
HOSTILE_IDS = (
    "Ünï-✓-漢字-😀",
    "a\"b'c`d\\e",
    "100%s %d %n %25",
    "<script>alert(1)</script>",
    "'; DROP TABLE sessions; --",
)


SESSIONS_NEEDED = 40  # how many known sessions all checks except the burst need


class NoSession(Exception):  # noqa: N818 - a result
    """All known sessions have been used."""


class Notices:
    """Makes the bodies of one run. `player` and `token` may be a real test player's, `sessions` the ids of open
    sessions, each of which is used once; values that are not given are made up.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        run: str,
        player: str | None = None,
        token: str | None = None,
        sessions: Sequence[str] | None = None,
        prefix: str = "lmcheck",
    ) -> None:
        self.operator = operator
        self.dialect: Dialect = operator.sends
        self.player = player or f"{prefix}-{run}-player"
        self.token = token or f"made-up-{uuid4().hex}"
        self._prefix = f"{prefix}-{run}"
        self._known = None if sessions is None else list(sessions)
        self._made = 0
        self._hashes: set[str] = set()

    @property
    def is_hashed(self) -> bool:
        """Whether notices carry a hash: the dialect has one, and its key is known."""
        return "hash" in self.dialect.fields and self.operator.hash_key is not None

    @property
    def has_known(self) -> bool:
        """Whether known sessions are sent, so that the endpoint may refuse unknown ones."""
        return self._known is not None

    def session(self) -> str:
        """A session id that has not been used yet. Raises NoSession."""
        if self._known is None:
            return self.unknown_session()
        if not self._known:
            raise NoSession(f"all test sessions were used; a whole run needs about {SESSIONS_NEEDED}")
        return self._known.pop(0)

    def unknown_session(self) -> str:
        """A session id that nobody has seen."""
        self._made += 1
        return f"{self._prefix}-{self._made}"

    def webhook_id(self) -> str:
        """A new id for the header `webhook-id`."""
        self._made += 1
        return f"{self._prefix.replace('-', '_')}_{self._made}"

    def fields(self, session: str | None = None, **facts: Any) -> Fields:
        """The fields of one notice by their names on the wire, in the dialect's order, without the hash. `facts` has
        values by their meaning.
        """
        known: dict[str, Any] = {
            "provider": self.operator.provider_id,
            "session": session or self.session(),
            "player": self.player,
            "token": self.token,
            "request": f"lmcheck-{uuid4().hex[:24]}",
        } | facts
        return {name: known[meaning] for meaning, name in self.dialect.fields.items() if meaning in known}

    def body(self, fields: Mapping[str, Any], *, key: str | None = None) -> bytes:
        """The notice as bytes, with its correct hash; `key` replaces the operator's key."""
        return self.written(self.hashed(fields, key=key))

    def hashed(self, fields: Mapping[str, Any], *, key: str | None = None) -> Fields:
        """The fields, by their names on the wire, with a correct hash; `key` replaces the operator's key."""
        if not self.is_hashed:
            return dict(fields)
        name = self.dialect.fields["hash"]
        digest = hash_of(fields.items(), name, key or self.operator.hash_key or "")
        self._hashes.add(digest)
        return {name: digest} | {other: value for other, value in fields.items() if other != name}

    def written(self, fields: Mapping[str, Any]) -> bytes:
        """The given fields as bytes: JSON or a form, as the dialect has it."""
        if self.dialect.content == "json":
            return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        return urlencode(fields).encode()

    def rewritten(self, fields: Mapping[str, Any]) -> bytes:
        """The same notice with its fields in reverse order and, in JSON, with white space."""
        turned = dict(reversed(self.hashed(fields).items()))
        if self.dialect.content == "json":
            return ("\r\n " + json.dumps(turned, indent="\t", ensure_ascii=True) + " \n").encode()
        return urlencode(turned).encode()

    def twice(self, fields: Mapping[str, Any], meaning: str, other: str) -> bytes:
        """A notice that has one field twice, with different values."""
        whole = self.body(fields)
        name = self.dialect.fields[meaning]
        if self.dialect.content == "json":
            return whole[:-1] + f',"{name}":{json.dumps(other)}}}'.encode()
        return whole + b"&" + urlencode({name: other}).encode()

    def malformed(self) -> Sequence[tuple[str, bytes]]:
        """Bodies that are not a notice in any dialect with this content type, and what is wrong with each."""
        if self.dialect.content == "json":
            whole = self.body(self.fields())
            return (
                ("commas are missing, as in the page's own sample", PAGE_SAMPLE),
                ("it breaks off", whole[:-5]),
                ("it is nested 2,000 deep", b'{"a":' * 2000 + b"1" + b"}" * 2000),
                ("it is not UTF-8", b'{"sessionId":"\xff\xfe"}'),
            )
        return (
            ("it is not UTF-8", b"sessionId=%FF%FE&providerId=x"),
            ("it is JSON", b'{"sessionId":"lmcheck"}'),
        )

    def headers(self, body: bytes, now_s: float, webhook_id: str | None = None) -> dict[str, str]:
        """The headers that the daemon would send with a body of its own; this one may be malformed."""
        made = request_headers(self.operator, webhook_id or self.webhook_id(), body, now_s)
        return made | {"Content-Type": self.operator.sends.content_type}

    def mask(self) -> Mask:
        """A mask for the secrets of all notices sent so far."""
        return Mask((self.token, *self._hashes, *secrets_of(self.operator)))


LONG_ID = "lmcheck-" + "x" * (ID_MAX - len("lmcheck-"))
