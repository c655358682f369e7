"""The daemon does what the files in docs/vectors say; independent libraries compute the same hashes and signatures."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from endpoints import to
from support import serving

from lmdaemon.config.values import whsec
from lmdaemon.delivery.sender import request_headers
from lmdaemon.dialects import SHIPPED, hash_of, parse
from lmdaemon.retry import judge

VECTORS = Path(__file__).parents[2] / "docs" / "vectors"


def read(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


async def answered(tmp_path: Path, document: Any, entries: list[Any]) -> list[dict[str, int]]:
    """What a whole daemon with an operator for each dialect answers to each request."""
    for name in ("token", "hashKey"):
        (tmp_path / name).write_text(document[name])
        (tmp_path / name).chmod(0o600)
    operators = [
        f'[operators."{name}"]\nprovider_id = "{document["providerId"]}"\naccept = ["{name}"]\nendpoint = "/{name}/x"\n'
        + ('token_check = "partner"\npartner_token_file = "token"\n' if "token" in dialect.required else "")
        + ('hash_key_file = "hashKey"\n' if "hash" in dialect.fields else "")
        for name, dialect in SHIPPED.items()
    ]
    found: list[dict[str, int]] = []
    async with serving(tmp_path, "".join(operators)) as s:
        for entry in entries:
            headers = {"Content-Type": entry["contentType"]}
            url = f"{s.server}/{entry['dialect']}/x"
            async with s.client.post(url, data=entry["body"].encode(), headers=headers) as answer:
                found.append({"status": answer.status, "error": (await answer.json())["error"]})
    return found


@pytest.mark.parametrize("name", ["notices", "refusals"])
async def test_a_daemon_answers_every_request_as_the_file_says(tmp_path: Path, name: str) -> None:
    """One daemon would refuse a notice for a session of another player. So each player's requests go to a daemon of
    their own.
    """
    document = read(name)
    seen = 0
    for number, player in enumerate({entry.get("playerId") for entry in document[name]}):
        entries = [entry for entry in document[name] if entry.get("playerId") == player]
        (directory := tmp_path / str(number)).mkdir()
        for entry, answer in zip(entries, await answered(directory, document, entries), strict=True):
            assert answer == entry["answer"], f"{entry['dialect']}: {entry['name']}"
            seen += 1
    assert seen == len(document[name]) > 15


def test_every_notice_is_read_as_the_ids_that_the_file_says() -> None:
    for entry in read("notices")["notices"]:
        dialect = SHIPPED[entry["dialect"]]
        parsed = parse(entry["body"].encode(), dialect.content, [dialect])
        assert (parsed.session_id, parsed.player_id) == (entry["sessionId"], entry["playerId"]), entry["name"]


def test_every_hash_is_the_md5_of_what_the_page_says() -> None:
    for entry in read("hashes")["hashes"]:
        joined = "&".join(f"{name}={entry['fields'][name]}" for name in sorted(entry["fields"])) + entry["secret"]
        assert hashlib.md5(joined.encode()).hexdigest() == entry["hash"]
        assert hash_of(entry["fields"].items(), "hash", entry["secret"]) == entry["hash"]


def test_every_signature_is_what_we_send_and_what_others_compute() -> None:
    for entry in read("signatures")["signatures"]:
        operator = to("http://127.0.0.1/", signing_keys=(whsec(entry["secret"]),))
        stamp = int(entry["webhook-timestamp"])
        sent = request_headers(operator, entry["webhook-id"], entry["body"].encode(), stamp)
        names = ("webhook-id", "webhook-timestamp", "webhook-signature")
        assert {name: sent[name] for name in names} == {name: entry[name] for name in names}
        theirs = standardwebhooks.Webhook(entry["secret"])
        signed = theirs.sign(entry["webhook-id"], datetime.fromtimestamp(stamp, UTC), entry["body"])
        assert signed == entry["webhook-signature"]


def test_every_answer_is_judged_as_the_file_says() -> None:
    entries = read("answers")["answers"]
    for entry in entries:
        final = SHIPPED[entry["dialect"]].codes.final
        found = judge(entry["status"], entry["body"].encode(), now_s=0, final=final)
        assert found.verdict == entry["verdict"], entry["name"]
    assert {entry["verdict"] for entry in entries} == {"delivered", "retry", "final", "hold"}
