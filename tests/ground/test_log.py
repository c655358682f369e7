"""Log lines: each has one event and its facts, can be read by machines, cannot be forged by input, and shows no
secret.
"""

import asyncio
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from chance import examples
from clocks import HandClock
from hypothesis import given, settings
from hypothesis import strategies as st
from support import until

from lmdaemon import log
from lmdaemon.log import Log, safe_url


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger("lmdaemon")
    before = root.handlers[:], root.propagate, root.level
    yield
    root.handlers[:], root.propagate, level = before
    root.setLevel(level)


def written(form: str, write: Callable[[Log], None], level: str = "debug") -> str:
    stream = io.StringIO()
    log.setup(level, form, stream)
    write(Log("test"))
    return stream.getvalue()


def written_for_journal(form: str, write: Callable[[Log], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines written to a log stream that $JOURNAL_STREAM names, as systemd sets it for journald."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.setup("debug", form, stream)
        write(Log("test"))
        stream.seek(0)
        return stream.read().splitlines()


def fail(to: Log) -> None:
    try:
        raise RuntimeError("first line\nsecond line")
    except RuntimeError:
        to.exception("writer.crashed", operator="acme")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_json_line_carries_time_level_event_and_facts(level: str) -> None:
    before = datetime.now(UTC)
    text = written(
        "json", lambda to: getattr(to, level)("delivery.retry", operator="acme", attempt=3, wait_s=8.2491, held=False)
    )
    line = orjson.loads(text)
    at = datetime.fromisoformat(line.pop("time"))
    assert (at - before).total_seconds() == pytest.approx(0, abs=5)
    assert list(line.items()) == [
        ("level", level),
        ("event", "delivery.retry"),
        ("operator", "acme"),
        ("attempt", 3),
        ("wait_s", 8.2),
        ("held", False),
    ]


def test_a_text_line_is_the_event_and_its_facts() -> None:
    at, _, rest = written("text", lambda to: to.info("delivery.retry", operator="acme", wait_s=8.2491)).partition(
        " info "
    )
    assert rest == "delivery.retry operator=acme wait_s=8.2\n"
    assert len(at) == len("2026-11-24 03:05:01.123Z")
    assert datetime.fromisoformat(at).tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (4.672007384967717, "4.7"),
        (1006.48, "1006.5"),
        (5.0, "5"),
        (0.04672, "0.047"),
        (0.996, "1"),
        (1234567.89, "1234567.9"),
        (-0.26, "-0.26"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (7, "7"),
    ],
)
def test_a_number_has_no_digits_that_only_look_exact(value: float, shown: str) -> None:
    assert written("text", lambda to: to.info("delivery.retry", wait_s=value)).split("wait_s=")[1] == shown + "\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("acme", "acme"),
        ("Zürich", "Zürich"),
        (7, "7"),
        ("", '""'),
        ("two words", '"two words"'),
        ("Zürich West", '"Zürich West"'),
        ("a=b", '"a=b"'),
        ('say "x"', '"say \\"x\\""'),
        ("x\n2026-11-24 info forged", '"x\\n2026-11-24 info forged"'),
        ("x\r\ny", '"x\\r\\ny"'),
        ("\x1b[2J", '"\\u001b[2J"'),
        ("x\x85y", '"x\\u0085y"'),
        ("x\u2028y", '"x\\u2028y"'),
        ("file\udce9", '"file\\udce9"'),
    ],
)
def test_a_text_fact_is_quoted_where_it_could_be_taken_for_several(value: object, shown: str) -> None:
    assert written("text", lambda to: to.info("event", fact=value)).endswith(f" info event fact={shown}\n")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_fact_that_is_none_is_left_out(form: str) -> None:
    text = written(form, lambda to: to.info("event", status=None, code=0, reason=""))
    assert "status" not in text
    assert "code" in text
    assert "reason" in text


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("file\udce9", "file\\udce9"),
        (10**30, str(10**30)),
        ({1: "x"}, "{1: 'x'}"),
        (Path("/run/x"), "/run/x"),
        (ValueError("no"), "no"),
        (b"x", "b'x'"),
    ],
)
def test_a_fact_that_json_cannot_carry_costs_no_line(value: object, kept: str) -> None:
    line = orjson.loads(written("json", lambda to: to.error("event", fact=value, operator="acme")))
    assert (line["event"], line["level"], line["fact"], line["operator"]) == ("event", "error", kept, "acme")


