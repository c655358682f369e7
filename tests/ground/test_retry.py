"""Judging an answer, the waits between attempts, and the breaker: a case for every status and shape of answer
(docs/delivery.md).
"""

import gzip
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from random import Random

import pytest
from chance import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdaemon import retry
from lmdaemon.model import Delivery, Gate
from lmdaemon.retry import Outcome

NOW = 1_790_000_000_000
NOW_S = NOW / 1000
HOUR = 3_600_000
SUCCESS = b'{"error":0,"description":"Success"}'

fuzz = settings(deadline=None, max_examples=examples(200))


# --- judge ---


def told(status: int, body: bytes, **options: object) -> tuple[str, str]:
    outcome = retry.judge(status, body, now_s=NOW_S, **options)  # type: ignore[arg-type]
    assert outcome.status == status
    return outcome.verdict, outcome.reason


def expected_of_success(status: int) -> tuple[str, str]:
    if 300 <= status < 400:
        return "retry", "redirect"
    return {200: ("delivered", ""), 410: ("hold", "gone")}.get(status, ("retry", f"status_{status}"))


def test_only_a_200_delivers_only_a_410_holds_and_do_not_retry_is_final() -> None:
    for status in range(100, 600):
        of_success = expected_of_success(status)
        assert told(status, SUCCESS) == of_success, status
        assert told(status, b"<html>") == (("retry", "bad_answer") if status == 200 else of_success), status
        for code in (120, 999):
            expected = ("hold", "gone") if status == 410 else ("final", f"code_{code}")
            assert told(status, b'{"error":%d}' % code) == expected, status


def test_gone_holds_whatever_the_body_says() -> None:
    for body in (SUCCESS, b'{"error":120}', b'{"error":100}', b""):
        assert told(410, body) == ("hold", "gone")


