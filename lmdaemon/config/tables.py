"""Reads the tables of the file into structs, by the types of their fields. Rules between keys are in `rules`."""

from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from lmdaemon.config import values
from lmdaemon.config.findings import Findings, suggestion
from lmdaemon.config.values import NAME, NAME_RULE, Duration, Listen, Network

_READERS: Mapping[Any, Callable[[object], Any]] = {
    Duration: values.duration,
    Listen: values.listen,
    Network: values.network,
}
_RULES: Mapping[Any, str] = {
    str: "must be a string",
    int: "must be an integer",
    bool: "must be true or false",
}
_T = TypeVar("_T", bound=msgspec.Struct)


class Tables:
    """Reads tables. `read` has the tables read so far, by name, as they are in the file with defaults filled in."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.read: dict[str, msgspec.Struct] = {}

    def table(self, kind: type[_T], raw: object, at: str) -> _T | None:
        """Reads one table of the file into its struct and notes it in `read`. None if it is no table."""
        table = self.struct(kind, raw, at)
        if table is not None:
            self.read[at] = table
        return table

    def struct(self, kind: type[_T], raw: object, at: str) -> _T | None:
        """Reads a table, or a table within one, into its struct. None if it is no table.

        If a value does not fit its key, an error is recorded, and the default is used instead (for a required key an
        empty value), so that the rules between keys can still be checked. Of a table within the table, the values that
        fit are kept.
        """
        error = self._findings.error
        if not isinstance(raw, dict):
            # The value is not shown, because a secret may have been written in the wrong place
            error(at, "must be a table")
            return None
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        for key in raw:
            if key not in fields:
                error(f"{at}.{key}", "is no key of this table" + suggestion(key, fields))
        found: dict[str, Any] = {}
        for name, field in fields.items():
            before = len(self._findings.errors)
            if name in raw:
                found[name] = self.value(field.type, raw[name], f"{at}.{name}")
            elif field.required:
                error(f"{at}.{name}", "is required")
            if len(self._findings.errors) > before and not isinstance(found.get(name), msgspec.Struct | dict):
                found.pop(name, None)
                if field.required:
                    found[name] = (get_origin(field.type) or field.type)()
        return kind(**found)

    def value(self, kind: Any, value: object, at: str) -> Any:
        """Converts one value to its type. If it does not fit, records an error and returns None."""
        error = self._findings.error
        options = get_args(kind)
        if get_origin(kind) in (UnionType, Union) and type(None) in options:
            (kind,) = (option for option in options if option is not type(None))
        if get_origin(kind) is tuple:
            if not isinstance(value, list):
                return error(at, "must be a list", value)
            (element, _) = get_args(kind)
            return tuple(self.value(element, item, f"{at}[{index}]") for index, item in enumerate(value))
        if get_origin(kind) is dict:
            if not isinstance(value, dict):
                return error(at, "must be a table")
            members = {key: self.value(options[1], item, f"{at}.{key}") for key, item in value.items()}
            return {key: member for key, member in members.items() if self._findings.sound(at, key)}
        if kind in _READERS:
            try:
                return _READERS[kind](value)
            except ValueError as broken:
                return error(at, str(broken), value)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(kind, value, at)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            choices = ", ".join(f'"{choice}"' for choice in get_args(kind) if choice)
            rule = f"must be one of {choices}" if get_origin(kind) is Literal else _RULES[kind]
            return error(at, rule, value)

    def named(self, kind: type[msgspec.Struct], raw: object, at: str) -> Iterable[tuple[str, object]]:
        """The sub-tables of `[operators]`, `[plugins]` or `[dialects]` with their names. Records an error for a name
        that breaks NAME_RULE; names stand in URLs and in the log. Keys of a sub-table (`kind`) that stand in no
        sub-table are one error.
        """
        if not isinstance(raw, dict):
            self._findings.error(at, "must be a table")
            return
        bare = [key for key, value in raw.items() if not isinstance(value, dict)]
        keys = {field.name for field in msgspec.structs.fields(kind)}
        astray = {*bare, *(keys & raw.keys())} if keys & set(bare) else set()
        if astray:
            more = f" and {len(astray) - 1} more" if len(astray) > 1 else ""
            first = next(key for key in bare if key in keys)
            self._findings.error(at, f"write [{at}.NAME], with a name of your choice, above {first}{more}")
        alike: dict[str, str] = {}
        for name, table in raw.items():
            if name in astray:
                continue
            if not NAME.fullmatch(name):
                self._findings.error(at, f"names {NAME_RULE}", name)
                continue
            other = alike.setdefault(name.casefold(), name)
            if other != name:
                self._findings.warn(f"{at}.{name}", f"is not {at}.{other}: upper and lower case make different names")
            yield name, table
