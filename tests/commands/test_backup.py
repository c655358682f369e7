"""`lmdaemon backup` and `restore`: real commands, used beside real daemon processes."""

import asyncio
import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from commands import COMMAND, Running, configure, daemon, environment, open_many, poll, run
from support import scripted_operator

from lmdaemon import rights
from lmdaemon.clock import Clock
from lmdaemon.commands import backup
from lmdaemon.store.sqlite.file import APPLICATION_ID, MIGRATIONS
from lmdaemon.store.sqlite.store import Store


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One daemon for all tests that do not harm it."""
    directory = tmp_path_factory.mktemp("lm")
    configure(directory, '[operators.many]\nprovider_id = "luckymonaco"\nendpoint = ""\n')
    with daemon(directory) as running:
        running.started().open("acme", "always there")
        yield running
        running.process.terminate()
        assert running.ended() == 0


def sessions_in(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as sql:
        assert sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {row[0] for row in sql.execute("SELECT session_id FROM session")}


async def test_a_backup_beside_openings_holds_all_acknowledged_before_it(lm: Running, tmp_path: Path) -> None:
    before = [f"before-{number}" for number in range(200)]
    await open_many(lm, "many", before)
    target = tmp_path / "copy.sqlite3"
    command = asyncio.create_task(asyncio.to_thread(lm, "backup", target, "--json"))
    meanwhile: list[str] = []
    while not command.done():
        batch = [f"meanwhile-{len(meanwhile) + number}" for number in range(20)]
        await open_many(lm, "many", batch)
        meanwhile += batch
    done = await command
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"file": str(target), "bytes": target.stat().st_size}
    assert meanwhile
    assert set(before) <= sessions_in(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_a_daemon_starts_from_a_backup(lm: Running, tmp_path: Path) -> None:
    lm.open("acme", "kept by the backup")
    assert lm("backup", tmp_path / "lmdaemon.sqlite3").stdout.endswith("bytes, integrity ok\n")
    configure(tmp_path)
    with daemon(tmp_path) as restored:
        shown = restored.started()("sessions", "show", "acme", "kept by the backup", "--json")
        assert json.loads(shown.stdout)["state"] == "active"


def test_a_backup_replaces_a_file_only_when_forced(lm: Running, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_text("precious")
    refused = lm("backup", target)
    assert refused.returncode == 1
    assert refused.stderr == f"lmdaemon: {target}: exists; --force replaces it\n"
    assert target.read_text() == "precious"
    assert lm("backup", target, "--force").returncode == 0
    assert sessions_in(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["lmdaemon.sqlite3", "lmdaemon.sqlite3-wal", "lmdaemon.sqlite3.lock"])
def test_a_backup_never_replaces_the_database_itself(lm: Running, name: str) -> None:
    inode = (lm.directory / name).stat().st_ino
    done = lm("backup", name, "--force")
    assert done.returncode == 1
    assert done.stderr == f"lmdaemon: {name}: belongs to the database itself\n"
    assert (lm.directory / name).stat().st_ino == inode


def test_a_backup_that_cannot_be_written_says_why_and_leaves_nothing(lm: Running, tmp_path: Path) -> None:
    done = lm("backup", tmp_path / "absent" / "copy")
    assert (done.returncode, done.stdout) == (1, "")
    assert "copy: cannot be written: No such file or directory" in done.stderr
    assert "is a directory; name a file" in lm("backup", tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_backup_of_a_database_that_does_not_exist_creates_none(tmp_path: Path) -> None:
    configure(tmp_path)
    before = set(tmp_path.iterdir())
    done = run("backup", "copy", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("lmdaemon: lmdaemon.sqlite3: no database to read: No such file or directory; ")
    assert "$STATE_DIRECTORY" in done.stderr
    elsewhere = run("backup", "copy", cwd=tmp_path, STATE_DIRECTORY=str(tmp_path / "state"))
    assert f"{tmp_path}/state/lmdaemon.sqlite3: no database to read: No such file or directory\n" in elsewhere.stderr
    assert set(tmp_path.iterdir()) == before


def mark_as_ours(sql: sqlite3.Connection, version: int = 1) -> None:
    sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    sql.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("CREATE TABLE somebody_elses (x)", "is a database of another program (application_id 0x0)"),
        ("", "is empty"),
    ],
)
def test_what_no_restore_would_take_is_not_passed_off_as_a_backup(tmp_path: Path, content: str, complaint: str) -> None:
    configure(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3", isolation_level=None)) as sql:
        sql.execute(content)
    (tmp_path / "lmdaemon.sqlite3").touch()
    before = set(tmp_path.iterdir())
    done = run("backup", "copy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"lmdaemon.sqlite3: {complaint}\n" in done.stderr
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["lmdaemon.sqlite3", "lmdaemon.sqlite3-journal"])
@pytest.mark.parametrize("command", [["backup", "copy.sqlite3"], ["sessions", "export"]])
def test_nobody_waits_for_a_pipe_in_the_place_of_a_database(stopped: Path, name: str, command: list[str]) -> None:
    (stopped / name).unlink(missing_ok=True)
    os.mkfifo(stopped / name)
    refused = run(*command, cwd=stopped)
    assert refused.returncode == 1
    assert f"{name} is no plain file" in refused.stderr


def test_a_newer_programs_database_can_still_be_copied(tmp_path: Path) -> None:
    configure(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3", isolation_level=None)) as sql:
        mark_as_ours(sql, version=99)
        sql.execute("CREATE TABLE session (session_id TEXT)")
    assert run("backup", "copy", cwd=tmp_path).returncode == 0
    assert sessions_in(tmp_path / "copy") == set()


def test_a_damaged_database_is_not_passed_off_as_a_backup(tmp_path: Path) -> None:
    configure(tmp_path)
    (tmp_path / "lmdaemon.sqlite3").write_bytes(b"garbage" * 1000)
    before = set(tmp_path.iterdir())
    done = run("backup", "copy", cwd=tmp_path)
    assert done.returncode == 1
    assert "lmdaemon.sqlite3: file is not a database" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_copy_that_fails_its_check_is_not_passed_off_as_a_backup(tmp_path: Path) -> None:
    configure(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3", isolation_level=None)) as sql:
        mark_as_ours(sql)
        sql.execute("CREATE TABLE session (idle_ms INTEGER CHECK (idle_ms > 0))")
        sql.execute("PRAGMA ignore_check_constraints = ON")
        sql.execute("INSERT INTO session VALUES (-1)")
    before = set(tmp_path.iterdir())
    done = run("backup", "copy", cwd=tmp_path)
    assert done.returncode == 1
    assert "the copy is damaged: CHECK constraint failed in session" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_backup_after_a_crash_holds_what_was_acknowledged(tmp_path: Path) -> None:
    """The backup changes nothing in the directory."""
    configure(tmp_path)
    with daemon(tmp_path) as running:
        running.started().open("acme", "acknowledged")
        running.process.kill()
        running.ended()
        files = [tmp_path / f"lmdaemon.sqlite3{suffix}" for suffix in ("", "-wal")]
        before = [file.read_bytes() for file in files]
        assert running("backup", tmp_path / "copy").returncode == 0
    assert sessions_in(tmp_path / "copy") == {"acknowledged"}
    assert [file.read_bytes() for file in files] == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_backup_by_root_leaves_no_file_of_root_behind(tmp_path: Path) -> None:
    """The database belongs to another user, whose daemon does not run."""
    configure(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    with daemon(tmp_path, STATE_DIRECTORY=str(state)) as running:
        running.started()
    (state / "lmdaemon.sqlite3").chmod(0o600)
    for file in state.iterdir():
        os.chown(file, 12345, 12345)
    done = run("backup", "copy", cwd=tmp_path, STATE_DIRECTORY=str(state))
    assert done.returncode == 0, done.stderr
    assert {(file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) for file in state.iterdir()} == {(12345, 0o600)}


def test_a_backup_through_a_link_replaces_what_it_leads_to(lm: Running, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "copy", tmp_path / "latest"
    link.symlink_to(target)
    assert lm("backup", link).returncode == 0
    assert link.is_symlink()
    assert sessions_in(target)
    assert lm("backup", link).stderr == f"lmdaemon: {target}: exists; --force replaces it\n"
    assert lm("backup", link, "--force").returncode == 0
    assert list(target.parent.iterdir()) == [target]


def test_a_linked_database_is_copied_and_its_files_are_never_replaced(tmp_path: Path) -> None:
    configure(tmp_path, "[database]\npath = 'link'\n".replace("'", '"'))
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "state" / "real")
    with daemon(tmp_path) as running:
        running.started().open("acme", "s1")
        refused = running("backup", "state/real-wal", "--force")
        assert refused.stderr == "lmdaemon: state/real-wal: belongs to the database itself\n"
        assert running("backup", "copy").returncode == 0
        running.open("acme", "s2")
    assert sessions_in(tmp_path / "copy") == {"s1"}
    assert run("restore", "copy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert sessions_in(tmp_path / "state" / "real") == {"s1"}


def test_a_backup_that_finds_the_disk_full_leaves_nothing(lm: Running, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = run("backup", tmp_path / "copy", cwd=lm.directory, before=small_files_only)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot copy" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_backup_goes_to_the_disk_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to disk in one piece at its end, the copy would make every commit of the daemon wait."""
    database = tmp_path / "database"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as sql:
        mark_as_ours(sql)
        sql.execute("CREATE TABLE filler (x)")
        sql.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000)"
            " INSERT INTO filler SELECT hex(randomblob(40)) FROM n"
        )
    sizes: list[int] = []
    flush = os.fdatasync

    def noted(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        flush(handle)

    monkeypatch.setattr(os, "fdatasync", noted)
    umask, handler = os.umask(0), signal.getsignal(signal.SIGTERM)
    try:
        with backup.copied(backup.Source(database, rights.own()), tmp_path / "copy", known=1) as copy:
            steps = [later - sooner for sooner, later in itertools.pairwise([0, *sizes, copy.stat().st_size])]
    finally:
        os.umask(umask)
        signal.signal(signal.SIGTERM, handler)
    assert len(steps) > 3
    assert max(steps) < 3 * backup.FLUSH_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_backup_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    configure(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3", isolation_level=None)) as sql:
        mark_as_ours(sql)
        sql.execute("CREATE TABLE filler (x)")
        sql.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500000)"
            " INSERT INTO filler SELECT hex(randomblob(40)) FROM n"
        )
    before = set(tmp_path.iterdir())
    with subprocess.Popen([*COMMAND, "backup", "copy"], cwd=tmp_path, env=environment()) as process:
        poll(lambda: any(file.stat().st_size for file in tmp_path.glob(".lmdaemon-*/copy")))
        process.send_signal(number)
        assert process.wait(20) == 1
    assert set(tmp_path.iterdir()) == before


