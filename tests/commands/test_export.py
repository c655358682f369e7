"""The export of ended sessions: complete, each session once, in order, without secrets, and without slowing the daemon
down.
"""

import asyncio
import contextlib
import csv
import io
import json
import re
import resource
import shlex
import shutil
import sqlite3
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import commands
import forked
import msgspec
import orjson
import pytest
from commands import (
    COMMAND,
    PLAYER_TOKEN,
    ROOT,
    UNREACHABLE,
    Running,
    configure,
    daemon,
    environment,
    poll,
)
from hypothesis import given, strategies
from support import open_store, scripted_operator

from lmdaemon.commands import export
from lmdaemon.model import rfc3339
from lmdaemon.store.contract import NewDelivery, Opening, Wanted
from lmdaemon.store.sqlite.archive import EXPORT_ROWS, Archive

LONG_AGO = 1_700_000_000_000
# Without the wait for commits that are still under way, because no daemon commits to these files any more
run = partial(commands.run, first=partial(forked.put, "lmdaemon.commands.export", "SETTLED_S", 0.0))


def lines(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


async def ended_sessions(directory: Path, clock: Any, ends: list[tuple[str, str, int]]) -> None:
    """Makes a database in which these sessions ended in this order. Each is given as operator, id, and time of its end
    in milliseconds since LONG_AGO.
    """
    async with open_store(directory / "lmdaemon.sqlite3", clock) as db:
        db.configured = frozenset(("acme", "other"))
        db.sinks_of = lambda session: [NewDelivery("http", b"secret body")]
        for operator, session, at in ends:
            clock.wall = LONG_AGO + at
            await db.open_session(Opening(operator, session, "p1", PLAYER_TOKEN, '{"table":"t-7"}', 10_000, 0))
            await db.end(operator, session)


@pytest.fixture
async def archive(tmp_path: Path, clock: Any) -> Path:
    """A database with ends at 0, 1000 (twice), 2000 and 3000 ms. The second session belongs to another operator."""
    configure(tmp_path, f"[operators.other]\n{UNREACHABLE}\n")
    ends = [("acme", "a", 0), ("other", "b", 1000), ("acme", "c", 1000), ("acme", "=1+1", 2000), ("acme", "e", 3000)]
    await ended_sessions(tmp_path, clock, ends)
    return tmp_path


def test_a_line_is_a_session_as_the_api_shows_it(tmp_path: Path) -> None:
    """A line also has the session's deliveries with their attempts."""

    async def scenario() -> None:
        async with scripted_operator({"error": 100}) as peer:
            configure(
                tmp_path, f'notify = true\nurl = "{peer.url}"\nallow_private_network = true\nschedule = ["1ms"]\n'
            )
            await asyncio.to_thread(check)

    def check() -> None:
        with daemon(tmp_path) as running:
            running.started().open("acme", "s1")
            running.open("acme", "still active")
            running.api("POST", "operators/acme/sessions/s1/close")
            poll(lambda: running.api("GET", "operators/acme/sessions/s1")["deliveries"][0]["state"] == "delivered")
            shown = running.api("GET", "operators/acme/sessions/s1")
            delivery = running.api("GET", f"deliveries/{shown['deliveries'][0]['id']}")
            (line,) = lines(running("sessions", "export"))
        del delivery["request"]  # the request is made from the settings in force, which are not in the database
        assert line == shown | {"deliveries": [delivery]}
        assert [attempt["code"] for attempt in delivery["history"]] == [100, 0]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["a", "b", "c", "=1+1", "e"]),
        (("--since", rfc3339(LONG_AGO + 1000)), ["b", "c", "=1+1", "e"]),
        (("--since", rfc3339(LONG_AGO + 1001)), ["=1+1", "e"]),
        (("--until", rfc3339(LONG_AGO + 1000)), ["a"]),
        (("--since", rfc3339(LONG_AGO + 1000), "--until", rfc3339(LONG_AGO + 3000)), ["b", "c", "=1+1"]),
        (("--since", "2023-11-14", "--until", "2023-11-15"), ["a", "b", "c", "=1+1", "e"]),
        (("--since", "2023-11-15"), []),
        (("--operator", "other"), ["b"]),
        (("--operator", "nobody"), []),
        (("--until", "2999-01-01"), ["a", "b", "c", "=1+1", "e"]),
        (("--player", "p2"), []),
        (("--player", "p1"), ["a", "b", "c", "=1+1", "e"]),
        (("--player", "p1", "--since", "2023-11-15"), []),
        (("--player", "p1", "--operator", "other"), ["b"]),
        (("--session", "c"), ["c"]),
        (("--session", "c", "--player", "p2"), []),
        (("--session", "c", "--until", rfc3339(LONG_AGO + 1000)), []),
    ],
)
async def test_an_export_is_what_ended_from_since_on_and_before_until(
    archive: Path, options: tuple[str, ...], expected: list[str]
) -> None:
    found = lines(run("sessions", "export", *options, cwd=archive, TZ="UTC"))  # a date alone is a day of the time zone
    assert [session["sessionId"] for session in found] == expected
    assert all("secret" not in json.dumps(session) for session in found)


