"""Commands that root runs where another user owns the directory: no link of that user makes them read or write a file
of root's. The same for links in a directory like /tmp.
"""

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import LIBRARIES, command_for, configure, daemon, environment, run

from lmdaemon import rights
from lmdaemon.rights import Rights, UnsafeError, acting_with

OWNER, OTHER = 12345, 12346

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

Seen = dict[str, tuple[int, int, int, bytes]]


def seen(directory: Path) -> Seen:
    """Every file and directory below it: owner, mode, time of the last change, content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        is_file = path.is_file()
        found[str(path)] = (path.stat().st_uid, path.stat().st_mode, path.stat().st_mtime_ns if is_file else 0,
                            path.read_bytes() if is_file else b"")  # fmt: skip
    return found


class Machine:
    """A configuration that root owns, a backup beside it, the state directory of the service, a directory for root
    alone, and a shared directory like /tmp.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.state, self.roots, self.shared = home, home / "state", home / "root-only", home / "shared"

    def set_up(self) -> None:
        for directory, mode in ((self.state, 0o700), (self.roots, 0o700), (self.shared, 0o1777)):
            directory.mkdir()
            directory.chmod(mode)
        (self.roots / "secret").write_text("of root's alone\n")
        (self.roots / "secret").chmod(0o600)
        configure(self.home)
        with daemon(self.home, STATE_DIRECTORY=str(self.state)) as running:
            running.started().open("acme", "kept")
        for path in (self.state, *self.state.iterdir()):
            os.chown(path, OWNER, OWNER)
        assert self.run("backup", "copy").returncode == 0

    def run(self, *words: object) -> "subprocess.CompletedProcess[str]":
        return run(*words, cwd=self.home, STATE_DIRECTORY=str(self.state))

    def plant(self, link: Path, target: Path, owner: int = OWNER) -> None:
        """Puts a link of this user in the place of whatever is there."""
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.chown(link, owner, owner, follow_symlinks=False)


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A directory of root's that others may enter, as /var/lib is. Other users cannot enter the directories that pytest
    makes.
    """
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def once_made() -> Iterator[Path]:
    with open_directory() as home:
        Machine(home).set_up()
        yield home


@pytest.fixture
def machine(once_made: Path) -> Iterator[Machine]:
    """A machine with the database of a stopped daemon and a copy of it."""
    with open_directory() as home:
        subprocess.run(["cp", "-a", f"{once_made}/.", str(home)], check=True)
        yield Machine(home)


COMMANDS = {
    "backup": ("backup", "out"),
    "export": ("sessions", "export", "--output", "out"),
    "restore": ("restore", "copy"),
}


@pytest.mark.parametrize("target", ["secret", "absent"])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_link_of_the_service_leads_root_to_a_file_of_roots(
    machine: Machine, command: str, suffix: str, target: str
) -> None:
    before = seen(machine.roots)
    machine.plant(machine.state / f"lmdaemon.sqlite3{suffix}", machine.roots / target)
    done = machine.run(*COMMANDS[command])
    assert seen(machine.roots) == before
    assert done.returncode in (0, 1)
    assert "of root's alone" not in done.stdout + done.stderr
    assert not [path for path in machine.home.glob("out*") if b"of root's" in path.read_bytes()]


def test_a_lock_that_is_a_link_is_named_and_nothing_is_restored(machine: Machine) -> None:
    lock = machine.state / "lmdaemon.sqlite3.lock"
    machine.plant(lock, machine.roots / "secret")
    before = seen(machine.state)
    done = machine.run("restore", "copy")
    database = machine.state / "lmdaemon.sqlite3"
    assert done.stderr == f"lmdaemon: {database}: cannot be opened: is a link ({lock})\n"
    assert done.returncode == 1
    assert seen(machine.state) == before


def test_a_lock_that_is_another_name_of_a_file_is_not_written_to(machine: Machine) -> None:
    lock, other = machine.state / "lmdaemon.sqlite3.lock", machine.state / "other"
    other.write_text("kept")
    os.chown(other, OWNER, OWNER)
    lock.unlink()
    lock.hardlink_to(other)
    done = machine.run("restore", "copy")
    assert (done.returncode, other.read_text()) == (1, "kept")
    assert f"must be a plain file with one name ({lock})" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_services_directory_everything_is_the_services(machine: Machine, command: str) -> None:
    for words in (COMMANDS[command], ("backup", machine.state / "beside"), ("restore", machine.state / "beside")):
        done = machine.run(*words)
        assert done.returncode == 0, done.stderr
    assert {path.lstat().st_uid for path in machine.state.rglob("*")} == {OWNER}
    assert {path.lstat().st_uid for path in machine.home.glob("[co]*")} == {0}


@pytest.mark.parametrize("words", [("backup",), ("backup", "--force"), ("sessions", "export", "--force", "--output")])
@pytest.mark.parametrize("target", ["secret", "absent"])
def test_no_link_in_a_shared_directory_leads_root_to_a_file_of_roots(
    machine: Machine, words: tuple[str, ...], target: str
) -> None:
    before = seen(machine.roots)
    link = machine.shared / "result"
    machine.plant(link, machine.roots / target, OTHER)
    done = machine.run(*words, link)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"lmdaemon: {link}: is a link of user {OTHER} in a directory that others can write to\n")
    assert seen(machine.roots) == before
    assert list(machine.shared.iterdir()) == [link]


def test_nor_does_one_on_the_way(machine: Machine) -> None:
    machine.plant(machine.shared / "directory", machine.roots, OTHER)
    before = seen(machine.roots)
    done = machine.run("backup", machine.shared / "directory/result")
    assert (done.returncode, seen(machine.roots)) == (1, before)
    assert f"is a link of user {OTHER}" in done.stderr


def test_a_link_of_roots_own_in_a_shared_directory_is_followed(machine: Machine) -> None:
    (machine.shared / "latest").symlink_to(machine.roots / "result")
    assert machine.run("backup", machine.shared / "latest").returncode == 0
    assert (machine.roots / "result").stat().st_size


def test_a_result_in_a_shared_directory_replaces_what_is_there(machine: Machine) -> None:
    """The file that is there may be anybody's. The result belongs to root."""
    result = machine.shared / "result"
    result.write_text("of another's")
    os.chown(result, OTHER, OTHER)
    assert machine.run("backup", result, "--force").returncode == 0
    assert (result.stat().st_uid, stat.S_IMODE(result.stat().st_mode)) == (0, 0o600)
    assert list(machine.shared.iterdir()) == [result]


