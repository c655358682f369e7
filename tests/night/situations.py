"""The fifteen situations of a night on call: how each is brought about, what the person on call hears, and which
commands to use.

Each is played by real processes in a scene. docs/operating.md has the same situations with their commands.
"""

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from scene import Scene

HOUR_S, DAY_S = 3600, 86_400


class Situation(NamedTuple):
    """What the person on call hears, the function that brings it about, and the command lines to use. The {names} in
    them are the keys that `play` returns.
    """

    heard: str
    play: Callable[[Scene], dict[str, str]]
    asks: tuple[str, ...]


def _sessions(count: int, prefix: str = "s") -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


# -- an operator that does not take its notices


def _refuses(scene: Scene) -> dict[str, str]:
    acme = scene.operator("acme", schedule=["2s", "2s", "2s", "10m"])
    scene.operator("birch")
    scene.start()
    scene.plays("birch", _sessions(6))
    scene.plays("acme", _sessions(2, "before"))
    scene.until_settled("acme")
    acme.stop()
    scene.plays("acme", _sessions(6))
    scene.until_logged("breaker.opened")
    return {}


def _html(scene: Scene) -> dict[str, str]:
    scene.operator("birch", "html")
    scene.start()
    scene.plays("birch", _sessions(6))
    scene.until_logged("breaker.opened")
    return {}


def _certificate(scene: Scene) -> dict[str, str]:
    scene.operator("cedar", "tls expired", tls=True)
    scene.start()
    scene.plays("cedar", _sessions(6))
    scene.until_logged("breaker.opened")
    return {}


def _code_7(scene: Scene) -> dict[str, str]:
    scene.operator("dune", "ok x4 then error 7 'Bad parameters: missing field player_id'")
    scene.start()
    scene.plays("dune", _sessions(12))
    scene.until_logged("breaker.opened")
    return {}


def _slow(scene: Scene) -> dict[str, str]:
    """The clock is fast, so that deliveries have soon waited long enough for a warning."""
    scene.operator("elm", "delay 200ms", concurrency=1)
    scene.start(speed=5)
    scene.plays("elm", _sessions(150))
    scene.until_logged("delivery.behind")
    scene.until(lambda: "finished (p50" in scene.check("deliveries").get("output", ""))
    return {}


def _held(scene: Scene) -> dict[str, str]:
    """The hold was set a week ago, in a run whose log is gone."""
    scene.operator("gum")
    scene.start(ago_s=7 * DAY_S)
    scene.call("POST", "v1/operators/gum/hold", {"note": "they move their database"})
    scene.plays("gum", _sessions(3))
    scene.stop()
    scene.daemon.log.unlink()
    scene.start()
    return {}


# -- game servers


def _touches_stopped(scene: Scene) -> dict[str, str]:
    scene.settings('[sessions]\nrestart_grace = "0s"\n')
    scene.operator("fir", idle_timeout="2s", concurrency=16)
    scene.operator("gum", concurrency=16)
    scene.start()
    scene.opens("gum", _sessions(400))
    scene.opens("fir", _sessions(150))
    scene.touches("fir", _sessions(150))
    scene.until_logged("operator.touches_stopped")
    scene.until_logged("operator.mass_expired")
    scene.until(lambda: not scene.of("fir")["live"])
    return {}


def _cut_off(scene: Scene) -> dict[str, str]:
    """The game server sends the heartbeats of s-123 to the wrong operator."""
    scene.settings('[sessions]\nrestart_grace = "0s"\n')
    scene.operator("acme", idle_timeout="2s")
    scene.operator("birch")
    scene.start()
    scene.opens("acme", ["s-123"], "p-77")
    scene.touches("birch", ["s-123"], "gs-7")
    scene.until(lambda: scene.daemon.events("session.ended"))
    scene.until_settled("acme")
    return {}


# -- the machine and its files


def _disk(scene: Scene) -> dict[str, str]:
    disk = scene.disk("size=16m,mode=700")
    scene.operator("acme")
    scene.start()
    scene.opens("acme", _sessions(10))
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while disk_free(disk) > 3 << 19:
            file.write(bytes(1 << 18))
    scene.opens("acme", ["s-10"])  # the disk is looked at when something is written
    scene.until(lambda: scene.check("disk")["status"] == "warn")
    return {}


def _disk_full(scene: Scene) -> dict[str, str]:
    disk = scene.disk("size=16m,mode=700")
    scene.operator("acme")
    scene.start()
    scene.opens("acme", _sessions(10))
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    scene.until(
        lambda: scene.status_of("PUT", "v1/operators/acme/sessions/new", {"playerId": "p", "token": "t"})[0] == 503
    )
    return {}


def disk_free(directory: os.PathLike[str]) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _typo(scene: Scene) -> dict[str, str]:
    scene.settings('[sessions]\nidle_timeout = "30m"\n')
    scene.operator("acme")
    scene.start()
    text = scene.daemon.config.read_text()
    scene.daemon.config.write_text(text.replace("idle_timeout", "idle_timout"))
    scene.daemon.popen.send_signal(signal.SIGHUP)
    scene.until_logged("config.reload_failed")
    return {}


