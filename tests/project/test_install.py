"""`make install` and `make uninstall`, run for real into directories of their own: which files are put where, what
stays, what is removed.

What needs a service manager (users, starting, upgrades under load, the Debian package) is tested in tests/service.
`make install-test` runs these tests.
"""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Running, configure, environment

# pip builds and installs the program twice, which takes minutes on a busy machine
pytestmark = [pytest.mark.install, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"  # the default of make install
PREFIX = "/srv/lmd"  # not the default, so that every path must follow it
DOC = f"{PREFIX}/share/doc/lmdaemon"
OLDER = "[server]  # as an older version shipped it\n"
EDITED = '[server]\nlisten = "127.0.0.1:18080"\n'


def has_venv(python: str) -> bool:
    return (
        Path(python).exists() and not subprocess.run([python, "-c", "import ensurepip, venv"], check=False).returncode
    )


needs_venv = pytest.mark.skipif(not has_venv(PYTHON), reason=f"needs {PYTHON} with venv (python3-venv)")


def start(*words: str) -> "subprocess.Popen[str]":
    """Starts make in the environment of a user's shell, without the variables that the make and Python of the tests
    have set.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept)


def make(*words: str) -> "subprocess.CompletedProcess[str]":
    with start(*words) as running:
        said, complained = running.communicate(timeout=1800)
    return subprocess.CompletedProcess(words, running.returncode, said, complained)


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


class Trees:
    """The file trees of two machines after `make install`, and its output. `bare` had nothing before; `edited` had an
    older version, edited settings and a plug-in.
    """

    def __init__(self, directory: Path) -> None:
        self.bare, self.edited = directory / "bare", directory / "edited"
        prefix = self.edited / PREFIX[1:]
        write(self.edited / "etc/lmdaemon/config.toml", EDITED, mode=0o600)
        write(self.edited / DOC[1:] / "config.toml", OLDER)
        version = "import sys; print('python%d.%d' % sys.version_info[:2])"
        python = subprocess.run([PYTHON, "-c", version], capture_output=True, text=True, check=True).stdout.strip()
        modules = prefix / "lib" / python / "site-packages"
        write(modules / "acme_hooks.py", "# an administrator's plug-in")
        gone = write(modules / "gone/gone.py", "")
        write(modules / "gone/__pycache__/gone.cpython-311.pyc", "")
        older = (gone, write(prefix / "bin/lmdaemon", "an older version's"))
        write(prefix / "installed-files", "".join(f"/{path.relative_to(self.edited)}\n" for path in older))
        # At the same time, because half of the time is waiting
        commands = {tree: start("install", f"DESTDIR={tree}", f"PREFIX={PREFIX}") for tree in (self.bare, self.edited)}
        self.said = {}
        for tree, command in commands.items():
            self.said[tree], complained = command.communicate(timeout=1800)
            assert command.returncode == 0, complained


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    return Trees(tmp_path_factory.mktemp("install"))


def files(tree: Path) -> Iterator[Path]:
    return (path for path in tree.rglob("*") if path.is_symlink() or not path.is_dir())


def inside(tree: Path) -> set[str]:
    return {f"/{path.relative_to(tree)}" for path in files(tree)}


def listed(tree: Path) -> set[str]:
    return set((tree / PREFIX[1:] / "installed-files").read_text().splitlines())


def site(tree: Path) -> Path:
    (found,) = (tree / PREFIX[1:] / "lib").glob("python3.*/site-packages")
    return found


@needs_venv
def test_everything_lands_where_service_and_administrator_look_for_it(trees: Trees) -> None:
    outside = {path for path in inside(trees.bare) if not path.startswith((f"{PREFIX}/lib/", DOC))}
    units = [path.name for path in (ROOT / "systemd").iterdir() if path.suffix in (".service", ".socket", ".timer")]
    minor = site(trees.bare).parent.name
    assert outside == {
        *(f"{PREFIX}/bin/{name}" for name in ("python", "python3", minor, "lmdaemon")),
        f"{PREFIX}/pyvenv.cfg",
        f"{PREFIX}/installed-files",
        "/etc/lmdaemon/config.toml",
        "/usr/lib/sysusers.d/lmdaemon.conf",
        "/usr/local/bin/lmdaemon",
        "/usr/local/share/man/man1/lmdaemon.1.gz",
        "/usr/local/share/bash-completion/completions/lmdaemon",
        "/usr/local/share/zsh/site-functions/_lmdaemon",
        "/usr/local/share/fish/vendor_completions.d/lmdaemon.fish",
        *(f"/usr/lib/systemd/system/{unit}" for unit in units),
    }
    assert {f"{DOC}/{name}" for name in ("README.md", "CHANGELOG.md", "config.toml", "docs/plugins.md")} <= inside(
        trees.bare
    )
    assert (trees.bare / "usr/local/bin/lmdaemon").readlink() == Path(f"{PREFIX}/bin/lmdaemon")
    assert listed(trees.bare) == inside(trees.bare) - {"/etc/lmdaemon/config.toml"}


@needs_venv
def test_the_units_start_what_lies_below_prefix_and_nothing_else_of_ours(trees: Trees) -> None:
    for unit in (trees.bare / "usr/lib/systemd/system").iterdir():
        assert "/opt/lmdaemon" not in unit.read_text()
    service = (trees.bare / "usr/lib/systemd/system/lmdaemon.service").read_text()
    assert f"ExecStart={PREFIX}/bin/python " in service
    assert f"Documentation=file:{DOC}/README.md" in service


def test_the_default_is_a_directory_of_its_own_below_opt() -> None:
    shown = make("--dry-run", "install").stdout
    assert "PREFIX='/opt/lmdaemon'" in shown
    assert "BINDIR='/usr/local/bin'" in shown
    assert f"PYTHON='{PYTHON}'" in shown
    assert "PYTHON='python3.99'" in make("--dry-run", "install", "PYTHON=python3.99").stdout


@needs_venv
def test_settings_and_secrets_can_be_read_by_whom_they_are_for(
    trees: Trees,
) -> None:
    """The settings can be read by root and the service's group, secrets by root alone, and the rest by everybody."""

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(trees.bare / "etc/lmdaemon/config.toml") == 0o640
    assert mode(trees.bare / "etc/lmdaemon/credentials") == 0o700
    config = trees.bare / "etc/lmdaemon"
    for path in trees.bare.rglob("*"):
        if path.is_symlink() or path in (config / "config.toml", config / "credentials"):
            continue
        assert mode(path) in ((0o755,) if path.is_dir() or path.parent.name == "bin" else (0o644, 0o755)), path


@needs_venv
def test_no_file_knows_where_it_was_built(trees: Trees) -> None:
    """No file contains DESTDIR, the path of the sources or a build directory. So a package is the same wherever it is
    built.
    """
    for path in files(trees.bare):
        if not path.is_symlink():
            content = path.read_bytes()
            for place in (str(trees.bare), str(ROOT), "/tmp/tmp."):
                assert place.encode() not in content, path
    assert not list(site(trees.bare).glob("*.dist-info/direct_url.json"))


@needs_venv
def test_it_is_compiled_and_brings_no_installer(trees: Trees) -> None:
    assert not [name for name in ("pip", "setuptools", "wheel") if (site(trees.bare) / name).exists()]
    sources = list(site(trees.bare).rglob("*.py"))
    assert len(sources) > 100
    for source in sources:
        minor = site(trees.bare).parent.name.removeprefix("python").replace(".", "")
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-{minor}.pyc"
        # PEP 552: the source's time of change, by which Python decides whether to compile it again
        assert int.from_bytes(compiled.read_bytes()[8:12], "little") == int(source.stat().st_mtime), source
        assert f"{PREFIX}/lib/".encode() in compiled.read_bytes(), "a traceback names the installed file"


@needs_venv
def test_what_was_installed_runs_and_reads_its_settings(trees: Trees) -> None:
    python = trees.bare / PREFIX[1:] / "bin/python"
    config = trees.bare / "etc/lmdaemon/config.toml"
    command = [python, "-I", "-m", "lmdaemon", "--config", config, "check-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (trees.bare / PREFIX[1:] / "bin/lmdaemon").read_text().startswith(f"#!{PREFIX}/bin/python -I\n")


@needs_venv
def test_every_module_and_data_file_is_installed(trees: Trees) -> None:
    """Files are installed through a wheel, whose content pyproject.toml describes."""

    def inside_of(directory: Path) -> set[str]:
        found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path}

    assert inside_of(site(trees.bare) / "lmdaemon") == inside_of(ROOT / "lmdaemon")


@needs_venv
def test_a_daemon_of_what_was_installed_alone_opens_a_session(trees: Trees, tmp_path: Path) -> None:
    """The daemon runs with the libraries that lmdaemon requires, without those of the tests, and away from the
    sources.
    """
    assert not (site(trees.bare) / "pytest").exists()
    file = configure(tmp_path)
    command = [trees.bare / PREFIX[1:] / "bin/python", "-I", "-m", "lmdaemon", "--config", file]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "serve"], cwd=tmp_path, env=environment(), stderr=log)
    try:
        lm = Running(tmp_path, process, tmp_path / "log").started()
        assert lm.open("acme", "s1")["state"] == "active"
        shown = subprocess.run(
            [*command, "status"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"^acme +1 ", shown.stdout, re.MULTILINE)
    finally:
        process.terminate()
        assert process.wait(60) == 0


@needs_venv
def test_the_services_settings_are_the_shipped_ones_and_a_little_more(trees: Trees) -> None:
    """The service's settings differ in the path of the database, and in a restart grace that suits a service."""
    shipped = tomllib.loads((ROOT / "config.toml").read_text())
    installed = tomllib.loads((trees.bare / "etc/lmdaemon/config.toml").read_text())
    # A root shell has no $STATE_DIRECTORY, in which a relative path would be looked up.
    assert installed["database"].pop("path") == "/var/lib/lmdaemon/lmdaemon.sqlite3"
    assert installed["sessions"].pop("restart_grace") == "60s"
    del shipped["database"]["path"], shipped["sessions"]["restart_grace"]
    assert installed == shipped
    assert "first try" not in (trees.bare / "etc/lmdaemon/config.toml").read_text()


@needs_venv
def test_edited_settings_are_kept_and_it_is_said_where_the_new_ones_are(trees: Trees) -> None:
    config = trees.edited / "etc/lmdaemon/config.toml"
    assert config.read_text() == EDITED
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert (
        f"/etc/lmdaemon/config.toml: kept as you have it; this version's is {DOC}/config.toml"
        in trees.said[trees.edited]
    )
    fresh = (trees.bare / "etc/lmdaemon/config.toml").read_text()
    assert (trees.edited / DOC[1:] / "config.toml").read_text() == fresh


@needs_venv
def test_an_upgrade_removes_what_a_version_no_longer_has(trees: Trees) -> None:
    """Nothing that the administrator has added is removed."""
    added = f"/{(site(trees.edited) / 'acme_hooks.py').relative_to(trees.edited)}"
    assert inside(trees.edited) == inside(trees.bare) | {added}
    assert not (site(trees.edited) / "gone").exists()
    assert listed(trees.edited) == listed(trees.bare)


@needs_venv
def test_an_install_that_fails_leaves_the_one_before_as_it_was(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trees.edited, tmp_path / "tree", symlinks=True)

    def seen() -> dict[Path, tuple[float, bytes]]:
        return {path: (path.lstat().st_mtime, path.read_bytes()) for path in files(tmp_path / "tree") if path.is_file()}

    before = seen()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = make("install", f"DESTDIR={tmp_path}/tree", f"PREFIX={PREFIX}")
    assert done.returncode != 0
    assert "setuptools" in done.stderr  # pip could not get it
    assert seen() == before


@needs_venv
def test_uninstall_leaves_the_settings_and_nothing_else(trees: Trees, tmp_path: Path) -> None:
    shutil.copytree(trees.bare, tmp_path / "tree", symlinks=True)
    state = write(tmp_path / "tree/var/lib/lmdaemon/lmdaemon.sqlite3", "sessions")
    done = make("uninstall", f"DESTDIR={tmp_path}/tree", f"PREFIX={PREFIX}")
    assert done.returncode == 0, done.stderr
    assert inside(tmp_path / "tree") == {"/etc/lmdaemon/config.toml", f"/{state.relative_to(tmp_path / 'tree')}"}
    assert (tmp_path / "tree/etc/lmdaemon/credentials").is_dir()
    assert not (tmp_path / "tree" / PREFIX[1:]).exists()
    for kept in ("/etc/lmdaemon", "/var/lib/lmdaemon", "rm -r"):
        assert kept in done.stdout


@needs_venv
def test_uninstall_leaves_what_was_added_and_says_so(trees: Trees, tmp_path: Path) -> None:
    shutil.copytree(trees.edited, tmp_path / "tree", symlinks=True)
    done = make("uninstall", f"DESTDIR={tmp_path}/tree", f"PREFIX={PREFIX}")
    assert done.returncode == 0, done.stderr
    (added,) = (path for path in inside(tmp_path / "tree") if path.startswith(PREFIX))
    assert added.endswith("/acme_hooks.py")
    assert f"{PREFIX}: kept" in done.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["PREFIX=/usr/local"], "PREFIX: must be a directory of lmdaemon's own"),
        (["PREFIX=opt"], "PREFIX: must be an absolute directory (got 'opt')"),
        (["PREFIX=/srv/a b"], "PREFIX, BINDIR, DESTDIR: letters, digits"),
        (["BINDIR=/usr/bin"], "usr/bin/lmdaemon: is there and not of this installation"),
        (["PYTHON=/nowhere/python3"], "needs Python: apt install python3 python3-venv"),
    ],
)
def test_install_refuses_with_the_reason_and_touches_nothing(tmp_path: Path, words: list[str], reason: str) -> None:
    write(tmp_path / "usr/local/share/others", "")
    write(tmp_path / "usr/bin/lmdaemon", "another program")
    before = inside(tmp_path)
    done = make("install", f"DESTDIR={tmp_path}", *words)
    assert done.returncode != 0
    assert f"make install: {reason}" in done.stderr or f"make install: {tmp_path}/{reason}" in done.stderr
    assert inside(tmp_path) == before


