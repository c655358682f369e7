"""Parsing and encoding notices: every dialect, every answer code, and every point that the provider's page leaves
open.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
import pytest
from chance import examples
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lmdaemon.dialects import (
    EXTRA_MAX,
    FORM_FIELDS_MAX,
    REQUEST_MAX,
    SHIPPED,
    SUCCESS,
    BadNotice,
    CannotEncode,
    Codes,
    Dialect,
    Extra,
    Parsed,
    answer,
    answered_code,
    breaks_hash,
    check_hash,
    content_of,
    encode,
    extra_of,
    hash_of,
    json_object,
    parse,
    recognise,
    rounded,
    uncoded,
)
from lmdaemon.model import ID_MAX, MEANINGS, TOKEN_MAX, id_problem

SESSION = "6fd2d6f3bb8f4c5a9fadf15d81206af2"
TOKEN = "fSYFZMScpZ01FhR26r59GexREh1xHgEY"
UUID = "0b9c1f6e2d3a4b5c8d7e6f5a4b3c2d1e"
V4, V4_01, PRAGMATIC = SHIPPED["v4"], SHIPPED["v4.01"], SHIPPED["pragmatic"]

# The example of the provider's page, word for word. It lacks the commas.
PAGE_EXAMPLE = b"""{
 "providerId": "luckymonaco"
 "sessionId": "6fd2d6f3bb8f4c5a9fadf15d81206af2"
 "externalPlayerId": "123456"
 "token" : "fSYFZMScpZ01FhR26r59GexREh1xHgEY"
}"""
NOTICE = {"providerId": "luckymonaco", "sessionId": SESSION, "externalPlayerId": "123456", "token": TOKEN}
FORM = {"hash": "00", "providerId": "PragmaticPlay", "sessionId": SESSION, "playerId": "123456"}

# A dialect that config.toml could define: JSON with a hash.
OLD = Dialect(
    "old",
    "/V4/SessionExpired",
    {
        "provider": "providerId",
        "session": "sessionId",
        "player": "playerId",
        "token": "token",
        "request": "uuid",
        "hash": "hash",
    },
    ("provider", "session", "player", "hash"),
    codes=Codes(7, bad_token=4, bad_hash=5, player_mismatch=2),
)

fuzz = settings(deadline=None, max_examples=examples(200))


def refusal(body: bytes | Mapping[str, Any], *accepted: Dialect) -> str:
    accepted = accepted or (V4,)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadNotice) as caught:
        parse(raw, accepted[0].content, accepted)
    assert caught.value.meaning == "bad_parameters"
    return caught.value.description


def raw_notice(session: bytes) -> bytes:
    """A v4 notice in which the value of sessionId is written as `session` (raw JSON)."""
    return b'{"providerId":"luckymonaco","sessionId":%s,"externalPlayerId":"123456","token":"t"}' % session


# --- the dialects as data ---


@pytest.mark.parametrize(
    ("name", "path", "content_type", "required", "optional"),
    [
        ("v4", "/V4/SessionExpired", "application/json", "providerId sessionId externalPlayerId token", ""),
        ("v4.01", "/V4/SessionExpired", "application/json", "providerId sessionId userId uuid", ""),
        ("v4.02", "/v4/SessionExpired", "application/json", "providerId sessionId userId uuid", ""),
        ("v1", "/v1/SessionExpired", "application/json", "providerId sessionId userId uuid", ""),
        (
            "pragmatic",
            "/sessionexpired",
            "application/x-www-form-urlencoded",
            "hash providerId sessionId playerId",
            "token",
        ),
    ],
)
def test_each_dialect_has_the_published_shape(
    name: str, path: str, content_type: str, required: str, optional: str
) -> None:
    dialect = SHIPPED[name]
    assert (dialect.name, dialect.path, dialect.content_type) == (name, path, content_type)
    assert dialect.required_names == set(required.split())
    assert set(dialect.fields.values()) == set(required.split()) | set(optional.split())


def test_five_dialects_are_shipped() -> None:
    assert list(SHIPPED) == ["v4", "v4.01", "v4.02", "v1", "pragmatic"]


CODES = {  # as in docs/protocol.md; a meaning that has no code of its own is answered as bad parameters
    "bad_parameters": (7, 57, 7),
    "bad_token": (7, 54, 4),
    "bad_hash": (7, 57, 5),
    "unknown_session": (7, 55, 7),
    "player_mismatch": (7, 57, 2),
    "retry": (100, 998, 100),
    "final": (120, 999, 120),
}
COLUMN = {"v4": 0, "v4.01": 1, "v4.02": 1, "v1": 1, "pragmatic": 2}


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("name", SHIPPED)
def test_each_meaning_has_its_code_in_each_dialect(name: str, meaning: str) -> None:
    assert SHIPPED[name].codes.of(meaning) == CODES[meaning][COLUMN[name]]


def test_v4_01_v4_02_and_v1_are_one_wire_and_no_other_two_are() -> None:
    alike = {(a, b) for a in SHIPPED for b in SHIPPED if SHIPPED[a].same_wire(SHIPPED[b])}
    family = ("v4.01", "v4.02", "v1")
    assert alike == {(a, b) for a in family for b in family} | {("v4", "v4"), ("pragmatic", "pragmatic")}


# --- the page's example ---


def test_the_pages_example_with_its_commas_is_read() -> None:
    body = PAGE_EXAMPLE.replace(b'"\n "', b'",\n "')
    parsed = parse(body, "json", [V4])
    assert parsed.dialect is V4
    assert parsed.provider_id == "luckymonaco"
    assert parsed.session_id == SESSION
    assert parsed.player_id == "123456"
    assert parsed.token == TOKEN
    assert (parsed.request, parsed.hash, extra_of(parsed)) == (None, None, ({}, None, 0))


def test_the_pages_example_without_commas_is_refused_with_the_place() -> None:
    """The answer names the position and the missing comma."""
    assert refusal(PAGE_EXAMPLE) == "malformed JSON at line 3 column 2: a comma is missing before this field"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"a":1 "b":2}', "line 1 column 8: a comma is missing before this field"),
        ('{"a":true\n\n"b":1}', "line 3 column 1: a comma is missing before this field"),
        ('{"a":{}"b":1}', "line 1 column 8: a comma is missing before this field"),
        ('{"é":"é💥"  "b":1}', "line 1 column 12: a comma is missing before this field"),
        ('{"a":[1 2]}', "line 1 column 9: a comma is missing before this value"),
        ('{"a":["x"\n"y"]}', "line 2 column 1: a comma is missing before this value"),
        ('{"a":[[1] [2], 3]}', "line 1 column 11: a comma is missing before this value"),
        ('{"a":[{}{}]}', "line 1 column 9: a comma is missing before this value"),
        ('{"a":[true -1]}', "line 1 column 12: a comma is missing before this value"),
        ('{"a":[0.5 null]}', "line 1 column 11: a comma is missing before this value"),
        ('{"a":1 2}', "line 1 column 8: unexpected character, expected ',' or '}'"),
        ('{"a":["say "hi""]}', "line 1 column 13: unexpected character, expected ',' or ']'"),
        ('{"a":["say "1""]}', "line 1 column 13: unexpected character, expected ',' or ']'"),
        ('{"a":[1 : 2]}', "line 1 column 9: unexpected character, expected ',' or ']'"),
        ('{"a":[1 x]}', "line 1 column 9: unexpected character, expected ',' or ']'"),
        ('{"a":[1}', "line 1 column 8: unexpected character, expected ',' or ']'"),
        ('{"a":"say "hi""}', "line 1 column 12: unexpected character, expected ',' or '}'"),
        ('{"a":"x";"b":1}', "line 1 column 9: unexpected character, expected ',' or '}'"),
        ('{"a":1,}', "line 1 column 7: trailing comma is not allowed"),
        ('{"a" "b"}', "line 1 column 6: unexpected character, expected ':' after key"),
        ('{"a":1}"b"', "line 1 column 8: unexpected content after document"),
    ],
)
def test_malformed_json_is_refused_with_its_position(body: str, complaint: str) -> None:
    """A missing comma is named only where it is the cause."""
    assert refusal(body.encode()) == f"malformed JSON at {complaint}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf" * 2 + b"{}",
        b"\xff\xfe{\x00}\x00",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b'{"a":"\n"}',
    ],
)
def test_what_is_no_strict_json_in_utf_8_is_refused_with_a_position(body: bytes) -> None:
    assert refusal(body).startswith("malformed JSON at line 1 column ")


@pytest.mark.parametrize(
    ("encoding", "column", "said"),
    [("utf-16", 1, "UTF-16, not UTF-8"), ("utf-16-be", 1, "UTF-16, not UTF-8"), ("latin-1", 8, "not UTF-8")],
)
def test_json_in_another_encoding_is_told_so(encoding: str, column: int, said: str) -> None:
    assert refusal('{"a": "é"}'.encode(encoding)) == f"malformed JSON at line 1 column {column}: {said}"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"providerId":"\xe9"}', "line 1 column 16"),
        ('{"a":"é💥",\n"b":"é'.encode() + b'\xe9"}', "line 2 column 7"),
        (b"\xef\xbb\xbf\xe9", "line 1 column 1"),
        (b'{"a":"\xc3"}', "line 1 column 7"),
    ],
)
def test_a_byte_that_is_not_utf_8_is_refused_with_its_position(body: bytes, place: str) -> None:
    assert refusal(body) == f"malformed JSON at {place}: not UTF-8"


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (b"[]", "an array"),
        (b"null", "null"),
        (b'"x"', "a string"),
        (b"1", "a number"),
        (b"1.5", "a fraction or a number too long"),
        (b"true", "a boolean"),
    ],
)
def test_a_body_must_be_an_object(body: bytes, got: str) -> None:
    assert refusal(body) == f"body must be a JSON object (got {got})"


# --- a key that stands twice ---


@pytest.mark.parametrize("second", ['"s"', '"\\u0073"'])
def test_duplicate_key_with_equal_values_passes(second: str) -> None:
    body = f'{{"providerId":"p","sessionId":"s","sessionId":{second},"externalPlayerId":"1","token":"t"}}'
    assert parse(body.encode(), "json", [V4]).session_id == "s"


@pytest.mark.parametrize(
    ("first", "second"),
    [('"s"', '"S"'), ("1", '"1"'), ("1", "true"), ("1", "1.0"), ("0", "false"), ("null", '""'), ("[]", "{}")],
)
def test_duplicate_key_with_different_values_is_refused(first: str, second: str) -> None:
    body = f'{{"providerId":"p","sessionId":{first},"sessionId":{second},"externalPlayerId":"1","token":"t"}}'
    assert refusal(body.encode()) == "field 'sessionId' stands twice with different values"


def test_duplicate_key_is_seen_through_escapes_colons_and_nesting() -> None:
    assert "'b' stands twice" in refusal(b'{"a":{"b":1,"\\u0062":2}}')
    assert "'b' stands twice" in refusal(b'{"a":[{"b":":","b":"::"}]}')
    assert "'sessionId' stands twice" in refusal(b'{"sessionId":"a","session\\u0049d":"b"}')


def test_colons_inside_values_are_no_keys() -> None:
    assert json_object(b'{"a":"x:y:z","b":"::"}') == {"a": "x:y:z", "b": "::"}


def test_a_long_key_is_not_echoed_whole() -> None:
    key = b"k" * 5000
    assert len(refusal(b'{"%s":1,"%s":2}' % (key, key))) < 400


@pytest.mark.parametrize("inner", [b"[" + b",".join([b"1"] * 4500) + b"]", b'"' + b"a" * 9000 + b'"'])
def test_a_nested_body_costs_what_its_size_costs(inner: bytes) -> None:
    """An earlier search for duplicate keys took a second of the event loop for such a body."""
    body = raw_notice(b'"s"')[:-1] + b',"x":' + b'{"a":' * 900 + inner + b"}" * 901
    assert len(body) <= 16 * 1024
    before = time.process_time()
    parse(body, "json", [V4])
    assert time.process_time() - before < 0.2


@pytest.mark.parametrize("depth", [900, 990, 1000, 1010, 1020])
def test_a_body_too_deep_for_its_second_reader_is_notice_or_refusal(depth: int) -> None:
    body = raw_notice(b'"s"')[:-1] + b',"x":{"a":' + b"[" * depth + b"]" * depth + b"}}"
    check_parsed_or_refused(body, "json")


# --- ids ---


@pytest.mark.parametrize(
    ("written", "session_id"),
    [
        (b'"6fd2d6f3bb8f4c5a9fadf15d81206af2"', SESSION),
        (b'"A"', "A"),
        (b'" a "', " a "),
        (b'"' + b"x" * 256 + b'"', "x" * 256),
        (b'"' + "é".encode() * 256 + b'"', "é" * 256),
        (b'"\\ud83d\\udca5"', "💥"),
        (b"0", "0"),
        (b"123456", "123456"),
        (b"-1", "-1"),
        (b"9007199254740993", "9007199254740993"),
        (b"18446744073709551615", "18446744073709551615"),
        (b"-9223372036854775808", "-9223372036854775808"),
    ],
)
def test_ids_are_opaque_strings_and_integers_become_strings_exactly(written: bytes, session_id: str) -> None:
    assert parse(raw_notice(written), "json", [V4]).session_id == session_id


A_FRACTION = "must be a string (got a fraction or a number too long)"


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        (b"18446744073709551616", A_FRACTION),
        (b"-9223372036854775809", A_FRACTION),
        (b"9" * 300, A_FRACTION),
        (b"1.0", A_FRACTION),
        (b"1e3", A_FRACTION),
        (b"true", "must be a string (got a boolean)"),
        (b"false", "must be a string (got a boolean)"),
        (b"null", "must be a string (got null)"),
        (b"{}", "must be a string (got an object)"),
        (b'["s"]', "must be a string (got an array)"),
        (b'""', "must not be empty"),
        (b'"\\u0000"', "must not contain control characters"),
        (b'"a\\nb"', "must not contain control characters"),
        (b'"\\u0085"', "must not contain control characters"),
        (b'"' + b"x" * 257 + b'"', "must be at most 256 characters (got 257)"),
    ],
)
def test_what_is_no_id_is_bad_parameters_naming_field_and_rule(written: bytes, rule: str) -> None:
    assert refusal(raw_notice(written)) == f"field 'sessionId' {rule}"


@pytest.mark.parametrize("name", ["v4", "v4.01", "v4.02", "v1"])
def test_a_missing_required_field_is_named(name: str) -> None:
    dialect = SHIPPED[name]
    for missing in dialect.required_names:
        fields = {field: "x" for field in dialect.required_names if field != missing}
        assert refusal(fields, dialect) == f"field {missing!r} is missing"


@pytest.mark.parametrize(
    ("token", "rule"),
    [
        ("", "must not be empty"),
        (None, "must be a string (got null)"),
        ("t" * (TOKEN_MAX + 1), "must be at most 4096 characters (got 4097)"),
    ],
)
def test_an_absent_or_empty_required_token_is_bad_parameters(token: str | None, rule: str) -> None:
    assert refusal(NOTICE | {"token": token}) == f"field 'token' {rule}"


def test_a_token_of_4096_characters_is_read() -> None:
    body = json.dumps(NOTICE | {"token": "t" * TOKEN_MAX}).encode()
    assert parse(body, "json", [V4]).token == "t" * TOKEN_MAX


def test_a_uuid_has_36_characters_at_most() -> None:
    fields = {"providerId": "p", "sessionId": "s", "userId": "1"}
    assert parse(json.dumps(fields | {"uuid": "u" * 36}).encode(), "json", [V4_01]).request == "u" * 36
    assert refusal(fields | {"uuid": "u" * 37}, V4_01) == "field 'uuid' must be at most 36 characters (got 37)"


@pytest.mark.parametrize("empty", ["", None])
def test_an_optional_field_sent_empty_or_null_is_absent(empty: str | None) -> None:
    fields = {"providerId": "p", "sessionId": "s", "playerId": "1", "hash": "00", "token": empty, "uuid": empty}
    parsed = parse(json.dumps(fields).encode(), "json", [OLD])
    assert (parsed.token, parsed.request) == (None, None)


def test_an_optional_field_of_a_wrong_type_is_refused() -> None:
    fields = {"providerId": "p", "sessionId": "s", "playerId": "1", "hash": "00", "token": ["t"]}
    assert refusal(fields, OLD) == "field 'token' must be a string (got an array)"


def extra(body: Mapping[str, Any], *secret_names: str, dialect: Dialect = V4) -> Extra:
    return extra_of(parse(json.dumps(NOTICE | body).encode(), "json", [dialect]), secret_names)


def test_unknown_fields_are_kept_as_received_and_in_that_order() -> None:
    fields = {"reason": "idle", "currency": None, "balance": 12.5, "nested": {"a": [1, True]}, "": "", "sessionid": "x"}
    found = extra(fields)
    assert (found.fields, found.left_out) == (fields, 0)
    assert found.text == json.dumps(fields, separators=(",", ":"))
    assert extra({}) == ({}, None, 0)


@pytest.mark.parametrize("before", [{}, {"a": 1}, {"a": 1, "é": "ü"}])
def test_unknown_fields_are_kept_up_to_2_kib_of_json(before: dict[str, Any]) -> None:
    empty = len(json.dumps(before | {"pad": ""}, separators=(",", ":"), ensure_ascii=False).encode())
    for size, kept in ((EXTRA_MAX, True), (EXTRA_MAX + 1, False)):
        found = extra(before | {"pad": "x" * (size - empty)})
        assert (found.fields.keys() == before.keys() | {"pad"}, found.left_out) == (kept, not kept)
        assert len((found.text or "").encode()) == (EXTRA_MAX if kept else len((extra(before).text or "").encode()))


def test_what_still_fits_is_kept_behind_what_did_not() -> None:
    found = extra({"first": 1, "long": "x" * EXTRA_MAX, "last": 2})
    assert found == ({"first": 1, "last": 2}, '{"first":1,"last":2}', 1)


@pytest.mark.parametrize(
    "name",
    [
        *("token", "accessToken", "HASH", "apiKey", "key", "api_secret", "passwd", "Password", "pwd", "Authorization"),
        *("signature", "sign", "x-hmac", "Cookie", "jwt", "credentials", "oauth", "ToKeN"),
        *("passphrase", "PassCode", "pass", "PASS", "userPass", "user_pass", "user-pass", "HTTPPass", "pass1", "Pass2"),
        *("pin", "PIN", "PINCode", "cardPIN", "pincode", "card_pin", "otp", "smsOtp", "bearer", "psk", "wifiPSK", "pw"),
    ],
)
def test_nothing_is_kept_under_a_name_that_looks_like_a_secrets(name: str) -> None:
    dialect = V4_01  # this dialect has no token field
    notice = {"providerId": "l", "sessionId": "s", "userId": "p", "uuid": "u"}
    fields = {"game": "g", name: "s3cret", "deep": {"list": [1, {name: {"value": "s3cret"}, "kept": 2}]}, "last": 3}
    found = extra_of(parse(json.dumps(notice | fields).encode(), "json", [dialect]))
    assert found.fields == {"game": "g", "deep": {"list": [1, {"kept": 2}]}, "last": 3}
    assert json.loads(found.text or "") == found.fields
    assert found.left_out == 2


@pytest.mark.parametrize(
    "name",
    [
        *("spin", "freeSpins", "SPIN", "pinned", "PINNED", "isPinned", "passenger", "bypass", "compass", "passed"),
        *("pingMs", "opinion", "pinball", "upw", "optIn", "passive", "", "1", "é"),
    ],
)
def test_a_word_with_a_secrets_name_inside_is_harmless(name: str) -> None:
    assert extra({name: 1}).fields == {name: 1}


def test_nothing_is_kept_under_the_names_that_dialects_have_for_secrets() -> None:
    fields = {"SUM": "s3cret", "Sum": 1, "sums": 2, "nested": {"sum": 3}}
    assert extra(fields, "sum", "rid").fields == {"sums": 2, "nested": {}}


def test_a_number_that_was_rounded_is_not_kept() -> None:
    fields = {"round": 123456789012345678901234567890, "deep": [{"n": 2**64}], "exact": 2**64 - 1, "share": 0.1}
    assert extra(fields).fields == {"exact": 2**64 - 1, "share": 0.1}


def test_what_a_plugin_writes_into_one_notice_is_in_no_other() -> None:
    mine: Any = extra({}).fields
    mine["written"] = "by a plug-in"
    assert extra({}) == ({}, None, 0)


def test_a_field_deeper_than_can_be_written_is_refused() -> None:
    body = raw_notice(b'"s"')[:-1] + b',"x":' + b"[" * 300 + b"]" * 300 + b"}"
    with pytest.raises(BadNotice, match="nested too deeply"):
        extra_of(parse(body, "json", [V4]))


STRICT = Dialect("strict", V4.path, V4.fields, V4.required, extra=False)


def test_a_dialect_without_extra_refuses_fields_that_it_does_not_know() -> None:
    assert parse(json.dumps(NOTICE).encode(), "json", [STRICT]).session_id == SESSION
    assert refusal(NOTICE | {"zone": 1, "x": 2}, STRICT) == "field 'x' is not known in dialect strict"
    assert refusal(NOTICE | {"x" * 300: 2}, STRICT) == f"field '{'x' * 256}' is not known in dialect strict"
    assert not STRICT.same_wire(V4)


# --- which dialect a body is in ---


@pytest.mark.parametrize(
    ("accepted", "names", "dialect"),
    [
        (("v4", "v4.01"), "providerId sessionId externalPlayerId token", "v4"),
        (("v4.01", "v4"), "providerId sessionId externalPlayerId token", "v4"),
        (("v4", "v4.01"), "providerId sessionId userId uuid", "v4.01"),
        (("v4", "v4.01"), "providerId sessionId userId uuid token", "v4.01"),
        (("v4", "v4.01"), "providerId sessionId userId uuid externalPlayerId token", "v4"),
        (("v4.01", "v4"), "providerId sessionId userId uuid externalPlayerId token", "v4.01"),
        (("v4", "v4.01"), "providerId sessionId token", "v4"),
        (("v4", "v4.01"), "providerId sessionId userId", "v4.01"),
        (("v4", "v4.01"), "", "v4"),
        (("v4.01", "v4"), "providerId sessionId", "v4.01"),
        (("v4.02", "v1"), "providerId sessionId userId uuid", "v4.02"),
    ],
)
def test_a_body_is_read_in_the_dialect_it_names(accepted: tuple[str, ...], names: str, dialect: str) -> None:
    """The names of its fields decide. If they fit no dialect better than another, the first accepted dialect is
    used.
    """
    assert recognise(dict.fromkeys(names.split(), "x"), [SHIPPED[name] for name in accepted]).name == dialect


def test_a_refusal_says_whose_codes_answer_it() -> None:
    with pytest.raises(BadNotice) as caught:
        parse(b'{"providerId":"p","sessionId":"s","userId":""}', "json", [V4, V4_01])
    assert caught.value.dialect is V4_01
    with pytest.raises(BadNotice) as caught:
        parse(PAGE_EXAMPLE, "json", [V4_01, V4])
    assert caught.value.dialect is None


@pytest.mark.parametrize(
    ("header", "content"),
    [
        ("application/json", "json"),
        ("application/json; charset=UTF-8", "json"),
        ("application/json;charset=utf-8", "json"),
        ('Application/JSON ; Charset="utf-8"', "json"),
        ("application/x-www-form-urlencoded", "form"),
        ("application/x-www-form-urlencoded; charset=UTF-8", "form"),
        ("application/json; charset=utf8", "json"),
        ("application/json; utf-8;", "json"),
        ("application/json; charset=ISO-8859-1", "json"),
        ("application/json; charset=utf-16; x=y", "json"),
        ("application/json;", "json"),
        ("application/x-www-form-urlencoded;charset=windows-1251", "form"),
        ("", None),
        ("text/json", None),
        ("text/plain", None),
        ("application/json-patch+json", None),
        ("application/problem+json", None),
        ("multipart/form-data; boundary=x", None),
        ("application/json, text/plain", None),
        ("charset=utf-8", None),
        ("; application/json", None),
        ("application/json charset=utf-8", None),
    ],
)
def test_json_and_forms_are_content_whatever_the_parameters_say(header: str, content: str | None) -> None:
    assert content_of(header) == content


@pytest.mark.parametrize(
    "headers",
    [
        *([], [""], ["identity"], ["Identity"], ["identity, identity"], ["identity", "utf-8"], [" , "]),
        *(["utf-8"], ["UTF8"], ["utf_8"], ["utf-16le"], ["iso-8859-1"], ["ISO8859-15"], ["latin1"], ["us-ascii"]),
        *(["windows-1251"], ["cp1252"], ["KOI8-R"], ["gb2312"], ["GBK"], ["big5"], ["Shift_JIS"], ["euc-kr"]),
        *(["ISO-2022-JP"], ["macintosh"], ["x-mac-cyrillic"], ["ibm850"], ["tis-620"], ["viscii"], ["big5-hkscs"]),
        *(["euc-tw"], ["hz-gb-2312"], ["iso-8859-8-i"], ["KS_C_5601-1987"], ["x-sjis"], ["x-euc-jp"], ["windows-874"]),
    ],
)
def test_a_content_encoding_that_packs_nothing_is_read(headers: list[str]) -> None:
    assert uncoded(headers)


@pytest.mark.parametrize(
    "headers",
    [
        *(["gzip"], ["x-gzip"], ["GZIP"], ["deflate"], ["br"], ["zstd"], ["compress"], ["x-compress"], ["aes128gcm"]),
        *(["identity, gzip"], ["utf-8", "gzip"], ["gzip;q=1"], ["unknown"], ["utf-8x"], ["utf 8"], ["chunked"]),
        *(["zip"], ["zlib"], ["bz2"], ["x-bzip2"], ["base64"], ["hex"], ["quopri"], ["uu"], ["rot13"], ["rot_13"]),
        *(["dcb"], ["dcz"], ["exi"], ["pack200-gzip"], ["lzma"], ["xz"], ["x-"], ["mac"], ["macro"], ["base64_codec"]),
    ],
)
def test_a_content_encoding_that_packs_or_is_unknown_is_not(headers: list[str]) -> None:
    assert not uncoded(headers)


# --- numbers that are kept ---


@pytest.mark.parametrize(
    ("written", "lost"),
    [
        *(("0", False), ("-1", False), ("1.5", False), ("0.1", False), ("1e15", False), ("9007199254740992.0", False)),
        *(("18446744073709551615", False), ("-9223372036854775808", False), ('"12345678901234567890123"', False)),
        *(('"1e99"', False), ('{"1e30": "3e4"}', False), ("[true, null]", False)),
        *(("18446744073709551616", True), ("-9223372036854775809", True), ("123456789012345678901234567890", True)),
        *(("9007199254740994.0", True), ("1e30", True), ("-1e300", True), ("1.0E+99", True)),
        *(('{"a": [1, {"b": 1e22}]}', True), ("[[[99999999999999999999]]]", True)),
    ],
)
def test_a_number_that_may_have_been_rounded_is_known(written: str, lost: bool) -> None:
    value = json_object(f'{{"v": {written}}}'.encode())["v"]
    assert rounded(value, orjson.dumps(value)) is lost


@given(st.integers(-(10**40), 10**40) | st.integers(-(2**64), 2**65))
def test_an_integer_is_kept_exactly_or_known_to_be_rounded(number: int) -> None:
    value = json_object(f'{{"v": {number}}}'.encode())["v"]
    assert rounded(value, orjson.dumps(value)) is (not isinstance(value, int) or value != number)


# --- a byte-order mark ---


def test_a_byte_order_mark_is_ignored_and_moves_no_position() -> None:
    body = json.dumps(NOTICE).encode()
    assert parse(b"\xef\xbb\xbf" + body, "json", [V4]) == parse(body, "json", [V4])
    twice = body[:-1] + b', "token": "other"}'
    assert "stands twice" in refusal(b"\xef\xbb\xbf" + twice)
    assert refusal(b"\xef\xbb\xbf" + body[:-1] + b";") == refusal(body[:-1] + b";")


# --- forms and the hash ---


def test_a_form_is_read_decoded() -> None:
    body = b"hash=AB&providerId=Lucky+Monaco&sessionId=%C3%A9%2B&playerId=123456&token=&x=1&x=1"
    parsed = parse(body, "form", [PRAGMATIC])
    assert (parsed.provider_id, parsed.session_id, parsed.player_id) == ("Lucky Monaco", "é+", "123456")
    assert (parsed.token, parsed.hash, extra_of(parsed).fields) == (None, "AB", {"x": "1"})


@pytest.mark.parametrize(
    ("body", "description"),
    [
        (b"", "field 'hash' is missing"),
        (b'{"hash":"00"}', "field 'hash' is missing"),
        (b"hash=00&providerId=p&sessionId=&playerId=1", "field 'sessionId' must not be empty"),
        (b"hash=00&providerId=p&sessionId=%00&playerId=1", "field 'sessionId' must not contain control characters"),
        (b"hash=&providerId=p&sessionId=s&playerId=1", "field 'hash' must not be empty"),
        (
            b"hash=00&providerId=p&sessionId=s&sessionId=t&playerId=1",
            "field 'sessionId' stands twice with different values",
        ),
        (b"hash=00&providerId=p&sessionId=%FF&playerId=1", "body must be a form in UTF-8"),
        (b"hash=00&providerId=p&sessionId=%ED%A0%80&playerId=1", "body must be a form in UTF-8"),
        (b"\xff=1", "body must be a form in UTF-8"),
        (b"a=1&" * FORM_FIELDS_MAX + b"b=1", "body must be a form of at most 100 fields"),
    ],
)
def test_a_bad_form_is_bad_parameters(body: bytes, description: str) -> None:
    assert refusal(body, PRAGMATIC) == description


def test_a_form_of_100_fields_is_read() -> None:
    fields = FORM | {f"x{n}": "" for n in range(FORM_FIELDS_MAX - len(FORM))}
    assert len(extra_of(parse(urlencode(fields).encode(), "form", [PRAGMATIC])).fields) == 96


GOLDEN = {"playerId": "123456", "providerId": "PragmaticPlay", "sessionId": SESSION}
GOLDEN_HASH = "c46d5b113e81d306831a06765e12067f"


def test_the_golden_vector_of_the_hash() -> None:
    assert hash_of(GOLDEN.items(), "hash", "testKey") == GOLDEN_HASH


def test_the_hash_ignores_order_its_own_field_and_what_is_absent() -> None:
    received = [*reversed(GOLDEN.items()), ("hash", "anything"), ("token", None)]
    assert hash_of(received, "hash", "testKey") == GOLDEN_HASH


def test_the_hash_covers_empty_values_and_parameters_added_tomorrow() -> None:
    assert hash_of((GOLDEN | {"token": ""}).items(), "hash", "testKey") != GOLDEN_HASH
    assert hash_of((GOLDEN | {"zone": "1"}).items(), "hash", "testKey") != GOLDEN_HASH


@pytest.mark.parametrize(
    "odd",
    [
        *(
            {"sessionId": "S1&token=T1"},
            {"playerId": "1&providerId=pp&sessionId=V&z="},
            {"token": "a=="},
            {"zone": "&"},
        ),
        *({"zone": "="}, {"a&b": "c"}, {"a=b": "c"}, {"=": ""}),
    ],
)
def test_with_a_hash_nothing_may_look_like_a_border_between_fields(odd: dict[str, str]) -> None:
    problem = f"field {next(iter(odd))!r} must have no & and no =, which separate the fields that are hashed"
    fields = GOLDEN | {"hash": "0"} | odd
    assert refusal(urlencode(fields).encode(), PRAGMATIC) == problem
    assert refusal(fields, OLD) == problem
    if "token" not in odd:
        nested = GOLDEN | {"hash": "0", "deep": [odd]}
        assert "'deep' must have no &" in refusal(nested, OLD)


def test_in_a_dialect_without_a_hash_they_are_characters_like_others() -> None:
    assert parse(json.dumps(NOTICE | {"sessionId": "a=b&c"}).encode(), "json", [V4]).session_id == "a=b&c"


@pytest.mark.parametrize("dialect", [PRAGMATIC, OLD])
@pytest.mark.parametrize("meaning", ["provider_id", "session_id", "player_id", "token"])
@pytest.mark.parametrize("value", ["a&b", "a=", "&"])
def test_what_could_be_read_as_several_fields_is_never_hashed(dialect: Dialect, meaning: str, value: str) -> None:
    facts: dict[str, Any] = {"provider_id": "l", "session_id": "s", "player_id": "p", "token": "t"} | {meaning: value}
    with pytest.raises(CannotEncode, match="must have no & and no =") as caught:
        encode(dialect, **facts, request_id="u", hash_key="k")
    assert caught.value.cause == "ambiguous_hash"


def test_the_hash_is_over_decoded_values() -> None:
    # The hash below is md5("playerId=a b&providerId=é&sessionId=x+y" + "k"), computed with md5sum.
    fields = {"playerId": "a b", "providerId": "é", "sessionId": "x+y"}
    body = urlencode(fields | {"hash": "040b01bcf1600cd67275c93f028d147b"}).encode()
    check_hash(parse(body, "form", [PRAGMATIC]), "k")


@pytest.mark.parametrize("hash_", [GOLDEN_HASH, GOLDEN_HASH.upper()])
def test_a_fitting_hash_passes_in_either_case(hash_: str) -> None:
    body = urlencode(GOLDEN | {"hash": hash_}).encode()
    check_hash(parse(body, "form", [PRAGMATIC]), "testKey")


@pytest.mark.parametrize("hash_", ["0", GOLDEN_HASH[:-1], GOLDEN_HASH + "0", " " + GOLDEN_HASH, "é" * 32, "c" * 256])
def test_a_wrong_hash_is_bad_hash_and_the_expected_one_is_not_told(hash_: str) -> None:
    parsed = parse(urlencode(GOLDEN | {"hash": hash_}).encode(), "form", [PRAGMATIC])
    with pytest.raises(BadNotice) as caught:
        check_hash(parsed, "testKey")
    assert caught.value.meaning == "bad_hash"
    assert GOLDEN_HASH not in repr(caught.value)


@pytest.mark.parametrize("sent", [{}, {OLD.fields["hash"]: None}, {OLD.fields["hash"]: ""}])
@pytest.mark.parametrize("key", ["k", ""])
def test_a_missing_hash_is_bad_hash_even_if_not_required(sent: dict[str, str | None], key: str) -> None:
    dialect = replace(OLD, required=("provider", "session", "player"))
    body = json.dumps({OLD.fields[meaning]: "x" for meaning in dialect.required} | sent).encode()
    with pytest.raises(BadNotice) as caught:
        check_hash(parse(body, "json", [dialect]), key)
    assert caught.value.meaning == "bad_hash"


def test_a_wrong_key_is_bad_hash() -> None:
    parsed = parse(urlencode(GOLDEN | {"hash": GOLDEN_HASH}).encode(), "form", [PRAGMATIC])
    with pytest.raises(BadNotice, match="does not fit"):
        check_hash(parsed, "testkey")


def test_a_value_too_deep_to_write_again_is_bad_parameters() -> None:
    """The hash is computed over each value written as JSON again, which such a value cannot be."""
    body = b'{"providerId":"p","sessionId":"s","playerId":"1","hash":"00","x":' + b"[" * 300 + b"]" * 300 + b"}"
    with pytest.raises(BadNotice, match="nested too deeply") as caught:
        check_hash(parse(body, "json", [OLD]), "k")
    assert caught.value.meaning == "bad_parameters"


# --- sending ---

FACTS = {
    "provider_id": "luckymonaco",
    "session_id": SESSION,
    "player_id": "123456",
    "token": TOKEN,
    "request_id": UUID,
    "hash_key": "testKey",
}
_V4_01_SENT = f'{{"providerId":"luckymonaco","sessionId":"{SESSION}","userId":"123456","uuid":"{UUID}"}}'


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (
            "v4",
            f'{{"providerId":"luckymonaco","sessionId":"{SESSION}","externalPlayerId":"123456","token":"{TOKEN}"}}',
        ),
        ("v4.01", _V4_01_SENT),
        ("v4.02", _V4_01_SENT),
        ("v1", _V4_01_SENT),
        (
            "pragmatic",
            f"hash=6f67150cadc64e1525786f6d4b3f43a0&providerId=luckymonaco&sessionId={SESSION}&playerId=123456&token={TOKEN}",
        ),
    ],
)
def test_each_dialect_sends_its_fields_and_no_other(name: str, body: str) -> None:
    assert encode(SHIPPED[name], **FACTS).decode() == body


def test_an_optional_fact_that_is_unknown_is_left_out() -> None:
    body = encode(PRAGMATIC, **FACTS | {"token": None, "provider_id": "PragmaticPlay"})
    assert dict(parse_qsl(body.decode())) == GOLDEN | {"hash": GOLDEN_HASH}


@pytest.mark.parametrize(
    ("dialect", "unknown", "name"), [(V4, "token", "token"), (PRAGMATIC, "hash_key", "hash"), (OLD, "hash_key", "hash")]
)
def test_a_required_fact_that_is_unknown_cannot_be_sent(dialect: Dialect, unknown: str, name: str) -> None:
    with pytest.raises(CannotEncode, match=f"dialect {dialect.name} must send '{name}'"):
        encode(dialect, **FACTS | {unknown: None})


# --- answers ---


def test_an_answer_is_the_pages_object_of_a_number_and_a_text() -> None:
    assert SUCCESS == b'{"error":0,"description":"Success"}'
    assert answer(57, 'say "é"') == '{"error":57,"description":"say \\"é\\""}'.encode()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":0}', 0),
        (b'{"error":"120"}', 120),
        (b'{"error":"-1.50"}', -1.5),
        (b'{"error":" 7 "}', 7),
        (b'{"error":998}', 998),
        (b'{"error":false}', None),
        (b'{"error":"\xd9\xa0"}', None),
        (b'{"error":"1e3"}', None),
        (b'{"error":"Infinity"}', None),
        (b'{"error":null}', None),
        (b"[0]", None),
        (b"", None),
    ],
)
def test_an_answered_code_is_a_number_or_a_numeric_string(body: bytes, code: float | None) -> None:
    assert answered_code(body) == code


# --- fuzz: every input gives a notice or a refusal ---

ALL = [*SHIPPED.values(), OLD]


def outcome_of(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or the BadNotice that it raises. Any other exception fails the test."""
    try:
        return call(*arguments)
    except BadNotice as refused:
        return refused