# -- restore


@pytest.fixture(scope="module")
def once_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopped")
    configure(directory)
    with daemon(directory) as running:
        running.started().open("acme", "older")
        assert running("backup", "copy").returncode == 0
        running.open("acme", "newer")
    return directory


@pytest.fixture
def stopped(once_stopped: Path, tmp_path: Path) -> Path:
    """A directory with the file of a stopped daemon, which has a session `newer`, and a backup that does not have
    it.
    """
    return shutil.copytree(once_stopped, tmp_path / "stopped")


def test_a_restore_puts_the_backup_in_place_and_keeps_what_was_there(stopped: Path) -> None:
    content = (stopped / "copy").read_bytes()
    done = run("restore", "copy", "--json", cwd=stopped)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["file"], told["database"]) == ("copy", str(stopped / "lmdaemon.sqlite3"))
    assert (told["live"], told["pending"]) == (1, 0)
    assert datetime.fromisoformat(told["asOf"]) < datetime.now(UTC)
    assert sessions_in(stopped / "lmdaemon.sqlite3") == {"older"}
    assert stat.S_IMODE((stopped / "lmdaemon.sqlite3").stat().st_mode) == 0o600
    assert sessions_in(Path(told["replaced"])) == {"older", "newer"}
    assert (stopped / "copy").read_bytes() == content
    with daemon(stopped) as running:
        assert running.started()("sessions", "show", "acme", "newer").returncode == 1
        running.open("acme", "newer")


