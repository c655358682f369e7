"""The values that all modules share: what is a valid id, which secrets a repr hides, how a notice is refused, how times
are written.
"""

from datetime import UTC, datetime
from typing import Any

import pytest
from chance import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import lmdaemon
from lmdaemon.model import (
    ID_MAX,
    MEANINGS,
    TOKEN_MAX,
    Delivery,
    Gate,
    Notice,
    Refuse,
    Session,
    SessionEnded,
    counted,
    id_problem,
    rfc3339,
    utc,
)

SECRET = "fSYFZMScpZ01FhR26r59GexREh1xHgEY"
AT = 1_790_000_000_123
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)


@pytest.mark.parametrize(
    "value",
    [
        "6fd2d6f3bb8f4c5a9fadf15d81206af2",
        "a",
        "0",
        "x" * 256,
        "é" * 256,
        "💥" * 256,
        " leading and trailing ",
        "a/b?c=d&e#f%00",
        "\u00a0",
        "\u200b",
        "\u2028",
        "\ufeff",
    ],
)
def test_an_id_is_opaque_text_of_1_to_256_characters(value: str) -> None:
    assert id_problem(value) is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "must not be empty"),
        ("x" * 257, "must be at most 256 characters (got 257)"),
        ("é" * 300, "must be at most 256 characters (got 300)"),
        ("\x00", "must not contain control characters"),
        ("a\nb", "must not contain control characters"),
        ("a\x1f", "must not contain control characters"),
        ("a\x7f", "must not contain control characters"),
        ("é\t", "must not contain control characters"),
        ("é\x7f", "must not contain control characters"),
        ("a\x80", "must not contain control characters"),
        ("a\x85b", "must not contain control characters"),
        ("a\x9f", "must not contain control characters"),
        ("\ud800", "must not contain lone surrogates"),
        ("a\udfff", "must not contain lone surrogates"),
    ],
)
def test_what_is_no_id_is_told_why(value: str, problem: str) -> None:
    assert id_problem(value) == problem


def test_a_token_may_be_longer_than_an_id() -> None:
    assert id_problem("t" * TOKEN_MAX, TOKEN_MAX) is None
    assert id_problem("t" * (TOKEN_MAX + 1), TOKEN_MAX) == "must be at most 4096 characters (got 4097)"


@settings(deadline=None, max_examples=examples(200))
@given(ANY_TEXT)
def test_what_passes_as_an_id_can_be_stored_and_sent(value: str) -> None:
    if id_problem(value) is None:
        assert 1 <= len(value) <= ID_MAX
        assert value.encode().decode() == value
        assert not any(ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F for c in value)


def problem_character_by_character(value: str) -> str | None:
    """The same rule in its simplest form, character by character: slow, but obviously right."""
    for character in value:
        point = ord(character)
        if point < 0x20 or 0x7F <= point < 0xA0:
            return "must not contain control characters"
        if 0xD800 <= point < 0xE000:
            return "must not contain lone surrogates"
    return None


EDGES = st.sampled_from("a é\u00a0\u2028\ufeff\u0378💥\x00\x1f\x20\x7e\x7f\x80\x9f\xa0\ud7ff\ud800\udfff\ue000")


@settings(deadline=None, max_examples=examples(500))
@given(st.text(EDGES | st.characters(exclude_categories=()), min_size=1, max_size=ID_MAX))
def test_an_id_is_judged_as_by_looking_at_each_character(value: str) -> None:
    assert id_problem(value) == problem_character_by_character(value)


def test_every_single_character_is_judged_by_the_rule() -> None:
    wrong = [point for point in range(0x110000) if id_problem(chr(point)) != problem_character_by_character(chr(point))]
    assert wrong == []


@pytest.mark.parametrize("meaning", MEANINGS)
def test_a_plugin_can_refuse_with_every_meaning_of_the_code_table(meaning: str) -> None:
    refusal = Refuse(meaning, "wallet is closed")
    assert (refusal.meaning, refusal.description) == (meaning, "wallet is closed")