def check_parsed_or_refused(body: bytes, content: str) -> None:
    """`parse` raises no exception but BadNotice. What it returns can be stored, sent and answered."""
    parsed = outcome_of(parse, body, content, [dialect for dialect in ALL if dialect.content == content])
    if isinstance(parsed, BadNotice):
        assert parsed.meaning == "bad_parameters"
        assert json.loads(answer(7, parsed.description))["description"]
        return
    assert isinstance(parsed, Parsed)
    for value, longest in [
        (parsed.provider_id, ID_MAX),
        (parsed.session_id, ID_MAX),
        (parsed.player_id, ID_MAX),
        (parsed.token, TOKEN_MAX),
        (parsed.request, REQUEST_MAX),
        (parsed.hash, ID_MAX),
    ]:
        if value is not None:
            assert type(value) is str
            assert id_problem(value, longest) is None
            assert value.encode("utf-8")
    for meaning in parsed.dialect.required:
        assert parsed.dialect.fields[meaning] in parsed.received
    if "hash" in parsed.dialect.fields:
        refused = outcome_of(check_hash, parsed, "k")
        assert refused is None or refused.meaning in ("bad_hash", "bad_parameters")


NAMES = sorted({name for dialect in ALL for name in dialect.fields.values()})
ALL_CHARACTERS = st.characters(exclude_categories=())
# Values as JSON text, so that they can contain duplicate keys, huge numbers, NaN and lone surrogates
SCALARS = st.one_of(
    st.sampled_from(["null", "true", "NaN", "-0", "1e400", "1.0", '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '""']),
    st.integers().map(str),
    st.integers(1, 600).map(lambda digits: "9" * digits),
    st.text(ALL_CHARACTERS, max_size=20).map(json.dumps),
    st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.integers(200, 5000).map(lambda length: json.dumps("x" * length)),
    st.integers(1, 2000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 1500).map(lambda depth: '{"a":' * depth + "1" + "}" * depth),
)
KEYS = st.sampled_from(NAMES).map(json.dumps) | st.text(max_size=8).map(json.dumps)


def written_object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(KEYS, inner), max_size=4).map(written_object),
    ),
    max_leaves=8,
)
GOOD = st.text("abc019é", min_size=1, max_size=36).map(json.dumps) | st.integers(0, 2**64).map(str)
# Bodies that are nearly notices: each field once with a good value, then some fields again with any value. Some of them
# are valid.
NEARLY = st.tuples(
    st.sampled_from(ALL),
    st.lists(GOOD, min_size=len(NAMES), max_size=len(NAMES)),
    st.lists(st.tuples(KEYS, VALUES), max_size=3),
).map(
    lambda drawn: [(json.dumps(name), drawn[1][i]) for i, name in enumerate(sorted(drawn[0].required_names))] + drawn[2]
)