FACTS: st.SearchStrategy[Any] = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=30),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.binary(max_size=10),
    st.lists(st.text(st.characters(exclude_categories=()), max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.integers(), max_size=2),
)


@pytest.mark.parametrize("form", ["text", "json"])
@settings(deadline=None, max_examples=examples(200))
@given(FACTS)
def test_every_event_is_exactly_one_line_that_can_be_written(form: str, fact: Any) -> None:
    text = written(form, lambda to: to.info("event", fact=fact))
    assert text.encode().count(b"\n") == 1
    assert text.endswith("\n")
    if form == "json":
        assert orjson.loads(text)["event"] == "event"
    else:
        assert len(text.splitlines()) == 1
        assert " info event fact=" in text


def test_levels_below_the_one_asked_for_are_silent() -> None:
    def all_levels(to: Log) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(to, level)(f"{level}.event")

    for silent, level in enumerate(("debug", "info", "warning", "error")):
        assert written("json", all_levels, level).count("\n") == 4 - silent


def test_setting_up_again_replaces_the_stream() -> None:
    """A reload sets up logging again. It must not make each line appear twice."""
    first, second = io.StringIO(), io.StringIO()
    log.setup("info", "json", first)
    log.setup("info", "json", second)
    Log("test").info("event")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


def test_no_line_is_written_twice_where_a_library_set_up_logging_too() -> None:
    others = io.StringIO()
    handler = logging.StreamHandler(others)
    logging.getLogger().addHandler(handler)
    try:
        assert written("json", lambda to: to.info("event")).count("\n") == 1
    finally:
        logging.getLogger().removeHandler(handler)
    assert others.getvalue() == ""


def test_an_exception_is_logged_with_its_traceback() -> None:
    line = json.loads(written("json", fail))
    assert (line["level"], line["event"], line["operator"]) == ("error", "writer.crashed", "acme")
    assert line["traceback"].startswith("Traceback (most recent call last):")
    assert line["traceback"].endswith("\nRuntimeError")
    first, *rest = written("text", fail).splitlines()
    assert first.endswith(" error writer.crashed operator=acme")
    assert rest[-1] == "RuntimeError"


def test_an_exceptions_text_is_left_out_and_its_causes_are_shown() -> None:
    """The text of an exception may contain what a peer has sent."""

    def group(to: Log) -> None:
        try:
            try:
                raise KeyError("tok-3n")
            except KeyError as cause:
                raise ExceptionGroup("tok-3n", [ValueError("tok-3n"), OSError("tok-3n")]) from cause
        except ExceptionGroup:
            to.exception("writer.crashed")

    text = written("text", group)
    # The traceback quotes the line above, which contains the token
    assert "tok-3n" not in text.replace('("tok-3n"', "")
    names = [
        line.strip()
        for line in text.splitlines()
        if line.strip() in ("KeyError", "ExceptionGroup", "ValueError", "OSError")
    ]
    assert names == ["KeyError", "ExceptionGroup", "ValueError", "OSError"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "form", "is_json"),
    [
        (Terminal(), "auto", False),
        (io.StringIO(), "auto", True),
        (Terminal(), "json", True),
        (io.StringIO(), "text", False),
    ],
)
def test_auto_is_text_on_a_terminal_and_json_otherwise(stream: io.StringIO, form: str, is_json: bool) -> None:
    log.setup("info", form, stream)
    Log("test").info("event")
    assert stream.getvalue().startswith("{") == is_json


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)])
def test_the_journal_gets_the_priority_of_each_line(level: str, priority: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = written_for_journal("text", lambda to: getattr(to, level)("event", n=1), monkeypatch)
    assert text == f"<{priority}>{level} event n=1"
    (line,) = written_for_journal("auto", lambda to: getattr(to, level)("event", n=1), monkeypatch)
    assert line.startswith(f"<{priority}>{{")
    assert orjson.loads(line[3:])["n"] == 1


def test_each_line_of_a_traceback_carries_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = written_for_journal("text", fail, monkeypatch)
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)
    (line,) = written_for_journal("json", fail, monkeypatch)
    assert orjson.loads(line.removeprefix("<3>"))["event"] == "writer.crashed"


