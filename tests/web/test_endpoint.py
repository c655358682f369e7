"""The public endpoint over real HTTP on a whole daemon: every dialect, every code, every status, every point that the
provider's page leaves open.
"""

import asyncio
import gzip
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from chance import examples
from clocks import HandClock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LISTEN, SUCCESS, Serving, hear, raw_connection, scrape, serving, until
from wires import (
    FORM,
    JSON,
    LATER,
    SECRET,
    TOKEN,
    V4,
    V4_WIRE,
    WIRES,
    Answer,
    notify,
    open_session,
    operator,
    query,
    send,
    sessions,
    write_secrets,
)

from lmdaemon.limits import Limits, StoreLimits

EVERY = pytest.mark.parametrize("name", WIRES)
WITH_TOKEN = pytest.mark.parametrize("name", [name for name, wire in WIRES.items() if "token" in wire.names])
WITH_HASH = pytest.mark.parametrize("name", [name for name, wire in WIRES.items() if "hash" in wire.names])


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path) -> None:
    write_secrets(tmp_path)


IMPATIENT = Limits(store=StoreLimits(busy_timeout_s=0.05))


def write_lock(directory: Path) -> closing[sqlite3.Connection]:
    """Another program that is in the middle of a write transaction on the daemon's file, until the connection is
    closed.
    """
    connection = sqlite3.connect(directory / "lmdaemon.sqlite3", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return closing(connection)


class TestDialects:
    """Each dialect with every code that the daemon itself can answer. For the codes of plug-ins see test_plugins."""

    @EVERY
    async def test_a_notice_is_answered_zero_and_ends_the_session(self, tmp_path: Path, name: str) -> None:
        async with serving(tmp_path, operator(name)) as s:
            await open_session(s)
            answer = await notify(s, WIRES[name])
            assert (answer.status, answer.json) == (200, SUCCESS)
            assert answer.headers["Content-Type"] == JSON
            assert sessions(tmp_path) == [("acme", "s", "p", "reported")]

    @EVERY
    @pytest.mark.parametrize("absent", ["provider", "session", "player", "request", "token"])
    async def test_a_required_field_that_is_absent_or_empty_is_bad_parameters(
        self, tmp_path: Path, name: str, absent: str
    ) -> None:
        wire = WIRES[name]
        required = absent in wire.names and (name not in ("pragmatic", "old") or absent != "token")
        async with serving(tmp_path, operator(name)) as s:
            for value in (None, ""):
                answer = await notify(s, wire, **{absent: value})
                if required:
                    assert (answer.status, answer.error) == (200, wire.codes["bad_parameters"])
                    assert wire.names[absent] in answer.json["description"]
                else:
                    assert answer.json == SUCCESS
            assert len(sessions(tmp_path)) == (not required)

    @EVERY
    async def test_an_unknown_provider_is_bad_parameters(self, tmp_path: Path, name: str) -> None:
        async with serving(tmp_path, operator(name)) as s:
            answer = await notify(s, WIRES[name], provider="somebody")
            assert (answer.status, answer.error) == (200, WIRES[name].codes["bad_parameters"])
            assert sessions(tmp_path) == []

    @EVERY
    async def test_an_unreadable_body_is_bad_parameters(self, tmp_path: Path, name: str) -> None:
        wire = WIRES[name]
        async with serving(tmp_path, operator(name)) as s:
            for body in (b"", b"{", b"\xff", b"%FF=%FF"):
                answer = await send(s, body, wire.path, wire.content)
                assert (answer.status, answer.error) == (200, wire.codes["bad_parameters"])

    @WITH_TOKEN
    @pytest.mark.parametrize("mode", ["partner", "session"])
    async def test_a_wrong_token_is_bad_token(self, tmp_path: Path, name: str, mode: str) -> None:
        async with serving(tmp_path, operator(name, token_check=mode)) as s:
            await open_session(s)
            answer = await notify(s, WIRES[name], token="wrong")
            assert (answer.status, answer.error) == (200, WIRES[name].codes["bad_token"])
            assert sessions(tmp_path) == [("acme", "s", "p", None)]
            assert (await notify(s, WIRES[name])).json == SUCCESS

    @WITH_HASH
    @pytest.mark.parametrize("given", ["0" * 32, "none", "é"])
    async def test_a_wrong_hash_is_bad_hash_and_the_right_one_is_not_told(
        self, tmp_path: Path, name: str, given: str
    ) -> None:
        wire = WIRES[name]
        right = json.loads(WIRES["old"].body())["sum"] if name == "old" else wire.body().partition(b"hash=")[2].decode()
        with hear() as events:
            async with serving(tmp_path, operator(name)) as s:
                answer = await notify(s, wire, hash=given)
                assert (answer.status, answer.error) == (200, wire.codes["bad_hash"])
                assert right.encode() not in answer.body
                assert sessions(tmp_path) == []
        assert any(event.name == "notice.refused" for event in events)
        assert right not in repr(events)
        assert SECRET not in repr(events)

    @WITH_HASH
    async def test_a_hash_is_required(self, tmp_path: Path, name: str) -> None:
        wire = WIRES[name]
        fields = wire.fields()
        body = json.dumps(fields).encode() if wire.content == JSON else urlencode(fields).encode()
        async with serving(tmp_path, operator(name)) as s:
            answer = await send(s, body, wire.path, wire.content)
            assert (answer.status, answer.error) == (200, wire.codes["bad_parameters"])

    @WITH_HASH
    async def test_the_hash_covers_fields_nobody_knows_and_empty_ones(self, tmp_path: Path, name: str) -> None:
        wire = WIRES[name]
        extra = {"added": "tomorrow + more", "empty": ""}
        async with serving(tmp_path, operator(name)) as s:
            assert (await notify(s, wire, extra=extra)).json == SUCCESS
            hash_of_less = json.loads(WIRES["old"].body(session="x"))["sum"] if name == "old" else "0" * 32
            answer = await notify(s, wire, session="x", extra=extra, hash=hash_of_less)
            assert answer.error == wire.codes["bad_hash"]

    @WITH_HASH
    async def test_a_captured_hash_passes_for_no_other_fields(self, tmp_path: Path, name: str) -> None:
        """The hash is computed over the joined fields without marks between them. Other fields that join to the same
        text must be refused.
        """
        wire = WIRES[name]
        session, token, provider, player = (
            wire.names[meaning] for meaning in ("session", "token", "provider", "player")
        )
        fields = wire.fields(session="S1", token="T1")
        hash_name = wire.names["hash"]
        names = sorted(fields)
        text = "&".join(f"{one}={fields[one]}" for one in names) + SECRET
        assert text.count("=") == 4
        good = hashlib.md5(text.encode()).hexdigest()
        moved = dict(fields)
        # This field's value now contains the token, and the token field is not sent
        before = names[names.index(token) - 1]
        moved[before] = f"{fields[before]}&{token}={moved.pop(token)}"
        async with serving(tmp_path, operator(name)) as s:
            for forged in (moved, {provider: "luckymonaco", player: f"p&{session}=V", session: "V", token: "x"}):
                body = forged | {hash_name: good}
                raw = json.dumps(body).encode() if wire.content == JSON else urlencode(body).encode()
                answer = await send(s, raw, wire.path, wire.content)
                assert (answer.status, answer.error) == (200, wire.codes["bad_parameters"])
                assert "must have no &" in answer.json["description"]
            assert sessions(tmp_path) == []
            assert (await notify(s, wire, session="S1", token="T1")).json == SUCCESS

    async def test_the_ancestors_golden_vector_is_accepted(self, tmp_path: Path) -> None:
        fields = {
            "playerId": "123456",
            "providerId": "PragmaticPlay",
            "sessionId": "6fd2d6f3bb8f4c5a9fadf15d81206af2",
            "hash": "c46d5b113e81d306831a06765e12067f",
        }
        async with serving(tmp_path, operator("pragmatic", provider_id="PragmaticPlay")) as s:
            assert (await send(s, urlencode(fields), "/sessionexpired", FORM)).json == SUCCESS

    @EVERY
    async def test_an_unknown_session_is_refused_where_the_policy_says_so(self, tmp_path: Path, name: str) -> None:
        async with serving(tmp_path, operator(name, unknown_session="reject")) as s:
            answer = await notify(s, WIRES[name])
            assert (answer.status, answer.error) == (200, WIRES[name].codes["unknown_session"])
            assert sessions(tmp_path) == []
            await open_session(s)
            assert (await notify(s, WIRES[name])).json == SUCCESS

    @EVERY
    @pytest.mark.parametrize("ended", [False, True])
    async def test_another_player_is_refused_and_the_session_stays_as_it_is(
        self, tmp_path: Path, name: str, ended: bool
    ) -> None:
        async with serving(tmp_path, operator(name)) as s:
            await open_session(s)
            if ended:
                await notify(s, WIRES[name])
            before = query(tmp_path, "SELECT * FROM session")
            answer = await notify(s, WIRES[name], player="another")
            assert (answer.status, answer.error) == (200, WIRES[name].codes["player_mismatch"])
            assert query(tmp_path, "SELECT * FROM session") == before

    @EVERY
    async def test_what_cannot_be_stored_is_answered_503_with_the_code_for_retry(
        self, tmp_path: Path, name: str
    ) -> None:
        async with serving(tmp_path, operator(name), limits=IMPATIENT) as s:
            with write_lock(tmp_path):
                answer = await notify(s, WIRES[name])
                assert (answer.status, answer.error) == (503, WIRES[name].codes["retry"])
                assert int(answer.headers["Retry-After"]) > 0
                assert sessions(tmp_path) == []
            assert (await notify(s, WIRES[name])).json == SUCCESS
            assert len(sessions(tmp_path)) == 1


class TestSharedPaths:
    @pytest.mark.parametrize("order", [("v4", "v4.01"), ("v4.01", "v4")])
    async def test_two_dialects_on_one_path_are_told_apart_by_their_keys(
        self, tmp_path: Path, order: tuple[str, str]
    ) -> None:
        async with serving(tmp_path, operator(*order)) as s:
            for name in order:
                assert (await notify(s, WIRES[name], session=name)).json == SUCCESS
                answer = await notify(s, WIRES[name], session=name, player="another")
                assert answer.error == WIRES[name].codes["player_mismatch"]
                assert (await notify(s, WIRES[name], session="")).error == WIRES[name].codes["bad_parameters"]
            assert len(sessions(tmp_path)) == 2

    @pytest.mark.parametrize("order", [("v4", "v4.01"), ("v4.01", "v4")])
    async def test_a_body_that_does_not_tell_gets_the_first_dialects_code(
        self, tmp_path: Path, order: tuple[str, str]
    ) -> None:
        first = WIRES[order[0]]
        async with serving(tmp_path, operator(*order)) as s:
            for body in (b"{", b"[]", b'{"providerId":"luckymonaco","sessionId":"s"'):
                assert (await send(s, body)).error == first.codes["bad_parameters"]
            assert (await send(s, b"{}", content="text/plain")).error == first.codes["bad_parameters"]

    @pytest.mark.parametrize(
        ("endpoint", "path", "code"),
        [
            (None, V4, 7),
            (None, "/v1/SessionExpired", 57),
            (None, "/old/SessionExpired/", 71),
            # A path that the operator has chosen belongs to none of its dialects
            ("/v1/SessionExpired", "/v1/SessionExpired", 7),
        ],
    )
    async def test_a_path_that_one_dialect_has_gets_the_codes_of_that(
        self, tmp_path: Path, endpoint: str | None, path: str, code: int
    ) -> None:
        keys = {} if endpoint is None else {"endpoint": endpoint}
        async with serving(tmp_path, operator("v4", "v1", "old", "pragmatic", **keys)) as s:
            for body in (b"{", b"[]", b"{}"):
                assert (await send(s, body, path)).error == code, body
            answers = [await send(s, b"{}", path, "text/plain"), await send(s, b" " * 17_000, path)]
            async with s.client.get(s.server + path) as response:
                answers.append(Answer(response.status, await response.read(), response.headers))
            assert [(answer.status, answer.error) for answer in answers] == [(415, code), (413, code), (405, code)]
            for name in ("v4", "v1", "old"):  # every accepted dialect is read at every path
                answer = await send(s, WIRES[name].body(session=name), path)
                assert answer.json == SUCCESS, name

    @pytest.mark.parametrize("name", ["v4", "v4.01"])
    @pytest.mark.parametrize("order", [("v4", "v4.01"), ("v4.01", "v4")])
    async def test_a_notice_that_cannot_be_stored_gets_its_own_dialects_code(
        self, tmp_path: Path, order: tuple[str, str], name: str
    ) -> None:
        async with serving(tmp_path, operator(*order), limits=IMPATIENT) as s:
            with write_lock(tmp_path):
                answer = await notify(s, WIRES[name])
                assert (answer.status, answer.error) == (503, WIRES[name].codes["retry"])

    async def test_a_form_and_json_on_one_path_are_told_apart_by_their_type(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator("v4.01", "pragmatic", endpoint="/both")) as s:
            for name in ("v4.01", "pragmatic"):
                wire = WIRES[name]
                assert (await send(s, wire.body(session=name), "/both", wire.content)).json == SUCCESS
                assert (await send(s, b"\xff", "/both", wire.content)).error == wire.codes["bad_parameters"]

    async def test_v4_01_v4_02_and_v1_are_served_side_by_side(self, tmp_path: Path) -> None:
        names = ("v4.01", "v4.02", "v1")
        async with serving(tmp_path, operator(*names)) as s:
            for name in names:
                assert (await notify(s, WIRES[name], session=name)).json == SUCCESS
            assert len(sessions(tmp_path)) == 3

    async def test_two_operators_share_a_path_by_their_provider_ids(self, tmp_path: Path) -> None:
        toml = operator(provider_id="one") + operator(name="other", provider_id="two")
        async with serving(tmp_path, toml) as s:
            for provider in ("one", "TWO"):
                assert (await notify(s, provider=provider)).json == SUCCESS
            assert (await notify(s, provider="three")).error == 7
            assert sessions(tmp_path) == [("acme", "s", "p", "reported"), ("other", "s", "p", "reported")]

    async def test_an_operator_takes_only_its_own_dialects_on_a_shared_path(self, tmp_path: Path) -> None:
        toml = operator("v4", provider_id="one") + operator("v4.01", name="other", provider_id="two")
        async with serving(tmp_path, toml) as s:
            assert (await notify(s, WIRES["v4.01"], provider="two")).json == SUCCESS
            assert (await notify(s, WIRES["v4"], provider="two", session="x")).error == 7
            assert (await notify(s, WIRES["v4.01"], provider="one", session="x")).error == 57
            assert sessions(tmp_path) == [("other", "s", "p", "reported")]

    async def test_each_operator_on_a_shared_path_has_its_own_allow_list(self, tmp_path: Path) -> None:
        toml = operator("v4", provider_id="one") + operator(
            "v4.01", name="other", provider_id="two", allow_from=["192.0.2.0/24"]
        )
        async with serving(tmp_path, toml) as s:
            assert (await notify(s, provider="one")).json == SUCCESS
            answer = await notify(s, WIRES["v4.01"], provider="two")
            assert (answer.status, answer.error) == (403, 57)
            assert sessions(tmp_path) == [("acme", "s", "p", "reported")]


class TestStatuses:
    @pytest.mark.parametrize(("networks", "status"), [(["127.0.0.1"], 200), (["::1", "192.0.2.0/24"], 403)])
    async def test_only_allowed_addresses_are_heard(self, tmp_path: Path, networks: list[str], status: int) -> None:
        async with serving(tmp_path, operator(allow_from=networks)) as s:
            answer = await notify(s)
            assert (answer.status, answer.error) == (status, 0 if status == 200 else 7)
            assert len(sessions(tmp_path)) == (status == 200)

    @pytest.mark.parametrize(
        ("forwarded", "status"),
        [
            ([], 403),
            (["192.0.2.7"], 200),
            (["192.0.2.7:5555"], 200),
            (["::ffff:192.0.2.7"], 200),
            (["203.0.113.9, 192.0.2.7"], 200),
            # Only the right-most address that is not trusted counts; what is left of it could be invented by the client
            (["192.0.2.7, 203.0.113.9"], 403),
            (["192.0.2.7, 10.0.0.1"], 200),
            (["192.0.2.7, 203.0.113.9, 10.0.0.1"], 403),
            (["203.0.113.9", "192.0.2.7"], 200),
            (["192.0.2.7", "203.0.113.9"], 403),
            (["10.0.0.1, 10.0.0.2"], 403),
            (["192.0.2.7, unknown"], 403),
            (["192.0.2.7,"], 403),
            ([""], 403),
        ],
    )
    async def test_behind_trusted_proxies_the_right_most_untrusted_address_counts(
        self, tmp_path: Path, forwarded: list[str], status: int
    ) -> None:
        server = '[server]\nlisten = "127.0.0.1:0"\ntrusted_proxies = ["127.0.0.0/8", "10.0.0.0/8"]\n'
        toml = server + '[api]\nlisten = "127.0.0.1:0"\n' + operator(allow_from=["192.0.2.0/24"])
        async with serving(tmp_path, toml) as s:
            headers = [("Content-Type", JSON), *(("X-Forwarded-For", value) for value in forwarded)]
            async with s.client.post(s.server + V4, data=V4_WIRE.body(), headers=headers) as response:
                assert response.status == status

    @pytest.mark.parametrize("proxies", ["[]", '["10.0.0.0/8"]'])
    @pytest.mark.parametrize("header", ["X_Forwarded_For", "Forwarded", "X_Real_IP"])
    async def test_a_spoofed_header_does_not_help(self, tmp_path: Path, proxies: str, header: str) -> None:
        server = f'[server]\nlisten = "127.0.0.1:0"\ntrusted_proxies = {proxies}\n[api]\nlisten = "127.0.0.1:0"\n'
        async with serving(tmp_path, server + operator(allow_from=["192.0.2.0/24"])) as s:
            address = "for=192.0.2.7" if header == "Forwarded" else "192.0.2.7"
            answer = await send(s, V4_WIRE.body(), **{header: address})
            assert (answer.status, answer.error) == (403, 7)
            assert sessions(tmp_path) == []

    async def test_every_unknown_path_answers_the_same_bytes(self, tmp_path: Path) -> None:
        hidden = operator("v1", name="hidden", endpoint="")
        paths = [
            "/",
            "/x",
            "/V4",
            f"{V4}/x",
            f"{V4}%2F",
            "/v1/SessionExpired",
            "/v1/operators",
            "/metrics",
            "/openapi.json",
        ]
        seen = set()
        async with serving(tmp_path, operator("v4.01") + hidden) as s:
            for path in paths:
                for method in ("GET", "POST", "DELETE", "OPTIONS"):
                    async with s.client.request(method, s.server + path, data=b"{}") as response:
                        kept = tuple(sorted((k, v) for k, v in response.headers.items() if k != "Date"))
                        seen.add((response.status, await response.read(), kept))
        ((status, body, headers),) = seen
        assert (status, json.loads(body)["error"], dict(headers)["Content-Type"]) == (404, 7, JSON)

    async def test_who_is_refused_after_the_body_was_read_is_logged_with_address(self, tmp_path: Path) -> None:
        """Only the body says to which operator the notice goes."""
        toml = operator() + operator(name="other", provider_id="other", allow_from=["192.0.2.0/24"])
        with hear() as events:
            async with serving(tmp_path, toml) as s:
                assert (await notify(s, provider="other")).status == 403
        assert [e.facts["address"] for e in events if e.name == "notice.not_taken"] == ["127.0.0.1"]

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
    async def test_another_method_is_405_and_told_which_is_allowed(self, tmp_path: Path, method: str) -> None:
        async with serving(tmp_path, operator("v4.01")) as s:
            async with s.client.request(method, s.server + V4) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
                body = await response.read()
                assert method == "HEAD" or json.loads(body) == {"error": 57, "description": "Method not allowed"}

    async def test_a_body_of_16_kib_is_taken_and_one_byte_more_is_not(self, tmp_path: Path) -> None:
        empty = len(V4_WIRE.body(extra={"pad": ""}))

        def body(size: int) -> bytes:
            return V4_WIRE.body(extra={"pad": "x" * (size - empty)})

        async def chunks(data: bytes) -> AsyncIterator[bytes]:
            for at in range(0, len(data), 1000):
                yield data[at : at + 1000]

        async with serving(tmp_path, operator()) as s:
            for announced in (True, False):
                big = body(16 * 1024 + 1)
                answer = await send(s, big if announced else chunks(big))
                assert (answer.status, answer.error) == (413, 7)
                assert sessions(tmp_path) == []
            for announced in (True, False):
                assert (await send(s, body(16 * 1024) if announced else chunks(body(16 * 1024)))).json == SUCCESS

    async def test_an_announced_flood_is_refused_before_it_is_sent(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(head("POST", V4, {"Content-Length": str(1 << 40)}))
            assert (await raw.answer()).status == 413

    @pytest.mark.parametrize(
        "content",
        [
            "application/json",
            "application/json; charset=UTF-8",
            "application/json;charset=utf-8",
            'Application/JSON; charset="utf-8"',
            "application/json; charset=utf8",
            "application/json; utf-8;",
            "application/json; charset=ISO-8859-1",
            "application/json; charset=utf-8; charset=latin-1",
            "application/json;",
        ],
    )
    async def test_json_in_utf_8_is_taken_whatever_its_parameters_say(self, tmp_path: Path, content: str) -> None:
        async with serving(tmp_path, operator()) as s:
            assert (await send(s, V4_WIRE.body(), content=content)).json == SUCCESS
            answer = await send(s, '{"providerId": "ü"}'.encode("latin-1"), content=content)
            assert (answer.status, answer.error) == (200, 7)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "text/plain",
            "text/json",
            "application/jsonx",
            "application/problem+json",
            FORM,
            "multipart/form-data; boundary=x",
            "*/*",
        ],
    )
    async def test_any_other_content_type_is_415(self, tmp_path: Path, content: str) -> None:
        async with serving(tmp_path, operator("v4.01")) as s:
            answer = await send(s, WIRES["v4.01"].body(), content=content)
            assert (answer.status, answer.error) == (415, 57)
            assert sessions(tmp_path) == []

    async def test_no_content_type_is_415(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            body = V4_WIRE.body()
            request = head("POST", V4, {"Content-Length": str(len(body))}).replace(
                b"Content-Type: application/json\r\n", b""
            )
            await raw.send(request + body)
            assert (await raw.answer()).status == 415

    async def test_json_is_415_where_only_a_form_is_accepted(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator("pragmatic")) as s:
            answer = await send(s, b"{}", "/sessionexpired", JSON)
            assert (answer.status, answer.error) == (415, 7)

    @pytest.mark.parametrize(
        "encoding", ["gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-unknown", "utf-8, gzip"]
    )
    async def test_a_content_encoding_that_packs_or_is_unknown_is_415(self, tmp_path: Path, encoding: str) -> None:
        body = V4_WIRE.body()
        packed = gzip.compress(body) if encoding == "gzip" else body
        request = head("POST", V4, {"Content-Length": str(len(packed)), "Content-Encoding": encoding})
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(request + packed)
            answer = await raw.answer()
            assert (answer.status, json.loads(answer.body)["error"]) == (415, 7)
            assert sessions(tmp_path) == []

    @pytest.mark.parametrize("encoding", ["", "identity", "UTF-8", "utf8", "iso-8859-1", "windows-1251"])
    async def test_a_content_encoding_that_packs_nothing_is_read(self, tmp_path: Path, encoding: str) -> None:
        body = V4_WIRE.body()
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(head("POST", V4, {"Content-Length": str(len(body)), "Content-Encoding": encoding}) + body)
            assert json.loads((await raw.answer()).body) == SUCCESS

    @pytest.mark.parametrize(
        ("headers", "seen"),
        [
            ({"Content-Type": 'text/xml; charset="x"'}, {"content_type": 'text/xml; charset="x"'}),
            ({"Content-Type": ""}, {"content_type": ""}),
            ({"Content-Type": "a/" + "b" * 300}, {"content_type": "a/" + "b" * 98}),
            ({"Content-Encoding": "gzip"}, {"content_encoding": "gzip"}),
            ({"Content-Encoding": "utf-8, " + "z" * 300}, {"content_encoding": "utf-8, " + "z" * 93}),
        ],
    )
    async def test_the_log_line_of_a_415_says_what_was_seen(
        self, tmp_path: Path, headers: dict[str, str], seen: dict[str, str]
    ) -> None:
        with hear() as events:
            async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
                await raw.send(head("POST", V4, {"Content-Length": "2"} | headers) + b"{}")
                assert (await raw.answer()).status == 415
        (facts,) = [event.facts for event in events if event.name == "notice.not_taken"]
        told = {name: value for name, value in facts.items() if name.startswith("content_") and value is not None}
        assert told == seen

    @pytest.mark.parametrize(
        ("forwarded", "address"),
        [
            ("203.0.113.9", "203.0.113.9"),
            ("x, 2001:db8::1", "2001:db8::1"),
            ("<script>", "unknown"),
            (None, "127.0.0.1"),
        ],
    )
    async def test_the_log_line_of_a_403_says_whose_address_was_refused(
        self, tmp_path: Path, forwarded: str | None, address: str
    ) -> None:
        server = '[server]\nlisten = "127.0.0.1:0"\ntrusted_proxies = ["127.0.0.0/8"]\n[api]\nlisten = "127.0.0.1:0"\n'
        one, other = (
            operator(allow_from=["192.0.2.0/24"]),
            operator(name="o", provider_id="x", allow_from=["192.0.2.0/24"]),
        )
        with hear() as events:
            async with serving(tmp_path, server + one + other) as s:
                headers = {} if forwarded is None else {"X_Forwarded_For": forwarded}
                assert (await send(s, V4_WIRE.body(), **headers)).status == 403
        assert [e.facts["address"] for e in events if e.name == "notice.not_taken"] == [address]

    async def test_the_public_health_tells_one_word(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            async with s.client.get(s.server + "/health") as response:
                assert (response.status, await response.json(content_type=None)) == (200, {"status": "pass"})
                assert response.headers["Content-Type"] == "application/health+json"
            for path in ("/Health/", "/health/", "//health", "//health//?x=//"):
                async with s.client.head(s.server + path) as response:
                    assert (response.status, response.headers["Content-Length"]) == (200, "17"), path
            async with s.client.post(s.server + "/health") as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")

    async def test_the_public_health_fails_while_nothing_can_be_stored(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator(), limits=IMPATIENT) as s:
            with write_lock(tmp_path):
                assert (await notify(s)).status == 503
                async with s.client.get(s.server + "/health") as response:
                    assert (response.status, await response.json(content_type=None)) == (503, {"status": "fail"})

    async def test_every_answer_is_counted_by_operator_dialect_and_code(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator("v4", "v4.01")) as s:
            await notify(s)
            await notify(s)
            await notify(s, WIRES["v4.01"], player="another")
            async with s.client.get(s.api + "/metrics") as response:
                lines = [line for line in (await response.text()).splitlines() if "notices_total" in line]
        counts = {line.rpartition(" ")[0].partition("{")[2]: float(line.split()[-1]) for line in lines if "{" in line}
        assert counts == {
            'code="0",dialect="v4",operator="acme"}': 2,
            'code="57",dialect="v4.01",operator="acme"}': 1,
        }


PAGE = """{
 "providerId": "luckymonaco",
 "sessionId": "6fd2d6f3bb8f4c5a9fadf15d81206af2",
 "externalPlayerId": "123456",
 "token" : "fSYFZMScpZ01FhR26r59GexREh1xHgEY"
}"""


NO_IDS = [
    '""',
    json.dumps("x" * 257),
    "true",
    "false",
    "null",
    "1.0",
    "1e3",
    "-0.0",
    "18446744073709551616",
    "123456789012345678901234567890",
    "{}",
    "[]",
    '["a"]',
    '"a\\u0000"',
    '"\\n"',
    '"a\\u001f"',
    '"\\u007f"',
    '"a\\u0085"',
    '"\\ud800"',
    '"\\udc00a"',
]


class TestBodies:
    async def test_the_pages_example_is_accepted_with_its_commas(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            assert (await send(s, PAGE.encode())).json == SUCCESS
            assert sessions(tmp_path) == [("acme", "6fd2d6f3bb8f4c5a9fadf15d81206af2", "123456", "reported")]

    async def test_the_pages_example_as_printed_is_refused_naming_the_missing_comma(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            answer = await send(s, PAGE.replace(",\n", "\n").encode())
            assert (answer.status, answer.error) == (200, 7)
            description = answer.json["description"]
            assert "line 3 column 2" in description
            assert "a comma is missing" in description
            assert sessions(tmp_path) == []

    @pytest.mark.parametrize(
        "body", [b"", b"{", b'{"a":1', b"null", b"[]", b'"x"', b"7", b"\xef\xbb\xbf{}", b"{}{}", b"\x00"]
    )
    async def test_what_is_no_json_object_is_bad_parameters(self, tmp_path: Path, body: bytes) -> None:
        async with serving(tmp_path, operator()) as s:
            answer = await send(s, body)
            assert (answer.status, answer.error) == (200, 7)

    async def test_a_byte_order_mark_before_the_json_is_ignored(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            assert (await send(s, b"\xef\xbb\xbf" + PAGE.encode())).json == SUCCESS
            assert (await send(s, b"\xef\xbb\xbf" + V4_WIRE.body())).json == SUCCESS
            assert (await send(s, PAGE.encode("utf-16"))).error == 7

    @pytest.mark.parametrize(
        ("twice", "error"),
        [
            ('"sessionId": "s"', 0),
            ('"sessionId": "t"', 7),
            ('"sessionId": "S"', 7),
            ('"token": "other"', 7),
            ('"note": 1, "note": 1', 0),
            ('"note": 1, "note": 2', 7),
            ('"note": 1, "note": true', 7),
            ('"note": 1, "note": 1.0', 7),
            ('"note": {"a": 1, "a": 2}', 7),
            ('"session\\u0049d": "t"', 7),
        ],
    )
    async def test_a_key_twice_passes_only_with_equal_values(self, tmp_path: Path, twice: str, error: int) -> None:
        body = V4_WIRE.body()[:-1] + b", " + twice.encode() + b"}"
        async with serving(tmp_path, operator()) as s:
            assert (await send(s, body)).error == error
            assert len(sessions(tmp_path)) == (error == 0)

    @pytest.mark.parametrize(("again", "error"), [("sessionId=s", 0), ("sessionId=t", 7)])
    async def test_a_form_field_twice_passes_only_with_equal_values(
        self, tmp_path: Path, again: str, error: int
    ) -> None:
        body = WIRES["pragmatic"].body() + b"&" + again.encode()
        async with serving(tmp_path, operator("pragmatic")) as s:
            assert (await send(s, body, "/sessionexpired", FORM)).error == error

    @pytest.mark.parametrize("field", ["sessionId", "externalPlayerId"])
    @pytest.mark.parametrize(
        ("written", "stored"),
        [
            ('"a"', "a"),
            ('"ünï ✓ 🎲"', "ünï ✓ 🎲"),
            ('"\\ud83c\\udfb2"', "🎲"),
            ('" a "', " a "),
            (json.dumps("x" * 256), "x" * 256),
            (json.dumps("🎲" * 256), "🎲" * 256),
            ("123", "123"),
            ("0", "0"),
            ("-5", "-5"),
            ("9007199254740993", "9007199254740993"),
            ("18446744073709551615", "18446744073709551615"),
        ],
    )
    async def test_an_id_is_kept_exactly(self, tmp_path: Path, field: str, written: str, stored: str) -> None:
        body = with_value(field, written)
        column = {"sessionId": "session_id", "externalPlayerId": "player_id"}[field]
        async with serving(tmp_path, operator()) as s:
            assert (await send(s, body)).json == SUCCESS
            assert query(tmp_path, f"SELECT {column} FROM session") == [(stored,)]

    @pytest.mark.parametrize("field", ["providerId", "sessionId", "externalPlayerId"])
    async def test_what_is_no_id_is_bad_parameters(self, tmp_path: Path, field: str, subtests: pytest.Subtests) -> None:
        async with serving(tmp_path, operator()) as s:
            for written in NO_IDS:
                with subtests.test(written):
                    answer = await send(s, with_value(field, written))
                    assert (answer.status, answer.error) == (200, 7)
                    assert sessions(tmp_path) == []

    @pytest.mark.parametrize("value", ["%00", "%0A", "%C2%85", "%ED%A0%80", "%FF", "x" * 257, ""])
    async def test_what_is_no_id_in_a_form_is_bad_parameters(self, tmp_path: Path, value: str) -> None:
        body = f"providerId=luckymonaco&sessionId={value}&playerId=p&hash=0"
        async with serving(tmp_path, operator("pragmatic")) as s:
            answer = await send(s, body.encode(), "/sessionexpired", FORM)
            assert (answer.status, answer.error) == (200, 7)

    async def test_ids_differ_by_case(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            for session_id in ("aB", "Ab"):
                assert (await notify(s, session=session_id)).json == SUCCESS
            assert (await notify(s, session="aB", player="P")).error == 7
            assert [row[1] for row in sessions(tmp_path)] == ["aB", "Ab"]

    async def test_a_request_id_has_at_most_36_characters(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator("v1")) as s:
            assert (await notify(s, WIRES["v1"], request="x" * 37)).error == 57
            assert (await notify(s, WIRES["v1"], request="x" * 36)).json == SUCCESS

    @pytest.mark.parametrize("depth", [200, 300, 1100, 8000])
    async def test_nesting_of_any_depth_is_answered(self, tmp_path: Path, depth: int) -> None:
        async with serving(tmp_path, operator()) as s:
            answer = await send(s, with_value("extra", "[" * depth + "]" * depth))
            assert (answer.status, answer.error) == (200, 0 if depth == 200 else 7)
            assert len(sessions(tmp_path)) == (depth == 200)


def with_value(field: str, written: str) -> bytes:
    """A v4 notice in which the value of one field is the given JSON text."""
    fields = {name: json.dumps(value) for name, value in V4_WIRE.fields().items()} | {field: written}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


class TestLenience:
    @pytest.mark.parametrize(
        "path",
        [V4, "/v4/sessionexpired", "/V4/SESSIONEXPIRED", "/V4/SessionExpired/", "/V4/SessionExpired?MEMB_ID=1&HASH=2"],
    )
    async def test_case_and_a_trailing_slash_of_the_path_do_not_matter(self, tmp_path: Path, path: str) -> None:
        async with serving(tmp_path, operator(endpoint="/v4/sessionExpired/")) as s:
            assert (await send(s, V4_WIRE.body(), path)).json == SUCCESS

    @pytest.mark.parametrize(
        ("target", "status"),
        [
            ("//V4/SessionExpired", 200),
            ("///V4//SessionExpired//", 200),
            ("/V4/SessionExpired?next=//elsewhere", 200),
            ("//V4/SessionExpired?a=//b", 200),
            ("http://casino.example//V4/SessionExpired", 200),
            ("/V4/%2FSessionExpired", 404),  # an escaped slash does not count as a slash
            ("/%2FV4/SessionExpired", 404),
            ("//x/V4/SessionExpired", 404),
        ],
    )
    async def test_repeated_slashes_of_the_path_count_as_one(self, tmp_path: Path, target: str, status: int) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(request(V4_WIRE.body()).replace(V4.encode(), target.encode()))
            assert (await raw.answer()).status == status

    async def test_an_endpoint_of_its_own_replaces_the_dialects_path(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator(endpoint="/casino/hook")) as s:
            assert (await send(s, V4_WIRE.body(), "/casino/hook")).json == SUCCESS
            assert (await send(s, V4_WIRE.body(), V4)).status == 404

    async def test_the_case_of_the_provider_id_does_not_matter_and_is_logged_once(self, tmp_path: Path) -> None:
        with hear() as events:
            async with serving(tmp_path, operator()) as s:
                for number in range(5):
                    for provider in ("luckymonaco", "Luckymonaco"):
                        assert (await notify(s, provider=provider, session=str(number))).json == SUCCESS
                assert len(sessions(tmp_path)) == 5
        spelled = [event.facts for event in events if event.name == "notice.misspelled"]
        assert spelled == [{"operator": "acme", "expected": "luckymonaco", "got": "Luckymonaco"}]

    @pytest.mark.parametrize("name", ["v4", "v4.01", "pragmatic"])
    async def test_unknown_extra_fields_are_kept_as_received(self, tmp_path: Path, name: str) -> None:
        extra: dict[str, Any] = {"secureLogin": "x", "empty": "", "ünï": "✓"}
        if WIRES[name].content == JSON:
            extra |= {"deep": {"list": [1, 2.5, None, True]}, "null": None}
        async with serving(tmp_path, operator(name)) as s:
            assert (await notify(s, WIRES[name], extra=extra)).json == SUCCESS
            ((kept,),) = query(tmp_path, "SELECT extra FROM session")
            assert json.loads(kept) == extra

    async def test_what_is_kept_of_extra_fields_is_bounded(self, tmp_path: Path) -> None:
        """The log says which fields were left out."""
        with hear() as events:
            async with serving(tmp_path, operator()) as s:
                assert (await notify(s, extra={"game": "g", "pad": "x" * 15_000, "table": 7})).json == SUCCESS
                assert (await notify(s, session="other", extra={"game": "g"})).json == SUCCESS
                kept = query(tmp_path, "SELECT extra FROM session ORDER BY id")
        assert kept == [('{"game":"g","table":7}',), ('{"game":"g"}',)]
        told = [event.facts["extra_left_out"] for event in events if event.name == "notice.recorded"]
        assert told == [1, None]

    async def test_a_secret_in_a_field_unknown_to_the_dialect_is_in_no_file(self, tmp_path: Path) -> None:
        extra = {"token": "s3cret-1", "key": "s3cret-2", "deep": {"Password": "s3cret-3"}, "sum": "s3cret-4"}
        # The dialect `old` calls its hash "sum"
        toml = operator("v4.01") + operator("old", name="other", provider_id="other")
        async with serving(tmp_path, toml) as s:
            assert (await notify(s, WIRES["v4.01"], extra=extra)).json == SUCCESS
            assert query(tmp_path, "SELECT extra FROM session") == [('{"deep":{}}',)]
            for path in tmp_path.glob("lmdaemon.sqlite3*"):
                assert b"s3cret" not in path.read_bytes(), path.name

    async def test_a_dialect_without_extra_takes_no_unknown_field(self, tmp_path: Path) -> None:
        toml = operator("old") + "extra = false\n"
        async with serving(tmp_path, toml) as s:
            answer = await notify(s, WIRES["old"], extra={"zone": "1"})
            assert answer.error == 71
            assert "'zone' is not known" in answer.json["description"]
            assert (await notify(s, WIRES["old"])).json == SUCCESS


class TestQuota:
    """`unknown_per_minute` limits notices of sessions that the daemon has never seen."""

    @pytest.mark.parametrize("name", ["v4", "v4.01", "pragmatic"])
    async def test_one_too_many_is_told_to_retry_and_leaves_nothing(
        self, tmp_path: Path, clock: HandClock, name: str
    ) -> None:
        wire = WIRES[name]
        with hear() as events:
            async with serving(tmp_path, operator(name, unknown_per_minute=3), clock) as s:
                for number in range(3):
                    assert (await notify(s, wire, session=f"s-{number}")).json == SUCCESS
                for _ in range(2):
                    answer = await notify(s, wire, session="s-3")
                    assert (answer.status, answer.error) == (200, wire.codes["retry"])
                assert len(sessions(tmp_path)) == 3
                assert (await scrape(s))['lmdaemon_notices_over_quota_total{operator="acme"}'] == 2
                clock.advance(61)
                assert (await notify(s, wire, session="s-3")).json == SUCCESS
        told = [event.facts for event in events if event.name == "notice.refused"]
        assert [(facts["meaning"], facts["operator"], facts["session"]) for facts in told] == [
            ("retry", "acme", "s-3")
        ] * 2

    async def test_known_sessions_and_repeats_do_not_count_and_are_not_refused(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator(unknown_per_minute=1)) as s:
            for number in range(5):
                await open_session(s, f"known-{number}")
                assert (await notify(s, session=f"known-{number}")).json == SUCCESS
            assert (await notify(s, session="first")).json == SUCCESS
            assert (await notify(s, session="second")).error == 100
            for number in range(5):
                assert (await notify(s, session=f"known-{number}")).json == SUCCESS
            await open_session(s, "opened-since")
            assert (await notify(s, session="opened-since")).json == SUCCESS
            assert (await notify(s, session="first")).json == SUCCESS
            assert (await notify(s, session="first", player="another")).error == 7

    async def test_what_is_refused_anyway_does_not_count(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator(token_check="partner", unknown_per_minute=1)) as s:
            for number in range(3):
                assert (await notify(s, session=f"s-{number}", token="wrong")).error == 7
            assert (await notify(s)).json == SUCCESS

    async def test_each_operator_has_its_own_and_a_reload_forgets_nothing(self, tmp_path: Path) -> None:
        toml = operator(unknown_per_minute=1) + operator(name="other", provider_id="other")
        async with serving(tmp_path, toml) as s:
            assert (await notify(s, session="a")).json == SUCCESS
            await s.daemon.reload_once()
            assert (await notify(s, session="b")).error == 100
            for number in range(5):
                assert (await notify(s, provider="other", session=f"s-{number}")).json == SUCCESS
            text = (tmp_path / "config.toml").read_text()
            (tmp_path / "config.toml").write_text(text.replace("unknown_per_minute = 1", "unknown_per_minute = 2"))
            await s.daemon.reload_once()
            assert (await notify(s, session="b")).json == SUCCESS
            assert (await notify(s, session="c")).error == 100


class TestTokens:
    @pytest.mark.parametrize("name", ["v4", "pragmatic", "old"])
    async def test_present_takes_any_token(self, tmp_path: Path, name: str) -> None:
        async with serving(tmp_path, operator(name, token_check="present")) as s:
            await open_session(s)
            assert (await notify(s, WIRES[name], token="anything")).json == SUCCESS

    @WITH_TOKEN
    @pytest.mark.parametrize("mode", ["session", "partner"])
    @pytest.mark.parametrize("value", [None, ""])
    async def test_an_absent_token_is_bad_parameters_where_it_is_checked(
        self, tmp_path: Path, name: str, mode: str, value: str | None
    ) -> None:
        async with serving(tmp_path, operator(name, token_check=mode)) as s:
            await open_session(s)
            answer = await notify(s, WIRES[name], token=value)
            assert answer.error == WIRES[name].codes["bad_parameters"]
            assert WIRES[name].names["token"] in answer.json["description"]
            assert sessions(tmp_path) == [("acme", "s", "p", None)]

    @pytest.mark.parametrize("token", ["first-secret", TOKEN, "thïrd"])
    async def test_each_of_several_partner_tokens_is_good(self, tmp_path: Path, token: str) -> None:
        async with serving(tmp_path, operator(token_check="partner")) as s:
            assert (await notify(s, token=token)).json == SUCCESS

    @pytest.mark.parametrize("token", ["first", "first-secret ", "FIRST-SECRET", f"first-secret\n{TOKEN}", "é" * 100])
    async def test_nothing_but_a_partner_token_is_good(self, tmp_path: Path, token: str) -> None:
        async with serving(tmp_path, operator("pragmatic", token_check="partner")) as s:
            code = 7 if "\n" in token else 4
            assert (await notify(s, WIRES["pragmatic"], token=token)).error == code
            assert sessions(tmp_path) == []

    async def test_a_session_token_is_that_of_the_opening_also_for_a_repeat(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator("pragmatic", token_check="session")) as s:
            await open_session(s)
            assert (await notify(s, WIRES["pragmatic"], token="wrong")).error == 4
            for _ in range(2):
                assert (await notify(s, WIRES["pragmatic"])).json == SUCCESS
            assert (await notify(s, WIRES["pragmatic"], token="wrong")).error == 4

    @pytest.mark.parametrize("policy", ["accept", "reject"])
    async def test_a_session_token_for_an_unknown_session_is_bad_token(self, tmp_path: Path, policy: str) -> None:
        async with serving(tmp_path, operator("pragmatic", token_check="session", unknown_session=policy)) as s:
            assert (await notify(s, WIRES["pragmatic"])).error == 4
            assert sessions(tmp_path) == []

    @pytest.mark.parametrize("mode", ["present", "session", "partner"])
    async def test_no_token_is_ever_logged_or_echoed(self, tmp_path: Path, mode: str) -> None:
        with hear() as events:
            async with serving(tmp_path, operator(token_check=mode)) as s:
                await open_session(s)
                answers = [await notify(s, token="wr0ng-t0ken", player=player) for player in ("q", "p")]
                answers += [await notify(s, player=player) for player in ("q", "p", "p")]
                answers.append(await send(s, V4_WIRE.body()[:-1]))
                answers.append(await send(s, with_value("token", f'["{TOKEN}"]')))
        assert len(events) > 5
        shown = repr(events) + repr([(answer.body, dict(answer.headers)) for answer in answers])
        for secret in (TOKEN, "wr0ng-t0ken", "first-secret"):
            assert secret not in shown


class TestOneEnd:
    async def test_a_repeated_notice_is_answered_the_same_and_delivered_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "hook_repeat.py").write_text("SEEN = []\nasync def hook(event):\n    SEEN.append(event)\n")
        monkeypatch.syspath_prepend(tmp_path)
        toml = operator() + '[plugins.x]\nuse = "hook_repeat:hook"\n'
        answers = []
        for _ in range(2):  # the second time after a restart
            async with serving(tmp_path, toml) as s:
                answers += [await notify(s) for _ in range(3)]
                await until(lambda: s.store.figures["acme"].pending == 0)
        assert {(answer.status, answer.body) for answer in answers} == {(200, b'{"error":0,"description":"Success"}')}
        assert query(tmp_path, "SELECT state, attempts FROM delivery") == [("delivered", 1)]
        import hook_repeat  # type: ignore[import-not-found]

        assert len(hook_repeat.SEEN) == 1

    async def test_a_repeat_changes_nothing_that_is_stored(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            await notify(s, extra={"first": 1})
            before = query(tmp_path, "SELECT * FROM session")
            assert (await notify(s, token="another", extra={"second": 2})).json == SUCCESS
            assert query(tmp_path, "SELECT * FROM session") == before

    async def test_a_notice_for_a_session_that_was_closed_here_is_a_repeat(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            await open_session(s)
            async with s.client.post(f"{s.api}/v1/operators/acme/sessions/s/close") as response:
                assert response.status == 200
            assert (await notify(s)).json == SUCCESS
            assert sessions(tmp_path) == [("acme", "s", "p", "closed")]

    async def test_two_hundred_identical_notices_at_once_are_one_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "hook_crowd.py").write_text("SEEN = []\nasync def hook(event):\n    SEEN.append(event)\n")
        monkeypatch.syspath_prepend(tmp_path)
        async with serving(tmp_path, operator() + '[plugins.x]\nuse = "hook_crowd:hook"\n') as s:
            answers = await asyncio.gather(*(notify(s) for _ in range(200)))
            assert {(answer.status, answer.error) for answer in answers} == {(200, 0)}
            await until(lambda: query(tmp_path, "SELECT 1 FROM delivery WHERE state = 'delivered'"))
            assert sessions(tmp_path) == [("acme", "s", "p", "reported")]
            assert query(tmp_path, "SELECT count(*) FROM delivery") == [(1,)]
        import hook_crowd  # type: ignore[import-not-found]

        assert len(hook_crowd.SEEN) == 1

    async def test_the_answer_comes_after_the_commit(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            await until(lambda: s.store.writing_since is None)
            with write_lock(tmp_path):
                asked = asyncio.create_task(notify(s))
                await until(lambda: s.store.writing_since is not None)
                assert sessions(tmp_path) == []
                assert not asked.done()
            assert (await asked).json == SUCCESS
            assert sessions(tmp_path) == [("acme", "s", "p", "reported")]

    async def test_every_acknowledged_notice_is_in_the_file_when_its_answer_arrives(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:

            async def acknowledged(number: int) -> bool:
                assert (await notify(s, session=str(number))).json == SUCCESS
                found = query(tmp_path, "SELECT reason FROM session WHERE session_id = ?", str(number))
                return found == [("reported",)]

            assert all(await asyncio.gather(*(acknowledged(number) for number in range(50))))


def head(method: str, path: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    lines = {"Host": "casino.example", "Content-Type": JSON} | dict(headers)
    return (
        f"{method} {path} HTTP/{version}\r\n".encode()
        + b"".join(f"{name}: {value}\r\n".encode() for name, value in lines.items())
        + b"\r\n"
    )


def request(body: bytes, version: str = "1.1", **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return head("POST", V4, {"Content-Length": str(len(body))} | named, version) + body


class TestRawHttp:
    async def test_http_1_0_is_answered_and_closed(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(request(V4_WIRE.body(), "1.0"))
            assert json.loads((await raw.answer()).body) == SUCCESS
            assert await raw.rest() == b""

    async def test_a_connection_is_closed_when_the_client_asks_for_it(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(request(V4_WIRE.body(), Connection="close"))
            assert json.loads((await raw.answer()).body) == SUCCESS
            assert await raw.rest() == b""

    async def test_a_connection_is_kept_otherwise_also_after_a_refusal(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            for body, code in ((b"{", 7), (V4_WIRE.body(), 0)):
                await raw.send(request(body))
                assert json.loads((await raw.answer()).body)["error"] == code

    async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(self, tmp_path: Path) -> None:
        body = V4_WIRE.body()
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(head("POST", V4, {"Content-Length": str(len(body)), "Expect": "100-Continue"}))
            assert (await raw.answer()).status == 100
            await raw.send(body)
            answer = await raw.answer()
            assert (answer.status, json.loads(answer.body)) == (200, SUCCESS)

    @pytest.mark.parametrize(
        ("path", "headers", "status"),
        [
            (V4, {"Content-Length": "16385"}, 413),
            (V4, {"Content-Length": "10", "Content-Type": "text/plain"}, 415),
            ("/unknown", {"Content-Length": "10"}, 404),
        ],
    )
    async def test_who_waits_for_100_continue_is_spared_a_body_that_is_refused(
        self, tmp_path: Path, path: str, headers: dict[str, str], status: int
    ) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(head("POST", path, headers | {"Expect": "100-continue"}))
            assert (await raw.answer()).status == status

    async def test_an_http_1_0_client_is_not_sent_100_continue(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(request(V4_WIRE.body(), "1.0", Expect="100-continue"))
            assert (await raw.answer()).status == 200

    async def test_pipelined_requests_are_answered_in_order(self, tmp_path: Path) -> None:
        bodies = [V4_WIRE.body(session="a"), b"{", V4_WIRE.body(session="b"), V4_WIRE.body(session="a", player="q")]
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(b"".join(map(request, bodies)))
            assert [json.loads((await raw.answer()).body)["error"] for _ in bodies] == [0, 7, 0, 7]
            assert [row[1] for row in sessions(tmp_path)] == ["a", "b"]

    async def test_a_body_in_single_bytes_is_read(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            for byte in request(V4_WIRE.body()):
                await raw.send(bytes([byte]))
            assert json.loads((await raw.answer()).body) == SUCCESS

    async def test_a_body_that_stops_half_way_is_cut_after_the_body_time_out(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator(), limits=Limits(body_s=0.1)) as s, raw_connection(s.server) as raw:
            whole = request(V4_WIRE.body())
            await raw.send(whole[:-10])
            answer = await raw.answer()
            assert (answer.status, json.loads(answer.body)["error"]) == (408, 7)
            assert answer.headers["connection"] == "close"
            await raw.send(whole[-10:])  # too late: these bytes change nothing
            assert await raw.rest() == b""
            assert sessions(tmp_path) == []

            async def taken() -> bool:  # on a busy machine a good notice may be slow, too
                return (await notify(s)).json == SUCCESS

            await until(taken)

    async def test_a_client_that_goes_away_half_way_leaves_nothing(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            async with raw_connection(s.server) as raw:
                await raw.send(request(V4_WIRE.body())[:-10])
            assert (await notify(s, session="after")).json == SUCCESS
            assert [row[1] for row in sessions(tmp_path)] == ["after"]

    async def test_a_notice_whose_client_leaves_early_is_recorded_all_the_same(self, tmp_path: Path) -> None:
        async with serving(tmp_path, operator()) as s:
            async with raw_connection(s.server) as raw:
                await raw.send(request(V4_WIRE.body()))
                await until(lambda: sessions(tmp_path))
            assert sessions(tmp_path) == [("acme", "s", "p", "reported")]

    @pytest.mark.parametrize(
        "garbage",
        [
            b"garbage\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
            b"POST\r\n\r\n",
            b"POST /V4/SessionExpired HTTP/9.9\r\nHost: x\r\n\r\n",
            b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nno colon here\r\n\r\n",
            b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            b"POST /V4/SessionExpired HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
            b"POST /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
        ids=lambda value: repr(value[:60]),
    )
    async def test_garbage_is_answered_400_and_harms_nobody(self, tmp_path: Path, garbage: bytes) -> None:
        async with serving(tmp_path, operator()) as s, raw_connection(s.server) as raw:
            await raw.send(garbage)
            assert (await raw.answer()).status == 400
            assert await raw.rest() == b""
            assert sessions(tmp_path) == []
            assert (await notify(s)).json == SUCCESS


# Bodies in which every field is right, wrong or absent. Some are accepted, and most are not.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=300),
    st.just(TOKEN),
    st.recursive(st.none() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)
NAMES = [*V4_WIRE.names.values(), *LATER.values()]
NOTICES = st.fixed_dictionaries(
    {},
    optional={"providerId": st.just("luckymonaco") | ODD}
    | {name: st.text("ab", min_size=1) | ODD for name in NAMES[1:]},
)
JSON_BODIES = st.one_of(
    st.binary(max_size=300),
    st.tuples(NOTICES, st.dictionaries(st.text(max_size=10), ODD, max_size=3)).map(
        lambda parts: json.dumps(parts[1] | parts[0]).encode()
    ),
    ODD.map(lambda value: json.dumps(value).encode()),
    st.integers(0, 3000).map(lambda depth: with_value("deep", "[" * depth + "]" * depth)),
    st.tuples(st.integers(0, 100), st.binary(min_size=1, max_size=3)).map(
        lambda cut: PAGE.encode()[: cut[0]] + cut[1] + PAGE.encode()[cut[0] :]
    ),
)
FORM_BODIES = st.one_of(
    st.binary(max_size=300),
    st.dictionaries(st.sampled_from([*WIRES["pragmatic"].names.values(), "x"]), st.text(max_size=20)).map(
        lambda fields: urlencode(fields, errors="replace").encode()
    ),
    st.fixed_dictionaries({"session": st.text("ab", max_size=3), "player": st.text("ab", max_size=2)}).map(
        lambda facts: WIRES["pragmatic"].body(**facts)
    ),
)


@pytest.fixture
async def everything(tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving(tmp_path, LISTEN + operator("v4", "v4.01", "pragmatic")) as s:
        yield s


class TestRandomBodies:
    """Every body gets an answer that is no 5xx, and nothing is stored unless the answer was 0."""

    @settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
    @given(body=JSON_BODIES)
    async def test_json(self, everything: Serving, tmp_path: Path, body: bytes) -> None:
        await self.check(everything, tmp_path, body, V4, JSON)

    @settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
    @given(body=FORM_BODIES)
    async def test_forms(self, everything: Serving, tmp_path: Path, body: bytes) -> None:
        await self.check(everything, tmp_path, body, "/sessionexpired", FORM)

    @staticmethod
    async def check(s: Serving, tmp_path: Path, body: bytes, path: str, content: str) -> None:
        before = len(sessions(tmp_path))
        answer = await send(s, body, path, content)
        assert answer.status == 200
        assert answer.error in (0, 2, 5, 7, 57)
        assert len(sessions(tmp_path)) <= before + (answer.error == 0)
