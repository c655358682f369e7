"""The chain of an export, and `lmdaemon sessions verify`, which checks it.

Each row ends with `chain`: the SHA-256 (hex) of the chain of the row before it, as text, followed by the bytes of the
row without its own `chain` and line break. If a row is changed, moved, added or left out, the chain breaks at that row
or at the next. Rows that are missing at the end break no chain; the digest of the whole file, in `FILE.sha256`, shows
that.
"""

import argparse
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmdaemon.commands.arguments import JSON, argument, command, file
from lmdaemon.commands.shared import FAILED, STOPPED, Failed, line, print_json, reason
from lmdaemon.model import counted

SUFFIX = ".sha256"  # beside the export, as sha256sum writes it
CSV_COLUMN = b",chain"
_IN_JSON = re.compile(rb',"chain":"([0-9a-f]{64})"\}\Z')
_IN_CSV = re.compile(rb",([0-9a-f]{64})\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Chain:
    """Chains rows one after the other. `last` is the chain of the latest row, `rows` how many there were."""

    def __init__(self) -> None:
        self.last = ""
        self.rows = 0

    def add(self, row: bytes) -> str:
        """Adds a row, given without its line break, and returns its hash: SHA-256 of the hash of the row before it,
        followed by the row.
        """
        self.last = hashlib.sha256(self.last.encode() + row).hexdigest()
        self.rows += 1
        return self.last


def chained(chunks: Iterable[bytes], chain: Chain, *, csv: bool) -> Iterator[bytes]:
    """The same chunks, each of whole lines, with the chain at the end of each row; CSV begins with its header."""
    is_header = csv
    for chunk in chunks:
        out = []
        for row in chunk.splitlines(keepends=True):
            text = row.rstrip(b"\r\n")
            end = row[len(text) :]
            if is_header:
                out.append(text + CSV_COLUMN + end)
                is_header = False
            elif csv:
                out.append(text + b"," + chain.add(text).encode() + end)
            else:
                out.append(text[:-1] + b',"chain":"' + chain.add(text).encode() + b'"}' + end)
        yield b"".join(out)


@command(argument("file", type=file, metavar="FILE", help="an export that was made with --digest"), JSON)
def verify(args: argparse.Namespace) -> int:
    """Says whether an export is whole: its chain, and its digest where `FILE.sha256` is beside it."""
    chain, whole = Chain(), hashlib.sha256()
    try:
        with args.file.open("rb") as rows:
            broken_at = _broken_at(_hashed(rows, whole), chain)
        known = _known_digest(args.file)
    except OSError as error:
        raise Failed(f"{args.file}: cannot be read: {reason(error)}") from error
    digest = whole.hexdigest()
    wrong = None
    if broken_at is not None:
        wrong = f"line {broken_at} was changed, or does not follow the line before it"
        if broken_at == 1:
            wrong = "line 1 was changed, or it is no export that was made with --digest"
    elif known is not None and known != digest:
        wrong = f"is not what {args.file.name}{SUFFIX} was written for: its end may be missing"
    if args.json:
        found = {"file": str(args.file), "whole": wrong is None, "rows": chain.rows, "sha256": digest}
        print_json(found | {"sha256Known": known, "problem": wrong})
    elif wrong:
        raise Failed(f"{args.file}: {wrong}")
    else:
        beside = "" if known else f"; without {args.file.name}{SUFFIX} beside it, its end is not proven"
        print(line(f"{args.file}: whole, {counted(chain.rows, 'row')}, sha256 {digest}{beside}"))
    return FAILED if wrong else STOPPED


def _hashed(rows: Iterable[bytes], whole: "hashlib._Hash") -> Iterator[bytes]:
    for row in rows:
        whole.update(row)
        yield row


def _broken_at(rows: Iterable[bytes], chain: Chain) -> int | None:
    """The number of the first line whose chain does not fit; None if all fit. All rows are read in any case."""
    pattern, broken_at = _IN_JSON, None
    for number, row in enumerate(rows, 1):
        text = row.rstrip(b"\r\n")
        if number == 1 and text.endswith(CSV_COLUMN):
            pattern = _IN_CSV
            continue
        found = pattern.search(text)
        bare = b"" if found is None else text[: found.start()] + (b"}" if pattern is _IN_JSON else b"")
        before = chain.last
        if broken_at is None and (found is None or chain.add(bare) != found[1].decode()):
            broken_at = number
            chain.last = before
    return broken_at


def _known_digest(target: Path) -> str | None:
    """The digest in `FILE.sha256` beside the export; None if there is no such file. Raises Failed."""
    beside = target.with_name(target.name + SUFFIX)
    if not beside.exists():
        return None
    found = beside.read_bytes()[:64].decode("ascii", "replace")
    if not _DIGEST.fullmatch(found):
        raise Failed(f"{beside}: must begin with a SHA-256 in hex, as sha256sum writes it")
    return found