async def test_a_restore_of_what_was_never_written_to_says_so(tmp_path: Path) -> None:
    configure(tmp_path)
    store = await Store.open(tmp_path / "lmdaemon.sqlite3", Clock())
    await store.close()
    assert run("backup", "copy", cwd=tmp_path).returncode == 0
    done = run("restore", "copy", cwd=tmp_path)
    assert done.stdout.splitlines()[1] == "never written to, sessions live: 0, deliveries pending: 0"
    assert json.loads(run("restore", "--json", "copy", cwd=tmp_path).stdout)["asOf"] is None


def test_a_restore_can_be_undone(stopped: Path) -> None:
    replaced = json.loads(run("restore", "copy", "--json", cwd=stopped).stdout)["replaced"]
    again = run("restore", replaced, cwd=stopped)
    assert again.returncode == 0, again.stderr
    assert "what was there before: " in again.stdout
    assert sessions_in(stopped / "lmdaemon.sqlite3") == {"older", "newer"}


def test_a_restore_after_a_crash_keeps_the_log_with_its_file(tmp_path: Path) -> None:
    configure(tmp_path)
    with daemon(tmp_path) as running:
        running.started().open("acme", "older")
        assert running("backup", "copy").returncode == 0
        running.open("acme", "acknowledged")
        running.process.kill()
        running.ended()
    replaced = json.loads(run("restore", "copy", "--json", cwd=tmp_path).stdout)["replaced"]
    assert sessions_in(tmp_path / "lmdaemon.sqlite3") == {"older"}
    assert not (tmp_path / "lmdaemon.sqlite3-wal").exists()
    with daemon(tmp_path) as running:
        running.started()
        assert running.events("store.wal_missing") == []
    assert run("restore", replaced, cwd=tmp_path).returncode == 0
    assert sessions_in(tmp_path / "lmdaemon.sqlite3") == {"older", "acknowledged"}


