"""The command line: argv → one command; exit codes.

Most commands talk to the running daemon over its private API; some need no daemon. A token is never taken from the
command line, which everybody on the machine can read, and never printed.

`COMMANDS` says in which module each command is. The module, which declares the command's arguments, is imported only
when the command is used. `version`, the list of commands and errors about unknown commands import none.
"""

import argparse
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from lmdaemon.commands import arguments
from lmdaemon.commands.arguments import Command
from lmdaemon.commands.shared import FAILED, MISCONFIGURED, STOPPED, Failed, Usage, say
from lmdaemon.version import __version__

SERVE = "serve:serve"
VERSION = "cli:version"

# Words → `module:function` and its help
COMMANDS = {
    "serve": (SERVE, "run the daemon (the default command)"),
    "check-config": ("serve:check_config", "check the configuration file and load its plug-ins"),
    "config": ("settings:config", "show the settings in force, and what a reload would change"),
    "status": ("admin:status", "show health, and one line for each operator"),
    "events": ("admin:events", "print events as they happen, until interrupted; waits for a daemon that is restarted"),
    "find": ("admin:find", "find the sessions with this id, and those of a player with this id, of all operators"),
    "sessions list": ("admin:list_sessions", "list an operator's sessions"),
    "sessions show": ("admin:show_session", "show one session with its deliveries"),
    "sessions open": ("admin:open_session", "open a session; opening it again counts as a touch"),
    "sessions touch": (
        "admin:touch_sessions",
        "report activity in sessions; exit code 1 if one is unknown or has ended",
    ),
    "sessions close": ("admin:close_session", "end a session because its game was closed"),
    "sessions export": (
        "export:export",
        "export ended sessions with their deliveries and attempts, in the order in which they ended",
    ),
    "sessions verify": ("chain:verify", "check whether an export that was made with --digest is whole"),
    "deliveries list": ("admin:list_deliveries", "list deliveries of all operators"),
    "deliveries show": ("admin:show_delivery", "show one delivery with its attempts"),
    "deliveries retry": ("dead:retry", "make one dead delivery, or all of an operator, due again"),
    "deliveries discard": (
        "dead:discard",
        "mark a dead delivery, or those of an operator, as wanted by nobody: they no longer count as dead",
    ),
    "hold": ("admin:hold", "stop sending to an operator; ends are still recorded"),
    "release": ("admin:release", "send again at once: ends a hold, closes the breaker, forgets a Retry-After"),
    "probe": ("admin:probe", "try an operator's next delivery now; exit code 0 only when it is delivered"),
    "send": (
        "send:send",
        "send one SessionExpired now and print both sides of it; exit code 0 only when it is delivered",
    ),
    "check": ("check:check", "try an operator's endpoint with made-up notices and report what it gets wrong"),
    "simulate operator": (
        "simulate_operator:operator",
        "simulate an operator that answers by a script, and report what a sender does wrong",
    ),
    "simulate provider": (
        "simulate_provider:provider",
        "play game servers against the running daemon, or notices against an endpoint, and judge it",
    ),
    "size": (
        "size:size",
        "measure how much of this machine a number of sessions would use, and how much disk keep_ended needs",
    ),
    "backup": ("backup:backup", "write a consistent copy of the database, also while the daemon runs"),
    "restore": (
        "backup:restore",
        "put a backup in the database's place while the daemon is stopped; what was there is kept beside it",
    ),
    "import": ("importing:import_file", "move a stopped daemon's file into an empty PostgreSQL database"),
    "migrate": ("migrate:migrate", "bring the schema of a PostgreSQL database to the newest version"),
    "completion": ("completion:completion", "print a completion script for bash, zsh or fish"),
    "version": (VERSION, "print the version"),
}

