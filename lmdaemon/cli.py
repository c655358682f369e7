"""The command line: argv → configuration → daemon, or one administration command; exit codes.

Contract, section 8. Results go to stdout, as text or with `--json` as one JSON document; messages go to stderr. The
commands talk to the running daemon over the private API, except `send` and `backup`, which work without one. A token is
never taken from the command line, which everybody on the machine can read, and never printed.

Modules that take long to import are imported by the commands that need them: `version` and usage errors need none.
"""

import argparse
import base64
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from lmdaemon.version import __version__

if TYPE_CHECKING:
    import asyncio

    import aiohttp

    from lmdaemon.config import Listen, Operator, Policy, Settings
    from lmdaemon.model import Session
    from lmdaemon.retry import Outcome

_Struct = TypeVar("_Struct", "Operator", "Policy")

STOPPED, FAILED, MISCONFIGURED = 0, 1, 2
ANSWER_WITHIN_S = 60.0  # of the private API: a bulk retry takes seconds, anything longer is a daemon that hangs
ROWS_DEFAULT = 100
PAGE_MAX = 1000  # rows in one answer of the private API
TOUCH_MAX = 10_000  # ids in one bulk touch
ABANDON_AFTER_S = 1.0  # for a plug-in's hook that ignores its cancellation when everything else has ended
BUSY_TIMEOUT_S = 10.0  # while the daemon recovers its log after a crash
MASK = "***"
ANSWER_HEADERS = (
    "Allow",
    "Content-Encoding",
    "Content-Length",
    "Content-Type",
    "Date",
    "Location",
    "Retry-After",
    "Server",
    "Via",
    "WWW-Authenticate",
    "X-Request-Id",
)

EPILOG = """\
Configuration file: --config, else $LMDAEMON_CONFIG, ./config.toml, /etc/lmdaemon/config.toml.
Exit codes: 0 stopped or done, 1 failed, 2 configuration or usage."""

SESSION_COLUMNS = ("sessionId", "playerId", "state", "reason", "openedAt", "lastSeenAt", "expiresAt", "endedAt")
DELIVERY_COLUMNS = (
    "id",
    "operator",
    "sessionId",
    "sink",
    "state",
    "attempts",
    "nextAttemptAt",
    "settledAt",
    "lastError",
)
ATTEMPT_COLUMNS = ("at", "durationMs", "status", "code", "error")
OPERATOR_COLUMNS = ("operator", "live", "pending", "dead", "held", "breaker", "oldestPendingSeconds")


class Failed(Exception):  # noqa: N818 - a result: one line on stderr, exit 1
    """The command could not be done; the text says why, for people."""


class Usage(Exception):  # noqa: N818
    """The arguments fit no command, in a way argparse cannot tell: exit 2, as argparse does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Bad usage raises SystemExit(2), as argparse does."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an id may not fit the terminal's encoding
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a long list has seen enough; nothing can be told to it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    return code


def _run(args: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = args.run
    if run is _version:
        return run(args)
    from lmdaemon.config import ConfigError

    try:
        return run(args)
    except ConfigError as error:
        for finding in error.findings:
            _say(finding)
        return MISCONFIGURED
    except Usage as error:
        _say(f"lmdaemon: {error}")
        return MISCONFIGURED
    except Failed as error:
        _say(f"lmdaemon: {error}")
        return FAILED


# -- arguments


class Command(NamedTuple):
    """One row of the command line: its words, what runs it, its help, its arguments as argparse takes them."""

    words: str
    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def _arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


class _RefuseSecret(argparse.Action):
    """`--token VALUE`: refused without repeating the value."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error("a command line can be read by everybody on this machine: use --token-file or --token-env")


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number (got {text!r})")
    return int(text)


