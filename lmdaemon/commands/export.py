"""`lmdaemon sessions export`: ended sessions with their deliveries and attempts, for an archive.

It reads the database itself, page by page, and never writes to it. The daemon spends no time on an export, and need not
run. Tokens and bodies are not exported.
"""

import argparse
import csv
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from lmdaemon import rights
from lmdaemon.clock import Clock
from lmdaemon.commands import times
from lmdaemon.commands.arguments import FORCE, OF_OPERATOR, argument, command, file, filled
from lmdaemon.commands.chain import SUFFIX, Chain, chained
from lmdaemon.commands.configured import configured, tell_unknown
from lmdaemon.commands.files import (
    Inode,
    check_source,
    check_target,
    file_beside,
    files_of,
    followed,
    put_in_place,
)
from lmdaemon.commands.progress import Tell, progress
from lmdaemon.commands.shared import STOPPED, Failed, Usage, print_json, reason, say
from lmdaemon.config.settings import Settings
from lmdaemon.model import Gate, counted, rfc3339
from lmdaemon.rights import UnsafeError, acting_with
from lmdaemon.shapes import ArchivedSession
from lmdaemon.store.contract import Archive, DatabaseError, Wanted
from lmdaemon.store.open import open_archive, real_path
from lmdaemon.web.documents import archived, to_json

# An end gets the time at which its transaction began, so transactions under way may still add ends of the period. They
# are waited for this long; only on a hanging disk does a transaction take longer
SETTLED_S = 2.0
POLL_S = 0.05

# CSV column → name of the value. There is one row for each delivery, and one for a session without any.
CSV_COLUMNS = {
    "operator": "operator",
    "sessionId": "session_id",
    "playerId": "player_id",
    "reason": "reason",
    "openedAt": "opened_at",
    "lastSeenAt": "last_seen_at",
    "endedAt": "ended_at",
    "idleTimeoutSeconds": "idle_timeout_seconds",
    "attributes": "attributes",
    "deliveryId": "id",
    "sink": "sink",
    "deliveryState": "state",
    "attempts": "attempts",
    "createdAt": "created_at",
    "nextAttemptAt": "next_attempt_at",
    "settledAt": "settled_at",
    "lastStatus": "last_status",
    "lastCode": "last_code",
    "lastError": "last_error",
    "history": "history",
    "discarded": "discarded",
}
_OF_SESSION, _OF_DELIVERY = [*CSV_COLUMNS.values()][:9], [*CSV_COLUMNS.values()][9:]

# Matches each place where a spreadsheet may begin a cell, if what follows could begin a formula. These can begin one:
# - one of = + - @, also in Unicode's full-width and small forms, which Excel treats alike. Blanks before them are
#   skipped, because some programs remove them;
# - a quote, because a program that begins a cell there would read what is quoted as a formula. The end of the text
#   counts as a quote, because the closing quote of the CSV cell follows it.
_FORMULA = re.compile(r"""(^(?!\Z)|[;\t\r\n])(?=\s*(?:['"=+\-@＝＋－＠﹦﹢﹣﹫\t\r\n]|\Z))""")


@dataclass
class Told:
    """What has been written so far: counts, the chain of the rows, and the digest. `tell` shows the progress."""

    sessions: int = 0
    deliveries: int = 0
    pending: int = 0
    tell: Tell = lambda *_: None
    chain: Chain = field(default_factory=Chain)
    digest: str | None = None  # SHA-256 of the whole file, in hex