@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\u2029"])
def test_no_fact_forges_a_line_of_the_journal(separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = f"x{separator}<0>emergency"
    lines = written_for_journal("text", lambda to: to.info("event", session=forged), monkeypatch)
    assert len(lines) == 1
    assert lines[0].startswith("<6>info event session=")


@pytest.mark.parametrize("variable", [None, "", "1:2"])
def test_another_stream_than_the_journals_gets_no_priority(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    if variable is not None:
        monkeypatch.setenv("JOURNAL_STREAM", variable)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stream:
        log.setup("info", "json", stream)
        Log("test").info("event")
        stream.seek(0)
        assert stream.read().startswith("{")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://op.example/V4/SessionExpired", "https://op.example/V4/SessionExpired"),
        ("https://op.example:8443/x", "https://op.example:8443/x"),
        ("https://[2001:db8::1]:8443/x", "https://[2001:db8::1]:8443/x"),
        ("https://user:s3cret@op.example/x", "https://op.example/x"),
        ("https://s3cret@op.example:8443/x", "https://op.example:8443/x"),
        ("https://user:s3@cret@op.example/x", "https://op.example/x"),
        ("https://op.example/x?MEMB_ID=1&HASH=s3cret", "https://op.example/x"),
        ("https://op.example?s3cret", "https://op.example"),
        ("https://op.example/x#s3cret", "https://op.example/x"),
        ("https://op.example/%40x", "https://op.example/%40x"),
        ("https://op.example/@x?s3cret@y", "https://op.example/@x"),
        ("https://op/@x", "(not a URL)"),  # what is before the @ may be a path, or the rest of a user name or password
        ("https://user:12/s3cret@op.example/x", "(not a URL)"),
        ("https://12?s3cret@op.example/x", "(not a URL)"),
        ("https://user/s3cret@op.example/x", "(not a URL)"),
        ("https://user:s3/cret@op.example/x", "(not a URL)"),
        ("https://user:s3?cret@op.example/x", "(not a URL)"),
        ("https:/user:s3cret@op.example/x", "(not a URL)"),
        ("user:s3cret@op.example/x", "(not a URL)"),
        ("https://user:s3cret@[::1/x", "(not a URL)"),
        ("", "(not a URL)"),
    ],
)
def test_a_url_is_shown_without_user_info_query_and_fragment(url: str, shown: str) -> None:
    assert safe_url(url) == shown


PARTS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=10)


@settings(deadline=None, max_examples=examples(200))
@given(PARTS, PARTS, PARTS, st.sampled_from(["", "/", "?", "#", "@", ":", "\\", "//"]))
def test_no_password_survives_a_delimiter_that_should_have_been_escaped(
    user: str, before: str, after: str, between: str
) -> None:
    for secret in (f"{before}-S3CRET{between}{after}", f"12{between}S3CRET{after}"):
        assert "S3CRET" not in safe_url(f"https://{user}:{secret}@op.example/x?{secret}#{secret}")


@settings(deadline=None, max_examples=examples(200))
@given(st.text(max_size=60))
def test_no_text_breaks_the_url(text: str) -> None:
    for url in (text, "https://" + text):
        shown = safe_url(url)
        assert shown == "(not a URL)" or not {"?", "#"} & set(shown)


# -- events that repeat


