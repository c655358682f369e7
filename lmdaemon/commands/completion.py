"""`lmdaemon completion`: what a shell needs to complete the command line, made from the parser itself."""

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from lmdaemon.commands import cli
from lmdaemon.commands.arguments import argument, command
from lmdaemon.commands.shared import STOPPED, Failed

SHELLS = ("bash", "zsh", "fish")


@command(argument("shell", choices=SHELLS, help="source it in your shell, or put it where it looks for completions"))
def completion(args: argparse.Namespace) -> int:
    """Prints the script that a shell completes the command line with."""
    try:
        shtab: Any = import_module("shtab")
    except ImportError:
        raise Failed("completion needs shtab: pip install 'lmdaemon[completion]'") from None
    parser = whole()
    for action in _actions(parser):
        if action.metavar == "FILE":
            action.complete = shtab.FILE
    print(shtab.complete(parser, shell=args.shell))
    return STOPPED


def whole() -> argparse.ArgumentParser:
    """The parser with every command's arguments; the manual page is made from it too."""
    return cli.parser(whole=True)


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The arguments of a parser and of all parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from _actions(below)
