"""The script of a simulated operator: text and TOML mean the same, random answers can be repeated, and errors name
their place.
"""

import re
from pathlib import Path

import pytest

from lmdaemon.workbench import script
from lmdaemon.workbench.script import Answer, ScriptError, read_text, read_toml

WORKBENCH = (Path(__file__).parents[2] / "docs" / "workbench.md").read_text()
PAIRS = [
    ("error 100", '[[rule]]\nanswer = "error 100"'),
    ("attempt 1-2: status 503 retry-after 30", '[[rule]]\nattempt = "1-2"\nanswer = "status 503 retry-after 30"'),
    (
        "session bad-*, attempt 3+: error 120 'no more'",
        "[[rule]]\nsession='bad-*'\nattempt='3+'\nanswer=\"error 120 'no more'\"",
    ),
    ("10%: reset; ok x3 then hang", '[[rule]]\nchance="10%"\nanswer="reset"\n[[rule]]\nanswer="ok x3 then hang"'),
    ("count 5: delay 2s ok # a comment", '[[rule]]\ncount = 5\nanswer = "delay 2s"'),
    ("body '{\"error\": 0; # no comment}'", '[[rule]]\nanswer = "body \'{\\"error\\": 0; # no comment}\'"'),
]


@pytest.mark.parametrize(("text", "toml"), PAIRS)
def test_text_and_toml_mean_the_same(text: str, toml: str) -> None:
    assert read_text(text) == read_toml(toml)


def test_the_first_rule_that_fits_decides_and_the_default_is_success() -> None:
    play = read_text("session bad-*, attempt 1: error 100\nsession bad-*: error 120")
    assert [play.next("bad-1", attempt).number for attempt in (1, 2, 3)] == [100, 120, 120]
    assert play.next("good", 1) == script.OK


def test_steps_take_their_turns_and_the_last_takes_all_the_rest() -> None:
    play = read_text("ok x2 then status 503 then error 100 x2 then ok")
    kinds = [play.next("s", 1).kind for _ in range(8)]
    assert kinds == ["ok", "ok", "status", "error", "error", "ok", "ok", "ok"]


def test_a_rule_whose_steps_are_counted_ends_and_the_next_one_decides() -> None:
    play = read_text("reset x2; error 100")
    assert [play.next("s", 1).kind for _ in range(4)] == ["reset", "reset", "error", "error"]


def test_a_seed_makes_chance_the_same_again() -> None:
    def kinds(seed: int) -> list[str]:
        play = read_text("30%: reset", seed)
        return [play.next("s", 1).kind for _ in range(200)]

    assert kinds(7) == kinds(7) != kinds(8)
    assert 30 < kinds(7).count("reset") < 90


