"""A night on call: in each situation, two documented commands tell who is concerned, what is wrong, since when, why,
what happens by itself and what can be done.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scene import Asked, CannotBePlayedError, Scene, scene
from situations import SITUATIONS

ROOT = Path(__file__).parents[2]
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z"

AT = f"(at {TIME}|now)"

# For each situation, regular expressions that the commands' output must match in this order
SAID: dict[str, list[str]] = {
    "refuses": [
        "operators +warn +broken=acme\n",
        f"acme: breaker (half-)?open since {TIME}: \\d attempts failed in a row since {TIME}: connect",
        r"\(connection refused at 127\.0\.0\.1:\d+\)\n",
        f"by itself: tried again {AT}; the first notice dies at {TIME}\n",
        "by hand: +lmdaemon probe acme .*\n +lmdaemon release acme",
        f"{TIME} .* connect +connection refused at",
    ],
    "html": [
        f"birch: breaker (half-)?open since {TIME}: every answer since {TIME} is bad_answer [(]the body is HTML[)]",
        f"tried again {AT}; the first notice dies at {TIME}",
        "lastStatus +200\n",
        "<html><body><h1>500 Internal Server Error",
    ],
    "certificate": [
        f"cedar: breaker (half-)?open since {TIME}: \\d attempts failed in a row since {TIME}: tls",
        "certificate verify failed: certificate has expired",
        f"tried again {AT}; the first notice dies at {TIME}",
        "lmdaemon probe cedar",
        "https://127.0.0.1:.* tls +certificate verify failed: certificate has expired",
    ],
    "code-7": [
        f"dune: breaker (half-)?open since {TIME}: every answer since {TIME} is code_7",
        "bad parameters .*missing field player_id.*none is known before: one side has changed what it expects",
        f"tried again {AT}; the first notice dies at {TIME}",
        'history:(\n.*)* 7 +code_7 .*{"error":7,"description":"Bad parameters: missing field player_id"}',
    ],
    "slow": [
        r"elm \(http\) falls behind: the first has waited for a slot for [\d.]+ (s|min), ",
        r"0 deliveries a second are added and \d(\.\d)? finished \(p50 0\.\d+ s\), \d+ wait: drained in \d+ s\n",
        "by hand: raise the concurrency",
        "operators.elm.concurrency = 1\n",
    ],
    "touches": [
        "expiry +warn +massExpired=fir",
        f"fir: 150 of 150 sessions ended at once, at {TIME}\n",
        "by hand: lmdaemon sessions list fir",
        "\ngum +400 ",
        f"ended +inactivity +{TIME} +{TIME} +- +{TIME}",
    ],
    "held": [
        "oldestPendingSeconds=7 d",
        "\ngum .* yes +closed +- +7 d\n",
        f"gum: held since {TIME} by anna: by_hand [(]they move their database[)]\n",
        "held until somebody releases it; its deliveries do not age",
        "lmdaemon release gum",
        "\nheld +no\n",
        "pending +[0-3]\n",  # some may be delivered already
    ],
    "disk": [
        "disk +warn +freeBytes=1.\\d+ MB sizeBytes=16.8 MB\n",
        "1.\\d+ MB of 16.8 MB are free\n",
        "by hand: make room, or lower database.keep_ended",
        'database.keep_ended = "90d"',
    ],
    "disk-full": [
        "status: fail",
        f"database or disk is full, since {TIME}\n",
        "by hand: make room on its disk, .* go on by themselves, and clients ask again",
    ],
    "typo": [
        "config +warn\n",
        r"config\.toml: sessions\.idle_timout: is no key of this table \(did you mean 'idle_timeout'\?\)\n",
        f"refused at {TIME}: the settings from before are in force\n",
        "by hand: lmdaemon check-config; mend the file and reload",
        'sessions.idle_timeout = "30m"\n',
        "A reload would be refused and change nothing:\n.*sessions.idle_timout",
    ],
    "cut-off": [
        f"\nacme +s-123 +p-77 +ended +inactivity +{TIME} +{TIME} +- +{TIME}\n",
        '"session.opened","operator":"acme","session":"s-123"',
        '"touch.refused","operator":"birch".*"unknown-session".*"s-123".*"request_id":"gs-7"',
    ],
    "auditor": [
        "p-77.jsonl: 3 sessions, 3 deliveries, until",
        "--since 20.* is 20",
        "p-77.jsonl: whole, 3 rows, sha256 [0-9a-f]{64}\n",
    ],
    "twice": [
        "\nmsg_1_[0-9a-f]{20} +acme +s-9 +http +delivered +2 ",
        f"settledAt +{TIME}",
        "bodySha256 +[0-9a-f]{64}",
        f"\n{TIME} .* interrupted +the daemon ended before it had the answer; the operator may have received this",
        f"\n{TIME} +\\d+ +http://127.0.0.1:.*V4/SessionExpired +127.0.0.1:\\d+ +200 +0 ",
    ],
    "again": [
        "found +7\n",
        "canBeSent +7\n",
        f"oldestSettledAt +{TIME}",
        "reasons +7 code_120\n",
        f"--since yesterday 18:00 is {TIME}",
        "retried +7\n",
    ],
    "upgrade": [
        r'"daemon.failed".*lmdaemon.sqlite3: was written by a newer lmdaemon \(schema \d+; this one knows \d+\)',
        "restored from before.sqlite3, .* integrity ok",
        f"as of {TIME}, sessions live: 1, ",
        "what has happened since then is missing: docs/operating.md",
        "what was there before: .*before-restore",
    ],
    "capacity": [
        "300,000 sessions touched every 30 s: 10,000 touches and 250.0 ends a second",
        "CPU, of one core: ",
        "after 90 days of keep_ended",
        "This machine's processor ",
        "The disk is ",
    ],
}


def play(played: Scene, name: str) -> list[Asked]:
    """Plays a situation and runs its commands. Returns their results."""
    try:
        names = SITUATIONS[name].play(played)
    except CannotBePlayedError as error:
        pytest.skip(str(error))
    return [played.asks(command.format(**names)) for command in SITUATIONS[name].asks]


# -- how a situation ends, by itself or by hand


def _released(played: Scene) -> None:
    played.peers["acme"].play("")
    assert played.asks("lmdaemon release acme").code == 0
    played.until_settled("acme")
    assert played.asks("lmdaemon status --check").code == 0


def _sent_again(played: Scene) -> None:
    played.until_settled("acme")
    assert played.of("acme")["dead"] == 4  # the deliveries that died three days ago


def _given_room(played: Scene) -> None:
    (played.directory / "disk" / "ballast").unlink()
    played.until(lambda: played.check("store")["status"] == "pass")
    played.opens("acme", ["new"])


def _rolled_back(played: Scene) -> None:
    played.start()
    (found,) = played.call("GET", "v1/operators/acme/sessions")["items"]
    assert found["sessionId"] == "s-1"


THEN: dict[str, Callable[[Scene], None]] = {
    "refuses": _released,
    "held": lambda played: played.until_settled("gum"),
    "again": _sent_again,
    "disk-full": _given_room,
    "upgrade": _rolled_back,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_two_commands_answer_each_situation(name: str) -> None:
    with scene() as played:
        text = "".join(asked.text for asked in play(played, name))
        at = 0
        for expected in SAID[name]:
            found = re.compile(expected).search(text, at)
            assert found, f"{expected!r} is not in what follows\n{text[at:]}\nof\n{text}"
            at = found.end() - 1
        if name in THEN:
            THEN[name](played)


# -- the documents


def documented() -> dict[str, list[str]]:
    """The commands in the table of docs/operating.md, by situation."""
    text = (ROOT / "docs" / "operating.md").read_text().partition("## The night's questions")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| `[a-z0-9-]+` \|", line)]
    return {name.strip("| `"): re.findall(r"`([^`]+)`", ask) for name, _, ask, _ in rows}


def fits(command: str, pattern: str) -> bool:
    """Whether a command equals the documented one; words in capitals stand for any word."""
    words, expected = shlex.split(command), shlex.split(pattern)
    return len(words) >= len(expected) and all(
        one == other or re.fullmatch("[A-Z]+", other) for one, other in zip(words, expected, strict=False)
    )


def test_the_runbook_has_the_commands_of_each_situation() -> None:
    found = documented()
    assert found.keys() == SITUATIONS.keys()
    for name, situation in SITUATIONS.items():
        assert len(situation.asks) == len(found[name]) <= 2
        assert all(map(fits, situation.asks, found[name])), name


@pytest.mark.slow
def test_make_night_lists_the_situations_and_hands_over_a_shell() -> None:
    """With commands instead of the shell."""
    words = [sys.executable, str(Path(__file__).parent)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    options["env"] = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'helpers'}{os.pathsep}{ROOT}"}
    listed = subprocess.run(words, **options)
    assert (listed.returncode, all(name in listed.stdout for name in SITUATIONS)) == (0, True)
    done = subprocess.run([*words, "typo", "lmdaemon status"], **options)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'idle_timeout'" in done.stdout