@command(
    OF_OPERATOR,
    argument("--player", type=filled, metavar="ID", help="of this player only"),
    argument("--session", type=filled, metavar="ID", help="with this id only"),
    times.since("those that ended"),
    times.until("those that ended"),
    argument("--format", choices=("jsonl", "csv"), default="jsonl", help="JSON lines (default) or CSV"),
    argument("--digest", action="store_true", help="with --output: chain the rows, write FILE.sha256"),
    argument("--output", type=file, metavar="FILE", help="write here, whole or not at all, mode 0600"),
    FORCE,
    argument("--json", action="store_true", help="print the summary of --output as JSON"),
)
def export(args: argparse.Namespace) -> int:
    """Writes the sessions that ended in a period, with deliveries and attempts."""
    settings = configured(args, "database")
    # A file with errors does not say what the daemon delivers: it runs with the file that it read before
    delivers = _all if settings.unusable else settings.delivers
    now_at = Clock().wall_ms()
    since_at, until_at = _period(args, now_at)
    told = Told()
    try:
        theirs = rights.own() if settings.postgres else rights.for_database(settings.database)
        ours = theirs if args.output is None else rights.for_result(args.output, theirs)
        # Must be called before root's rights are given up, because the module that it imports may be readable only by
        # root
        source = open_archive(settings)
        with acting_with(theirs):
            check_source(settings)
            with source as archive:
                until_at = min(until_at, archive.now_at())
                _wait_until_committed(archive, until_at)
                write = _as_csv if args.format == "csv" else _as_json_lines
                live = set() if settings.postgres else files_of(real_path(settings.database.absolute()))
                # Progress is not shown if the rows go to the terminal, because the two would mix
                shown = args.output is not None or not sys.stdout.isatty()
                # All files of the database are open by now, so the rights for it are not needed any more
                with acting_with(ours), progress("exporting", " sessions", shown=shown) as told.tell:
                    wanted = Wanted(args.operator, args.player, args.session)

                    def chunks() -> Iterator[bytes]:
                        rows = write(archived_sessions(archive, wanted, since_at, until_at, delivers), told)
                        return chained(rows, told.chain, csv=args.format == "csv") if args.digest else rows

                    _write(args, live, chunks, told)
    except (DatabaseError, UnsafeError) as error:
        raise Failed(str(error)) from error
    _report(args, settings, told, since_at if args.since else None, until_at, now_at)
    return STOPPED


def _period(args: argparse.Namespace, now_at: int) -> tuple[int, int]:
    """The bounds of the period [since, until) as wall times (ms); it ends now at the latest. Raises Usage."""
    if args.json and not args.output:
        raise Usage("sessions export: --json is for the summary that --output prints; the format is --format")
    if args.digest and not args.output:
        raise Usage("sessions export: --digest goes with --output, beside which it puts FILE.sha256")
    since_at, until_at = times.period(args)
    if until_at is not None and until_at > now_at:
        say(f"lmdaemon: --until lies ahead: sessions that end from {rfc3339(now_at)} on are not included", "WARNING")
    if since_at is not None and since_at > now_at:
        raise Usage("--since: must not lie ahead")
    return since_at or 0, now_at if until_at is None else min(until_at, now_at)


def _wait_until_committed(archive: Archive, until_at: int) -> None:
    """Waits until every end before `until_at` is in the file, or SETTLED_S have passed."""
    while archive.committed_at() < until_at and archive.now_at() < until_at + SETTLED_S * 1000:
        time.sleep(POLL_S)


def _all(operator: str, sink: str) -> bool:
    return True


def archived_sessions(
    archive: Archive, wanted: Wanted, since_at: int, until_at: int, delivers: Callable[[str, str], bool] = _all
) -> Iterator[list[ArchivedSession]]:
    """Pages of documents, in the order in which the sessions ended. `delivers` is that of Settings.

    Sessions that end during the export end after `until_at`, so they are not part of it.
    """
    after: tuple[int, int] | None = (since_at, 0)
    while after is not None:
        page = archive.ended(wanted, after, until_at)
        after = page.after
        gates = archive.gates()
        yield [
            archived(session, deliveries, gates.get(session.operator, Gate()), delivers)
            for session, deliveries in page.sessions
        ]


# -- formats


def _count(pages: Iterable[list[ArchivedSession]], told: Told) -> Iterator[list[ArchivedSession]]:
    for page in pages:
        for session in page:
            told.sessions += 1
            told.deliveries += len(session.deliveries)
            told.pending += sum(delivery.state == "pending" for delivery in session.deliveries)
        told.tell(told.sessions)
        yield page


