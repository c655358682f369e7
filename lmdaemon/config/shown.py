"""Settings as they may be shown to everybody who may call the API: by key of the file, as TOML, without a secret."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from lmdaemon.config.settings import (
    DeliveryTable,
    OperatorTable,
    SessionsTable,
    Settings,
    by_key,
    changes,
    flat,
)
from lmdaemon.config.values import VARIABLE, Duration, Listen, spell
from lmdaemon.log import safe_url

MASKED = '"…"'
# Tables and keys that must have the same values for all daemons on one database
_ALIKE = {"operators", "dialects", "plugins", "delivery", "sessions", "database.keep_ended"}
_ELSEWHERE = ("_file", "_env")  # ends of keys that name a file or variable, which may differ between machines
_MASKED_KEYS = {"options"}  # the options of a plug-in: only the plug-in knows whether they contain a secret


class Difference(NamedTuple):
    """One key in two readings. `old` and `new` are TOML, None where the key or its table is not there."""

    key: str
    old: str | None
    new: str | None
    content: bool  # the key names a file or a variable, and the content of that has changed


def in_force(settings: Settings) -> dict[str, str]:
    """Every key with its value, inherited values included. A secret is shown as the name of its file or variable."""
    return dict(_in_force(settings))


def _in_force(settings: Settings) -> Iterator[tuple[str, str]]:
    tables = settings.tables
    for name, table in tables.items():
        for key, value in flat(table, name):
            if value is None and isinstance(table, OperatorTable):
                value = _inherited(key.rpartition(".")[2], tables)
            if value is not None:
                yield key, _toml(key, value)


def _inherited(key: str, tables: Mapping[str, msgspec.Struct]) -> Any:
    for name, kind in (("sessions", SessionsTable), ("delivery", DeliveryTable)):
        if key in kind.__struct_fields__:
            return getattr(tables[name], key)
    return None


def digest(settings: Settings) -> str:
    """A digest of the settings that must be the same for all daemons on one database: operators with inherited values,
    dialects, plug-ins, and keep_ended. Secrets and the paths of files are left out, since paths may differ between
    machines.
    """
    alike = {
        key: value
        for key, value in in_force(settings).items()
        if (key.partition(".")[0] in _ALIKE or key in _ALIKE) and not key.endswith(_ELSEWHERE)
    }
    return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:16]


def inherited(settings: Settings) -> list[str]:
    """The key paths of operators whose values are inherited from [sessions] or [delivery]."""
    return [
        key
        for name, table in settings.tables.items()
        if isinstance(table, OperatorTable)
        for key, value in flat(table, name)
        if value is None and _inherited(key.rpartition(".")[2], settings.tables) is not None
    ]


def differences(old: Settings, new: Settings) -> list[Difference]:
    """Each key that differs, with its old and new value as TOML without secrets, in the order in which a reload logs
    them.
    """
    before, after = by_key(old), by_key(new)
    found = []
    for key in changes(old, new):
        was, will_be = before.get(key), after.get(key)
        if was is None or will_be is None:  # a whole table was added or removed
            there = ["{ … }" if key in settings.tables else None for settings in (old, new)]
            found.append(Difference(key, there[0], there[1], content=False))
            continue
        values = [None if value is None else _toml(key, value) for value in (was[0], will_be[0])]
        found.append(Difference(key, values[0], values[1], content=was[0] == will_be[0]))
    return found


def _toml(key: str, value: Any) -> str:
    """A value as TOML, without anything in it that may be a secret."""
    last = key.rpartition(".")[2]
    if last in _MASKED_KEYS and value:
        return "{ " + ", ".join(f"{name} = {MASKED}" for name in value) + " }"
    if key == "database.url":  # it has no password; user and query are left out as well
        return json.dumps(re.sub(r"//[^/@]*@", "//", value).partition("?")[0], ensure_ascii=False)
    if last.endswith("_env") and value and not VARIABLE.fullmatch(value):
        return MASKED
    if last == "url" and value:
        return json.dumps(safe_url(value), ensure_ascii=False)
    return toml(value)


def toml(value: Any) -> str:
    """A value as TOML, on one line."""
    match value:
        case Duration():
            return f'"{spell(value)}"'
        case Listen():
            return json.dumps(value.text, ensure_ascii=False)
        case bool() | int():
            return json.dumps(value)
        case tuple() | list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return "{ " + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + " }" if value else "{}"
    return json.dumps(str(value), ensure_ascii=False)