@fuzz
@given(st.binary(max_size=300), st.sampled_from(["json", "form"]))
@example(b"\x00" * 16_384, "json")
@example(b"[" * 16_384, "json")
@example(b'{"a":' * 3276, "json")
@example(b"&" * 16_384, "form")
@example(b"%" * 16_384, "form")
@example(b"a=" + b"%C3" * 5000, "form")
@example(raw_notice(b"9" * 16_000), "json")
def test_any_bytes_are_a_notice_or_a_refusal(body: bytes, content: str) -> None:
    check_parsed_or_refused(body, content)


@fuzz
@given(NEARLY | st.lists(st.tuples(KEYS, VALUES), max_size=8))
def test_any_json_object_is_a_notice_or_a_refusal(pairs: list[tuple[str, str]]) -> None:
    check_parsed_or_refused(written_object(pairs).encode("utf-8", "surrogatepass")[: 16 * 1024], "json")


@fuzz
@given(NEARLY, st.integers(0, 16_000))
def test_a_big_body_is_a_notice_or_a_refusal(pairs: list[tuple[str, str]], padding: int) -> None:
    body = written_object([*pairs, ('"padding"', '"' + ":" * padding + '"')]).encode("utf-8", "surrogatepass")
    check_parsed_or_refused(body[: 16 * 1024], "json")