def _commands() -> tuple[Command, ...]:
    as_json = _arg("--json", action="store_true", help="print JSON")
    operator = _arg("operator", metavar="OPERATOR", help="its name in the configuration")
    session = _arg("session", metavar="ID", help="the session's id")
    token = (
        _arg("--token-file", metavar="FILE", help="file with the player's token"),
        _arg("--token-env", metavar="NAME", help="environment variable with the player's token"),
        _arg("--token", action=_RefuseSecret, help=argparse.SUPPRESS),
    )
    rows = (
        _arg("--limit", type=_count, default=ROWS_DEFAULT, metavar="N", help="how many, newest first (default 100)"),
        _arg("--all", action="store_true", help="all of them"),
        as_json,
    )
    return (
        Command("serve", _serve, "run the daemon (the default command)"),
        Command("check-config", _check_config, "check the configuration file and load its plug-ins", (as_json,)),
        Command("status", _asking(_status), "health, and one line for each operator", (as_json,)),
        Command(
            "sessions list",
            _asking(_list_sessions),
            "an operator's sessions",
            (
                operator,
                _arg("--state", choices=("active", "ended")),
                _arg("--player", metavar="ID", help="of this player only"),
                *rows,
            ),
        ),
        Command(
            "sessions show", _asking(_show_session), "one session with its deliveries", (operator, session, as_json)
        ),
        Command(
            "sessions open",
            _asking(_open_session),
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
            _asking(_touch_sessions),
            "activity in sessions; exit code 1 if one is unknown or has ended",
            (operator, _arg("sessions", nargs="+", metavar="ID", help="the sessions' ids"), as_json),
        ),
        Command("sessions close", _asking(_close_session), "the game was closed", (operator, session, as_json)),
        Command(
            "deliveries list",
            _asking(_list_deliveries),
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
            _asking(_show_delivery),
            "one delivery with its attempts",
            (_arg("delivery", metavar="ID", help="its webhook-id"), as_json),
        ),
        Command(
            "deliveries retry",
            _asking(_retry),
            "make one dead delivery, or all of an operator, due again",
            (
                _arg("delivery", nargs="?", metavar="ID", help="its webhook-id"),
                _arg("--operator", metavar="OPERATOR", help="all dead ones of this operator"),
                _arg("--since", metavar="TIME", help="only those given up since then, as in 2026-01-31T03:00:00Z"),
                as_json,
            ),
        ),
        Command("hold", _asking(_hold), "stop sending to an operator; ends are still recorded", (operator, as_json)),
        Command("release", _asking(_release), "resume sending to an operator", (operator, as_json)),
        Command(
            "send",
            _send,
            "send one SessionExpired now and print both sides of it; exit code 0 only when it is delivered",
            (
                _arg("operator", nargs="?", metavar="OPERATOR", help="send as the daemon would to this operator"),
                _arg("--url", metavar="URL", help="send here instead; private addresses are allowed, you chose it"),
                _arg("--dialect", metavar="NAME", help="instead of the operator's (without one: v4)"),
                _arg("--provider-id", metavar="ID", help="instead of the operator's (without one: luckymonaco)"),
                _arg("--session", metavar="ID", help="session id (default: a test value)"),
                _arg("--player", metavar="ID", help="player id (default: a test value)"),
                *token,
                _arg("--hash-key-file", metavar="FILE", help="file with the key, for a dialect with a hash"),
                _arg("--timeout", metavar="SPAN", help='such as "500ms" or "10s" (default: the operator\'s, or 10s)'),
                as_json,
            ),
        ),
        Command(
            "backup",
            _backup,
            "write a consistent copy of the database, also while the daemon runs",
            (
                _arg("file", type=Path, metavar="FILE", help="the copy, mode 0600"),
                _arg("--force", action="store_true", help="replace an existing FILE"),
                as_json,
            ),
        ),
        Command("version", _version, "print the version", (as_json,)),
    )


def _parser() -> argparse.ArgumentParser:
    def config_option(parser: argparse.ArgumentParser, **options: Any) -> argparse.ArgumentParser:
        parser.add_argument("--config", metavar="FILE", help="configuration file", **options)
        return parser

    parser = argparse.ArgumentParser(
        "lmdaemon",
        description="SessionExpired as a daemon: sessions, their expiry, and its delivery.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config_option(parser).set_defaults(run=_serve)
    # Suppressed, or a command's missing --config would undo the one before it
    common = config_option(argparse.ArgumentParser(add_help=False), default=argparse.SUPPRESS)
    groups = {"": parser.add_subparsers(metavar="COMMAND", title="commands")}
    for command in _commands():
        group, _, verb = command.words.rpartition(" ")
        if group not in groups:
            verbs = [other.words.split()[1] for other in _commands() if other.words.startswith(f"{group} ")]
            made = groups[""].add_parser(group, help=", ".join(verbs), parents=[common], allow_abbrev=False)
            groups[group] = made.add_subparsers(metavar="VERB", title="verbs", required=True)
        leaf = groups[group].add_parser(
            verb, help=command.help, description=command.help, parents=[common], allow_abbrev=False
        )
        leaf.set_defaults(run=command.run)
        for names, options in command.arguments:
            leaf.add_argument(*names, **options)
    return parser


# -- the daemon


def _serve(args: argparse.Namespace) -> int:
    import asyncio

    from lmdaemon import config, log

    # Until the daemon handles signals itself, SIGTERM is a Ctrl-C: what was opened is closed, exit 0.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        settings = config.load(config.find(args.config))
        log.setup(settings.log.level, settings.log.format)
        _quiet_libraries()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = _until_ended(runner, settings)
            _abandon_what_hangs(runner, code)
    except KeyboardInterrupt:
        return STOPPED
    return code


def _until_ended(runner: "asyncio.Runner", settings: "Settings") -> int:
    """Runs the daemon to its end, says why it ended, and returns the exit code."""
    from lmdaemon.config import ConfigError
    from lmdaemon.daemon import Daemon
    from lmdaemon.database import DatabaseError, StoreError
    from lmdaemon.log import Log

    try:
        runner.run(Daemon(settings).run())
    except KeyboardInterrupt:
        return STOPPED
    except ConfigError as error:  # a plug-in's finding; the file's name before it, as the file's own findings have it
        for finding in error.findings:
            _say(f"{settings.file}: {finding}")
        return MISCONFIGURED
    except (DatabaseError, StoreError, OSError) as error:
        Log("daemon").error("daemon.failed", reason=_reason(error))
        return FAILED
    except Exception as error:  # an ExceptionGroup when a loop died; the service manager starts us again
        lost = _file_lost(error)
        if lost is None:
            Log("daemon").exception("daemon.crashed")
        else:
            Log("daemon").error("daemon.failed", reason=str(lost))
        return FAILED
    return STOPPED


def _file_lost(error: Exception) -> Exception | None:
    """The one reason in a group of exceptions when it is a file that was taken away, else None."""
    from lmdaemon.database import FileLostError

    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, FileLostError) else None


