"""`lmdaemon simulate operator`: plays an operator that answers by a script, and reports what the sender does wrong."""

import argparse
import asyncio
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmdaemon.commands.arguments import JSON, argument, command, file, seed
from lmdaemon.commands.recipient import checked_span, signing_keys
from lmdaemon.commands.shared import (
    FAILED,
    STOPPED,
    Failed,
    Lines,
    Usage,
    line,
    quiet_libraries,
    reason,
    secret_file,
    standard_output,
)
from lmdaemon.config.settings import DeliveryTable
from lmdaemon.config.values import listen
from lmdaemon.dialects import SHIPPED
from lmdaemon.workbench.journal import Journal, read_expectations, verdict
from lmdaemon.workbench.script import Script, ScriptError, Span, read_text, read_toml
from lmdaemon.workbench.stage import Stage

PORT_MAX = 65535


@command(
    argument(
        "--listen", required=True, metavar="HOST:PORT", help="where to serve, such as 127.0.0.1:9090, or unix:/path"
    ),
    argument("--dialect", choices=tuple(SHIPPED), default="v4", help="what is expected (default v4)"),
    argument("--script", metavar="FILE|TEXT", help="what to answer: rules, or a file of rules (*.toml: in TOML)"),
    argument("--seed", type=seed, metavar="N", help="for the script's random choices (default: the file's, or 0)"),
    argument("--journal", type=file, metavar="FILE", help="write a JSON line for each notice"),
    argument("--expect", type=file, metavar="FILE", help="TOML of counts; exit code 1 when one is missed"),
    argument(
        "--schedule", metavar="SPANS", help='waits that a sender must keep, such as "5s,30s,2m" (default: lmdaemon\'s)'
    ),
    argument("--signing-secret-file", type=file, metavar="FILE", help="whsec_ secrets: signatures are verified"),
    argument("--hash-key-file", type=file, metavar="FILE", help="hash key of the dialect: hashes are verified"),
    argument("--tls-ca", type=file, metavar="FILE", help="serve https; the made-up CA's certificate is written here"),
    argument("--for", dest="span", metavar="SPAN", help="end after this time (default: at Ctrl-C)"),
    JSON,
)
def operator(args: argparse.Namespace) -> int:
    """Plays an operator until it is stopped, and judges the sender that speaks to it."""
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
            contexts = authority.contexts(args.tls_ca, "localhost" if "/" in host else host)
        except ImportError:
            raise Failed("--tls-ca needs trustme: pip install 'lmdaemon[workbench]'") from None
        except OSError as error:
            raise Failed(f"--tls-ca: {args.tls_ca} cannot be written: {reason(error)}") from None
    span_s = checked_span(args.span, "--for") if args.span else None
    quiet_libraries()
    keys = signing_keys(args.signing_secret_file) if args.signing_secret_file else ()
    hash_key = secret_file(args.hash_key_file, "--hash-key-file") if args.hash_key_file else None
    shown, written = standard_output(), _opened(args.journal) if args.journal else None
    journal = Journal(SHIPPED[args.dialect], schedule, keys, hash_key, written)
    stage = Stage(script, journal, contexts=contexts, tell=_tell(shown, quiet=args.json))
    try:
        asyncio.run(_serve(stage, host, port, span_s, scheme="https" if contexts else "http"))
    except OSError as error:
        raise Failed(f"--listen: {args.listen}: {reason(error)}") from None
    finally:
        if written is not None:
            written.close()
    end = verdict(journal, expected)
    shown(json.dumps(end, indent=2) if args.json else "\n".join(_verdict_lines(end)))
    problems = [one.problem for one in (shown, written) if one and one.problem]
    if problems:
        raise Failed("; ".join((*problems, _verdict(end))))
    return STOPPED if end["good"] else FAILED


async def _serve(stage: Stage, host: str, port: int, span_s: float | None, *, scheme: str) -> None:
    await stage.open(host, port)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    print(f"Serving {_shown(scheme, *stage.address)}", file=sys.stderr, flush=True)
    try:
        async with asyncio.timeout(span_s):
            await stopped.wait()
    except TimeoutError:
        pass
    finally:
        await stage.close()


def _tell(shown: Lines, *, quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: shown(line(text)))


def _shown(scheme: str, host: str, port: int) -> str:
    if "/" in host:
        return line(f"{scheme} on unix:{host}")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"


def _address(text: str) -> tuple[str, int]:
    """Host and port, or the path of a unix socket and 0. Raises Usage."""
    if text.startswith("unix:"):
        try:
            return listen(text).unix, 0
        except ValueError as error:
            raise Usage(f"--listen: {error} (got {text!r})") from None
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > PORT_MAX:
        raise Usage(f"--listen: must be HOST:PORT, a port of at most {PORT_MAX} (got {text!r})")
    return host.strip("[]"), int(port)


def _script(args: argparse.Namespace) -> Script:
    given = args.script or ""
    try:
        if given.endswith(".toml"):
            return read_toml(_text_of(Path(given), "--script"), args.seed)
        return read_text(_text_of(Path(given), "--script") if _is_file(given) else given, args.seed or 0)
    except ScriptError as error:
        no_file = f", and there is no file {given}" if re.fullmatch(r"\S*[./]\S*", given) else ""
        raise Usage(f"--script: {error}{no_file}") from None


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


def _opened(path: Path) -> Lines:
    try:
        return Lines(path.open("w", encoding="utf-8"), f"--journal: {path}")
    except OSError as error:
        raise Failed(f"--journal: {path} cannot be written: {reason(error)}") from None


def _schedule(text: str | None) -> tuple[float, ...]:
    if text is None:
        return tuple(DeliveryTable().schedule)
    return tuple(checked_span(one.strip(), "--schedule") for one in text.split(","))


def _verdict_lines(end: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in end["counts"].items())
    if end["neverAccepted"]:
        yield f"Never answered with success: {', '.join(map(line, end['neverAccepted']))}"
    for one in (*end["missed"], *end["evidence"]):
        yield f"  {line(one)}"
    yield _verdict(end)


def _verdict(end: dict[str, Any]) -> str:
    return f"Verdict: {'' if end['good'] else 'NOT '}as expected"
