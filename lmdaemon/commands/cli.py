"""The command line: argv → one command; exit codes.

Contract, section 8. The commands talk to the running daemon over the private API, except those that work without one. A
token is never taken from the command line, which everybody on the machine can read, and never printed.

Each command lives in a module that is imported when it is called: `version` and usage errors need none.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lmdaemon.commands.shared import FAILED, MISCONFIGURED, STOPPED, Failed, Usage, say
from lmdaemon.version import __version__

ROWS_DEFAULT = 100
VERSION = "version"  # the one command that needs no module
SERVE = "serve:serve"

EPILOG = """\
Configuration file: --config, else $LMDAEMON_CONFIG, ./config.toml, /etc/lmdaemon/config.toml.
Exit codes: 0 stopped or done, 1 failed, 2 configuration or usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    with suppress(ValueError, OSError):  # the service's sandbox does not let it, and sets it itself
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core has every token in it that was in memory
    try:
        code = _run(argv)
        sys.stdout.flush()
    except Failed as error:
        say(f"lmdaemon: {error}")
        return FAILED
    except (BrokenPipeError, KeyboardInterrupt):  # the reader of a long list has seen enough, or whoever asked for it
        return FAILED
    return code


def _run(argv: Sequence[str] | None) -> int:
    """One command. Raises Failed."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as told:  # the help, or bad usage
        return int(told.code or STOPPED)
    if args.run == VERSION:
        return _version(args)
    if args.run == SERVE:
        _stop_at_once()
    from lmdaemon.config.findings import ConfigError

    try:
        return _loaded(args.run)(args)
    except ConfigError as error:
        for finding in error.findings:
            say(finding)
    except Usage as error:
        say(f"lmdaemon: {error}")
    return MISCONFIGURED


def _stop_at_once() -> None:
    """How signals are taken while the daemon's modules are imported: there is nothing to be closed yet, or reloaded."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(STOPPED))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _loaded(name: str) -> Callable[[argparse.Namespace], int]:
    """The function that is named as `module:function`."""
    module, _, function = name.partition(":")
    run: Callable[[argparse.Namespace], int] = getattr(import_module(f"lmdaemon.commands.{module}"), function)
    return run


# -- arguments


class Command(NamedTuple):
    """One row of the command line: its words, what runs it (`module:function`), its help, and its arguments as argparse
    takes them.
    """

    words: str
    run: str
    help: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def _arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    if "action" not in options:
        options.setdefault("type", _text)
    return names, options


def _text(text: str) -> str:
    """What is sent to the daemon or an operator. Any bytes can stand on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        from lmdaemon.log import safe_url

        text = safe_url(text) if "://" in text else text
        raise argparse.ArgumentTypeError(f"must be UTF-8 (got {text!r})") from None
    return text


class _RefuseSecret(argparse.Action):
    """`--token VALUE`: refused without repeating the value."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error("a command line can be read by everybody on this machine: use --token-file or --token-env")


