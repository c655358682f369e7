"""The sentences that tell people why deliveries to an operator wait, since when and until when."""

from dataclasses import replace
from random import Random

import pytest
from support import hear

from lmdaemon import gates, retry
from lmdaemon.model import Gate
from lmdaemon.retry import Outcome

NOW = 1_790_000_000_000  # 2026-09-21T14:13:20Z
DAY = 86_400_000
REFUSED = Outcome("retry", "tls", detail="no")
CODE_7 = Outcome("retry", "code_7", 200, 7, detail="`error` is 7")
DELIVERED = Outcome("delivered", "", 200, 0)


def after(gate: Gate, *outcomes: Outcome, at: int = NOW, probe: bool = False) -> Gate:
    for outcome in outcomes:
        gate = retry.after(gate, outcome, at, 5.0, probe=probe, rng=Random(1))
    return gate


BROKEN = after(Gate(), *[REFUSED] * 5)
HELD = retry.hold(Gate(), NOW, "by_hand", by="anna", note="they move", until_at=NOW + 7_200_000)
PAUSED = after(Gate(), Outcome("retry", "status_503", 503, retry_after_s=3600.0))


@pytest.mark.parametrize(
    ("gate", "because", "outlook"),
    [
        (Gate(), None, None),
        (
            BROKEN,
            "breaker open since 2026-09-21T14:13:20Z: 5 attempts failed in a row since 2026-09-21T14:13:20Z: tls (no)",
            "tried again at 2026-09-21T14:13:25Z; the first notice dies at 2026-09-22T14:13:20Z",
        ),
        (
            HELD,
            "held since 2026-09-21T14:13:20Z by anna: by_hand (they move)",
            "released by itself at 2026-09-21T16:13:20Z; its deliveries do not age until then",
        ),
        (
            retry.hold(Gate(), NOW, "gone"),
            "held since 2026-09-21T14:13:20Z: it answered 410 (gone)",
            "held until somebody releases it; its deliveries do not age meanwhile",
        ),
        (
            retry.hold(Gate(), NOW, "failing_for_days"),
            "held since 2026-09-21T14:13:20Z: for 5 days every attempt failed (failing_for_days)",
            "held until somebody releases it; its deliveries do not age meanwhile",
        ),
        (
            PAUSED,
            "a Retry-After of 2026-09-21T14:13:20Z asks for no attempt before 2026-09-21T15:13:20Z",
            "sent again at 2026-09-21T15:13:20Z; the first notice dies at 2026-09-22T14:13:20Z",
        ),
    ],
    ids=["open", "broken", "held for a time", "gone", "failing for days", "paused"],
)
def test_since_when_why_and_until_when_stand_in_a_sentence(
    gate: Gate, because: str | None, outlook: str | None
) -> None:
    assert gates.because(gate, NOW) == because
    assert gates.outlook(gate, NOW, pending=3, dies_at=NOW + DAY) == outlook


def test_a_half_open_breaker_is_told_with_the_time_at_which_it_opened() -> None:
    later_at = BROKEN.probe_at + 60_000
    assert retry.breaker(BROKEN, later_at) == "half-open"
    assert (gates.because(BROKEN, later_at) or "").startswith("breaker open since 2026-09-21T14:13:20Z: 5 attempts")


def test_a_breaker_with_nothing_to_send_is_said_to_close_by_itself() -> None:
    said = "nothing waits for it: the breaker closes by itself at 2026-09-21T14:13:25Z"
    assert gates.outlook(BROKEN, NOW, pending=0) == said


def test_the_same_refusal_every_time_after_a_quiet_day_is_a_mismatch() -> None:
    gate = after(Gate(), *[CODE_7] * 5)
    said = "every answer since 2026-09-21T14:13:20Z is code_7 (`error` is 7), none is known before"
    assert gates.mismatch(gate) == f"{said}: one side has changed what it expects"
    assert gates.because(gate, NOW) == f"breaker open since 2026-09-21T14:13:20Z: {gates.mismatch(gate)}"


def test_a_hold_is_said_also_where_every_answer_was_the_same_refusal() -> None:
    held = retry.hold(after(Gate(), *[CODE_7] * 5), NOW, "by_hand", by="anna", note="they look into it")
    assert gates.because(held, NOW) == "held since 2026-09-21T14:13:20Z by anna: by_hand (they look into it)"