def test_nothing_is_restored_under_a_running_daemon(lm: Running, tmp_path: Path) -> None:
    assert lm("backup", tmp_path / "copy").returncode == 0
    inode = (lm.directory / "lmdaemon.sqlite3").stat().st_ino
    done = lm("restore", tmp_path / "copy")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("lmdaemon.sqlite3: is in use by another lmdaemon; stop the daemon first\n")
    assert (lm.directory / "lmdaemon.sqlite3").stat().st_ino == inode
    assert lm("sessions", "list", "acme").returncode == 0


def spoil(path: Path, how: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as sql:
        if how == "newer":
            sql.execute("PRAGMA user_version = 99")
        elif how == "a stranger's":
            sql.execute("PRAGMA application_id = 1")
        elif how == "damaged":
            sql.execute("PRAGMA ignore_check_constraints = ON")
            sql.execute("UPDATE session SET reason = 'nonsense'")
    if how == "no database":
        path.write_bytes(b"garbage" * 1000)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:9000])
    if how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("newer", f"was written by a newer lmdaemon (schema 99; this one knows {len(MIGRATIONS)})"),
        ("a stranger's", "is a database of another program (application_id 0x1)"),
        ("damaged", "the copy is damaged: CHECK constraint failed in session"),
        ("no database", "file is not a database"),
        ("cut short", "copy: database disk image is malformed"),
        ("empty", "is empty"),
    ],
)
def test_what_is_no_sound_backup_is_refused_and_changes_nothing(stopped: Path, how: str, complaint: str) -> None:
    spoil(stopped / "copy", how)
    before = {file: file.read_bytes() for file in stopped.iterdir()}
    done = run("restore", "copy", cwd=stopped)
    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr
    assert {file: file.read_bytes() for file in stopped.iterdir()} == before


def test_a_restore_from_nowhere_or_to_nowhere_says_so(stopped: Path) -> None:
    assert "absent: cannot be read: No such file or directory" in run("restore", "absent", cwd=stopped).stderr
    assert "is no file" in run("restore", ".", cwd=stopped).stderr
    assert "is the database itself" in run("restore", "lmdaemon.sqlite3", cwd=stopped).stderr
    nowhere = run("restore", "copy", cwd=stopped, STATE_DIRECTORY=str(stopped / "absent"))
    assert nowhere.stderr == f"lmdaemon: {stopped}/absent: no such directory\n"


def test_a_restore_into_an_empty_directory_is_a_move_to_another_machine(stopped: Path) -> None:
    state = stopped / "state"
    state.mkdir()
    done = run("restore", "copy", "--json", cwd=stopped, STATE_DIRECTORY=str(state))
    assert json.loads(done.stdout)["replaced"] is None
    assert sessions_in(state / "lmdaemon.sqlite3") == {"older"}


