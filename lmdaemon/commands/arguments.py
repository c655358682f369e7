"""Decorators with which a command's module declares the options and positional arguments of each command. For example:

@command(OPERATOR, argument("--state", choices=("active", "ended")), JSON)
def list_sessions(args: argparse.Namespace) -> int: ...
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROWS_DEFAULT = 100

Run = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]  # as argparse's add_argument takes it


class Command(NamedTuple):
    """A function that runs one command and returns its exit code, with the arguments it takes."""

    run: Run
    arguments: tuple[Argument, ...]

    def __call__(self, args: argparse.Namespace) -> int:
        """Runs the command and returns its exit code."""
        return self.run(args)

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Adds its arguments to the parser of the command."""
        for names, options in self.arguments:
            parser.add_argument(*names, **options)


def command(*arguments: Argument) -> Callable[[Run], Command]:
    """Makes a function a command that takes these arguments."""
    return lambda run: Command(run, arguments)


def argument(*names: str, **options: Any) -> Argument:
    """One option or positional argument, as `add_argument` takes it. Without `type`, its value must be UTF-8 text."""
    if "action" not in options:
        options.setdefault("type", text)
    return names, options


# -- types


def text(value: str) -> str:
    """Text that is sent to the daemon or an operator. It must be valid UTF-8, although a command line may have any
    bytes.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        from lmdaemon.log import safe_url

        value = safe_url(value) if "://" in value else value
        raise argparse.ArgumentTypeError(f"must be UTF-8 (got {value!r})") from None
    return value


def filled(value: str) -> str:
    """A text that is not empty. An empty one, as from a shell variable that is not set, would choose all operators or
    sessions.
    """
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return text(value)


def file(value: str) -> Path:
    """A file's name: any bytes, as the system has them."""
    if not value:
        raise argparse.ArgumentTypeError("must name a file")
    return Path(value)


def count(value: str) -> int:
    """A positive number of at most nine digits, for argparse."""
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number (got {value!r})")
    return int(value)


def count_to(most: int) -> Callable[[str], int]:
    """A type of argument for argparse: a positive number of at most `most`."""

    def read(value: str) -> int:
        if (found := count(value)) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most} (got {value!r})")
        return found

    return read


def percent(value: str) -> int:
    """A whole number from 0 to 100, for argparse."""
    if not re.fullmatch(r"[0-9]{1,3}", value) or int(value) > 100:
        raise argparse.ArgumentTypeError(f"must be 0 to 100 (got {value!r})")
    return int(value)


def seconds(value: str) -> int:
    """A duration as in the configuration, in whole seconds."""
    from lmdaemon.config.values import duration

    try:
        found = duration(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if found < 1 or found % 1:
        raise argparse.ArgumentTypeError(f"must be whole seconds, at least 1s (got {value!r})")
    return int(found)


def seed(value: str) -> int:
    """The seed of a random generator, so that a run can be repeated."""
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise argparse.ArgumentTypeError(f"must be a whole number (got {value!r})")
    return int(value)


class _RefuseSecret(argparse.Action):
    """`--token VALUE`: refused without repeating the value."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error("a command line can be read by everybody on this machine: use --token-file or --token-env")


# -- arguments that several commands take

JSON = argument("--json", action="store_true", help="print JSON")
OPERATOR = argument("operator", type=filled, metavar="OPERATOR", help="its name in the configuration")
OF_OPERATOR = argument("--operator", type=filled, metavar="OPERATOR", help="of this operator only")
SESSION = argument("session", type=filled, metavar="ID", help="the session's id")
FORCE = argument("--force", action="store_true", help="replace an existing FILE")
PLAYER_TOKEN = (
    argument("--token-file", type=file, metavar="FILE", help="file with the player's token"),
    argument("--token-env", metavar="NAME", help="environment variable with the player's token"),
    argument("--token", action=_RefuseSecret, help=argparse.SUPPRESS),
)
ROWS = (
    argument("--limit", type=count, default=ROWS_DEFAULT, metavar="N", help="how many, newest first (default 100)"),
    argument("--all", action="store_true", help="all of them"),
    JSON,
)
_ASKED = "for a daemon whose api.client_ca_file asks for one"
CLIENT_CERTIFICATE = (
    argument("--client-cert", type=file, metavar="FILE", help=f"certificate {_ASKED}"),
    argument("--client-key", type=file, metavar="FILE", help="its key, if that is in another file"),
)