def test_a_spoiled_handshake_has_its_turn_before_any_notice() -> None:
    play = read_text("tls expired x2 then ok")
    assert [play.next_handshake() for _ in range(3)] == ["expired", "expired", ""]
    assert play.next("s", 1).kind == "ok"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("10% ok", "a condition ends with a colon and a space"),
        ("oops", "rule 1 ('oops'): must be one of delay, ok, error"),
        ("ok\nerror", "rule 2 ('error'): error needs a number from 0"),
        ("status 99", "status needs a number from 200 to 599 (got '99')"),
        ("attempt 0: ok", "attempt must be N, N-M or N+, from 1 (got '0')"),
        ("attempt 3-2: ok", "(got '3-2')"),
        ("101%: ok", "a chance must be 0% to 100%"),
        ("delay soon", 'must be a duration such as "250ms"'),
        ("big 100000MiB", "big needs a size such as 17KiB, from 1 to 64MiB"),
        ("ok then", "an answer is missing"),
        ("ok ok", "ok: 'ok' is too much"),
        ("colour blue: ok", "must be session PATTERN, attempt RANGE"),
        ("session 'a: ok", "No closing quotation"),
        ("attempt 1: tls expired", "can have no condition but count"),
        ("tls old", "tls needs one of expired, wrong-name, refuse (got 'old')"),
        ("ok x0", "rule 1 ('ok x0'): how many notices an answer is given to must be x1 to x999999999 (got 'x0')"),
        ("ok; error 100 x-1", "rule 2 ('error 100 x-1'): how many notices an answer"),
        ("ok x1 then ok x00 then hang", "(got 'x00')"),
        ("ok x9999999999", "must be x1 to x999999999 (got 'x9999999999')"),
        ("big 0", "big needs a size such as 17KiB, from 1 to 64MiB (got '0')"),
        ("gzip-bomb 17kB", "(got '17kB')"),
        ("interim 0", "interim needs a number from 1 to 1000 (got '0')"),
        ("truncate -1", "truncate needs a number from 0 to 1000 (got '-1')"),
        ("error -1", "error needs a number from 0 to 999999999 (got '-1')"),
        ("status 0", "status needs a number from 200 to 599 (got '0')"),
        ("delay -1s", "delay must be a duration"),
        ("drip 3651d", "drip must be at most \"3650d\" (got '3651d')"),
        ("down 5", "down must be a duration"),
        ("delay 1s delay 2s", "delay must stand once in an answer"),
        ("count -1: ok", "count must be N, N-M or N+, from 1 (got '-1')"),
        ("-1%: ok", "a chance must be 0% to 100% (got '-1%')"),
        ("session '': ok", "session must be a pattern such as bad-* (got '')"),
        ("status 503 retry-after 'a\tb'", "retry-after must have no control characters (got 'a\\tb')"),
    ],
)
def test_a_bad_script_is_told_with_place_rule_and_value(text: str, complaint: str) -> None:
    with pytest.raises(ScriptError, match=re.escape(complaint)):
        read_text(text)


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("[[rule]]\nanswers = 'ok'", "rule 1: answers: is not known"),
        ("[[rule]]\nattempt = 1", "rule 1: answer must be a text"),
        ("seed = 'x'", "seed must be a whole number"),
        ("rules = []", "rules: is not known; known are seed and [[rule]]"),
        ("= 1", "Invalid statement"),
        ("rule = [1]", "rule must be an array of tables ([[rule]])"),
        ("seed = true", "seed must be a whole number from 0 to 999999999 (got True)"),
        ("seed = -1", "(got -1)"),
        ("seed = 1.5", "(got 1.5)"),
        ("seed = 1000000000", "(got 1000000000)"),
        ("[[rule]]\nchance = 0.5\nanswer = 'ok'", "rule 1: a chance must be 0% to 100% (got '0.5')"),
        ("[[rule]]\ncount = -1\nanswer = 'ok'", "rule 1: count must be N, N-M or N+, from 1 (got '-1')"),
        ("[[rule]]\nattempt = true\nanswer = 'ok'", "(got 'True')"),
        ("[[rule]]\nanswer = \"redirect '/\\u000d\\u000aX: y'\"", "redirect must have no control characters"),
    ],
)
def test_a_bad_toml_script_is_told_so(toml: str, complaint: str) -> None:
    with pytest.raises(ScriptError, match=re.escape(complaint)):
        read_toml(toml)


def test_the_manual_has_every_answer_and_examples_that_can_be_read() -> None:
    table = re.findall(r"^\| `([a-z-]+)", WORKBENCH.partition("### Answers")[2].partition("\n#")[0], re.MULTILINE)
    assert set(table) == {"delay", *script.KINDS}
    examples = re.findall(r"```text\n(.*?)```", WORKBENCH, re.DOTALL)
    assert examples
    for example in examples:
        assert read_text(example).rules
    tables = re.findall(r"```toml\n# play.toml\n(.*?)```", WORKBENCH, re.DOTALL)
    assert tables
    for example in tables:
        assert read_toml(example).rules


@pytest.mark.parametrize(
    ("text", "accepts"),
    [
        ("ok", True),
        ("error 0", True),
        ("json '\"0\"'", True),
        ("json false", False),
        ("body '{}'", False),
        ("html", False),
    ],
)
def test_an_answer_knows_whether_it_says_success(text: str, accepts: bool) -> None:
    answer: Answer = read_text(text).next("s", 1)
    assert answer.accepts is accepts