def _abandon_what_hangs(runner: "asyncio.Runner", code: int) -> None:
    """Ends the process at once when a plug-in's hook ignores its cancellation: the loop's own end would wait for it for
    ever. By now everything of ours is closed.
    """
    import asyncio

    from lmdaemon.log import Log

    async def cancel_all() -> int:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        return len((await asyncio.wait(tasks, timeout=ABANDON_AFTER_S))[1]) if tasks else 0

    hanging = runner.run(cancel_all())
    if hanging:
        Log("daemon").warning("daemon.abandoned_hooks", count=hanging)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _loop_factory() -> Callable[[], Any] | None:
    """uvloop's event loop where that extra is installed; None: asyncio's own."""
    from importlib import import_module

    try:
        factory: Callable[[], Any] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


def _quiet_libraries() -> None:
    """Keeps what libraries log out of the output: aiohttp quotes the bytes of broken requests, tokens included.

    asyncio's errors (an exception in a callback, or one that nobody fetched) are bugs that must not go unseen, so they
    pass as one event with the exception's type and place, without any text.
    """
    import logging

    from lmdaemon.log import Log, place

    class LoopError(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            Log("daemon").error(
                "loop.error",
                error=None if error is None else type(error).__name__,
                where=None if error is None else place(error),
            )

    handlers = {
        "aiohttp": logging.NullHandler(),
        "aiosqlite": logging.NullHandler(),
        "asyncio": LoopError(logging.ERROR),
    }
    for name, handler in handlers.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False


# -- what needs no daemon


def _version(args: argparse.Namespace) -> int:
    print(json.dumps({"version": __version__}) if args.json else f"lmdaemon {__version__}")
    return STOPPED


def _check_config(args: argparse.Namespace) -> int:
    from lmdaemon.config import ConfigError, find

    path: Path | None = None
    errors: Sequence[str] = ()
    warnings: Sequence[str] = ()
    try:
        path = find(args.config)
        warnings = _checked(path).warnings
    except ConfigError as error:
        errors = error.findings
    if args.json:
        file = None if path is None else str(path)
        _print_json({"file": file, "valid": not errors, "errors": [*errors], "warnings": [*warnings]})
    else:
        for finding in errors:
            _say(finding)
        for warning in warnings:
            _say(f"{path}: warning: {warning}", "WARNING")
        if not errors:
            print(f"{path}: valid")
    return MISCONFIGURED if errors else STOPPED


def _checked(path: Path) -> "Settings":
    """The settings, their plug-ins imported and made, but not started. Raises ConfigError with every finding."""
    import asyncio

    from lmdaemon import config, plugins

    settings = config.load(path, secrets="readable")
    findings: list[str] = []

    async def load() -> None:  # in a running loop, as the daemon does it: a plug-in may make a client when it is made
        for plugin in settings.plugins.values():
            try:
                plugins.load(plugin)
            except config.ConfigError as error:
                findings.extend(f"{path}: {finding}" for finding in error.findings)

    _quiet_libraries()
    with redirect_stdout(sys.stderr):  # stdout is for the result, whatever an import prints
        asyncio.run(load())
    if findings:
        raise config.ConfigError(findings)
    return settings


# -- talking to the daemon


class Client:
    """The private API of the running daemon, found by the configuration. Raises Failed, with one clear line."""

    def __init__(self, settings: "Settings") -> None:
        self._address = settings.api.listen.text
        self._base = _base_url(settings.api.listen)
        self._unix = settings.api.listen.unix
        self._token = settings.api_tokens[0] if settings.api_tokens else None
        # With the daemon's credentials out of this user's reach, a refusal is no surprise, but should say so
        self._hints = [warning for warning in settings.warnings if warning.startswith("api.token_")]
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "Client":
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._unix) if self._unix else aiohttp.TCPConnector(),
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self, method: str, *path: str, query: Mapping[str, object] | None = None, body: object = None
    ) -> Any:
        """The JSON answered to one call; an error document is raised as Failed."""
        import aiohttp

        try:
            async with self._session.request(method, self._url(path, query or {}), json=body) as response:
                content, status, kind = await response.read(), response.status, response.content_type
        except TimeoutError:
            raise Failed(f"daemon does not answer at {self._address} (waited {ANSWER_WITHIN_S:g} s)") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            cause = getattr(error, "os_error", error)
            number = getattr(cause, "errno", None) or 0  # negative where no name could be resolved
            reason = os.strerror(number) if number > 0 else _reason(cause)
            raise Failed(f"daemon not reachable at {self._address}: is it running? ({reason})") from error
        except aiohttp.ClientError as error:
            raise Failed(f"what answers at {self._address} is no lmdaemon ({type(error).__name__})") from error
        try:
            answer = json.loads(content)
        except ValueError:
            raise Failed(f"what answers at {self._address} is no lmdaemon (status {status}, {kind})") from None
        if kind == "application/problem+json":
            raise Failed("; ".join([_problem(answer), *(self._hints if status == 401 else ())]))
        return answer

    async def pages(self, wanted: int | None, *path: str, query: Mapping[str, object]) -> AsyncIterator[list[Any]]:
        """A list page by page, up to `wanted` rows; says so when there are more. None: all."""
        after: str | None = None
        left = wanted
        while left is None or left > 0:
            limit = PAGE_MAX if left is None else min(left, PAGE_MAX)
            page = await self.call("GET", *path, query={**query, "limit": limit, "after": after})
            yield page["items"]
            after = page["next"]
            if after is None:
                return
            left = None if left is None else left - len(page["items"])
        _say(f"lmdaemon: {wanted} shown, there are more: --limit N or --all")

    def _url(self, path: Sequence[str], query: Mapping[str, object]) -> Any:
        from urllib.parse import urlencode

        from yarl import URL

        given = {name: value for name, value in query.items() if value is not None}
        # Encoded here, byte by byte: an id may contain a slash, or not be UTF-8, which the daemon refuses. And taken as
        # it is: an id may be "..", which a URL would resolve.
        parameters = urlencode(given, errors="surrogateescape")
        return URL(f"{self._base}/{'/'.join(map(_segment, path))}?{parameters}", encoded=True)