def _as_json_lines(pages: Iterable[list[ArchivedSession]], told: Told) -> Iterator[bytes]:
    for page in _count(pages, told):
        yield b"".join(to_json(session) + b"\n" for session in page)


def _as_csv(pages: Iterable[list[ArchivedSession]], told: Told) -> Iterator[bytes]:
    """RFC 4180 in UTF-8, with a header."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for page in _count(pages, told):
        for session in page:
            own = [cell(getattr(session, name)) for name in _OF_SESSION]
            rows: list[object] = [*session.deliveries] or [None]
            for delivery in rows:
                writer.writerow([*own, *(cell(getattr(delivery, name, None)) for name in _OF_DELIVERY)])
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()


def cell(value: object) -> object:
    """A value as a cell that no spreadsheet takes for a formula: ids are chosen by strangers.

    A text that begins like a formula gets an apostrophe in front (OWASP, "CSV injection"). In much of Europe Excel
    separates cells at `;`, so the same is done after each `;`, tab and line break inside a text. An apostrophe that is
    already in such a place gets a second one, so that removing one in each place restores the text. JSON has no tabs or
    line breaks, and its `;` is written as an escape.
    """
    if isinstance(value, list | msgspec.Raw | msgspec.Struct):
        return to_json(value).decode().replace(";", "\\u003b")
    if isinstance(value, str):
        return _FORMULA.sub(r"\1'", value)
    return value


# -- output


def _write(args: argparse.Namespace, live: set[Inode], chunks: Callable[[], Iterable[bytes]], told: Told) -> None:
    if args.output is None:
        _pour(chunks(), sys.stdout.buffer)
        return
    target = followed(args.output)
    check_target(live, target, force=args.force)
    if not args.digest:
        _put(target, chunks())
        return
    beside = target.with_name(target.name + SUFFIX)
    check_target(live, beside, force=args.force)
    whole = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in chunks():
            whole.update(chunk)
            yield chunk

    _put(target, hashed())
    told.digest = whole.hexdigest()
    _put(beside, [f"{told.digest}  ".encode() + os.fsencode(target.name) + b"\n"])


def _put(target: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file that appears whole or not at all. Raises Failed."""
    with file_beside(target) as (file, handle):
        try:
            with open(handle, "wb", closefd=False) as out:
                _pour(chunks, out)
            os.fsync(handle)
            put_in_place(file, target)
        except OSError as error:
            raise Failed(f"{target}: cannot be written: {reason(error)}") from error


def _pour(chunks: Iterable[bytes], out: BinaryIO) -> None:
    for chunk in chunks:
        out.write(chunk)
    out.flush()


def _report(
    args: argparse.Namespace, settings: Settings, told: Told, since_at: int | None, until_at: int, now_at: int
) -> None:
    pruned_at = now_at - round(settings.keep_ended_s * 1000)
    if since_at is not None and since_at < pruned_at:
        say(f"lmdaemon: what ended before {rfc3339(pruned_at)} is pruned (database.keep_ended): it may be missing")
    if told.pending:
        one, several = "delivery is still pending: its result is", "deliveries are still pending: their results are"
        say(f"lmdaemon: {counted(told.pending, one, several)} not included")
    if not told.sessions:
        tell_unknown(args.operator, settings.operators)
    if args.output is None:
        return
    if args.json:
        summary: Mapping[str, Any] = {
            "file": str(args.output),
            "since": rfc3339(since_at),
            "until": rfc3339(until_at),
            "sessions": told.sessions,
            "deliveries": told.deliveries,
            "pending": told.pending,
        }
        if told.digest is not None:
            summary = {**summary, "sha256": told.digest}
        print_json(summary)
    else:
        made = f"{counted(told.sessions, 'session')}, {counted(told.deliveries, 'delivery', 'deliveries')}"
        print(f"{args.output}: {made}, until {rfc3339(until_at)}")