async def test_sessions_that_ended_in_one_millisecond_are_each_read_once(tmp_path: Path, clock: Any) -> None:
    """Each session is read once wherever a page ends."""
    ends = [("acme" if number % 3 else "other", f"s{number}", number // 4) for number in range(50)]
    await ended_sessions(tmp_path, clock, ends)
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3", isolation_level=None)) as sql:
        for rows in (1, 3, 4, 25, 50, 51):
            for operator, player in product((None, "acme"), (None, "p1")):
                found, after = [], (0, 0)
                while after is not None:
                    page, after = Archive(sql).ended(Wanted(operator, player), after, LONG_AGO + 10**6, rows)
                    found += [session.session_id for session, _ in page]
                assert found == [session for whose, session, _ in ends if operator in (None, whose)]


async def test_between_two_pages_the_log_can_start_over(tmp_path: Path, clock: Any) -> None:
    """A read transaction over a whole export would make the daemon's write-ahead log grow without limit."""
    await ended_sessions(tmp_path, clock, [("acme", str(number), number) for number in range(2 * EXPORT_ROWS + 1)])
    database = tmp_path / "lmdaemon.sqlite3"
    with (
        contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader,
        contextlib.closing(sqlite3.connect(database, isolation_level=None)) as writer,
    ):
        pages = export.archived_sessions(Archive(reader), Wanted(), 0, LONG_AGO + 10**6)
        assert len(next(pages)) == EXPORT_ROWS
        writer.execute("UPDATE clock SET wall_at = wall_at + 1")
        assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert [len(page) for page in pages] == [EXPORT_ROWS, 1]


def test_exports_of_consecutive_periods_hold_every_session_once(
    tmp_path: Path,
) -> None:
    """The daemon ends further sessions during the exports."""
    configure(tmp_path)
    ids: list[str] = []
    enough = threading.Event()

    def exported(running: Running, since: str | None) -> tuple[list[str], str]:
        words = ("--since", since) if since else ()
        done = running("sessions", "export", *words, "--output", "part", "--force", "--json")
        assert done.returncode == 0, done.stderr
        part = [json.loads(line) for line in (tmp_path / "part").read_text().splitlines()]
        assert [session["endedAt"] for session in part] == sorted(session["endedAt"] for session in part)
        return [session["sessionId"] for session in part], json.loads(done.stdout)["until"]

    def end_sessions(running: Running) -> None:
        while not enough.is_set():
            ids.append(f"s{len(ids)}")
            running.open("acme", ids[-1])
            running.api("POST", f"operators/acme/sessions/{ids[-1]}/close")

    with daemon(tmp_path) as running, ThreadPoolExecutor(1) as pool:
        ending = pool.submit(end_sessions, running.started())
        parts, since = [], None
        for _ in range(3):
            part, since = exported(running, since)
            parts.append(part)
        enough.set()
        ending.result()
        parts.append(exported(running, since)[0])
    assert len([part for part in parts if part]) > 1
    assert sorted(session for part in parts for session in part) == sorted(ids)


# -- digests, and `sessions verify`


@pytest.mark.parametrize("form", ["jsonl", "csv"])
async def test_a_copy_of_an_export_is_shown_to_be_whole_or_not(archive: Path, form: str) -> None:
    """A copy is not whole if any row is changed, left out, moved or cut off."""
    made = run("sessions", "export", "--format", form, "--output", "out", "--digest", "--json", cwd=archive)
    assert made.returncode == 0, made.stderr
    checked = subprocess.run(["sha256sum", "-c", "out.sha256"], cwd=archive, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "out: OK\n")
    found = run("sessions", "verify", "out", "--json", cwd=archive)
    digest = json.loads(made.stdout)["sha256"]
    verified = {"file": "out", "whole": True, "rows": 5, "sha256": digest, "sha256Known": digest, "problem": None}
    assert json.loads(found.stdout) == verified
    header = form == "csv"
    rows = (archive / "out").read_bytes().splitlines(keepends=True)
    first = int(header)
    broken = {
        "changed": ([*rows[:2], rows[2].replace(b"p1", b"p2"), *rows[3:]], 3),
        "left out": ([*rows[: first + 1], *rows[first + 2 :]], first + 2),
        "moved": ([*rows[:first], rows[first + 1], rows[first], *rows[first + 2 :]], first + 1),
        "without a chain": ([*rows[:-1], b"{}\n"], len(rows)),
    }
    for copy, number in broken.values():
        (archive / "out").write_bytes(b"".join(copy))
        refused = run("sessions", "verify", "out", cwd=archive)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"out: line {number} was changed" in refused.stderr
    (archive / "out").write_bytes(b"".join(rows[:-1]))
    assert "its end may be missing" in run("sessions", "verify", "out", cwd=archive).stderr
    (archive / "out.sha256").unlink()
    assert "its end is not proven" in run("sessions", "verify", "out", cwd=archive).stdout


async def test_the_runbooks_check_of_the_chain_finds_what_verify_finds(archive: Path) -> None:
    run("sessions", "export", "--output", "june.jsonl", "--digest", cwd=archive)
    (script,) = re.findall(r"```sh\n(last=.*?)```", RUNBOOK, re.DOTALL)
    whole = subprocess.run(["sh", "-c", script], cwd=archive, capture_output=True, text=True, check=True)
    assert whole.stdout == ""
    rows = (archive / "june.jsonl").read_text().splitlines(keepends=True)
    (archive / "june.jsonl").write_text("".join([rows[0], *rows[2:]]))
    broken = subprocess.run(["sh", "-c", script], cwd=archive, capture_output=True, text=True, check=True)
    assert broken.stdout == f"broken: {rows[2]}"


# -- CSV


async def test_csv_is_rfc_4180_with_a_fixed_header_one_row_a_delivery(archive: Path) -> None:
    with contextlib.closing(sqlite3.connect(archive / "lmdaemon.sqlite3")) as sql:
        attempt = {"at": 1, "durationMs": 7, "status": 200, "code": -5, "error": None}
        sql.execute("UPDATE delivery SET history = ?, last_code = -5 WHERE id = 1", (json.dumps([attempt]),))
        sql.execute("DELETE FROM delivery WHERE id = 2")
        sql.execute("UPDATE session SET session_id = 'a \"quoted\", id' WHERE id = 1")
        sql.commit()
    subprocess_done = run("sessions", "export", "--format", "csv", "--output", "out.csv", cwd=archive)
    assert subprocess_done.stdout == f"out.csv: 5 sessions, 4 deliveries, until {until_of(subprocess_done)}\n"
    content = (archive / "out.csv").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == 6
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True))
    assert ",".join(rows[0]) == (
        "operator,sessionId,playerId,reason,openedAt,lastSeenAt,endedAt,idleTimeoutSeconds,attributes,deliveryId,sink,"
        "deliveryState,attempts,createdAt,nextAttemptAt,settledAt,lastStatus,lastCode,lastError,history,discarded"
    )
    first, second = rows[0], rows[1]
    assert (first["sessionId"], first["reason"], first["lastCode"]) == ('a "quoted", id', "closed", "-5")
    assert json.loads(first["history"]) == [attempt | {"at": "1970-01-01T00:00:00.001Z"}]
    assert json.loads(first["attributes"]) == {"table": "t-7"}
    assert (second["sessionId"], second["deliveryId"], second["history"]) == ("b", "", "")