def test_a_restore_cut_short_keeps_the_daemon_from_starting(stopped: Path) -> None:
    """The daemon starts again once a restore has run to its end."""
    (stopped / "lmdaemon.sqlite3.lock").write_bytes(b"restoring")
    (stopped / "lmdaemon.sqlite3").rename(stopped / "moved-away")
    with daemon(stopped) as running:
        assert running.ended() == 1
        assert "a restore did not finish; run `lmdaemon restore` again" in running.log.read_text()
    assert not (stopped / "lmdaemon.sqlite3").exists()
    assert run("restore", "copy", cwd=stopped).returncode == 0
    with daemon(stopped) as running:
        running.started()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_root_does_beside_the_services_user_never_locks_it_out() -> None:
    user = 12345
    with tempfile.TemporaryDirectory() as name:  # not below pytest's directories, which user 12345 cannot enter
        directory, state = Path(name), Path(name) / "state"
        directory.chmod(0o755)
        state.mkdir(mode=0o700)
        os.chown(state, user, user)
        configure(directory)
        os.chown(directory / "api-token", user, user)
        env = {"STATE_DIRECTORY": str(state)}

        def owners() -> set[tuple[int, int]]:
            return {(file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) for file in state.iterdir()}

        with daemon(directory, user=user, **env) as running:
            running.started().open("acme", "first")
            assert running("backup", "copy", **env).returncode == 0
            running.open("acme", "second")
            assert owners() == {(user, 0o600)}
            running.process.kill()
            running.ended()
        assert run("backup", "after-crash", cwd=directory, **env).returncode == 0
        assert sessions_in(directory / "after-crash") == {"first", "second"}
        assert owners() == {(user, 0o600)}
        with daemon(directory, user=user, **env) as running:
            running.started().open("acme", "third")
        assert run("backup", "after-stop", cwd=directory, **env).returncode == 0
        assert owners() == {(user, 0o600)}
        (state / "lmdaemon.sqlite3.lock").unlink()
        assert run("restore", "copy", cwd=directory, **env).returncode == 0
        assert owners() == {(user, 0o600)}
        with daemon(directory, user=user, **env) as running:
            running.started().open("acme", "fourth")
        copies = [directory / copy for copy in ("copy", "after-crash", "after-stop")]
        assert {(copy.stat().st_uid, stat.S_IMODE(copy.stat().st_mode)) for copy in copies} == {(0, 0o600)}