def _base_url(listen: "Listen") -> str:
    import ipaddress

    if listen.unix:
        return "http://localhost"
    host = listen.host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # "on every address" is where to listen; a client needs one of them
            host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{listen.port}" if ":" in host else f"http://{host}:{listen.port}"


def _segment(text: str) -> str:
    from urllib.parse import quote

    return quote(os.fsencode(text), safe="")


def _problem(document: Mapping[str, Any]) -> str:
    """An RFC 9457 document as one line; an ended session in it is named with its end."""
    line = f"{document.get('status')} {document.get('title')}: {document.get('detail')}"
    session = document.get("session") or {}
    return line + (f" ({session['reason']}, {session['endedAt']})" if session.get("endedAt") else "")


def _asking(ask: Callable[[Client, argparse.Namespace], Awaitable[int]]) -> Callable[[argparse.Namespace], int]:
    """The command that runs `ask` with a client of the running daemon."""

    def run(args: argparse.Namespace) -> int:
        import asyncio

        from lmdaemon import config

        settings = config.load(config.find(args.config), secrets="optional")
        _quiet_libraries()

        async def talk() -> int:
            async with Client(settings) as client:
                return await ask(client, args)

        return asyncio.run(talk())

    return run


async def _status(client: Client, args: argparse.Namespace) -> int:
    health = await client.call("GET", "health")
    operators: list[Any] = []
    try:
        operators = (await client.call("GET", "v1", "operators"))["items"]
    except Failed as error:
        if health["status"] != "fail":
            raise
        _say(f"lmdaemon: {error}")  # a daemon that cannot read its store still tells so
    if args.json:
        _print_json({"health": health, "operators": operators})
    else:
        print(f"status: {health['status']} (lmdaemon {health.get('version', '?')})")
        checks = [{"check": name, **check} for name, found in health.get("checks", {}).items() for check in found]
        for check in checks:
            figures = (f"{name}={_cell(value)}" for name, value in check.items() if name not in _CHECK_HEAD)
            print(f"  {check['check']:10}  {check['status']:4}  {' '.join(figures)}".rstrip())
        print()
        _print_table(OPERATOR_COLUMNS, operators)
    return FAILED if health["status"] == "fail" else STOPPED


_CHECK_HEAD = ("check", "status", "time")


async def _list_sessions(client: Client, args: argparse.Namespace) -> int:
    query = {"state": args.state, "playerId": args.player}
    pages = client.pages(_wanted(args), "v1", "operators", args.operator, "sessions", query=query)
    return await _print_pages(SESSION_COLUMNS, pages, as_json=args.json)


async def _show_session(client: Client, args: argparse.Namespace) -> int:
    return _show(args, await client.call("GET", *_session_path(args)), deliveries=DELIVERY_COLUMNS)


async def _open_session(client: Client, args: argparse.Namespace) -> int:
    facts = {"playerId": args.player, "token": _token(args), "idleTimeoutSeconds": args.idle_timeout}
    body = {name: value for name, value in facts.items() if value is not None}
    return _show(args, await client.call("PUT", *_session_path(args), body=body))


async def _touch_sessions(client: Client, args: argparse.Namespace) -> int:
    total: dict[str, Any] = {"touched": 0, "unknown": [], "ended": []}
    for start in range(0, len(args.sessions), TOUCH_MAX):
        body = {"sessionIds": args.sessions[start : start + TOUCH_MAX]}
        answer = await client.call("POST", "v1", "operators", args.operator, "sessions", "touch", body=body)
        total = {name: total[name] + answer[name] for name in total}
    if args.json:
        _print_json(total)
    else:
        print(f"touched: {total['touched']}")
        for name in ("unknown", "ended"):
            for session_id in total[name]:
                print(f"{name}: {_cell(session_id)}")
    return FAILED if total["unknown"] or total["ended"] else STOPPED


async def _close_session(client: Client, args: argparse.Namespace) -> int:
    return _show(args, await client.call("POST", *_session_path(args), "close"))