def until_of(done: "subprocess.CompletedProcess[str]") -> str:
    return done.stdout.split()[-1]


FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")
PLAIN = ["plain", "a=b", "a;b", "a; b=c", "x-1", 'say "hi"', ""]
GUARDED = {
    "=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0",
    "+1": "'+1",
    "-1": "'-1",
    "@SUM(1)": "'@SUM(1)",
    "'quoted": "''quoted",
    "＝1+1": "'＝1+1",
    "＋1": "'＋1",
    "－1": "'－1",
    "＠SUM(1)": "'＠SUM(1)",
    "﹦1": "'﹦1",
    " =1": "' =1",
    '"=1': "'\"=1",
    "x;=1+1": "x;'=1+1",
    "x; =1": "x;' =1",
    'x;"=1;"': "x;'\"=1;'\"",
    "x;": "x;'",
    'x;"y"': 'x;\'"y"',
    "x;'=1": "x;''=1",
    "a;-1;@b;c": "a;'-1;'@b;c",
    "x\t=1": "x\t'=1",
    "x\n=1": "x\n'=1",
    "\t=1": "'\t'=1",
    "＝1;＠A": "'＝1;'＠A",
}


def given_back(cell: str) -> str:
    return re.sub(r"(^|[;\t\r\n])'", r"\1", cell)


