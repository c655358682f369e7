"""`lmdaemon simulate operator` and `provider`: plays one side of the wire, and judges the other.

An operator answers by a script. A provider is game servers before a running daemon, or notices before an endpoint.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from lmdaemon.commands.arguments import CLIENT_CERTIFICATE, JSON, PLAYER_TOKEN, argument, command, count, file
from lmdaemon.commands.client import Client
from lmdaemon.commands.configured import configured
from lmdaemon.commands.recipient import checked_span, is_loopback, recipient, signing_keys
from lmdaemon.commands.shared import (
    FAILED,
    STOPPED,
    Failed,
    Usage,
    line,
    player_token,
    print_json,
    quiet_libraries,
    reason,
)
from lmdaemon.config.settings import DeliveryTable
from lmdaemon.config.values import duration
from lmdaemon.dialects import SHIPPED
from lmdaemon.workbench import players, storm
from lmdaemon.workbench.figures import Times
from lmdaemon.workbench.journal import Journal, read_expectations, verdict
from lmdaemon.workbench.players import Load
from lmdaemon.workbench.script import Script, ScriptError, Span, read_text, read_toml
from lmdaemon.workbench.stage import Stage
from lmdaemon.workbench.storm import Mix


@command(
    argument("--listen", required=True, metavar="HOST:PORT", help="where to serve, such as 127.0.0.1:9090"),
    argument("--dialect", choices=tuple(SHIPPED), default="v4", help="what is expected (default v4)"),
    argument("--script", metavar="FILE|TEXT", help="what to answer; a file that ends with .toml, or the text itself"),
    argument("--seed", metavar="N", help="for chances in the script (default: the file's, or 0)"),
    argument("--journal", type=file, metavar="FILE", help="write a JSON line for each notice"),
    argument("--expect", type=file, metavar="FILE", help="TOML of counts; exit code 1 when one is missed"),
    argument("--schedule", metavar="SPANS", help='waits that a sender must keep, such as "5s,30s,2m" (default: ours)'),
    argument("--signing-secret-file", type=file, metavar="FILE", help="whsec_ secrets: signatures are verified"),
    argument("--tls-ca", type=file, metavar="FILE", help="serve https; the made-up CA's certificate is written here"),
    argument("--for", dest="span", metavar="SPAN", help="end after this time (default: at Ctrl-C)"),
    JSON,
)
def operator(args: argparse.Namespace) -> int:
    host, port = _address(args.listen)
    script = _script(args)
    expected = _expectations(args.expect)
    schedule = _schedule(args.schedule)
    if script.needs_tls and not args.tls_ca:
        raise Usage("simulate operator: a script with tls needs --tls-ca FILE")
    contexts = None
    if args.tls_ca:
        from lmdaemon.workbench import authority

        try:
            contexts = authority.contexts(args.tls_ca, host)
        except ImportError:
            raise Failed("--tls-ca needs trustme: pip install 'lmdaemon[workbench]'") from None
        except OSError as error:
            raise Failed(f"--tls-ca: {args.tls_ca} cannot be written: {reason(error)}") from None
    span_s = checked_span(args.span, "--for") if args.span else None
    quiet_libraries()
    with ExitStack() as stack:
        output = stack.enter_context(_opened(args.journal)) if args.journal else None
        keys = signing_keys(args.signing_secret_file) if args.signing_secret_file else ()
        journal = Journal(SHIPPED[args.dialect], schedule, keys, output)
        stage = Stage(script, journal, contexts=contexts, tell=_tell(quiet=args.json))
        try:
            asyncio.run(_serve(stage, host, port, span_s, scheme="https" if contexts else "http"))
        except OSError as error:
            raise Failed(f"--listen: {args.listen}: {reason(error)}") from None
    end = verdict(journal, expected)
    if args.json:
        print_json(end)
    else:
        _print_verdict(end)
    return STOPPED if end["good"] else FAILED


async def _serve(stage: Stage, host: str, port: int, span_s: float | None, *, scheme: str) -> None:
    await stage.open(host, port)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    shown = f"[{stage.address[0]}]" if ":" in stage.address[0] else stage.address[0]
    print(f"Serving {scheme}://{shown}:{stage.address[1]}/", file=sys.stderr, flush=True)
    try:
        async with asyncio.timeout(span_s):
            await stopped.wait()
    except TimeoutError:
        pass
    finally:
        await stage.close()


def _tell(*, quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(line(text), flush=True))


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Usage(f"--listen: must be HOST:PORT (got {text!r})")
    return host.strip("[]"), int(port)


def _script(args: argparse.Namespace) -> Script:
    seed = None if args.seed is None else _seed(args.seed)
    given = args.script or ""
    try:
        if given.endswith(".toml"):
            return read_toml(_text_of(Path(given), "--script"), seed)
        return read_text(_text_of(Path(given), "--script") if _is_file(given) else given, seed or 0)
    except ScriptError as error:
        raise Usage(f"--script: {error}") from None


def _seed(text: str | None) -> int:
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Usage(f"--seed: must be a whole number (got {text!r})")
    return int(text or 0)


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):
        return False


def _expectations(path: Path | None) -> dict[str, Span]:
    if path is None:
        return {}
    try:
        return read_expectations(_text_of(path, "--expect"))
    except ScriptError as error:
        raise Usage(f"--expect: {path}: {error}") from None


def _text_of(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{option}: {path} cannot be read: {reason(error)}") from None


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise Failed(f"--journal: {path} cannot be written: {reason(error)}") from None


def _schedule(text: str | None) -> tuple[float, ...]:
    if text is None:
        return tuple(DeliveryTable().schedule)
    try:
        return tuple(float(duration(one.strip())) for one in text.split(","))
    except ValueError as error:
        raise Usage(f"--schedule: {error} (got {text!r})") from None


def _print_verdict(end: dict[str, object]) -> None:
    counts = end["counts"]
    assert isinstance(counts, dict)  # noqa: S101 - it was made here
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    for name in ("missed", "evidence"):
        found = end[name]
        assert isinstance(found, list)  # noqa: S101
        for one in found:
            print(f"  {line(one)}")
    print("Verdict: as expected" if end["good"] else "Verdict: NOT as expected")


# -- provider


@command(
    argument("operator", nargs="?", metavar="OPERATOR", help="play its game servers, against the running daemon"),
    argument("--url", metavar="URL", help="send notices to this endpoint instead"),
    argument("--yes", action="store_true", help="code of others may act on it (not asked on loopback)"),
    argument("--seed", metavar="N", help="the same seed plays the same game (default 0)"),
    argument("--players", type=count, default=Load().players, metavar="N", help="at a time (default 200)"),
    argument("--duration", default="30s", metavar="SPAN", help="how long they play (default 30s)"),
    argument("--play", default="10s", metavar="SPAN", help="a session's length on average (default 10s)"),
    argument("--heartbeat", default="1s", metavar="SPAN", help="between touches, 20%% either way (default 1s)"),
    argument("--abandon", type=count, default=50, metavar="PERCENT", help="sessions that nobody closes (default 50)"),
    argument("--idle", type=count, default=Load().idle_s, metavar="SECONDS", help="their idle time (default 3)"),
    argument("--late", default="1s", metavar="SPAN", help="how late an end may be (default 1s)"),
    argument("--dialect", metavar="NAME", help="of the endpoint (default v4)"),
    argument("--provider-id", metavar="ID", help="towards the endpoint (default luckymonaco)"),
    argument("--player", metavar="ID", help="a test player that the endpoint knows (default: made up)"),
    *PLAYER_TOKEN,
    argument("--hash-key-file", type=file, metavar="FILE", help="file with the hash key, if any"),
    argument("--signing-secret-file", type=file, metavar="FILE", help="file with whsec_ secrets, if any"),
    argument("--timeout", metavar="SPAN", help="for an answer of the endpoint (default 10s)"),
    argument("--notices", type=count, default=Mix().notices, metavar="N", help="how many (default 200)"),
    argument("--rate", type=count, default=int(Mix().rate), metavar="N", help="a second (default 20)"),
    argument(
        "--mix", default="70,15,5,10", metavar="SHARES", help="good, repeated, racing, malformed (default 70,15,5,10)"
    ),
    *CLIENT_CERTIFICATE,
    JSON,
)
def provider(args: argparse.Namespace) -> int:
    if bool(args.operator) == bool(args.url):
        raise Usage("simulate provider: give either an operator of the running daemon, or --url of an endpoint")
    _need_histogram()
    quiet_libraries()
    report = asyncio.run(_before_endpoint(args) if args.url else _before_daemon(args))
    if args.json:
        print_json(report)
    else:
        _print_report(report, storm.PROMISES if args.url else players.PROMISES)
    return STOPPED if report["good"] and not report["counts"].get("interrupted") else FAILED


def _need_histogram() -> None:
    try:
        Times()
    except ImportError:
        raise Failed("simulate provider needs hdrhistogram: pip install 'lmdaemon[workbench]'") from None


async def _before_endpoint(args: argparse.Namespace) -> dict[str, Any]:
    operator = recipient(args, "simulate provider")
    if not args.yes and not is_loopback(operator):
        raise Usage(f"simulate provider: this sends {args.notices} notices to {args.url}; say --yes if that is meant")
    if "hash" in operator.sends.required and operator.hash_key is None:
        raise Usage(f"simulate provider: dialect {operator.sends.name} needs --hash-key-file")
    shares = args.mix.split(",")
    if (
        len(shares) != len(storm.KINDS)
        or not all(one.isascii() and one.isdigit() for one in shares)
        or not any(map(int, shares))
    ):
        raise Usage(f"--mix: must be four whole numbers such as 70,15,5,10 (got {args.mix!r})")
    good, repeated, racing, malformed = map(float, shares)
    mix = Mix(args.notices, args.rate, (good, repeated, racing, malformed))
    with _progress() as tell:
        run = storm.Storm(operator, mix, _seed(args.seed), token=player_token(args), player=args.player, tell=tell)
        return await run.run()


async def _before_daemon(args: argparse.Namespace) -> dict[str, Any]:
    settings = configured(args, "api", "database", "sessions", "delivery", "dialects", f"operators.{args.operator}")
    if args.operator not in settings.operators:
        raise Usage(f"simulate provider: {settings.file} has no operator {args.operator!r}")
    operator = settings.operators[args.operator]
    if operator.notify and not args.yes and not is_loopback(operator):
        raise Usage(
            f"simulate provider: the ends of its sessions are sent to {args.operator}'s URL; say --yes if that is meant"
        )
    if args.abandon > 100:
        raise Usage(f"--abandon: must be 1 to 100 (got {args.abandon})")
    load = Load(
        players=args.players,
        span_s=checked_span(args.duration, "--duration"),
        play_s=checked_span(args.play, "--play"),
        heartbeat_s=checked_span(args.heartbeat, "--heartbeat"),
        abandon=args.abandon / 100,
        idle_s=args.idle,
        late_s=checked_span(args.late, "--late"),
    )
    async with Client(settings, args.client_cert, args.client_key) as client:

        async def call(method: str, *path: str, body: object = None) -> tuple[int, Any]:
            try:
                return await client.status_and_answer(method, *path, body=body)
            except Failed:
                return 0, None

        await client.call("GET", "v1", "operators", shape={"items": [{}]})  # it runs, and lets us in
        with _progress() as tell:
            return await players.Players(call, args.operator, load, _seed(args.seed), tell=tell).run()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tells on a terminal how far it is, in one line that goes at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print_report(report: Mapping[str, Any], promises: Mapping[str, str]) -> None:
    print(
        f"{report['durationSeconds']:g} s: " + ", ".join(f"{n} {_words(name)}" for name, n in report["counts"].items())
    )
    for name, times in report["timesMs"].items():
        if times["count"]:
            shown = ", ".join(f"{one} {value:.1f}" for one, value in times.items() if one != "count")
            print(f"  {_words(name)}, ms: {shown} ({times['count']})")
    for promise, times_broken in report["broken"].items():
        if times_broken:
            print(f"{promise}: {times_broken} ({promises[promise]})")
    for one in report["evidence"]:
        print(f"  {line(one)}")
    print("Verdict: every promise was kept" if report["good"] else "Verdict: a promise was BROKEN")


def _words(name: str) -> str:
    return line(name.replace("_", " "))