async def _list_deliveries(client: Client, args: argparse.Namespace) -> int:
    query = {"operator": args.operator, "sink": args.sink, "state": args.state}
    pages = client.pages(_wanted(args), "v1", "deliveries", query=query)
    return await _print_pages(DELIVERY_COLUMNS, pages, as_json=args.json)


async def _show_delivery(client: Client, args: argparse.Namespace) -> int:
    return _show(args, await client.call("GET", "v1", "deliveries", args.delivery), history=ATTEMPT_COLUMNS)


async def _retry(client: Client, args: argparse.Namespace) -> int:
    if bool(args.delivery) == bool(args.operator) or (args.since and not args.operator):
        raise Usage(
            "deliveries retry: give either the ID of a delivery or --operator, and --since only with --operator"
        )
    if args.delivery:
        return _show(args, await client.call("POST", "v1", "deliveries", args.delivery, "retry"))
    body = {"since": args.since} if args.since else {}
    return _show(args, await client.call("POST", "v1", "operators", args.operator, "deliveries", "retry", body=body))


async def _hold(client: Client, args: argparse.Namespace) -> int:
    return _show(args, await client.call("POST", "v1", "operators", args.operator, "hold"))


async def _release(client: Client, args: argparse.Namespace) -> int:
    return _show(args, await client.call("POST", "v1", "operators", args.operator, "release"))


def _session_path(args: argparse.Namespace) -> tuple[str, ...]:
    return "v1", "operators", args.operator, "sessions", args.session


def _wanted(args: argparse.Namespace) -> int | None:
    limit: int = args.limit
    return None if args.all else limit


# -- secrets given by name


def _token(args: argparse.Namespace) -> str | None:
    """The player's token from the file or variable that was named; None when none was. Raises Usage."""
    from lmdaemon.model import TOKEN_MAX, id_problem

    if args.token_file and args.token_env:
        raise Usage("--token-file and --token-env must not both be given")
    if args.token_env:
        token = os.environ.get(args.token_env, "")
    elif args.token_file:
        token = _secret_file(args.token_file, "--token-file")
    else:
        return None
    problem = id_problem(token, TOKEN_MAX)
    if problem:
        raise Usage(f"{'--token-env' if args.token_env else '--token-file'}: the token {problem}")
    return token