@pytest.fixture
def lines(clock: HandClock, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Returns the lines written since the last call, at level info. A clock moved by hand counts the minutes."""
    monkeypatch.setattr(log, "repeats", log.Repeats(clock.monotonic))
    stream = io.StringIO()
    log.setup("info", "json", stream)

    def written() -> list[dict[str, Any]]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return [orjson.loads(line) for line in text.splitlines()]

    return written


Lines = Callable[[], list[dict[str, Any]]]


def retry_failed(reason: str = "timeout", operator: str = "acme", **facts: Any) -> None:
    Log("test").warning("delivery.retry", operator=operator, sink="http", reason=reason, **facts)


def test_the_first_of_a_kind_and_each_change_are_written_not_repeats(lines: Lines) -> None:
    for reason in ("timeout", "timeout", "connect", "timeout", "connect"):
        retry_failed(reason)
        retry_failed(reason, "other")
    assert [(line["operator"], line["reason"]) for line in lines()] == [
        ("acme", "timeout"),
        ("other", "timeout"),
        ("acme", "connect"),
        ("other", "connect"),
    ]


def test_under_a_flood_one_line_a_minute_says_how_many_there_were(clock: HandClock, lines: Lines) -> None:
    for number in range(1, 181):
        retry_failed(attempt=number)
        clock.advance(1)
    written = lines()
    told = [(line.get("attempt"), line.get("suppressed")) for line in written]
    assert told == [(1, None), (None, 59), (61, None), (None, 59), (121, None)]
    assert {line["level"] for line in written} == {"warning"}


def test_what_was_suppressed_is_told_also_when_no_more_comes(clock: HandClock, lines: Lines) -> None:
    for _ in range(5):
        retry_failed()
    lines()
    log.repeats.flush()
    assert lines() == []  # the minute in which repeats are counted is not over
    clock.advance(log.WINDOW_S)
    log.repeats.flush()
    (line,) = lines()
    del line["time"]
    assert line == {
        "level": "warning",
        "event": "delivery.retry",
        "operator": "acme",
        "sink": "http",
        "reason": "timeout",
        "suppressed": 4,
    }
    log.repeats.flush(everything=True)
    assert lines() == []  # the count is written only once


async def test_a_timer_tells_it_and_none_runs_while_nothing_is_suppressed(
    monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    monkeypatch.setattr(log, "repeats", log.Repeats(window_s=0.5, stragglers_s=0.01))
    loop = asyncio.get_running_loop()
    retry_failed()
    assert log.repeats._timer is None
    retry_failed()
    retry_failed()
    told: list[dict[str, Any]] = []
    await until(lambda: told.extend(lines()) or [line for line in told if line.get("suppressed") == 2])
    assert log.repeats._timer is None
    assert loop.is_running()


def test_sessions_are_told_one_by_one_until_there_are_too_many(clock: HandClock, lines: Lines) -> None:
    most = log.LIMITS["session.ended"].lines
    for number in range(most + 500):
        Log("test").info("session.ended", operator="acme", session=str(number), reason="inactivity")
    assert len(lines()) == most
    clock.advance(log.WINDOW_S)
    Log("test").info("session.ended", operator="acme", session="next", reason="inactivity")
    count, line = lines()
    assert (line["session"], line.get("suppressed")) == ("next", None)
    assert count.keys() == {"time", "level", "event", "suppressed"}  # a count of many events names no session
    assert count["suppressed"] == 500


def test_journald_would_not_drop_a_line_of_what_happens_to_sessions() -> None:
    """journald drops lines of a service beyond 10,000 in 30 s. Those 30 s can overlap two of the log's windows."""
    each = [limit.lines for limit in log.LIMITS.values() if limit.lines > 100]
    assert len(each) == 5
    assert 2 * sum(each) <= 10_000


def test_debug_writes_every_line(lines: Lines) -> None:
    stream = io.StringIO()
    log.setup("debug", "json", stream)
    for _ in range(5):
        retry_failed()
    assert len(stream.getvalue().splitlines()) == 5


def test_a_change_to_debug_writes_what_was_suppressed_from_now_on(lines: Lines) -> None:
    most = log.LIMITS["session.ended"].lines
    for number in range(most + 5):
        Log("test").info("session.ended", session=str(number))
    stream = io.StringIO()
    log.setup("debug", "json", stream)
    Log("test").info("session.ended", session="seen")
    (line,) = map(orjson.loads, stream.getvalue().splitlines())
    assert line["session"] == "seen"


def test_however_many_kinds_there_are_memory_is_bounded(clock: HandClock, lines: Lines) -> None:
    for number in range(log.KINDS_MAX + 5000):
        retry_failed(str(number))
    assert len(log.repeats._kinds) == log.KINDS_MAX + 1
    written = len(lines())
    assert written == log.KINDS_MAX + 1
    clock.advance(log.WINDOW_S)
    retry_failed("again")
    assert [line.get("suppressed") for line in lines()] == [4999, None]
    assert len(log.repeats._kinds) == 1


def test_what_is_suppressed_is_counted_by_level(clock: HandClock, lines: Lines) -> None:
    before = dict(log.happened)
    for _ in range(3):
        retry_failed()
    Log("test").error("store.failing", reason="full")
    assert {level: log.happened[level] - before[level] for level in before} == {"warning": 3, "error": 1}
    assert log.repeats.suppressed == 2