EPILOG = """\
Configuration file: --config, else $LMDAEMON_CONFIG, ./config.toml, /etc/lmdaemon/config.toml.
Exit codes: 0 stopped or done, 1 failed, 2 configuration or usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    with suppress(ValueError, OSError):  # not allowed in the service's sandbox, which sets the limit itself
        # No core dumps, because a core contains every token that was in memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        code = _run(argv)
        sys.stdout.flush()
    except Failed as error:
        say(f"lmdaemon: {error}")
        return FAILED
    # BrokenPipeError: the reader of the output has closed the pipe. KeyboardInterrupt: the user has pressed Ctrl-C
    except (BrokenPipeError, KeyboardInterrupt):
        return FAILED
    return code


def _run(argv: Sequence[str] | None) -> int:
    """Runs one command and returns the exit code, also for wrong arguments. Raises Failed."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as told:  # raised by argparse for --help and for wrong arguments
        return int(told.code or STOPPED)
    if args.run == VERSION:
        return version(args)
    run = loaded(args.run)
    from lmdaemon.config.findings import ConfigError

    try:
        return run(args)
    except ConfigError as error:
        for finding in error.findings:
            say(finding)
    except Usage as error:
        say(f"lmdaemon: {error}")
    return MISCONFIGURED


@arguments.command(arguments.JSON)
def version(args: argparse.Namespace) -> int:
    """Prints the version."""
    print(json.dumps({"version": __version__}) if args.json else f"lmdaemon {__version__}")
    return STOPPED


def loaded(name: str) -> Command:
    """The command that is named as `module:function`."""
    if name == VERSION:
        return version
    if name == SERVE:
        _stop_at_once()
    module, _, function = name.partition(":")
    found: Command = getattr(import_module(f"lmdaemon.commands.{module}"), function)
    return found


def _stop_at_once() -> None:
    """Handles signals while the daemon's modules are imported: exits at once, because nothing is open yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(STOPPED))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# -- the parser


class _Later(argparse.ArgumentParser):
    """The parser of one command or group of commands, which is made when it is about to be used. Most never are."""

    def __init__(self, **options: Any) -> None:
        self._options: dict[str, Any] | None = options
        self.fill: Callable[[argparse.ArgumentParser], None]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        return super().parse_known_args(args, namespace)

    def complete(self) -> None:
        """Makes the parser and adds its arguments, once."""
        if self._options is not None:
            super().__init__(**self._options, allow_abbrev=False)
            self._options = None
            # SUPPRESS, because the default of the command's own --config would overwrite a --config before the command
            _config_option(self, default=argparse.SUPPRESS)
            self.fill(self)


def parser(*, whole: bool = False) -> argparse.ArgumentParser:
    """The parser of the command line. With `whole`, the arguments of all commands are declared, so that all their
    modules are imported.
    """
    top = argparse.ArgumentParser(
        "lmdaemon",
        description="SessionExpired as a daemon: sessions, their expiry, and its delivery.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _config_option(top).set_defaults(run=SERVE, json=False)
    top.add_argument("--version", dest="run", action="store_const", const=VERSION, help="print the version")
    _add_commands(top, "", whole=whole)
    return top


def _add_commands(parser: argparse.ArgumentParser, group: str, *, whole: bool) -> None:
    """Adds the commands of a group (of "": the commands of one word, and the groups) to its parser."""
    metavar, title = ("VERB", "verbs") if group else ("COMMAND", "commands")
    added = parser.add_subparsers(metavar=metavar, title=title, required=bool(group), parser_class=_Later)
    made: dict[str, _Later] = {}
    for words, (run, help_text) in COMMANDS.items():
        first, _, verb = words.rpartition(" ")
        if first == group:
            made[verb] = added.add_parser(verb, help=help_text, description=help_text)
            made[verb].fill = partial(_declare, run=run)
        elif not group and first not in made:
            verbs = [other.split()[1] for other in COMMANDS if other.startswith(f"{first} ")]
            made[first] = added.add_parser(first, help=", ".join(verbs))
            made[first].fill = partial(_add_commands, group=first, whole=whole)
    if whole:
        for later in made.values():
            later.complete()


def _declare(parser: argparse.ArgumentParser, run: str) -> None:
    """Adds the arguments of the command that is named `run`, whose module is imported for that."""
    parser.set_defaults(run=run)
    loaded(run).declare(parser)


def _config_option(parser: argparse.ArgumentParser, **options: Any) -> argparse.ArgumentParser:
    parser.add_argument("--config", type=arguments.file, metavar="FILE", help="configuration file", **options)
    return parser
