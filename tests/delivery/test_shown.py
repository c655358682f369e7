"""A request as it may be shown: as it is sent, but with every secret masked."""

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from support import load, operator_table

from lmdaemon.config.settings import Operator
from lmdaemon.delivery import sinks
from lmdaemon.delivery.shown import Request, request_of
from lmdaemon.model import Delivery
from lmdaemon.workbench.trial import made_up

TOKEN = "tok-3n-of-the-player"
SECRETS = ("us-er", "pa-ss-word", "in-the-query", "the-hash-key", TOKEN)
URL = "https://us-er:pa-ss-word@wallet.example/V4/SessionExpired?key=in-the-query&bare-in-the-query"


def operator_of(directory: Path, **keys: Any) -> Operator:
    (directory / "hash").write_text("the-hash-key")
    (directory / "signing").write_text("whsec_" + "c2VjcmV0" * 4)
    table = operator_table("acme", URL, signing_secret_file="signing", **keys)
    return load(directory / "config.toml", table).operators["acme"]


def row(body: bytes, **facts: Any) -> Delivery:
    known = dict.fromkeys(Delivery._fields) | {"id": 7, "nonce": "0" * 20, "token": TOKEN, "sink": "http"}
    return Delivery(**(known | {"body_digest": "d", "body": body} | facts))


def shown_of(operator: Operator, body: bytes, **facts: Any) -> Request:
    found = request_of(operator, row(body, **facts), 1_700_000_000.5)
    assert found is not None
    return found


def body_of(operator: Operator, player: str = "it's p&1") -> bytes:
    return sinks.compose(operator, made_up(operator, "s-1", player, TOKEN))


def test_the_request_is_shown_as_sent_without_a_secret(tmp_path: Path) -> None:
    found = shown_of(operator := operator_of(tmp_path), body_of(operator))
    assert found.url == "https://wallet.example/V4/SessionExpired?key=***&***"
    assert found.headers["Authorization"] == "Basic ***"
    assert found.headers["webhook-id"] == "msg_7_" + "0" * 20
    assert found.headers["webhook-timestamp"] == "1700000000"
    assert found.headers["webhook-signature"] == "v1,***"
    assert json.loads(found.body or "") == {
        "providerId": "acme",
        "sessionId": "s-1",
        "externalPlayerId": "it's p&1",
        "token": "***",
    }
    words = shlex.split(found.curl)
    assert words[:2] == ["curl", found.url]
    assert words[-2:] == ["--data-binary", found.body]
    assert "Content-Type: application/json" in words
    assert not [word for word in words if word.startswith(("Host:", "Content-Length:", "Accept:"))]
    for secret in SECRETS:
        assert secret not in repr(found) + found.curl


def test_in_a_form_the_hash_is_masked_too(tmp_path: Path) -> None:
    operator = operator_of(tmp_path, dialect="pragmatic", accept=["pragmatic"], hash_key_file="hash")
    found = shown_of(operator, body_of(operator, "it's p1"))
    assert parse_qs(found.body or "") == {
        "hash": ["***"],
        "providerId": ["acme"],
        "sessionId": ["s-1"],
        "playerId": ["it's p1"],
        "token": ["***"],
    }


@pytest.mark.parametrize("old", ["v4", "pragmatic"])
def test_a_body_of_a_dialect_no_longer_in_force_shows_no_secret(tmp_path: Path, old: str) -> None:
    """The delivery is older than a reload that changed `dialect`. Every field that is not known to be an id is
    masked.
    """
    before = operator_of(tmp_path, dialect=old, accept=[old], hash_key_file="hash")
    body = sinks.compose(before, made_up(before, "s-1", "p", TOKEN))
    now = operator_of(tmp_path, dialect="v4.01", accept=["v4.01"])
    shown = shown_of(now, body).body or ""
    assert "s-1" in shown
    assert TOKEN not in shown
    for value in parse_qs(body.decode()).get("hash", []):
        assert value not in shown


def test_once_delivered_the_body_is_not_kept_and_so_not_shown(tmp_path: Path) -> None:
    found = shown_of(operator_of(tmp_path), b"")
    assert found.body is None
    assert "Content-Length" not in found.headers
    assert shlex.split(found.curl)[-1] == "***"


def test_nothing_is_shown_of_what_is_not_sent_by_http(tmp_path: Path) -> None:
    operator = operator_of(tmp_path)
    assert request_of(operator, row(b"", sink="plugin:lock"), 0) is None
    assert request_of(operator, row(b"", body_digest=None), 0) is None
    silent = load(tmp_path / "config.toml", '[operators.acme]\nprovider_id = "acme"\n').operators["acme"]
    assert request_of(silent, row(b"{}"), 0) is None
