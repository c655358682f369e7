"""A reload puts every setting into force, or says that it needs a restart."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from clocks import HandClock
from support import LISTEN, hear, load, operator_table, scripted_operator, serving, until

from lmdaemon import reloader
from lmdaemon.config.settings import (
    NEEDS_RESTART,
    ApiTable,
    DatabaseTable,
    LogTable,
    ServerTable,
    SessionsTable,
    Settings,
    flat,
)
from lmdaemon.store.contract import Opening

TOML = LISTEN + '[operators.acme]\nprovider_id = "acme"\n'

# Settings that are read only at the start, with the keys of the file that each is made of
AT_THE_START = {
    "server.listen": {"server.listen"},
    "api.listen": {"api.listen"},
    "database": {"database.path"},
    "postgres": {"database.url", "database.password_file", "database.password_env", "database.migrate"},
}
# Settings that say what the next start does, so that a reload has nothing to do for them
OF_THE_NEXT_START = {"count_downtime"}
# Settings that belong to the file alone. The daemon does not read them, or reads what was made of them.
OF_THE_FILE = {"unusable", "tables", "secrets", "server.client_ca_file", "api.client_ca_file"}
OF_THE_FILE |= {f"{side}.tls_{part}_file" for side in ("server", "api") for part in ("cert", "key")}
OF_THE_FILE |= {f"api.{right}token_{source}" for right in ("", "read_") for source in ("file", "env")}


def noted(struct: msgspec.Struct, seen: set[str], at: str = "") -> Any:
    """The same struct, but its members that are read are noted in `seen`."""
    kind = type(struct)
    fields = kind.__struct_fields__

    def read(self: Any, name: str) -> Any:
        if name in fields:
            seen.add(at + name)
        return kind.__getattribute__(self, name)

    values = {name: getattr(struct, name) for name in fields}
    for name in ("server", "api"):
        if name in values and isinstance(struct, Settings):
            values[name] = noted(values[name], seen, f"{name}.")
    noting = type(f"Noted{kind.__name__}", (kind,), {"__getattribute__": read}, frozen=True)
    return noting(**values)


@pytest.mark.parametrize(
    ("before", "after", "content_type"),
    [("v4", "pragmatic", "application/json"), ("pragmatic", "v4", "application/x-www-form-urlencoded")],
)
async def test_a_waiting_body_keeps_its_type_if_the_dialect_changes(
    tmp_path: Path, clock: HandClock, before: str, after: str, content_type: str
) -> None:
    """The second attempt is refused too, and its answer is read and kept."""
    (tmp_path / "hash.key").write_text("the-hash-key")
    (tmp_path / "hash.key").chmod(0o600)
    refused = {"error": 100, "description": "later"}
    async with scripted_operator(refused, refused) as operator:

        def toml(dialect: str) -> str:
            return LISTEN + operator_table(
                "acme", operator.url, dialect=dialect, accept=["v4", "pragmatic"], hash_key_file="hash.key"
            )

        async with serving(tmp_path, toml(before), clock) as d:
            await d.store.open_session(Opening("acme", "s", "p", "tok-3n", None, 10_000, 0))
            await d.store.end("acme", "s")
            await until(lambda: d.store.gate("acme").failures == 1)
            (tmp_path / "config.toml").write_text(toml(after))
            await d.daemon.reload_once()
            async with d.client.post(f"{d.api}/v1/operators/acme/probe") as answer:
                probed = await answer.json()
            async with d.client.get(f"{d.api}/v1/deliveries/{probed['id']}") as answer:
                shown = (await answer.json())["request"]["headers"]
        first, second = operator.received
    assert first.body == second.body
    assert [one.headers["Content-Type"] for one in (first, second)] == [content_type] * 2
    assert shown["Content-Type"] == content_type
    assert [one["error"] for one in probed["history"]] == ["code_100"] * 2


async def test_every_setting_is_read_again_or_told_to_need_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, TOML) as d:
        seen: set[str] = set()
        new = noted(load(tmp_path / "config.toml", TOML), seen)
        monkeypatch.setattr(reloader.reader, "load", lambda *_, **__: new)
        await d.daemon.reload_once()
        await d.pruner.once()
        for url in (f"{d.server}/health", f"{d.api}/health", f"{d.api}/console/"):
            async with d.client.get(url) as answer:
                assert answer.status == 200
        await d.daemon.reload_once()
    every = {name for name in Settings.__struct_fields__ if name not in ("server", "api")}
    for name, kind in (("server", ServerTable), ("api", ApiTable)):
        every |= {f"{name}.{key}" for key in kind.__struct_fields__}
    assert every - seen - OF_THE_FILE - OF_THE_NEXT_START <= AT_THE_START.keys()
    assert set().union(*AT_THE_START.values()) == NEEDS_RESTART


def test_the_keys_that_need_a_restart_are_keys() -> None:
    tables = {"database": DatabaseTable, "sessions": SessionsTable, "log": LogTable}
    known = {key for name, kind in tables.items() for key, _ in flat(kind(), name)}
    assert known | {"server.listen", "api.listen"} >= NEEDS_RESTART


async def test_what_needs_a_restart_is_in_force_as_it_was_at_the_start(tmp_path: Path) -> None:
    """The settings of the start stay in force however often the file is read again. The command `config` still shows
    what a restart would change.
    """
    async with serving(tmp_path, TOML) as d:
        text = TOML.replace('[api]\nlisten = "127.0.0.1:0"', '[api]\nlisten = "127.0.0.9:9"')
        text += '[sessions]\nidle_timeout = "9m"\n[database]\npath = "other"\n'
        (tmp_path / "config.toml").write_text(text)
        for changed in ("sessions.idle_timeout", "nothing"):
            with hear("lmdaemon.daemon") as events:
                await d.daemon.reload_once()
            (told,) = [event.facts["changed"] for event in events if event.name == "config.reloaded"]
            assert told == changed
        async with d.client.get(f"{d.api}/v1/config") as answer:
            found = await answer.json()
    shown = found["settings"]
    assert shown["sessions.idle_timeout"] == '"9m"'
    assert (shown["api.listen"], shown["database.path"]) == ('"127.0.0.1:0"', '"lmdaemon.sqlite3"')
    assert {(one["key"], one["new"]) for one in found["changes"] if one["needsRestart"]} == {
        ("api.listen", '"127.0.0.9:9"'),
        ("database.path", '"other"'),
    }
    assert len(found["changes"]) == 2


async def test_graces_of_a_reload_are_in_force_at_once(tmp_path: Path) -> None:
    """A grace is how long ends wait after something has happened. `downtime` is for the next start."""
    async with serving(tmp_path, TOML) as d:
        text = TOML + '[sessions]\nrestart_grace = "7s"\ndowntime = "count"\ndaemon_grace = "3s"\n'
        (tmp_path / "config.toml").write_text(text)
        with hear("lmdaemon.daemon") as events:
            await d.daemon.reload_once()
        assert [event.facts["changed"] for event in events if event.name == "config.reloaded"] == [
            "sessions.daemon_grace,sessions.downtime,sessions.restart_grace"
        ]
        assert not [event for event in events if event.name == "config.needs_restart"]
        assert (d.store.grace_ms, d.store.daemon_grace_ms) == (7000, 3000)
        async with d.client.get(f"{d.api}/v1/config") as answer:
            found = await answer.json()
    assert (found["settings"]["sessions.restart_grace"], found["changes"]) == ('"7s"', [])