def _secret_file(name: str, option: str) -> str:
    try:
        return Path(name).read_text("utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"  # a UnicodeDecodeError's own text quotes the file
        raise Usage(f"{option}: {name} cannot be read: {reason}") from None


# -- send


class Exchange(NamedTuple):
    """One SessionExpired and what came back: `answer` is status, headers, body, and whether that was all of it; None
    when there was none, and `detail` then says more than the verdict's one word.
    """

    headers: Mapping[str, str]
    answer: tuple[int, Mapping[str, str], bytes, bool] | None
    outcome: "Outcome"
    detail: str


def _send(args: argparse.Namespace) -> int:
    import asyncio

    from lmdaemon.delivery import compose

    operator = _recipient(args)
    session = _test_session(args, operator)
    body, impossible = compose(operator, session)
    if impossible:
        raise Usage(f"send: {impossible}")
    _quiet_libraries()
    exchange = asyncio.run(_exchange(operator, body))
    shown = _shown_exchange(operator, session, body, exchange)
    if args.json:
        _print_json(shown)
    else:
        _print_exchange(shown)
    return STOPPED if exchange.outcome.verdict == "delivered" else FAILED


def _recipient(args: argparse.Namespace) -> "Operator":
    """The operator of the configuration with what the options change, or one made of the options. Raises Usage."""
    from lmdaemon import config
    from lmdaemon.dialects import SHIPPED

    dialects = dict(SHIPPED)
    operator = _stranger()
    if args.operator or args.config or args.dialect not in (None, *SHIPPED):
        settings = config.load(config.find(args.config), secrets="optional")
        # An own dialect is known here once some operator of the file uses it
        for one in settings.operators.values():
            dialects |= {dialect.name: dialect for dialect in (one.sends, *one.receives)}
        if args.operator:
            operator = _configured(settings, args.operator)
    changes: dict[str, Any] = {}
    if args.url:
        changes |= {"url": _checked_url(args.url), "allow_private_network": True}
    if args.dialect:
        if args.dialect not in dialects:
            raise Usage(f"--dialect: must be one of {', '.join(dialects)} (got {args.dialect!r})")
        changes["sends"] = dialects[args.dialect]
    if args.provider_id:
        changes["provider_id"] = _checked_id(args.provider_id, "--provider-id")
    if args.hash_key_file:
        changes["hash_key"] = _secret_file(args.hash_key_file, "--hash-key-file")
    if args.timeout:
        changes["policy"] = _changed(operator.policy, timeout_s=_checked_span(args.timeout))
    operator = _changed(operator, **changes)
    if not operator.url:
        raise Usage("send: give --url, or an operator of the configuration that has a url")
    return operator


def _changed(struct: _Struct, **changes: Any) -> _Struct:
    return type(struct)(**{name: getattr(struct, name) for name in struct.__struct_fields__} | changes)


def _stranger() -> "Operator":
    """The operator of `send --url`, as a file that says nothing else would make it; the options change it."""
    from lmdaemon.config import DeliveryTable, Operator, Policy
    from lmdaemon.dialects import SHIPPED

    return Operator(
        name="(none)",
        provider_id="luckymonaco",
        sends=SHIPPED["v4"],
        receives=(),
        paths=(),
        accept_unknown=True,
        token_check="present",  # noqa: S106 - a mode, not a token
        partner_tokens=(),
        hash_key=None,
        allow_from=(),
        auth_none=False,
        notify=True,
        url="",
        idle_s=0,
        lifetime_s=0,
        policy=Policy(DeliveryTable().timeout, (), 0, 1),
        allow_private_network=True,
        ca_file=None,
        client_cert_file=None,
        client_key_file=None,
        signing_keys=(),
    )


def _configured(settings: "Settings", name: str) -> "Operator":
    from lmdaemon.config import ConfigError

    if name not in settings.operators:
        known = ", ".join(settings.operators) or "none"
        raise Usage(f"send: {settings.file} has no operator {name!r}; known are {known}")
    at = f"operators.{name}."
    # What the daemon sends is hashed, signed and encrypted with these; without them the verdict would be another one.
    sending = tuple(at + key for key in ("hash_key_", "signing_secret_", "ca_file", "client_"))
    missing = [warning for warning in settings.warnings if warning.startswith(sending) and ": unchecked: " in warning]
    if missing:
        raise ConfigError([f"{settings.file}: {finding.replace(' unchecked:', '', 1)}" for finding in missing])
    return settings.operators[name]


def _checked_url(text: str) -> str:
    from yarl import URL

    from lmdaemon.log import safe_url

    with suppress(ValueError):
        url = URL(text)
        if url.scheme in ("http", "https") and url.host and text.isprintable() and " " not in text:
            return text
    raise Usage(f"--url: must be a URL with http or https (got {safe_url(text)!r})")


def _checked_id(text: str, option: str) -> str:
    from lmdaemon.model import id_problem

    problem = id_problem(text)
    if problem:
        raise Usage(f"{option}: {problem}")
    return text


def _checked_span(text: str) -> float:
    from lmdaemon.config import duration

    try:
        span = duration(text)
    except ValueError as error:
        raise Usage(f"--timeout: {error} (got {text!r})") from None
    if span <= 0:
        raise Usage("--timeout: must not be zero")
    return span


def _test_session(args: argparse.Namespace, operator: "Operator") -> "Session":
    """The session to tell of: ids and token as given, else values that nobody takes for real ones."""
    from uuid import uuid4

    from lmdaemon.model import Session

    now_at = time.time_ns() // 1_000_000
    return Session(
        id=0,
        operator=operator.name,
        session_id=_checked_id(args.session or f"test-{uuid4().hex}", "--session"),
        player_id=_checked_id(args.player or "test-player", "--player"),
        token=_token(args) or f"test-{uuid4().hex}",
        attributes=None,
        extra=None,
        idle_ms=0,
        opened_at=now_at,
        seen_ms=0,
        seen_at=now_at,
        lifetime_at=None,
        ended_at=now_at,
        reason="closed",
    )


async def _exchange(operator: "Operator", body: bytes) -> Exchange:
    """Sends it once, through the very code the daemon sends with."""
    from uuid import uuid4

    from lmdaemon.clock import Clock
    from lmdaemon.delivery import Sender, Unreachable, request_headers
    from lmdaemon.retry import Outcome, judge

    class Moment(Clock):
        """Stands still, so that the headers printed are signed as those sent."""

        now_ms = time.time_ns() // 1_000_000

        def wall_ms(self) -> int:
            return self.now_ms

    clock, webhook_id = Moment(), f"test_{uuid4().hex}"
    sender = Sender(clock)
    headers = _headers_of_aiohttp(operator.url, body) | request_headers(operator, webhook_id, body, clock.now_ms / 1000)
    began = time.monotonic()
    answer, detail = None, ""
    try:
        answer = await sender.post(operator, operator.url, webhook_id, body)
        status, received, content, complete = answer
        outcome = judge(
            status,
            content,
            complete=complete,
            retry_after=received.get("Retry-After"),
            now_s=clock.now_ms / 1000,
            final=operator.sends.codes.final,
        )
    except Unreachable as error:
        outcome = Outcome("retry", str(error))
        # Only the cause of a failed connection: other exceptions may quote the URL with its query
        cause = getattr(error.__cause__, "os_error", None) or getattr(error.__cause__, "certificate_error", None)
        detail = str(cause or "")
    finally:
        await sender.close()
    return Exchange(headers, answer, _timed(outcome, began), detail)


def _timed(outcome: "Outcome", began: float) -> "Outcome":
    from dataclasses import replace

    return replace(outcome, duration_ms=round((time.monotonic() - began) * 1000))


def _headers_of_aiohttp(url: str, body: bytes) -> dict[str, str]:
    """The headers aiohttp adds by itself; a test compares them with what a server gets."""
    from yarl import URL

    parts = URL(url)
    headers = {"Host": parts.host_port_subcomponent or "", "Accept": "*/*", "Content-Length": str(len(body))}
    if parts.user is not None or parts.password is not None:
        headers["Authorization"] = f"Basic {MASK}"
    return headers


def _shown_exchange(operator: "Operator", session: "Session", body: bytes, exchange: Exchange) -> dict[str, Any]:
    """Both sides as they may be shown to anybody: with token, hash, signatures and the URL's secrets masked."""
    outcome = exchange.outcome
    fields = _body_fields(operator, body)
    signatures = [one.partition(",")[2] for one in exchange.headers.get("webhook-signature", "").split()]
    mask = _Mask(
        session.token,
        operator.hash_key,
        fields.get(operator.sends.fields.get("hash", "")),
        *signatures,
        *_secrets_of_url(operator.url),
    )
    answer = None
    if exchange.answer is not None:
        status, received, content, complete = exchange.answer
        text = mask(content.decode("utf-8", "replace"))
        answer = {
            "status": status,
            "headers": {
                name: mask(_shown_url(received[name]) if name == "Location" else received[name])
                for name in ANSWER_HEADERS
                if name in received
            },
            # What was cut off may have been the rest of an echoed secret
            "body": text if complete else text[: max(0, len(text) - mask.longest)],
            "complete": complete,
        }
    return {
        "request": {
            "method": "POST",
            "url": _shown_url(operator.url),
            "headers": {name: mask(value) if name != "Host" else value for name, value in exchange.headers.items()},
            "body": _masked_body(operator, fields),
        },
        "answer": answer,
        "verdict": outcome.verdict,
        "reason": outcome.reason or None,
        "detail": mask(exchange.detail) or None,
        "retryAfterSeconds": outcome.retry_after_s,
        "durationMs": outcome.duration_ms,
    }


def _body_fields(operator: "Operator", body: bytes) -> dict[str, str]:
    from urllib.parse import parse_qsl

    text = body.decode()
    return json.loads(text) if operator.sends.content == "json" else dict(parse_qsl(text, keep_blank_values=True))


def _masked_body(operator: "Operator", fields: Mapping[str, str]) -> str:
    """The body as sent, but for the masked fields. By field: a short token may also stand in an id by chance."""
    from urllib.parse import urlencode

    secret = {operator.sends.fields.get("token"), operator.sends.fields.get("hash")}
    masked = {name: MASK if name in secret else value for name, value in fields.items()}
    if operator.sends.content == "json":
        return json.dumps(masked, ensure_ascii=False, separators=(",", ":"))
    return urlencode(masked, safe="*")


def _shown_url(url: str) -> str:
    """Without user info and fragment, the query's values masked: its names tell an integrator enough. Also a path
    alone, as a Location may be.
    """
    from lmdaemon.log import safe_url

    path = url.partition("#")[0].partition("?")[0]
    shown = path if path.startswith("/") and not path.startswith("//") else safe_url(url)
    query = "&".join(f"{name}={MASK}" if name else MASK for name, _ in _query_of(url))
    return f"{shown}?{query}" if query else shown


def _query_of(url: str) -> list[tuple[str, str]]:
    """The query's names and values as they stand; a part without `=` may be a secret, so it is a value without name."""
    parts = url.partition("#")[0].partition("?")[2].split("&")
    return [
        (name, value) if equals else ("", name)
        for part in parts
        if part
        for name, equals, value in [part.partition("=")]
    ]


def _secrets_of_url(url: str) -> list[str]:
    from urllib.parse import unquote_plus

    from yarl import URL

    parts = URL(url)
    basic = base64.b64encode(f"{parts.user or ''}:{parts.password or ''}".encode()).decode()  # as in Authorization
    found = [parts.user or "", parts.password or "", basic, *(unquote_plus(value) for _, value in _query_of(url))]
    return [value for value in found if len(value) >= 4]  # a shorter one is no secret, and stands everywhere


class _Mask:
    """Replaces secrets, in every spelling in which a server may echo them: as they are, and escaped as in JSON, in a
    URL, a form or HTML.
    """

    def __init__(self, *secrets: str | None) -> None:
        spellings = {spelling for secret in secrets if secret for spelling in _spellings(secret)}
        longest_first = sorted(spellings, key=len, reverse=True)
        self.longest = len(longest_first[0]) if longest_first else 0
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return self._pattern.sub(MASK, text)


def _spellings(secret: str) -> Iterator[str]:
    from html import escape
    from urllib.parse import quote, quote_plus

    yield secret
    for ascii_only in (True, False):
        in_json = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        yield in_json
        yield in_json.replace("/", "\\/")
    yield quote(secret)
    yield quote(secret, safe="")
    yield quote_plus(secret)
    yield escape(secret)


def _print_exchange(shown: Mapping[str, Any]) -> None:
    """Both sides as they stand on the wire, and the verdict: for pasting into a ticket."""
    request, answer = shown["request"], shown["answer"]
    print(f"{request['method']} {_line(request['url'])}")
    _print_message(request)
    if answer is None:
        print(f"No answer ({shown['durationMs']} ms)")
        print()
    else:
        print(f"HTTP {answer['status']} ({shown['durationMs']} ms)")
        _print_message(answer)
        if not answer["complete"]:
            print("(the answer is longer; the rest was not read)")
            print()
    print(f"Verdict: {_line(_verdict(shown))}")


def _print_message(message: Mapping[str, Any]) -> None:
    for name, value in message["headers"].items():
        print(f"{name}: {_line(value)}")
    print()
    for line in message["body"].splitlines():
        print(_line(line))
    print()


def _verdict(shown: Mapping[str, Any]) -> str:
    reason = shown["reason"] + (f" ({shown['detail']})" if shown["detail"] else "") if shown["reason"] else ""
    text = {
        "delivered": "delivered",
        "final": f"final, never sent again because {reason}",
        "retry": f"would be retried because {reason}",
        "hold": f"would hold the operator because {reason}",
    }[shown["verdict"]]
    wait_s = shown["retryAfterSeconds"]
    return text + (f"; nothing would be sent to this operator for {wait_s:g} s (Retry-After)" if wait_s else "")


# -- backup


def _backup(args: argparse.Namespace) -> int:
    from lmdaemon import config

    settings = config.load(config.find(args.config), secrets="optional")
    database, target = settings.database.absolute(), args.file
    _check_source(settings)
    _check_target(database, target, force=args.force)
    size = _copy(database, target)
    if args.json:
        _print_json({"file": str(target), "bytes": size})
    else:
        print(f"{target}: {size} bytes, integrity ok")
    return STOPPED


def _check_source(settings: "Settings") -> None:
    try:
        settings.database.stat()
    except OSError as error:
        hint = ""
        if settings.database.is_relative_to(settings.file.parent) and not os.environ.get("STATE_DIRECTORY"):
            hint = "; a relative database.path is looked up in $STATE_DIRECTORY, which the service has and you have not"
        raise Failed(f"{settings.database}: no database to copy: {_reason(error)}{hint}") from error


def _check_target(database: Path, target: Path, *, force: bool) -> None:
    try:
        if target.is_dir():
            raise Failed(f"{target}: is a directory; name a file")
        if not target.exists():
            return
        for suffix in ("", "-wal", "-shm", "-journal", ".lock"):  # replacing one of these destroys the database
            live = database.with_name(database.name + suffix)
            if live.exists() and target.samefile(live):
                raise Failed(f"{target}: belongs to the database itself")
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {_reason(error)}") from error
    if not force:
        raise Failed(f"{target}: exists; --force replaces it")


def _copy(database: Path, target: Path) -> int:
    """Copies into a file beside the target, checks it, and puts it in place. Returns its size. Raises Failed."""
    import sqlite3
    import tempfile

    os.umask(0o077)
    try:
        handle, name = tempfile.mkstemp(prefix=".lmdaemon-backup-", dir=target.parent)  # mode 0600, whatever the umask
    except OSError as error:
        raise Failed(f"{target}: cannot be written: {_reason(error)}") from error
    copy = Path(name).absolute()
    try:
        _vacuum_into(database, copy)
        _check_integrity(copy)
        os.fsync(handle)
        size = os.fstat(handle).st_size
        copy.rename(target)
        _sync_directory(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise Failed(f"{target}: cannot copy {database}: {_reason(error)}") from error
    finally:
        os.close(handle)
        copy.unlink(missing_ok=True)
    return size


def _vacuum_into(database: Path, copy: Path) -> None:
    """One read transaction: the daemon writes on meanwhile. Page by page, its every commit would start it again.

    `mode=ro` never creates a database. The -wal and -shm files beside it, should they be missing, SQLite makes with the
    owner and mode of the database, also as root (unixOpen, robustFchown).
    """
    import sqlite3

    source = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        source.execute("VACUUM INTO ?", (str(copy),))
    finally:
        source.close()


def _check_integrity(copy: Path) -> None:
    import sqlite3

    # Not read-only, though nothing is written: SQLite leaves out CHECK constraints then
    opened = sqlite3.connect(f"{copy.as_uri()}?mode=rw", uri=True)
    try:
        (verdict,) = opened.execute("PRAGMA integrity_check(1)").fetchone()
    finally:
        opened.close()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"the copy is damaged: {verdict}")


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- printing


def _say(message: str, level: str = "ERROR") -> None:
    from lmdaemon.log import PRIORITY, is_journal

    priority = f"<{PRIORITY[level]}>" if is_journal(sys.stderr) else ""
    print(priority + _line(message), file=sys.stderr)


def _reason(error: BaseException) -> str:
    """An error's text for people, without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


def _line(text: str) -> str:
    """Text from elsewhere for one line of a terminal: what would control it is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _cell(value: object) -> str:
    match value:
        case None | "" | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}" if value < 1e6 else f"{value:.0f}"
        case dict() | list():
            return json.dumps(value)
    return _line(str(value))


def _print_table(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], widths: list[int] | None = None
) -> list[int]:
    """Rows under their columns' names; further pages are given the widths returned for the first, and no names."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    if widths is None:
        cells.insert(0, list(columns))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return widths


async def _print_pages(columns: Sequence[str], pages: AsyncIterator[list[Any]], *, as_json: bool) -> int:
    """Prints a list page by page: it may be longer than what memory should hold. As JSON: one array."""
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
        widths = _print_table(columns, page, widths)
    return STOPPED


def _show(args: argparse.Namespace, document: Mapping[str, Any], **tables: Sequence[str]) -> int:
    """One thing: its facts a line each, then the lists in it as tables of the columns given."""
    if args.json:
        _print_json(document)
        return STOPPED
    facts = {name: value for name, value in document.items() if name not in tables}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_cell(value)}")
    for name, columns in tables.items():
        print(f"\n{name}:")
        _print_table(columns, document[name])
    return STOPPED