@pytest.mark.parametrize("meaning", ["", "success", "BAD_TOKEN", "bad_parameter"])
def test_a_meaning_nobody_defined_cannot_be_answered(meaning: str) -> None:
    with pytest.raises(ValueError, match="meaning must be one of bad_parameters, bad_token"):
        Refuse(meaning)


def test_plugins_import_their_types_from_the_package() -> None:
    assert (lmdaemon.Notice, lmdaemon.Refuse, lmdaemon.SessionEnded) == (Notice, Refuse, SessionEnded)


def delivery(**changes: Any) -> Delivery:
    facts = {
        "id": 7,
        "nonce": "q83vEjRWeJA",
        "session": 1,
        "operator": "acme",
        "session_id": "s",
        "token": SECRET,
        "sink": "http",
        "state": "pending",
        "created_at": AT,
        "due_at": AT,
        "settled_at": None,
        "attempts": 0,
        "step": 0,
        "aged_from_at": AT,
        "held_base_ms": 0,
        "last_status": None,
        "last_code": None,
        "last_error": None,
        "history": "[]",
        "body": b'{"token":"%s"}' % SECRET.encode(),
        "discarded": None,
        "body_digest": None,
    }
    return Delivery(**(facts | changes))


def session(**changes: Any) -> Session:
    facts = {
        "id": 1,
        "operator": "acme",
        "session_id": "s",
        "player_id": "123456",
        "token": SECRET,
        "attributes": None,
        "extra": f'{{"partnerToken":"{SECRET}"}}',
        "idle_ms": 900_000,
        "opened_at": AT,
        "seen_ms": 5_000,
        "seen_at": AT,
        "lifetime_at": None,
        "ended_at": None,
        "reason": None,
    }
    return Session(**(facts | changes))


@pytest.mark.parametrize(
    "value",
    [
        Notice("acme", "v4", "luckymonaco", "s", "123456", SECRET, None, {"partnerToken": SECRET}),
        SessionEnded(
            "msg_1_x",
            "acme",
            "luckymonaco",
            "s",
            "123456",
            SECRET,
            "reported",
            utc(AT),
            utc(AT),
            utc(AT),
            {},
            {"partnerToken": SECRET},
        ),
        session(),
        delivery(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_repr_shows_a_secret(value: object) -> None:
    assert SECRET not in repr(value)
    assert "acme" in repr(value)


@pytest.mark.parametrize("value", [Notice("a", "v4", "p", "s", "1"), session(), delivery(), Gate()])
def test_what_is_known_cannot_be_changed(value: Any) -> None:
    with pytest.raises(AttributeError):  # FrozenInstanceError is a kind of AttributeError
        setattr(value, next(iter(type(value).__annotations__)), "other")


def test_a_session_is_idle_too_long_one_idle_time_after_its_last_touch() -> None:
    assert session(seen_ms=5_000, idle_ms=900_000).deadline_ms == 905_000


def test_webhook_id_carries_row_and_nonce() -> None:
    assert delivery(id=7, nonce="q83vEjRWeJA").webhook_id == "msg_7_q83vEjRWeJA"


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (1_790_000_000_123, "2026-09-21T14:13:20.123Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (None, None),
    ],
)
def test_times_are_rfc_3339_in_utc_with_milliseconds(at: int | None, text: str | None) -> None:
    assert rfc3339(at) == text


@settings(deadline=None, max_examples=examples(200))
@given(st.integers(0, 4_102_444_800_000))
def test_no_millisecond_is_lost_in_a_written_time(at: int) -> None:
    text = rfc3339(at)
    assert text is not None
    read = datetime.fromisoformat(text)
    assert read == utc(at)
    assert (read - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000 == pytest.approx(at, abs=0.01)


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted(1, "delivery", "deliveries") == "1 delivery"
    assert counted(3, "delivery", "deliveries") == "3 deliveries"