def _file(text: str) -> Path:
    """A file's name: any bytes, as the system has them."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file")
    return Path(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number (got {text!r})")
    return int(text)


def _commands() -> tuple[Command, ...]:
    as_json = _arg("--json", action="store_true", help="print JSON")
    operator = _arg("operator", metavar="OPERATOR", help="its name in the configuration")
    session = _arg("session", metavar="ID", help="the session's id")
    token = (
        _arg("--token-file", type=_file, metavar="FILE", help="file with the player's token"),
        _arg("--token-env", metavar="NAME", help="environment variable with the player's token"),
        _arg("--token", action=_RefuseSecret, help=argparse.SUPPRESS),
    )
    rows = (
        _arg("--limit", type=_count, default=ROWS_DEFAULT, metavar="N", help="how many, newest first (default 100)"),
        _arg("--all", action="store_true", help="all of them"),
        as_json,
    )
    return (
        Command("serve", SERVE, "run the daemon (the default command)"),
        Command("check-config", "serve:check_config", "check the configuration file and load its plug-ins", (as_json,)),
        Command("status", "admin:status", "health, and one line for each operator", (as_json,)),
        Command(
            "sessions list",
            "admin:list_sessions",
            "an operator's sessions",
            (
                operator,
                _arg("--state", choices=("active", "ended")),
                _arg("--player", metavar="ID", help="of this player only"),
                *rows,
            ),
        ),
        Command("sessions show", "admin:show_session", "one session with its deliveries", (operator, session, as_json)),
        Command(
            "sessions open",
            "admin:open_session",
            "open a session; opening it again counts as a touch",
            (
                operator,
                session,
                _arg("--player", required=True, metavar="ID", help="the player's id"),
                *token,
                _arg("--idle-timeout", type=_count, metavar="S", help="seconds (default: the operator's)"),
                as_json,
            ),
        ),
        Command(
            "sessions touch",
            "admin:touch_sessions",
            "activity in sessions; exit code 1 if one is unknown or has ended",
            (operator, _arg("sessions", nargs="+", metavar="ID", help="the sessions' ids"), as_json),
        ),
        Command("sessions close", "admin:close_session", "the game was closed", (operator, session, as_json)),
        Command(
            "sessions export",
            "export:export",
            "ended sessions with their deliveries and attempts, in the order in which they ended, read from the file",
            (
                _arg("--operator", metavar="OPERATOR", help="of this operator only"),
                _arg(
                    "--since",
                    metavar="TIME",
                    help="those that ended then or later, as in 2026-01-31T03:00:00Z or 2026-01-31",
                ),
                _arg("--until", metavar="TIME", help="those that ended before then (default: now)"),
                _arg("--format", choices=("jsonl", "csv"), default="jsonl", help="JSON lines (default) or CSV"),
                _arg("--output", type=_file, metavar="FILE", help="write here, whole or not at all, mode 0600"),
                _arg("--force", action="store_true", help="replace an existing FILE"),
                _arg("--json", action="store_true", help="print the summary of --output as JSON"),
            ),
        ),
        Command(
            "deliveries list",
            "admin:list_deliveries",
            "deliveries of all operators",
            (
                _arg("--operator", metavar="OPERATOR", help="of this operator only"),
                _arg("--sink", metavar="SINK", help='"http" or "plugin:NAME"'),
                _arg("--state", choices=("pending", "delivered", "dead")),
                *rows,
            ),
        ),
        Command(
            "deliveries show",
            "admin:show_delivery",
            "one delivery with its attempts",
            (_arg("delivery", metavar="ID", help="its webhook-id"), as_json),
        ),
        Command(
            "deliveries retry",
            "admin:retry",
            "make one dead delivery, or all of an operator, due again",
            (
                _arg("delivery", nargs="?", metavar="ID", help="its webhook-id"),
                _arg("--operator", metavar="OPERATOR", help="all dead ones of this operator"),
                _arg("--since", metavar="TIME", help="only those given up since then, as in 2026-01-31T03:00:00Z"),
                as_json,
            ),
        ),
        Command("hold", "admin:hold", "stop sending to an operator; ends are still recorded", (operator, as_json)),
        Command("release", "admin:release", "resume sending to an operator", (operator, as_json)),
        Command(
            "send",
            "send:send",
            "send one SessionExpired now and print both sides of it; exit code 0 only when it is delivered",
            (
                _arg("operator", nargs="?", metavar="OPERATOR", help="send as the daemon would to this operator"),
                _arg("--url", metavar="URL", help="send here instead; private addresses are allowed, you chose it"),
                _arg("--yes", action="store_true", help="the operator's code may act on it (not asked on loopback)"),
                _arg("--dialect", metavar="NAME", help="instead of the operator's (without one: v4)"),
                _arg("--provider-id", metavar="ID", help="instead of the operator's (without one: luckymonaco)"),
                _arg("--session", metavar="ID", help="session id (default: a test value)"),
                _arg("--player", metavar="ID", help="player id (default: a test value)"),
                *token,
                _arg("--hash-key-file", type=_file, metavar="FILE", help="file with the hash key, if any"),
                _arg("--timeout", metavar="SPAN", help='such as "500ms" or "10s" (default: the operator\'s, or 10s)'),
                as_json,
            ),
        ),
        Command(
            "backup",
            "backup:backup",
            "write a consistent copy of the database, also while the daemon runs",
            (
                _arg("file", type=_file, metavar="FILE", help="the copy, mode 0600"),
                _arg("--force", action="store_true", help="replace an existing FILE"),
                as_json,
            ),
        ),
        Command(
            "restore",
            "backup:restore",
            "put a backup in the database's place while the daemon is stopped; what was there is kept beside it",
            (_arg("file", type=_file, metavar="FILE", help="a copy made by backup; it stays as it is"), as_json),
        ),
        Command("version", VERSION, "print the version", (as_json,)),
    )


def _parser() -> argparse.ArgumentParser:
    def config_option(parser: argparse.ArgumentParser, **options: Any) -> argparse.ArgumentParser:
        parser.add_argument("--config", type=_file, metavar="FILE", help="configuration file", **options)
        return parser

    parser = argparse.ArgumentParser(
        "lmdaemon",
        description="SessionExpired as a daemon: sessions, their expiry, and its delivery.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config_option(parser).set_defaults(run="serve:serve", json=False)
    parser.add_argument("--version", dest="run", action="store_const", const=VERSION, help="print the version")
    # Suppressed, or a command's missing --config would undo the one before it
    common = config_option(argparse.ArgumentParser(add_help=False), default=argparse.SUPPRESS)
    talking = argparse.ArgumentParser(add_help=False)
    asked = "to show where api.client_ca_file asks for it"
    talking.add_argument("--client-cert", type=_file, metavar="FILE", help=f"certificate {asked}")
    talking.add_argument("--client-key", type=_file, metavar="FILE", help="its key, where that is another file")
    groups = {"": parser.add_subparsers(metavar="COMMAND", title="commands")}
    for command in _commands():
        group, _, verb = command.words.rpartition(" ")
        if group not in groups:
            verbs = [other.words.split()[1] for other in _commands() if other.words.startswith(f"{group} ")]
            made = groups[""].add_parser(group, help=", ".join(verbs), parents=[common], allow_abbrev=False)
            groups[group] = made.add_subparsers(metavar="VERB", title="verbs", required=True)
        parents = [common, talking] if command.run.startswith("admin:") else [common]
        leaf = groups[group].add_parser(
            verb, help=command.help, description=command.help, parents=parents, allow_abbrev=False
        )
        leaf.set_defaults(run=command.run)
        for names, options in command.arguments:
            leaf.add_argument(*names, **options)
    return parser


def _version(args: argparse.Namespace) -> int:
    print(json.dumps({"version": __version__}) if args.json else f"lmdaemon {__version__}")
    return STOPPED
