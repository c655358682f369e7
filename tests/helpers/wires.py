"""Notices as the page of each dialect publishes them, and functions that send them to a whole daemon and read its
file.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from support import Serving

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
V4 = "/V4/SessionExpired"
SECRET = "testKey"
TOKEN = "fSYFZMScpZ01FhR26r59GexREh1xHgEY"

# A published shape that is no shipped dialect. It has a code of its own for every meaning.
OLD = """
[dialects.old]
path = "/old/SessionExpired"
fields = { provider = "provider", session = "game", player = "PlayerId", token = "key", request = "rid", hash = "sum" }
required = ["provider", "session", "player", "hash"]
codes = { bad_parameters = 71, bad_token = 72, bad_hash = 73, unknown_session = 74, player_mismatch = 75, retry = 76 }
"""


@dataclass(frozen=True)
class Wire:
    """A dialect as its page publishes it. It is written down here a second time, so that the daemon's own table is
    checked.
    """

    path: str
    names: Mapping[str, str]
    codes: Mapping[str, int]
    content: str = JSON

    def fields(self, **changes: Any) -> dict[str, Any]:
        """The fields of a notice by their names on the wire. `changes` are by meaning; None leaves a field out."""
        facts = {
            "provider": "luckymonaco",
            "session": "s",
            "player": "p",
            "token": TOKEN,
            "request": "0" * 32,
        } | changes
        fields = {name: facts[meaning] for meaning, name in self.names.items() if facts.get(meaning) is not None}
        return fields | changes.get("extra", {})

    def body(self, **changes: Any) -> bytes:
        """The body of a notice. Its hash is right unless `changes` gives one."""
        fields = self.fields(**changes)
        if "hash" in self.names:
            text = "&".join(f"{name}={fields[name]}" for name in sorted(fields) if name != self.names["hash"])
            fields.setdefault(self.names["hash"], hashlib.md5(f"{text}{SECRET}".encode()).hexdigest())
        return json.dumps(fields).encode() if self.content == JSON else urlencode(fields).encode()


LATER = {"provider": "providerId", "session": "sessionId", "player": "userId", "request": "uuid"}
LATER_CODES = {"bad_parameters": 57, "unknown_session": 55, "player_mismatch": 57, "retry": 998}
WIRES = {
    "v4": Wire(
        V4,
        {"provider": "providerId", "session": "sessionId", "player": "externalPlayerId", "token": "token"},
        {"bad_parameters": 7, "bad_token": 7, "unknown_session": 7, "player_mismatch": 7, "retry": 100},
    ),
    "v4.01": Wire(V4, LATER, LATER_CODES),
    "v4.02": Wire("/v4/SessionExpired", LATER, LATER_CODES),
    "v1": Wire("/v1/SessionExpired", LATER, LATER_CODES),
    "pragmatic": Wire(
        "/sessionexpired",
        {"hash": "hash", "provider": "providerId", "session": "sessionId", "player": "playerId", "token": "token"},
        {"bad_parameters": 7, "bad_token": 4, "bad_hash": 5, "unknown_session": 7, "player_mismatch": 2, "retry": 100},
        FORM,
    ),
    "old": Wire(
        "/old/SessionExpired",
        {"provider": "provider", "session": "game", "player": "PlayerId", "token": "key", "hash": "sum"},
        {
            "bad_parameters": 71,
            "bad_token": 72,
            "bad_hash": 73,
            "unknown_session": 74,
            "player_mismatch": 75,
            "retry": 76,
        },
    ),
}
V4_WIRE = WIRES["v4"]


def operator(*accept: str, name: str = "acme", **keys: Any) -> str:
    """The table `[operators.NAME]`, with the secrets that its dialects need."""
    accept = accept or ("v4",)
    values: dict[str, Any] = {"provider_id": "luckymonaco", "accept": accept} | keys
    if any("hash" in WIRES[one].names for one in accept):
        values["hash_key_file"] = "hash.key"
    if keys.get("token_check") == "partner":
        values["partner_token_file"] = "partner.tokens"
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return f"\n[operators.{name}]\n{table}" + (OLD if "old" in accept else "")


def write_secrets(directory: Path) -> None:
    """Writes the secret files that `operator` names."""
    for name, text in {"hash.key": f"{SECRET}\n", "partner.tokens": f"first-secret\n{TOKEN}\nthïrd\n"}.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The code of the answer, which must have the members `error` and `description` and no other."""
        answer = self.json
        assert list(answer) == ["error", "description"]
        assert type(answer["error"]) is int
        assert type(answer["description"]) is str
        return answer["error"]


async def send(s: Serving, body: Any, path: str = V4, content: str = JSON, **headers: str) -> Answer:
    """Posts a body as it is. Header names have underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with s.client.post(s.server + path, data=body, headers={"Content-Type": content} | named) as response:
        return Answer(response.status, await response.read(), response.headers)


async def notify(s: Serving, wire: Wire = V4_WIRE, **changes: Any) -> Answer:
    return await send(s, wire.body(**changes), wire.path, wire.content)


async def open_session(s: Serving, session_id: str = "s", player: str = "p", token: str | None = TOKEN) -> None:
    url = f"{s.api}/v1/operators/acme/sessions/{session_id}"
    async with s.client.put(url, json={"playerId": player, "token": token}) as response:
        assert response.status == 201


def query(directory: Path, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """Reads rows from the SQLite file, over a separate connection."""
    with closing(sqlite3.connect(f"file:{directory / 'lmdaemon.sqlite3'}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, arguments).fetchall()


def sessions(directory: Path) -> list[tuple[Any, ...]]:
    return query(directory, "SELECT operator, session_id, player_id, reason FROM session ORDER BY id")