FORM_BYTES = st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=20)), max_size=12)


@fuzz
@given(FORM_BYTES)
def test_any_form_is_a_notice_or_a_refusal(pairs: list[tuple[str, bytes]]) -> None:
    check_parsed_or_refused(urlencode(pairs).encode(), "form")
    check_parsed_or_refused(b"&".join(name.encode() + b"=" + value for name, value in pairs), "form")


@fuzz
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["1", '"1"', "true", "1.0", "[1]"])), max_size=5))
def test_an_object_is_refused_exactly_when_a_key_has_two_values(pairs: list[tuple[str, str]]) -> None:
    body = written_object([(json.dumps(key), value) for key, value in pairs]).encode()
    contradicted = len(set(pairs)) > len({key for key, _ in pairs})
    found = outcome_of(json_object, body)
    if contradicted:
        assert "stands twice with different values" in found.description
    else:
        assert found == {key: json.loads(value) for key, value in pairs}


@fuzz
@given(st.binary(max_size=200) | VALUES.map(lambda value: f'{{"error":{value}}}'.encode("utf-8", "surrogatepass")))
def test_no_answer_breaks_the_reader(body: bytes) -> None:
    code = answered_code(body)
    assert code is None or (type(code) in (int, float) and abs(code) < float("inf"))
    assert type(code) is not int or abs(code) < 2**63  # SQLite's integers have 64 bits


IDS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=ID_MAX)
TOKENS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=500)


@pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.name)
@fuzz
@given(IDS, IDS, IDS, TOKENS, st.uuids().map(lambda uuid: uuid.hex))
def test_what_is_sent_is_read_back(
    dialect: Dialect, provider: str, session: str, player: str, token: str, request_id: str
) -> None:
    assume("hash" not in dialect.fields or not breaks_hash(provider + session + player + token))
    body = encode(
        dialect,
        provider_id=provider,
        session_id=session,
        player_id=player,
        token=token,
        request_id=request_id,
        hash_key="testKey",
    )
    parsed = parse(body, dialect.content, [dialect])
    assert (parsed.provider_id, parsed.session_id, parsed.player_id) == (provider, session, player)
    assert parsed.token == (token if "token" in dialect.fields else None)
    assert parsed.request == (request_id if "request" in dialect.fields else None)
    assert extra_of(parsed).fields == {}
    if "hash" in dialect.fields:
        check_hash(parsed, "testKey")