# -- a backup put in place by hand, with the log of a crashed daemon still there


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A directory as kill -9 leaves it: the session `newer` is only in the write-ahead log. Beside it are two older
    copies, made by `lmdaemon backup` and by SQLite.
    """
    directory = tmp_path / "crashed"
    directory.mkdir()
    configure(directory)
    with daemon(directory) as running:
        running.started().open("acme", "older")
        assert running("backup", "copy").returncode == 0
        with (
            contextlib.closing(sqlite3.connect(directory / "lmdaemon.sqlite3")) as sql,
            contextlib.closing(sqlite3.connect(directory / "sqlites-own-copy")) as target,
        ):
            sql.backup(target)
        running.open("acme", "newer")
        running.process.kill()
        running.ended()
    assert (directory / "lmdaemon.sqlite3-wal").stat().st_size
    return directory


def by_hand(directory: Path, how: str) -> None:
    database = directory / "lmdaemon.sqlite3"
    if how == "copied over it":
        shutil.copyfile(directory / "copy", database)
    elif how == "moved over it":
        (directory / "sqlites-own-copy").replace(database)
    elif how == "emptied":
        os.truncate(database, 0)
    else:
        database.unlink()


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("copied over it", "is a copy"),
        ("moved over it", "was replaced"),
        ("emptied", "is missing"),
        ("removed", "is missing"),
    ],
)
def test_the_log_of_another_file_is_neither_mixed_in_nor_lost(crashed: Path, how: str, problem: str) -> None:
    """SQLite itself would mix the log in, or delete it, without a word."""
    by_hand(crashed, how)
    log = (crashed / "lmdaemon.sqlite3-wal").read_bytes()
    with daemon(crashed) as running:
        assert running.ended() == 1
        (failed,) = running.events("daemon.failed")
    assert f"lmdaemon.sqlite3: {problem}, but lmdaemon.sqlite3-wal of another file is beside it" in failed["reason"]
    assert (crashed / "lmdaemon.sqlite3-wal").read_bytes() == log
    assert run("restore", "copy", cwd=crashed).returncode == 0
    assert sessions_in(crashed / "lmdaemon.sqlite3") == {"older"}
    with daemon(crashed) as running:
        running.started()


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_with_its_own_log_is_taken_also_in_another_place(crashed: Path, tmp_path: Path, moved: bool) -> None:
    place = shutil.copytree(crashed, tmp_path / "elsewhere") if moved else crashed
    with daemon(place) as running:
        running.started()
        sessions = running.api("GET", "operators/acme/sessions")["items"]
        assert {session["sessionId"] for session in sessions} == {"older", "newer"}


# -- what a restored daemon does


async def test_after_a_restore_the_world_is_as_it_was_at_the_backup(tmp_path: Path) -> None:
    async with scripted_operator() as peer:
        told = f'notify = true\nurl = "{peer.url}"\nallow_private_network = true\n'
        configure(tmp_path, f'{told}[sessions]\nrestart_grace = "0s"\nidle_timeout = "1h"\n')
        await asyncio.to_thread(before_the_restore, tmp_path)
        ids = [received.headers["webhook-id"] for received in peer.received]
        assert len(ids) == 2
        await asyncio.to_thread(after_the_restore, tmp_path)
    again = peer.received[2:]
    assert [json.loads(received.body)["sessionId"] for received in again] == ["pending", "ended later"]
    # What was pending in the backup is the same delivery. A session that has ended since the backup ends again and is
    # sent under a new id, although its row gets the same number as before
    assert (again[0].headers["webhook-id"], again[0].body) == (ids[0], peer.received[0].body)
    renewed = again[1].headers["webhook-id"]
    assert renewed != ids[1]
    assert renewed.rpartition("_")[0] == ids[1].rpartition("_")[0] == "msg_2"


def delivered(running: Running, session: str) -> bool:
    (delivery,) = running.api("GET", f"operators/acme/sessions/{quote(session)}")["deliveries"]
    return bool(delivery["state"] == "delivered")


def before_the_restore(directory: Path) -> None:
    with daemon(directory) as running:
        running.started()
        for session in ("pending", "ended later", "kept"):
            running.open("acme", session)
        running.api("POST", "operators/acme/hold")
        running.api("POST", "operators/acme/sessions/pending/close")
        assert running("backup", "copy").returncode == 0
        running.api("POST", "operators/acme/release")
        poll(lambda: delivered(running, "pending"))
        running.api("POST", "operators/acme/sessions/ended%20later/close")
        poll(lambda: delivered(running, "ended later"))
        running.open("acme", "opened since")
        running.api("POST", "operators/acme/sessions/touch", {"sessionIds": ["kept"]})


def after_the_restore(directory: Path) -> None:
    assert run("restore", "copy", cwd=directory).returncode == 0
    with contextlib.closing(sqlite3.connect(directory / "lmdaemon.sqlite3")) as sql:
        (left_ms,) = sql.execute(
            "SELECT seen_ms + idle_ms - service_ms FROM session, clock WHERE session_id = 'kept'"
        ).fetchone()
    began = time.time()
    with daemon(directory) as running:
        running.started()
        kept = running.api("GET", "operators/acme/sessions/kept")
        assert kept["state"] == "active"
        assert datetime.fromisoformat(kept["expiresAt"]).timestamp() >= began + left_ms / 1000
        touched = running.api(
            "POST", "operators/acme/sessions/touch", {"sessionIds": ["kept", "ended later", "opened since"]}
        )
        assert touched == {"touched": 2, "unknown": ["opened since"], "ended": []}
        assert running("sessions", "touch", "acme", "opened since").returncode == 1
        assert running.open("acme", "opened since")["state"] == "active"
        (operator,) = running.api("GET", "operators")["items"]
        assert (operator["held"], operator["pending"]) == (True, 1)
        running.api("POST", "operators/acme/release")
        poll(lambda: delivered(running, "pending"))
        running.api("POST", "operators/acme/sessions/ended%20later/close")
        poll(lambda: delivered(running, "ended later"))


@pytest.mark.parametrize("downtime", ["pause", "count"])
def test_the_time_since_an_old_backup_is_downtime(tmp_path: Path, downtime: str) -> None:
    configure(tmp_path, f'[sessions]\nrestart_grace = "0s"\nidle_timeout = "1h"\ndowntime = "{downtime}"\n')
    with daemon(tmp_path) as running:
        running.started().open("acme", "live")
        assert running("backup", "copy").returncode == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "copy", isolation_level=None)) as sql:
        sql.execute("UPDATE clock SET wall_at = wall_at - 7200000")  # makes the backup two hours old
        sql.execute("UPDATE session SET seen_at = seen_at - 7200000, opened_at = opened_at - 7200000")
    assert run("restore", "copy", cwd=tmp_path).returncode == 0
    with daemon(tmp_path) as running:
        running.started()
        if downtime == "count":
            ended = poll(lambda: running.events("session.ended"))
            assert ended[0]["reason"] == "inactivity"
        else:
            session = running.api("GET", "operators/acme/sessions/live")
            assert session["state"] == "active"
            assert datetime.fromisoformat(session["expiresAt"]).timestamp() > time.time() + 1800