DELIVERED = ("delivered", "")
BAD_ANSWER = ("retry", "bad_answer")


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (SUCCESS, DELIVERED),
        (b'{"error":0}', DELIVERED),
        (b'{"error":0.0}', DELIVERED),
        (b'{"error":-0}', DELIVERED),
        (b'{"error":"0"}', DELIVERED),
        (b'{"error":"0.0"}', DELIVERED),
        (b'{"error":"00"}', DELIVERED),
        (b'{"error":" 0 "}', DELIVERED),
        (b' {"description": "", "error" : 0 }\n', DELIVERED),
        (b'\xef\xbb\xbf{"error":0}', DELIVERED),
        (b'\xef\xbb\xbf{"error":120}', ("final", "code_120")),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"error":0}', BAD_ANSWER),
        (b'{"error":0,"description":"cut in an emoji \\ud83d"}', DELIVERED),
        (b'{"error":120,"description":"\\uDE00 \\uD83D\\uDE00"}', ("final", "code_120")),
        (b'{"error":0,"description":"\\ud83d"', BAD_ANSWER),
        (b'{"error":NaN,"description":"\\ud83d"}', BAD_ANSWER),
        (b'{"error":"\\ud83d"}', BAD_ANSWER),
        (b'{"error":false}', BAD_ANSWER),
        (b'{"error":true}', BAD_ANSWER),
        (b'{"error":null}', BAD_ANSWER),
        (b'{"error":""}', BAD_ANSWER),
        (b'{"error":" "}', BAD_ANSWER),
        (b'{"error":"zero"}', BAD_ANSWER),
        (b'{"error":"0x0"}', BAD_ANSWER),
        (b'{"error":"0e0"}', BAD_ANSWER),
        (b'{"error":"."}', BAD_ANSWER),
        (b'{"error":"nan"}', BAD_ANSWER),
        (b'{"error":"\\u0660"}', BAD_ANSWER),
        (b'{"error":"%s"}' % (b"0" * 33), BAD_ANSWER),
        (b'{"error":NaN}', BAD_ANSWER),
        (b'{"error":1e400}', BAD_ANSWER),
        (b'{"error":[]}', BAD_ANSWER),
        (b'{"error":[0]}', BAD_ANSWER),
        (b'{"error":{}}', BAD_ANSWER),
        (b'{"Error":0}', BAD_ANSWER),
        (b'{"description":"Success"}', BAD_ANSWER),
        (b"{}", BAD_ANSWER),
        (b"[]", BAD_ANSWER),
        (b'[{"error":0}]', BAD_ANSWER),
        (b"0", BAD_ANSWER),
        (b'"error"', BAD_ANSWER),
        (b"null", BAD_ANSWER),
        (b"", BAD_ANSWER),
        (b"OK", BAD_ANSWER),
        (b"\xff\xfe", BAD_ANSWER),
        (b"error=0", BAD_ANSWER),
        (SUCCESS[:-1], BAD_ANSWER),
        (SUCCESS + b"}", BAD_ANSWER),
        (b"[" * 16_384, BAD_ANSWER),
        (b'{"error":120}', ("final", "code_120")),
        (b'{"error":"120"}', ("final", "code_120")),
        (b'{"error":120.0}', ("final", "code_120")),
        (b'{"error":999}', ("final", "code_999")),
        (b'{"error":"999"}', ("final", "code_999")),
        (b'{"error":100}', ("retry", "code_100")),
        (b'{"error":998}', ("retry", "code_998")),
        (b'{"error":1}', ("retry", "code_1")),
        (b'{"error":-1}', ("retry", "code_-1")),
        (b'{"error":0.5}', ("retry", "code_0.5")),
        (b'{"error":7}', ("retry", "code_7")),
        (b'{"error":"57"}', ("retry", "code_57")),
        (b'{"error":120.5}', ("retry", "code_120.5")),
        (b'{"error":1234567}', ("retry", "code_1234567")),
    ],
)
def test_every_shape_of_a_200_has_its_verdict(body: bytes, verdict: tuple[str, str]) -> None:
    assert told(200, body) == verdict


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (SUCCESS.decode().encode("utf-16"), "UTF-16, not UTF-8"),
        (SUCCESS.decode().encode("utf-16-le"), "UTF-16, not UTF-8"),
        (SUCCESS.decode().encode("utf-16-be"), "UTF-16, not UTF-8"),
        (SUCCESS.decode().encode("utf-32"), "UTF-32, not UTF-8"),
        ('{"error":0,"description":"Éxito"}'.encode("latin-1"), "not UTF-8"),
        (gzip.compress(SUCCESS, mtime=0), "compressed with gzip"),
        (b"<html>", ""),
        (b"", ""),
        (b"{}", ""),
    ],
)
def test_why_an_answer_cannot_be_read_is_told_where_it_does_not_show(body: bytes, detail: str) -> None:
    outcome = retry.judge(200, body, now_s=0)
    assert (outcome.verdict, outcome.reason, outcome.detail) == ("retry", "bad_answer", detail)


def test_the_dialects_own_final_code_is_final_too() -> None:
    assert told(200, b'{"error":77}', final=77) == ("final", "code_77")
    assert told(200, b'{"error":77}') == ("retry", "code_77")
    assert told(200, b'{"error":120}', final=77) == ("final", "code_120")


def test_an_oversized_answer_is_retried_however_it_begins() -> None:
    assert told(200, SUCCESS, complete=False) == ("retry", "answer_too_long")
    assert told(200, b'{"error":120}', complete=False) == ("retry", "answer_too_long")
    assert told(502, SUCCESS, complete=False) == ("retry", "status_502")


@pytest.mark.parametrize(
    ("body", "code"),
    [(SUCCESS, 0), (b'{"error":"57.0"}', 57), (b'{"error":1000000}', 1000000), (b'{"error":0.5}', 0.5), (b"{}", None)],
)
def test_the_answered_code_is_shown_whole(body: bytes, code: float | None) -> None:
    found = retry.judge(200, body, now_s=NOW_S).code
    assert (found, type(found)) == (code, type(code))