def _upgrade(scene: Scene) -> dict[str, str]:
    """A newer version has used the file for an hour, and is to be rolled back."""
    scene.operator("acme")
    scene.start()
    scene.opens("acme", ["s-1"])
    assert scene.asks("lmdaemon backup before.sqlite3").code == 0
    scene.opens("acme", ["s-2"])
    scene.stop()
    with contextlib.closing(sqlite3.connect(scene.daemon.path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")
    scene.daemon.spawn()
    assert scene.daemon.popen.wait(60) == 1
    return {}


def _capacity(scene: Scene) -> dict[str, str]:
    scene.operator("acme")
    scene.start()
    return {}


# -- what became of notices


def _auditor(scene: Scene) -> dict[str, str]:
    month = (datetime.now(UTC).replace(day=1) - timedelta(days=15)).replace(day=15)
    scene.operator("acme")
    scene.start(ago_s=(datetime.now(UTC) - month).total_seconds())
    for player in ("p-77", "p-78"):
        scene.plays("acme", _sessions(3, player), player)
    scene.until_settled("acme")
    scene.stop()
    scene.start()
    scene.plays("acme", ["later"], "p-77")
    first = month.replace(day=1).date()
    return {"first": f"{first}", "next": f"{datetime.now(UTC).replace(day=1).date()}"}


def _never_or_twice(scene: Scene) -> dict[str, str]:
    """The daemon is killed after the operator has received the first attempt. The second attempt is answered."""
    acme = scene.operator("acme", "hang", timeout="60s")
    scene.start()
    scene.plays("acme", ["s-9"], "p-77")
    scene.until(lambda: acme.notices)
    scene.daemon.kill()
    acme.play("")
    scene.start()
    scene.until_settled("acme")
    (delivery,) = scene.call("GET", "v1/deliveries?operator=acme")["items"]
    return {"id": delivery["id"]}


def _again(scene: Scene) -> dict[str, str]:
    """Some notices died three days ago and are not wanted any more. Others died since yesterday, 18:00, and are."""
    acme = scene.operator("acme", "error 120")
    since = datetime.now(UTC).replace(hour=18, minute=0, second=0, microsecond=0) - timedelta(days=1)
    ago_s = (datetime.now(UTC) - since).total_seconds()
    for past_s, names in ((3 * DAY_S, _sessions(4, "old")), (ago_s - 600, _sessions(7))):
        scene.start(past_s)
        scene.plays("acme", names)
        scene.until_settled("acme")
        scene.stop()
    acme.play("")
    scene.start()
    return {}


STATUS = "lmdaemon status"

SITUATIONS = {
    "refuses": Situation("acme has got no notice for a while", _refuses, (STATUS, "lmdaemon probe acme")),
    "html": Situation("birch is in maintenance, or is it?", _html, (STATUS, "lmdaemon probe birch")),
    "certificate": Situation("nothing gets to cedar", _certificate, (STATUS, "lmdaemon probe cedar")),
    "code-7": Situation("dune refuses every notice", _code_7, (STATUS, "lmdaemon probe dune")),
    "slow": Situation("elm gets its notices later and later", _slow, (STATUS, "lmdaemon config")),
    "touches": Situation(
        "all players of fir were thrown out at once",
        _touches_stopped,
        (STATUS, "lmdaemon sessions list fir --state ended --since '1h ago' --limit 5"),
    ),
    "held": Situation("gum has heard nothing for a week", _held, (STATUS, "lmdaemon release gum")),
    "disk": Situation("the alert of the disk has come", _disk, (STATUS, "lmdaemon config")),
    "disk-full": Situation("game servers get 503", _disk_full, (STATUS,)),
    "typo": Situation("somebody has reloaded, and nothing has changed", _typo, (STATUS, "lmdaemon config")),
    "cut-off": Situation(
        "a player was cut off in session s-123 while playing",
        _cut_off,
        ("lmdaemon find s-123", "journalctl -u lmdaemon -S -1d -o cat | grep s-123"),
    ),
    "auditor": Situation(
        "the auditor wants all of player p-77 of last month",
        _auditor,
        (
            "lmdaemon sessions export --player p-77 --since {first} --until {next} --digest --output p-77.jsonl",
            "lmdaemon sessions verify p-77.jsonl",
        ),
    ),
    "twice": Situation(
        "acme has never got the notice of s-9, or got it twice",
        _never_or_twice,
        ("lmdaemon sessions show acme s-9", "lmdaemon deliveries show {id}"),
    ),
    "again": Situation(
        "what acme did not take since yesterday 18:00 is to be sent again",
        _again,
        (
            "lmdaemon deliveries retry --operator acme --since 'yesterday 18:00' --dry-run",
            "lmdaemon deliveries retry --operator acme --since 'yesterday 18:00'",
        ),
    ),
    "upgrade": Situation(
        "the new version is taken back, and the old one does not start",
        _upgrade,
        ("journalctl -u lmdaemon -p err -o cat | tail -n 3", "lmdaemon restore before.sqlite3"),
    ),
    "capacity": Situation(
        "will this machine carry 300,000 sessions?",
        _capacity,
        ("lmdaemon size --sessions 300000 --heartbeat 30s --measure 2s",),
    ),
}
