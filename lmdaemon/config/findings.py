"""Collects errors and warnings about a configuration, each under the key that it is about, and without any secret."""

import difflib
from collections.abc import Iterable

from lmdaemon.log import safe_url

ABSENT = object()  # stands for a value that is not shown


class ConfigError(Exception):
    """The configuration cannot be used. `findings` are complete sentences: file, key path, rule, value."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class ContentError(ConfigError):
    """The file was read, and its content has errors."""


class Findings:
    """Errors and warnings of one reading of one file, each as `key path: what is wrong with it`."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, key: str, rule: str, value: object = ABSENT, hint: str = "") -> None:
        """Records an error under its key."""
        hidden = value is ABSENT or key.endswith("_env")  # people write the secret itself there
        self.errors.append(f"{key}: {rule}" + ("" if hidden else f" (got {_shown(value)})") + hint)

    def warn(self, key: str, text: str) -> None:
        """Records a warning under its key."""
        self.warnings.append(f"{key}: {text}")

    def unchecked(self, key: str, why: str) -> None:
        """Records a warning instead of an error, because the daemon may be able to read what this process cannot."""
        self.warn(key, f"unchecked: {why}")

    def about(self, tables: Iterable[str]) -> list[str]:
        """The errors that are about these tables of the file."""
        places = tuple(f"{table}{end}" for table in tables for end in ":.[")
        return [error for error in self.errors if error.startswith(places)]

    def sound(self, at: str, *keys: str) -> bool:
        """Whether no error is recorded for these keys of a table, so that rules between them can be checked."""
        places = tuple(f"{at}.{key}{end}" for key in keys for end in ":.[")
        return not any(error.startswith(places) for error in self.errors)


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that a wrong one was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as an end of a finding; else empty."""
    found = meant(name, known)
    return f" (did you mean {found!r}?)" if found else ""


def _shown(value: object) -> str:
    if isinstance(value, dict | list):  # its members may be secrets
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 64:  # repr refuses very long ones
        return "a number of more than 64 bits"
    text = repr(safe_url(value) if isinstance(value, str) and "://" in value else value)
    return text if len(text) <= 120 else text[:117] + "..."