@pytest.mark.parametrize("status", [200, 202, 301, 410, 429, 503])
def test_retry_after_is_heard_on_any_answer(status: int) -> None:
    assert retry.judge(status, b"", retry_after="7", now_s=NOW_S).retry_after_s == 7


ERRORS = st.sampled_from([b"0", b'"0"', b"false", b"120", b"1e999", b"null", b'"%s"', b"{}", b"9" * 400])
ANSWERS = st.one_of(
    st.binary(max_size=200),
    ERRORS.map(lambda error: b'{"error":' + error + b"}"),
    st.text(max_size=40).map(lambda text: b'{"error":"' + text.encode("utf-8", "replace") + b'"}'),
)


@fuzz
@given(
    st.integers(100, 599), ANSWERS, st.none() | st.text(max_size=50), st.booleans(), st.floats(0, 4e9), st.integers()
)
def test_no_answer_breaks_the_judge(
    status: int, body: bytes, header: str | None, complete: bool, now_s: float, final: int
) -> None:
    outcome = retry.judge(status, body, complete=complete, retry_after=header, now_s=now_s, final=final)
    assert (outcome.verdict == "hold") == (status == 410)
    if outcome.verdict == "delivered":
        assert (status, complete, outcome.reason) == (200, True, "")
        assert outcome.code == 0
    else:
        assert outcome.reason


# --- Retry-After ---


def date_in(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(NOW_S + seconds, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("1e3", None),
        ("0x10", None),
        ("٣", None),
        ("5, 10", None),
        ("0", 0),
        ("000", 0),
        ("5", 5),
        (" 5 ", 5),
        ("0000000000120", 120),
        ("3600", 3600),
        ("3601", 3600),
        ("9" * 5000, 3600),
        (date_in(90), 90),
        (date_in(0), 0),
        (date_in(-90), 0),
        (date_in(86_400), 3600),
        ("Monday, 21-Sep-26 14:14:20 GMT", 60),
        ("Mon Sep 21 14:14:20 2026", 60),
        ("Mon, 21 Sep 2026 14:14:20", 60),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 3600),
        ("Mon, 1 Jan 0100 00:00:00 GMT", 0),
        ("Mon, 99 Foo 2026 99:99:99 GMT", None),
        ("1 Jan 2030 00:00:00 +99999999999999", None),
    ],
)
def test_retry_after_is_read_in_every_form_of_the_rfc(header: str | None, seconds: float | None) -> None:
    assert retry.retry_after_s(header, NOW_S) == seconds


DATES = st.tuples(
    st.integers(0, 99),
    st.sampled_from(["Jan", "Feb", "Dec", "Foo"]),
    st.integers(0, 99_999),
    st.integers(-99999, 99999),
).map(lambda d: f"Mon, {d[0]} {d[1]} {d[2]:04} 12:00:00 {d[3]:+05}")


@fuzz
@given(st.text(max_size=60) | st.text("0123456789-+:, GMTJan", max_size=60) | DATES, st.floats(0, 4e9))
def test_retry_after_asks_for_an_hour_at_most_or_is_nonsense(header: str, now_s: float) -> None:
    seconds = retry.retry_after_s(header, now_s)
    assert seconds is None or 0 <= seconds <= 3600


@fuzz
@given(st.integers(0, 10**12), st.integers(0, 30))
def test_seconds_are_read_exactly_up_to_the_hour(seconds: int, zeros: int) -> None:
    assert retry.retry_after_s("0" * zeros + str(seconds), NOW_S) == min(seconds, 3600)


# --- waits ---


def test_the_schedule_is_used_up_after_its_last_wait() -> None:
    assert retry.delay_s(0, [], Random(1)) is None
    assert retry.delay_s(1, [5.0], Random(1)) is None
    assert retry.delay_s(2, [5.0, 30.0, 120.0], Random(1)) is not None