@pytest.mark.parametrize(
    ("works", "reason"),
    [
        ("*ensurepip*", "needs Python's venv: apt install python3-venv"),
        ("*version_info*", "needs Python 3.11 or newer"),
    ],
)
def test_what_a_python_lacks_is_told_with_the_package_that_has_it(tmp_path: Path, works: str, reason: str) -> None:
    python = write(tmp_path / "python3", f'#!/bin/sh\ncase $2 in {works}) exit 1 ;; esac\n', mode=0o755)  # fmt: skip
    done = make("install", f"DESTDIR={tmp_path}/tree", f"PYTHON={python}")
    assert done.returncode != 0
    assert reason in done.stderr
    assert not (tmp_path / "tree").exists()


def test_a_python_in_somebodys_home_is_refused_for_the_sandbox_hides_it(tmp_path: Path) -> None:
    python = write(
        tmp_path / "python3", "#!/bin/sh\ncase $2 in *realpath*) echo /root/.pyenv/bin/python3 ;; esac\n", mode=0o755
    )
    done = make("install", f"DESTDIR={tmp_path}/tree", f"PYTHON={python}")
    assert done.returncode != 0
    assert "lies where the sandboxed service cannot see it" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to stop being it")
def test_without_root_it_is_said_that_root_is_needed() -> None:
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "sh",
        str(ROOT / "systemd/install.sh"),
        "install",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "needs root, or a DESTDIR" in done.stderr


def test_uninstall_of_nothing_says_so(tmp_path: Path) -> None:
    done = make("uninstall", f"DESTDIR={tmp_path}")
    assert done.returncode != 0
    assert "nothing is known to be installed there" in done.stderr


def test_the_package_is_built_with_debians_python_alone(tmp_path: Path) -> None:
    python = write(tmp_path / "python3", f"#!/bin/sh\necho {tmp_path}/python3\n", mode=0o755)
    done = make("deb", f"PYTHON={python}")
    assert done.returncode != 0
    assert f"PYTHON: must be Debian's own, which the package depends on (got {tmp_path}/python3)" in done.stderr