@pytest.mark.parametrize("how", ["another's", "open to all", "open to a group"])
def test_root_writes_no_result_where_others_can_exchange_it(machine: Machine, how: str) -> None:
    place = machine.home / "place"
    place.mkdir()
    place.chmod({"another's": 0o755, "open to all": 0o777, "open to a group": 0o775}[how])
    os.chown(place, OTHER if how == "another's" else 0, OTHER)
    done = machine.run("backup", place / "copy")
    whose = f"user {OTHER}" if how == "another's" else "others"
    assert done.stderr == (
        f"lmdaemon: {place}/copy: {whose} can exchange files in {place}: root writes only where nobody else can\n"
    )
    assert (done.returncode, list(place.iterdir())) == (1, [])


def test_a_copy_in_a_shared_directory_is_restored_without_a_log(
    machine: Machine,
) -> None:
    """Any user may have put the write-ahead log there."""
    copy = Path(shutil.copy(machine.home / "copy", machine.shared))
    assert machine.run("restore", copy).returncode == 0
    (machine.shared / "copy-wal").write_text("planted")
    done = machine.run("restore", copy)
    assert done.returncode == 1
    assert "copy-wal is beside it, where others can make files" in done.stderr
    assert sorted(path.name for path in machine.shared.iterdir()) == ["copy", "copy-wal"]


def test_a_daemon_of_roots_does_not_start_in_anothers_directory(machine: Machine) -> None:
    before = seen(machine.state)
    with daemon(machine.home, STATE_DIRECTORY=str(machine.state)) as running:
        assert running.ended() == 1
        (failed,) = running.events("daemon.failed")
    database = machine.state / "lmdaemon.sqlite3"
    assert failed["reason"] == (
        f"{database}: root must not keep a database where user {OWNER} can exchange it: run as user {OWNER}"
    )
    assert seen(machine.state) == before