@fuzz
@given(st.lists(st.floats(0.001, 36_000), min_size=1, max_size=10), st.integers(0, 9), st.integers())
def test_each_wait_is_within_a_fifth_of_the_schedule(schedule: list[float], step: int, seed: int) -> None:
    wait_s = retry.delay_s(step, schedule, Random(seed))
    if step >= len(schedule):
        assert wait_s is None
    else:
        assert wait_s is not None
        assert schedule[step] * 0.7999 <= wait_s <= schedule[step] * 1.2001


def test_operators_coming_back_together_are_not_hit_together() -> None:
    rng = Random(1)
    waits = {retry.delay_s(0, [5.0], rng) for _ in range(100)}
    assert len(waits) == 100
    assert min(waits) < 4.2  # type: ignore[type-var,operator]
    assert max(waits) > 5.8  # type: ignore[type-var,operator]


# --- breaker and hold ---

FAILED = Outcome("retry", "status_500", 500)
DELIVERED_OUTCOME = Outcome("delivered", "", 200, 0)


def after(gate: Gate, outcome: Outcome, now: int = NOW, *, probe: bool = False, first_wait_s: float = 5.0) -> Gate:
    return retry.after(gate, outcome, now, first_wait_s, probe=probe, rng=Random(1))


def failed(times: int, gate: Gate = Gate()) -> Gate:  # noqa: B008 - frozen
    for _ in range(times):
        gate = after(gate, FAILED)
    return gate


@pytest.mark.parametrize(
    ("gate", "due_at", "to_url", "to_plugin"),
    [
        (Gate(), NOW + 5, NOW + 5, NOW + 5),
        (Gate(), NOW - 5, NOW - 5, NOW - 5),
        (Gate(not_before_at=NOW + HOUR), NOW + 5, NOW + HOUR, NOW + 5),
        (Gate(not_before_at=NOW + HOUR), NOW + 2 * HOUR, NOW + 2 * HOUR, NOW + 2 * HOUR),
        (Gate(failures=5, probe_at=NOW + 9), NOW + 5, NOW + 9, NOW + 5),
        (Gate(failures=4, probe_at=NOW + 9), NOW + 5, NOW + 5, NOW + 5),
        (Gate(failures=5, probe_at=NOW + 9, not_before_at=NOW + 8), NOW + 5, NOW + 9, NOW + 5),
        (Gate(held_at=NOW, not_before_at=NOW + HOUR), NOW + 5, None, NOW + 5),
        (Gate(paced_until_at=NOW + HOUR), NOW + 5, NOW + 5, NOW + 5),
    ],
)
def test_a_delivery_is_tried_when_it_is_due_and_its_gate_lets_it(
    gate: Gate, due_at: int, to_url: int | None, to_plugin: int
) -> None:
    facts = dict.fromkeys(Delivery._fields, 0) | {"due_at": due_at, "state": "pending"}
    for sink, expected in (("http", to_url), ("plugin:x", to_plugin)):
        delivery = Delivery(**facts | {"sink": sink})  # type: ignore[arg-type]
        assert retry.next_attempt_at(delivery, gate) == expected
        for state in ("delivered", "dead"):
            assert retry.next_attempt_at(delivery._replace(state=state), gate) is None  # type: ignore[arg-type]


def test_an_operator_is_put_off_by_retry_after_and_by_the_breaker() -> None:
    """A Retry-After or a pause that is over puts nothing off."""
    for gate, at in (
        (Gate(), None),
        (Gate(not_before_at=NOW + 1), NOW + 1),
        (Gate(not_before_at=NOW), None),
        (Gate(failures=5, probe_at=NOW + 1), NOW + 1),
        (Gate(failures=5, probe_at=NOW), None),
        (Gate(held_at=NOW, not_before_at=NOW + 1), None),
    ):
        assert retry.not_before(gate, NOW) == at


@pytest.mark.parametrize("times", range(5))
def test_up_to_four_failures_leave_the_breaker_closed(times: int) -> None:
    gate = failed(times)
    assert retry.breaker(gate, NOW) == "closed"
    assert retry.opens_at(gate) == 0


