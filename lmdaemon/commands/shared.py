"""What the commands share: exit codes, failures, printing, secrets read from named files and variables.

Results go to stdout, as text or with `--json` as one JSON document; messages go to stderr. This module must import
little, because `version` and usage errors import nothing else.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

STOPPED, FAILED, MISCONFIGURED = 0, 1, 2
NARROWEST = 6  # the least width, in characters, to which a column is reduced
_GAP = "  "


class Failed(Exception):  # noqa: N818 - a result rather than an error: one line on stderr, exit code 1
    """The command could not be done. The text says why, for people."""


class Usage(Exception):  # noqa: N818
    """The arguments do not fit together in a way that argparse cannot check. The exit code is argparse's own, 2."""


# -- printing


def say(message: str, level: str = "ERROR") -> None:
    """Prints a message on stderr, for journald with the priority of `level` (a level name of `logging`)."""
    from lmdaemon.log import PRIORITY, is_journal

    priority = f"<{PRIORITY[level]}>" if is_journal(sys.stderr) else ""
    print(priority + line(message), file=sys.stderr)


def reason(error: BaseException) -> str:
    """The text of an error for people, without an error number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def print_json(document: object) -> None:
    """Prints a result as JSON."""
    print(json.dumps(document, indent=2))


class Lines:
    """Prints lines for a command that must go on when they cannot be written. The first failure is kept in `failure`;
    nothing is printed after it. `name` is what `problem` calls `file`.
    """

    def __init__(self, file: TextIO, name: str) -> None:
        self._file = file
        self._name = name
        self.failure: Failed | OSError | None = None

    def __call__(self, text: str) -> None:
        """Prints one line, or the lines of the text."""
        if self.failure is None:
            try:
                print(text, file=self._file, flush=True)
            except (Failed, OSError) as error:
                self.failure = error

    def close(self) -> None:
        """Closes the file. What could not be written is not tried again."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error

    @property
    def problem(self) -> str:
        """The failure in words; empty if there was none."""
        match self.failure:
            case None:
                return ""
            case Failed() as failed:  # of standard output, which has its own message
                return str(failed)
            case error:
                return f"{self._name} cannot be written to: {reason(error)}"


def standard_output() -> Lines:
    """Standard output as Lines."""
    return Lines(sys.stdout, "standard output")


def line(text: str) -> str:
    """Text as one line for a terminal. Characters that are not printable are escaped, so that none has an effect."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def cell(value: object) -> str:
    """A value as it is shown in a table; "-" for what is absent or empty."""
    match value:
        case None | "" | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}" if value < 1e6 else f"{value:.0f}"
        case dict() | list():
            return json.dumps(value)
    return line(str(value))


def print_table(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], widths: list[int] | None = None
) -> list[int]:
    """Prints rows under the names of their columns and returns the widths of the columns.

    Further pages are given the widths of the first; they are printed without the names.
    """
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    if widths is None:
        cells.insert(0, list(columns))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if sys.stdout.isatty():
            widths = fitted(widths, shutil.get_terminal_size().columns)
    cut = _cut if sys.stdout.isatty() else _whole
    for line in cells:
        print(_GAP.join(cut(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return widths


def fitted(widths: Sequence[int], room: int) -> list[int]:
    """The widths of columns, the widest ones reduced until all fit into `room` characters. The first column keeps its
    width, because it has the ids that other commands take; no other gets narrower than NARROWEST.
    """
    found = list(widths)
    while sum(found) + len(_GAP) * (len(found) - 1) > room:
        width, at = max(((width, at) for at, width in enumerate(found) if at), default=(0, 0))
        if width <= NARROWEST:
            break
        found[at] -= 1
    return found


def _whole(text: str, _: int) -> str:
    return text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


async def print_pages(columns: Sequence[str], pages: AsyncIterator[list[Any]], *, as_json: bool) -> int:
    """Prints a list page by page, because it may be too long for memory; as JSON, it is one array."""
    if as_json:
        before = "["
        async for page in pages:
            for item in page:
                print(f"{before}\n{json.dumps(item)}", end="")
                before = ","
        print("[]" if before == "[" else "\n]")
        return STOPPED
    widths: list[int] | None = None
    async for page in pages:
        widths = print_table(columns, page, widths)
    return STOPPED


def show(args: argparse.Namespace, document: Mapping[str, Any], **tables: Sequence[str]) -> int:
    """Prints one object: a line for each member, then its lists as tables.

    `tables` names the members that are lists, with the columns to print of each.
    """
    if args.json:
        print_json(document)
        return STOPPED
    facts = {name: value for name, value in document.items() if name not in tables}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {cell(value)}")
    for name, columns in tables.items():
        print(f"\n{name}:")
        print_table(columns, document[name])
    return STOPPED


def quiet_libraries() -> None:
    """Keeps the logs of libraries out of the output: aiohttp quotes broken requests, with the tokens in them.

    Errors of asyncio (an exception in a callback, or one that was never retrieved) are bugs that must be seen. They are
    logged as one event, with the type and the place of the exception and without its text.
    """
    import logging

    class LoopError(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log_loop_error(record.exc_info[1] if record.exc_info else None)

    handlers = {
        "aiohttp": logging.NullHandler(),
        "aiosqlite": logging.NullHandler(),
        "psycopg": logging.NullHandler(),
        "asyncio": LoopError(logging.ERROR),
    }
    for name, handler in handlers.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False


def log_loop_error(error: BaseException | None) -> None:
    """Logs an exception that reached the event loop, by its type and place."""
    from lmdaemon.log import Log, place

    Log("daemon").error(
        "loop.error",
        error=None if error is None else type(error).__name__,
        where=None if error is None else place(error),
    )


# -- secrets given by name


def player_token(args: argparse.Namespace) -> str | None:
    """The player's token from the file or variable that the options name; None if they name none. Raises Usage."""
    from lmdaemon.model import TOKEN_MAX, id_problem

    if args.token_file and args.token_env:
        raise Usage("--token-file and --token-env must not both be given")
    if args.token_env:
        token = _secret(os.environb.get(os.fsencode(args.token_env), b""), f"--token-env: {args.token_env}")
    elif args.token_file:
        token = secret_file(args.token_file, "--token-file")
    else:
        return None
    problem = id_problem(token, TOKEN_MAX)
    if problem:
        raise Usage(f"{'--token-env' if args.token_env else '--token-file'}: the token {problem}")
    return token


def secret_file(file: Path, option: str) -> str:
    """The content of a file without the line break at its end. Raises Usage with a text that names the option."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Usage(f"{option}: {file} cannot be read: {reason(error)}") from None
    return _secret(content, f"{option}: {file}")


def _secret(content: bytes, place: str) -> str:
    from lmdaemon import textfile

    try:
        return textfile.decode(content).rstrip("\r\n")
    except ValueError as error:
        raise Usage(f"{place} {error}") from None