def test_nor_where_everybody_can_put_files_beside_its_database(machine: Machine) -> None:
    before = seen(machine.shared)
    with daemon(machine.home, STATE_DIRECTORY=str(machine.shared)) as running:
        assert running.ended() == 1
        (failed,) = running.events("daemon.failed")
    assert f"others can make files in {machine.shared}: root keeps its database" in failed["reason"]
    assert seen(machine.shared) == before


def test_links_of_others_in_a_shared_directory_lead_nobody_else_either(machine: Machine) -> None:
    """The kernel protects only against following a link. A result is written to the path that a link names, so the
    command itself must refuse.
    """
    mine = machine.shared / "mine"
    mine.mkdir()
    (mine / "precious").write_text("precious")
    for path in (mine, mine / "precious", *machine.state.rglob("*"), machine.home / "api-token"):
        os.chown(path, OWNER, OWNER)
    machine.plant(machine.shared / "result", mine / "precious", OTHER)
    done = subprocess.run(
        [*command_for(OWNER), "backup", str(machine.shared / "result"), "--force"],
        cwd=machine.home,
        env=environment(PYTHONPATH=LIBRARIES, STATE_DIRECTORY=str(machine.state)),
        capture_output=True,
        text=True,
        check=False,
        user=OWNER,
        group=OWNER,
        extra_groups=[],
        timeout=120,
    )
    assert (done.returncode, (mine / "precious").read_text()) == (1, "precious")
    assert f"is a link of user {OTHER} in a directory that others can write to" in done.stderr


# -- whose rights


def in_force() -> tuple[int, int, set[int]]:
    return os.geteuid(), os.getegid(), set(os.getgroups())


def test_rights_are_in_force_inside_nest_and_come_back_whatever_is_raised() -> None:
    before = in_force()
    owner, roots = Rights(OWNER, OWNER, (OWNER,)), rights.own()
    with contextlib.suppress(KeyError), acting_with(owner):
        assert in_force() == (OWNER, OWNER, {OWNER})
        with acting_with(roots):
            assert in_force() == before
            with acting_with(Rights(OTHER, OTHER, ())):
                assert in_force() == (OTHER, OTHER, set())
        assert in_force() == (OWNER, OWNER, {OWNER})
        raise KeyError
    assert in_force() == before


def test_a_database_is_used_with_the_rights_of_whoever_could_exchange_it(machine: Machine) -> None:
    (machine.home / "link").symlink_to(machine.state / "lmdaemon.sqlite3")
    for way in ("state/lmdaemon.sqlite3", "link", "root-only/../state/absent"):
        assert rights.for_database(machine.home / way).uid == OWNER
    assert rights.for_database(machine.roots / "absent").uid == 0
    theirs = machine.shared / "theirs"
    theirs.touch()
    os.chown(theirs, OTHER, OTHER)
    assert rights.for_database(theirs).uid == OTHER
    with pytest.raises(UnsafeError, match="others can make files"):
        rights.for_database(machine.shared / "absent")


@pytest.mark.parametrize(("mode", "remedy"), [(0o777, "chmod go-w {}"), (0o1777, "choose a directory of its own")])
def test_it_is_told_what_makes_a_directory_safe(machine: Machine, mode: int, remedy: str) -> None:
    machine.shared.chmod(mode)
    with pytest.raises(UnsafeError) as caught:
        rights.for_database(machine.shared / "absent")
    assert str(caught.value).endswith(f"; {remedy.format(machine.shared)}, or run lmdaemon as another user")
    machine.shared.chmod(0o755)
    assert rights.for_database(machine.shared / "absent").uid == 0


def test_a_circle_of_links_is_no_endless_way(machine: Machine) -> None:
    for name, target in (("a", "b"), ("b", "a")):
        (machine.roots / name).symlink_to(target)
    with pytest.raises(UnsafeError, match="too many links"):
        rights.for_database(machine.roots / "a/x")