def test_the_fifth_failure_opens_the_breaker_for_the_first_wait() -> None:
    gate = failed(5)
    assert retry.opens_at(gate) == NOW + 5_000
    assert retry.breaker(gate, NOW + 4_999) == "open"
    assert retry.breaker(gate, NOW + 5_000) == "half-open"


def test_failed_probes_double_the_pause_up_to_five_minutes() -> None:
    gate, now, pauses = failed(5), NOW, []
    for _ in range(9):
        pauses.append(gate.pause_ms)
        now = gate.probe_at
        gate = after(gate, FAILED, now, probe=True)
        assert gate.probe_at == now + gate.pause_ms
    assert pauses == [5_000, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000, 300_000, 300_000]


def test_only_probes_double_the_pause() -> None:
    """Attempts that were already under way when the breaker opened fail as well, but say nothing new about the
    operator.
    """
    opened = failed(5)
    assert failed(20, opened) == replace(opened, failures=25)


def test_a_first_wait_longer_than_five_minutes_is_cut() -> None:
    gate = replace(failed(4))
    assert after(gate, FAILED, first_wait_s=7200.0).pause_ms == 300_000


def test_a_first_wait_is_kept_to_the_millisecond() -> None:
    assert after(failed(retry.BREAKER_OPENS_AT - 1), FAILED, first_wait_s=4.007).pause_ms == 4007


@pytest.mark.parametrize("outcome", [DELIVERED_OUTCOME, Outcome("final", "code_120", 200, 120)])
@pytest.mark.parametrize("failures", [1, 4, 5, 40])
def test_a_settled_answer_closes_the_breaker(outcome: Outcome, failures: int) -> None:
    closed = after(failed(failures), outcome, probe=failures > 4)
    assert closed == Gate(failed_at=NOW, failed_reason=FAILED.reason)


def test_retry_after_delays_the_operator_with_jitter_only_upward() -> None:
    rng = Random(1)
    slow = Outcome("retry", "status_429", 429, None, 60.0)
    waits = [retry.after(Gate(), slow, NOW, 5.0, probe=False, rng=rng).not_before_at - NOW for _ in range(200)]
    assert min(waits) >= 60_000
    assert max(waits) <= 72_000
    assert len(set(waits)) > 100


def test_retry_after_never_delays_beyond_an_hour() -> None:
    gate = after(Gate(), Outcome("retry", "status_503", 503, None, 3600.0))
    assert gate.not_before_at == NOW + HOUR


def test_retry_after_counts_on_a_success_and_shortens_no_earlier_one() -> None:
    gate = after(Gate(not_before_at=NOW + HOUR), Outcome("delivered", "", 200, 0, 10.0))
    assert gate.not_before_at == NOW + HOUR
    assert NOW + 10_000 <= after(Gate(), Outcome("delivered", "", 200, 0, 10.0)).not_before_at <= NOW + 12_000


def test_gone_holds_and_a_held_gate_lets_nothing_through() -> None:
    gate = after(Gate(), Outcome("hold", "gone", 410))
    assert (gate.held_at, gate.held_reason) == (NOW, "gone")
    assert retry.opens_at(gate) is None


def test_five_days_of_nothing_but_failure_hold_the_operator() -> None:
    days = 5 * 24 * HOUR
    gate = failed(1)
    assert after(gate, FAILED, NOW + days - 1).held_at is None
    held = after(gate, FAILED, NOW + days)
    assert (held.held_at, held.held_reason) == (NOW + days, "failing_for_days")


def test_one_success_in_five_days_starts_them_anew() -> None:
    days = 5 * 24 * HOUR
    gate = after(failed(3), DELIVERED_OUTCOME, NOW + days - 2)
    gate = after(gate, FAILED, NOW + days - 1)
    assert after(gate, FAILED, NOW + days).held_at is None


