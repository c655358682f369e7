"""`lmdaemon check`: tries an operator's SessionExpired endpoint with made-up notices, and reports what it found.

Requests go only to the target that was named.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from lmdaemon.commands.arguments import JSON, PLAYER_TOKEN, argument, command, file
from lmdaemon.commands.recipient import RECIPIENT, checked_id, recipient
from lmdaemon.commands.shared import (
    FAILED,
    STOPPED,
    Failed,
    Lines,
    Usage,
    line,
    player_token,
    quiet_libraries,
    reason,
    standard_output,
)
from lmdaemon.delivery.shown import shown_url
from lmdaemon.workbench import reports
from lmdaemon.workbench.bench import Check, Limits
from lmdaemon.workbench.notices import SESSIONS_NEEDED
from lmdaemon.workbench.runner import Result, Runner, chosen

_SESSIONS = (
    f"ids of open test sessions, one a line, for an endpoint that refuses unknown ones (about {SESSIONS_NEEDED})"
)


@command(
    argument("operator", nargs="?", metavar="OPERATOR", help="check as the daemon would send to this operator"),
    argument("--url", metavar="URL", help="check this URL instead; private addresses are allowed"),
    argument("--player", metavar="ID", help="a test player that the endpoint knows (default: made up)"),
    *PLAYER_TOKEN,
    *RECIPIENT,
    argument("--session-file", type=file, metavar="FILE", help=_SESSIONS),
    argument("--only", action="append", metavar="CHECK", help="these checks or groups, and answer.valid"),
    argument(
        "--skip", action="append", metavar="CHECK", help="all but these checks or groups; answer.valid is always tried"
    ),
    argument(
        "--burst", action="store_true", help="as fast as possible, 50 requests at once, instead of 5 in any second"
    ),
    argument("--junit", type=file, metavar="FILE", help="write a JUnit report"),
    argument("--html", type=file, metavar="FILE", help="write a report as one HTML page"),
    JSON,
)
def check(args: argparse.Namespace) -> int:
    """Tries an operator's endpoint and reports what it gets wrong. Exit code 0 only if nothing fails."""
    operator = recipient(args, "check")
    if "hash" in operator.sends.required and operator.hash_key is None:
        raise Usage(f"check: dialect {operator.sends.name} needs --hash-key-file")
    try:
        checks = chosen(_names(args.only), _names(args.skip))
    except ValueError as error:
        raise Usage(f"check: {error}") from None
    sessions = _sessions(args.session_file)
    token = player_token(args)
    for option, path in (("--junit", args.junit), ("--html", args.html)):
        if path:
            _must_be_writable(path, option)  # checked before any request, because the file is written after the last
    output = standard_output()
    progress = _Progress(
        len(checks),
        shown=sys.stderr.isatty(),
        output=None if args.json else output,
        only_printed=not (args.junit or args.html),
    )
    runner = Runner(
        operator,
        checks=checks,
        player=checked_id(args.player, "--player") if args.player else None,
        token=token,
        sessions=sessions,
        limits=Limits(burst=args.burst),
        on_begin=progress.began,
        on_result=progress.ended,
    )
    quiet_libraries()
    if not args.json:
        for text in reports.heading_lines(shown_url(operator.url), operator.sends):
            output(line(text))
    report = asyncio.run(runner.run())
    if args.json:
        output(json.dumps(report.as_json(), indent=2))
    else:
        for text in reports.summary_lines(report):
            output(line(text))
    if args.junit:
        _write(args.junit, reports.junit(report), "--junit")
    if args.html:
        _write(args.html, reports.html(report), "--html")
    if output.failure:
        raise output.failure
    return STOPPED if report.is_good else FAILED


def _sessions(path: Path | None) -> list[str] | None:
    """The ids of the file, each once. Raises Usage."""
    if path is None:
        return None
    try:
        found = dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"--session-file: {path} cannot be read: {reason(error)}") from None
    return [checked_id(one, "--session-file") for one in found if one]


def _names(given: list[str] | None) -> list[str]:
    return [name.strip() for one in given or () for name in one.split(",") if name.strip()]


def _must_be_writable(path: Path, option: str) -> None:
    """Makes the file if there is none. Raises Usage."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise Usage(f"{option}: {path} cannot be written: {reason(error)}") from None


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failed(f"{option}: {path} cannot be written: {reason(error)}") from None


class _Progress:
    """Prints each result as it comes and, on a terminal, which check is under way. If results cannot be printed, the
    run ends with Failed where printing them is all that it is for (`only_printed`).
    """

    def __init__(self, total: int, *, shown: bool, output: Lines | None, only_printed: bool) -> None:
        self._total = total
        self._shown = shown
        self._output = output
        self._only_printed = only_printed

    def began(self, check: Check, number: int) -> None:
        if self._shown:
            print(f"\r\x1b[K{number}/{self._total} {check.id}", end="", file=sys.stderr, flush=True)

    def ended(self, result: Result) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if self._output is not None:
            for text in reports.result_lines(result):
                self._output(line(text))
            if self._output.failure and self._only_printed:
                raise self._output.failure