@pytest.mark.parametrize(("text", "cell"), [*GUARDED.items(), *((text, text) for text in PLAIN)])
def test_a_text_that_a_spreadsheet_would_run_is_guarded(text: str, cell: str) -> None:
    assert export.cell(text) == cell
    assert given_back(cell) == text


@given(strategies.lists(strategies.text("=+-@＝＠;\t\r\n'\", ab"), min_size=1, max_size=4))
def test_no_cell_is_a_formula_and_every_text_comes_back(texts: list[str]) -> None:
    """No cell is a formula whatever character the spreadsheet takes as the separator of cells."""
    written = io.StringIO(newline="")
    csv.writer(written).writerow(["acme", *map(export.cell, texts)])
    for separator in (",", ";", "\t"):
        rows = list(csv.reader(io.StringIO(written.getvalue(), newline=""), delimiter=separator))
        assert not [cell for row in rows for cell in row if cell.strip(' "').startswith(FORMULAS)]
    ((_, *cells),) = csv.reader(io.StringIO(written.getvalue(), newline=""))
    assert [given_back(cell) for cell in cells] == texts


@pytest.mark.parametrize("text", [";=1+1", "\t=1", "\n;-1", ";"])
def test_json_in_a_cell_has_nothing_to_split_it_at_and_stays_json(text: str) -> None:
    for value in ([{"error": text}], msgspec.Raw(orjson.dumps({"table": text}))):
        cell = export.cell(value)
        assert isinstance(cell, str)
        assert not set(cell) & set(";\t\r\n")
        assert json.loads(cell) == orjson.loads(msgspec.json.encode(value))


async def test_no_id_of_a_stranger_is_a_formula_in_the_file(tmp_path: Path, clock: Any) -> None:
    ids = [text for text in (*GUARDED, *PLAIN) if text and text.isprintable()]
    configure(tmp_path)
    await ended_sessions(tmp_path, clock, [("acme", session, 0) for session in ids])
    done = run("sessions", "export", "--format", "csv", cwd=tmp_path)
    cells = [row["sessionId"] for row in csv.DictReader(io.StringIO(done.stdout, newline=""), strict=True)]
    assert cells == [GUARDED.get(session, session) for session in ids]
    assert [session["sessionId"] for session in lines(run("sessions", "export", cwd=tmp_path))] == ids


# -- the output file


async def test_an_output_appears_whole_and_replaces_only_when_forced(archive: Path) -> None:
    """The file has mode 0600."""
    target = archive / "out.jsonl"
    target.write_text("precious")
    refused = run("sessions", "export", "--output", target, cwd=archive)
    assert (refused.returncode, refused.stderr) == (1, f"lmdaemon: {target}: exists; --force replaces it\n")
    assert target.read_text() == "precious"
    done = run("sessions", "export", "--output", target, "--force", "--json", cwd=archive)
    summary = json.loads(done.stdout)
    assert (summary["sessions"], summary["deliveries"], summary["since"]) == (5, 5, None)
    assert len(target.read_text().splitlines()) == 5
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    belongs = run("sessions", "export", "--output", "lmdaemon.sqlite3", "--force", cwd=archive)
    assert belongs.stderr == "lmdaemon: lmdaemon.sqlite3: belongs to the database itself\n"