def test_a_hold_that_stands_keeps_its_start_and_reason() -> None:
    gate = retry.hold(Gate(), NOW, "by_hand")
    assert retry.hold(gate, NOW + HOUR, "gone") == gate
    gone = after(gate, Outcome("hold", "gone", 410), NOW + HOUR)
    assert (gone.held_at, gone.held_reason, gone.failed_reason) == (NOW, "by_hand", "gone")


def test_release_closes_hold_and_breaker_and_forgets_retry_after() -> None:
    gate = retry.hold(replace(failed(7), not_before_at=NOW + HOUR, paced_until_at=NOW + 500), NOW, "by_hand")
    released = retry.release(gate, NOW + HOUR)
    last_failure = {"failed_at": NOW, "failed_reason": FAILED.reason}
    assert released == Gate(held_total_ms=HOUR, paced_until_at=NOW + 500, **last_failure)
    assert retry.breaker(released, NOW) == "closed"
    assert retry.opens_at(released) == 0


def test_releasing_what_is_not_held_adds_nothing() -> None:
    assert retry.release(Gate(held_total_ms=7), NOW) == Gate(held_total_ms=7)


def test_a_wall_clock_set_back_during_a_hold_shortens_no_earlier_hold() -> None:
    gate = retry.hold(Gate(held_total_ms=HOUR), NOW, "by_hand")
    assert retry.release(gate, NOW - HOUR).held_total_ms == HOUR


def test_age_excludes_holds_since_it_began() -> None:
    held_before = Gate(held_total_ms=10 * HOUR)
    assert retry.age_ms(NOW, 10 * HOUR, held_before, NOW + 3 * HOUR) == 3 * HOUR
    held = retry.hold(held_before, NOW + HOUR, "by_hand")
    assert retry.age_ms(NOW, 10 * HOUR, held, NOW + 3 * HOUR) == HOUR
    released = retry.release(held, NOW + 3 * HOUR)
    assert retry.age_ms(NOW, 10 * HOUR, released, NOW + 4 * HOUR) == 2 * HOUR


OUTCOMES = st.sampled_from(
    [FAILED, DELIVERED_OUTCOME, Outcome("final", "code_120", 200), Outcome("hold", "gone", 410)]
    + [Outcome("retry", "status_429", 429, None, seconds) for seconds in (0.0, 0.5, 3600.0)]
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(OUTCOMES, st.booleans()),
        st.tuples(st.sampled_from(["hold", "release"]), st.just(False)),
        st.tuples(st.integers(0, 2 * 24 * HOUR), st.just(False)),
    ),
    max_size=60,
)


@fuzz
@given(EVENTS, st.floats(0.001, 36_000))
def test_whatever_happens_the_gate_keeps_its_promises(events: list[tuple[object, bool]], first_wait_s: float) -> None:
    gate, now, not_held_ms, rng = Gate(), NOW, 0, Random(1)
    for event, probe in events:
        before = gate
        match event:
            case int():
                now += event
                not_held_ms += event if gate.held_at is None else 0
            case "hold":
                gate = retry.hold(gate, now, "by_hand")
                assert gate.held_at is not None
            case "release":
                gate = retry.release(gate, now)
                assert (gate.held_at, gate.failures, retry.breaker(gate, now)) == (None, 0, "closed")
            case Outcome():
                gate = retry.after(gate, event, now, first_wait_s, probe=probe, rng=rng)
                if gate.pause_ms > before.pause_ms:
                    assert probe or gate.failures == 5
        if before.held_at is not None and event != "release":
            assert (gate.held_at, gate.held_reason) == (before.held_at, before.held_reason)
            assert retry.opens_at(gate) is None
        assert gate.pause_ms <= 300_000
        assert gate.probe_at <= now + 300_000
        assert gate.not_before_at <= now + HOUR
        assert (gate.failures >= 5) == (retry.breaker(gate, now) != "closed")
        assert retry.age_ms(NOW, 0, gate, now) == not_held_ms
