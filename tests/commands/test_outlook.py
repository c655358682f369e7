"""The text of `lmdaemon status`: rounded figures, what is wrong in words, and what can be done."""

from typing import Any

import pytest

from lmdaemon.commands import outlook
from lmdaemon.model import in_bytes, in_time


def of(name: str, **check: Any) -> list[str]:
    return [*outlook.of_health({"checks": {name: [{"status": "warn", "time": "2026-11-28T03:00:00.000Z", **check}]}})]


def test_figures_are_rounded_and_what_is_not_known_is_left_out() -> None:
    check = {"status": "pass", "freeBytes": 74_412_797_952, "growthBytesPerDay": None, "held": []}
    assert of("disk", **check) == ["  disk  pass  freeBytes=74.4 GB"]
    check = {"status": "pass", "pending": 3, "oldestPendingSeconds": 604_801.5}
    assert of("deliveries", **check) == ["  deliveries  pass  pending=3 oldestPendingSeconds=7 d"]
    assert of("sweeper", status="pass", observedValue=0.0, observedUnit="s late") == ["  sweeper  pass  0 s late"]


def test_each_thing_that_is_wrong_has_a_line_and_then_what_can_be_done() -> None:
    said = of("expiry", massExpired=["fir", "gum"], output="fir: 150 of 150 ended; gum: 9 of 9 ended")
    assert [line.strip() for line in said[:3]] == [
        "expiry  warn  massExpired=fir,gum",
        "fir: 150 of 150 ended",
        "gum: 9 of 9 ended",
    ]
    assert [line.split(" --")[0].strip() for line in said[3:]] == [
        "by hand: lmdaemon sessions list fir",
        "by hand: lmdaemon sessions list gum",
    ]


def test_only_who_falls_behind_is_to_get_more_concurrency() -> None:
    assert len(of("deliveries", dead=3)) == 1
    assert "raise the concurrency" in of("deliveries", dead=0, output="elm (http) falls behind: …")[2]
    assert len(of("deliveries", dead=0, output="elm (http): the oldest of 1 pending is 20 min old, …")) == 2


def test_operators_are_told_once_below_the_table() -> None:
    check = {"status": "warn", "held": ["gum"], "output": "gum: held since …"}
    health = {"checks": {"operators": [check]}}
    assert [*outlook.of_health(health)] == ["  operators  warn  held=gum"]
    assert [*outlook.of_health(health, is_each_told=False)][1:] == ["                   gum: held since …"]


def test_an_operator_that_left_the_file_is_told_with_a_row_of_its_own() -> None:
    gone = [{"operator": "old", "live": 1, "pending": 36}]
    said = "old is not in the file, so its sessions and deliveries wait: 1 live, 36 pending"
    check = {"status": "warn", "held": ["gum"], "notConfigured": gone, "output": f"{said}; gum: held since …"}
    health = {"checks": {"operators": [check]}}
    lines = [line.strip() for line in outlook.of_health(health)]
    assert lines[:2] == ["operators  warn  held=gum notConfigured=old", said]
    assert lines[2].startswith("by hand: put them back")
    assert outlook.rows_of(health) == [{"operator": "old (not in the file)", "live": 1, "pending": 36}]
    assert outlook.rows_of({"status": "pass"}) == []
    check["notConfigured"] = gone * 12  # of many, `output` tells of some only
    assert not [line for line in outlook.of_health(health) if "gum: held" in line]


def test_an_operator_that_is_kept_back_has_the_commands_for_it() -> None:
    kept_back = {"operator": "acme", "keptBack": "breaker open since …", "outlook": "tried again at …", "dead": 0}
    assert [*outlook.of_operator(kept_back)] == [
        "acme: breaker open since …",
        "  by itself: tried again at …",
        "  by hand:   lmdaemon probe acme (its next notice, now)",
        "             lmdaemon release acme (sends at once what was not tried yet, the rest on its schedule)",
    ]


def test_a_probe_while_the_breaker_is_open_has_its_price() -> None:
    kept_back = {"operator": "acme", "keptBack": "…", "outlook": "…", "dead": 0}
    price = "; if it fails, the breaker's pause doubles"
    for breaker, text in (("open", price), ("half-open", price), ("closed", "")):
        said = [*outlook.of_operator(kept_back | {"breaker": breaker})]
        assert said[2] == f"  by hand:   lmdaemon probe acme (its next notice, now{text})"


def test_dead_deliveries_have_the_commands_for_them() -> None:
    said = [*outlook.of_operator({"operator": "acme", "keptBack": None, "dead": 7})]
    assert said[0] == "acme: 7 dead, which are sent again only by hand"
    assert said[2] == "  why:       lmdaemon deliveries retry --operator acme --dry-run (changes nothing)"
    assert "lmdaemon deliveries retry --operator acme;" in said[3]
    assert [*outlook.of_operator({"operator": "acme", "keptBack": None, "dead": 0})] == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.6, "1 kB"),
        (1417216, "1.42 MB"),
        (999_999, "1 MB"),
        (1.38e12, "1.38 TB"),
    ],
)
def test_bytes_have_three_digits(number: float, text: str) -> None:
    assert in_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.857, "0.857 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (604_801, "7 d")],
)
def test_a_time_is_in_its_greatest_unit(seconds: float, text: str) -> None:
    assert in_time(seconds) == text