def test_a_page_in_place_of_answers_may_also_be_somebody_else() -> None:
    gate = after(Gate(), *[Outcome("retry", "bad_answer", 200, detail="the body is HTML")] * 5)
    assert (gates.mismatch(gate) or "").endswith(
        "something else answers in its place, or one side has changed what it expects"
    )


def test_a_mismatch_after_failures_long_ago_says_how_long_it_was_quiet() -> None:
    long_ago = after(after(Gate(), REFUSED), DELIVERED)
    found = gates.mismatch(after(long_ago, *[CODE_7] * 5, at=NOW + 2 * DAY))
    assert found is not None
    assert "before that none for a day" in found


@pytest.mark.parametrize(
    "gate",
    [
        after(Gate(), *[CODE_7] * 4),
        BROKEN,
        after(after(Gate(), REFUSED, at=NOW - 1), *[CODE_7] * 5),
        after(after(Gate(), CODE_7), DELIVERED, *[CODE_7] * 5),
        after(Gate(), *[CODE_7] * 5, DELIVERED),
    ],
    ids=["too few", "no answer", "another failure among them", "one within the day before", "over"],
)
def test_other_failures_are_no_mismatch(gate: Gate) -> None:
    assert gates.mismatch(gate) is None


def changes(before: Gate, gate: Gate, cause: str, at: int = NOW) -> list[tuple[str, dict[str, object]]]:
    with hear() as events:
        gates.log_change("acme", before, gate, at, pending=7, cause=cause, by="anna")
    return [(event.name, event.facts) for event in events]


def test_a_release_logs_the_hold_and_the_breaker_that_it_ends() -> None:
    before = retry.hold(BROKEN, NOW, "by_hand", by="bob", note="they move")
    (released, facts), (closed, more) = changes(before, retry.release(before, NOW), "by_hand", NOW + 60_000)
    assert (released, closed) == ("operator.released", "breaker.closed")
    assert (facts["held_s"], facts["held_by"], facts["note"], facts["by"]) == (60.0, "bob", "they move", "anna")
    assert (more["open_s"], more["failed_attempts"], more["pending"], more["reason"]) == (60.0, 5, 7, "by_hand")


def test_a_release_that_ends_a_retry_after_alone_is_told() -> None:
    assert [name for name, _ in changes(PAUSED, retry.release(PAUSED, NOW), "by_hand")] == ["operator.resumed"]


def test_what_changes_nothing_of_what_is_told_logs_nothing() -> None:
    assert changes(BROKEN, replace(BROKEN, failures=6), "answer") == []


def test_time_ends_a_hold_and_closes_a_breaker_for_which_nothing_waits() -> None:
    assert retry.settled_by_time(HELD, NOW + 7_199_999, is_waiting=True) is HELD
    assert retry.settled_by_time(HELD, NOW + 7_200_000, is_waiting=True).held_at is None
    assert retry.changes_by_time_at(HELD, is_waiting=True) == NOW + 7_200_000
    assert retry.settled_by_time(BROKEN, NOW + 5_000, is_waiting=True) is BROKEN
    closed = retry.settled_by_time(BROKEN, NOW + 5_000, is_waiting=False)
    assert (closed.failures, closed.opened_at, closed.failing_since_at) == (0, None, NOW)
    assert retry.changes_by_time_at(BROKEN, is_waiting=False) == NOW + 5_000
    assert retry.changes_by_time_at(BROKEN, is_waiting=True) is None


def test_each_attempt_knows_the_url_that_was_in_force_when_it_began() -> None:
    gate = gates.with_url(gates.with_url(Gate(), "https://a.example/", 100), "https://b.example/", 200)
    assert gates.with_url(gate, "https://b.example/", 300) is gate
    found = [gates.url_at(gate, at) for at in (99, 100, 199, 200, 999)]
    assert found == [None, "https://a.example/", "https://a.example/", "https://b.example/", "https://b.example/"]


def test_a_second_hold_keeps_its_start_and_takes_over_a_note_and_an_end() -> None:
    again = retry.hold(HELD, NOW + 5, "by_hand", by="bob", note="still", until_at=NOW + 9)
    assert again == replace(HELD, held_note="still", held_until_at=NOW + 9)
    assert retry.hold(HELD, NOW + 5, "by_hand", by="bob") == HELD
