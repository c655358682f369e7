"""Times on the command line: each form means one time. Without a zone it is in the machine's zone."""

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from lmdaemon.commands import times
from lmdaemon.commands.shared import Usage

NOW_AT = int(datetime.fromisoformat("2026-11-28T03:00:00+01:00").timestamp() * 1000)


@pytest.fixture(autouse=True)
def _in_vienna(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Vienna")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-11-27 18:00", "2026-11-27T18:00:00+01:00"),
        ("2026-11-27T18:00:30", "2026-11-27T18:00:30+01:00"),
        ("2026-07-01", "2026-07-01T00:00:00+02:00"),  # with the offset of that day
        ("today", "2026-11-28T00:00:00+01:00"),
        ("yesterday", "2026-11-27T00:00:00+01:00"),
        ("yesterday 18:00", "2026-11-27T18:00:00+01:00"),
        ("tomorrow", "2026-11-29T00:00:00+01:00"),
        ("2h ago", "2026-11-28T01:00:00+01:00"),
        ("30d ago", "2026-10-29T03:00:00+01:00"),
        ("now", "2026-11-28T03:00:00+01:00"),
    ],
)
def test_a_time_without_a_zone_is_told_as_understood(text: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = times.read(text, "--since", NOW_AT)
    assert at == datetime.fromisoformat(meant).timestamp() * 1000
    assert f"--since {text} is 2026-" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2026-11-27T18:00:00Z", "2026-11-27T19:00:00+01:00", "2026-11-27t18:00:00.000z"])
def test_a_time_of_rfc_3339_is_taken_in_silence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert times.read(text, "--since", NOW_AT) == datetime.fromisoformat("2026-11-27T18:00:00Z").timestamp() * 1000
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    ["", "soon", "18:00", "2026-13-01", "2026-02-30 03:00", "2 h ago", "h ago", "99999999d ago", "yesterday 25:00"],
)
def test_another_form_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(Usage, match="--until: must be a time such as 2026-01-31T03:00:00Z"):
        times.read(text, "--until", NOW_AT)