async def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path: Path, clock: Any) -> None:
    def small_files_only() -> None:  # larger than SQLite's own files
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))

    configure(tmp_path)
    await ended_sessions(tmp_path, clock, [("acme", f"s{number}", number) for number in range(200)])
    before = {file.name for file in tmp_path.iterdir()} | {"lmdaemon.sqlite3-wal", "lmdaemon.sqlite3-shm"}
    done = run("sessions", "export", "--output", "out", cwd=tmp_path, before=small_files_only)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lmdaemon: out: cannot be written: File too large\n"
    assert {file.name for file in tmp_path.iterdir()} <= before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--since 2999-01-01 --until 2999-01-02", "--since: must not lie ahead"),
        ("--since 2020-02-02 --until 2020-02-01", "--since: must not be later than --until"),
        ("--since tomorrow", "--since: must not be later than now"),
        ("--since 2020-13-01", "--since: must be a time such as 2026-01-31T03:00:00Z"),
        ("--until soon", "--until: must be a time such as 2026-01-31T03:00:00Z"),
        ("--digest", "--digest goes with --output"),
        ("--json", "--json is for the summary that --output prints"),
        ("--format xml", "invalid choice: 'xml'"),
    ],
)
def test_what_cannot_be_exported_is_said_and_exits_2(tmp_path: Path, words: str, complaint: str) -> None:
    configure(tmp_path)
    done = run("sessions", "export", *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_a_database_that_is_missing_or_no_database_exits_1(tmp_path: Path) -> None:
    configure(tmp_path)
    done = run("sessions", "export", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "lmdaemon.sqlite3: no database to read: No such file" in done.stderr
    (tmp_path / "lmdaemon.sqlite3").write_bytes(b"garbage" * 1000)
    assert "file is not a database" in run("sessions", "export", cwd=tmp_path).stderr


async def test_what_an_archive_lacks_is_said(archive: Path) -> None:
    done = run("sessions", "export", "--since", "2023-11-01", cwd=archive)
    assert "is pruned (database.keep_ended): it may be missing" in done.stderr
    assert "5 deliveries are still pending: their results are not included" in done.stderr
    yesterday = datetime.now(UTC).strftime("%Y-%m-%dT00:00:00Z")
    assert run("sessions", "export", "--since", yesterday, cwd=archive).stderr == ""


# -- the runbook's scripts and timers

RUNBOOK = (ROOT / "docs" / "operating.md").read_text()


@pytest.mark.parametrize("name", ["lmdaemon-backup", "lmdaemon-export"])
async def test_the_runbooks_script_does_what_it_says(tmp_path: Path, clock: Any, name: str) -> None:
    today = datetime.now(UTC)
    last_month = today.replace(day=1) - timedelta(days=1)
    configure(tmp_path)
    at = int(last_month.timestamp() * 1000) - LONG_AGO
    await ended_sessions(tmp_path, clock, [("acme", "earlier", at - 40 * 86_400_000), ("acme", "last month", at)])
    script = re.search(rf"```sh\n(#!/bin/sh\n# /usr/local/sbin/{name}:.*?)```", RUNBOOK, re.DOTALL)
    assert script
    words = script[1].replace("/var/lib/lmdaemon", str(tmp_path)).replace("/var/backups/lmdaemon", str(tmp_path))
    words = words.replace("/etc/lmdaemon/", f"{tmp_path}/").replace("/opt/lmdaemon/bin/lmdaemon", shlex.join(COMMAND))
    done = subprocess.run(["sh", "-c", words], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if name == "lmdaemon-backup":
        assert (tmp_path / f"{today:%a}.sqlite3").stat().st_size
    else:
        text = (tmp_path / f"sessions-{last_month:%Y-%m}.csv").read_text()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [row["sessionId"] for row in rows] == ["last month"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_runbooks_units(tmp_path: Path) -> None:
    units = re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", RUNBOOK, re.DOTALL)
    assert [name for name, _ in units] == [
        f"lmdaemon-{what}.{kind}" for what in ("backup", "export") for kind in ("service", "timer")
    ]
    for name, text in units:
        (tmp_path / name).write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text))
    files = [str(tmp_path / name) for name, _ in units]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "lmdaemon" in line]
    assert ours == []
    for when in re.findall(r"OnCalendar=(.*)", RUNBOOK):
        subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True, timeout=60)


async def test_when_a_pending_delivery_is_tried_next_is_what_the_api_says(archive: Path) -> None:
    file = archive / "config.toml"
    acme = '[operators.acme]\nprovider_id = "luckymonaco"'
    file.write_text(file.read_text().replace(acme, f"[operators.acme]{UNREACHABLE}"))
    with contextlib.closing(sqlite3.connect(archive / "lmdaemon.sqlite3")) as sql:
        sql.execute("UPDATE delivery SET state = 'pending', due_at = 5000, settled_at = NULL")
        sql.execute("UPDATE operator SET not_before_at = 9000 WHERE name = 'acme'")
        sql.execute("UPDATE operator SET held_at = 1 WHERE name = 'other'")
        sql.commit()
    found = lines(run("sessions", "export", cwd=archive))
    times = {(one["operator"], delivery["nextAttemptAt"]) for one in found for delivery in one["deliveries"]}
    assert times == {("acme", rfc3339(9000)), ("other", None)}
    file.write_text(file.read_text().replace("notify = true", "notify = false"))
    found = lines(run("sessions", "export", cwd=archive))
    assert {delivery["nextAttemptAt"] for one in found for delivery in one["deliveries"]} == {None}
