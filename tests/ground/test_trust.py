"""trust: a configuration file at a default place is read only if no other user can have written it."""

import os
import shutil
from pathlib import Path

import pytest
from commands import run, secret_file

from lmdaemon import trust
from lmdaemon.config import reader
from lmdaemon.config.findings import ConfigError

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a config.toml that is found there by default."""
    directory = tmp_path / "here"
    directory.mkdir(mode=0o755)
    monkeypatch.chdir(directory)
    monkeypatch.delenv("LMDAEMON_CONFIG", raising=False)
    (directory / "config.toml").write_text("[log]\nlevel = 'debug'\n")
    (directory / "config.toml").chmod(0o644)
    return directory


def refusal() -> str:
    with pytest.raises(ConfigError) as refused:
        reader.of_command(None)
    (finding,) = refused.value.findings
    before, after = (
        "config.toml: was found, not named, and is not read: ",
        ". If you know it, name it: --config config.toml",
    )
    assert finding.startswith(before)
    assert finding.endswith(after)
    return finding.removeprefix(before).removesuffix(after)


def test_ones_own_file_in_ones_own_directory_is_read(here: Path) -> None:
    assert reader.of_command(None).log.level == "debug"


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o757])
def test_a_directory_that_others_can_write_to_is_not_trusted(here: Path, mode: int) -> None:
    here.chmod(mode)
    assert refusal().startswith(f"others can write to its directory {here} (owner ")
    assert refusal().endswith(f", mode {mode:o})")


def test_a_file_that_others_can_write_to_is_not_trusted(here: Path) -> None:
    (here / "config.toml").chmod(0o646)
    assert refusal().startswith("others can write to it (owner ")


@as_root
@pytest.mark.parametrize("what", [".", "config.toml"])
def test_what_belongs_to_somebody_else_is_not_trusted(here: Path, what: str) -> None:
    os.chown(here / what, STRANGER, STRANGER)
    named = "it" if what == "config.toml" else f"its directory {here}"
    assert refusal() == f"{named} belongs to user {STRANGER}, neither to root nor to you"


@as_root
def test_what_a_group_can_write_to_is_trusted_if_it_is_its_owners_own(here: Path) -> None:
    """A file that a group can write is trusted only if the group has no member but the file's owner."""
    file = here / "config.toml"
    file.chmod(0o664)
    assert reader.of_command(None).log.level == "debug"  # root's own group
    os.chown(file, 0, STRANGER)
    assert refusal() == f"the group {STRANGER} can write to it (mode 664)"
    file.chmod(0o640)
    # As `make install` leaves it: root owns the file, and the service's group may read it
    assert reader.of_command(None).log.level == "debug"


@as_root
@pytest.mark.parametrize("loose", ["the link's directory", "the file's directory", "the file"])
def test_a_link_is_followed_and_both_its_ends_are_looked_at(here: Path, tmp_path: Path, loose: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (here / "config.toml").rename(elsewhere / "real.toml")
    (here / "config.toml").symlink_to("../elsewhere/real.toml")
    assert reader.of_command(None).log.level == "debug"
    at = {"the link's directory": here, "the file's directory": elsewhere, "the file": elsewhere / "real.toml"}[loose]
    os.chown(at, STRANGER, STRANGER)
    assert f"belongs to user {STRANGER}" in refusal()


def test_the_callers_word_is_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.chmod(0o1777)
    assert reader.of_command(Path("config.toml")).log.level == "debug"
    monkeypatch.setenv("LMDAEMON_CONFIG", "config.toml")
    assert reader.of_command(None).log.level == "debug"


def test_a_file_that_was_found_is_looked_at_again_at_a_reload(here: Path) -> None:
    settings = reader.of_command(None)
    assert settings.found
    here.chmod(0o1777)
    with pytest.raises(ConfigError, match="not named"):
        reader.load(settings.file, found=settings.found)


def test_what_is_exchanged_after_the_look_is_not_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened by its name in the directory that was checked, never through a link and not by its full
    path.
    """
    real_open = os.open

    def exchanged(path: str | Path, flags: int, *args: int, **options: int) -> int:
        if path == "config.toml":  # the directory has been checked by now, and the file not yet been opened
            shutil.move(here, here.with_name("away"))
            here.mkdir()
            (here / "config.toml").write_text("[log]\nlevel = 'error'\n")
        return real_open(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exchanged)
        assert trust.read(Path("config.toml")) == b"[log]\nlevel = 'debug'\n"
    (here / "config.toml").unlink()
    (here / "config.toml").symlink_to("/dev/null")
    # No link is resolved: as if the link had been made after links were resolved
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    with pytest.raises(OSError, match="symbolic links"):
        trust.read(here / "config.toml")


@as_root
@pytest.mark.parametrize("command", ["status", "check-config", "serve", "backup copy", "sessions export"])
def test_roots_command_in_a_strangers_directory_ignores_the_file(tmp_path: Path, command: str) -> None:
    directory = tmp_path / "public"
    directory.mkdir()
    directory.chmod(0o1777)
    secret_file(directory / "root-only", "root:$y$hash")
    file = directory / "config.toml"
    file.write_text(
        "[api]\ntoken_file = 'root-only'\n[plugins.p]\nuse = 'subprocess:Popen'\n"
        f"options = {{ '/usr/bin/touch' = 1, '{directory}/pwned' = 1 }}\n"
    )
    os.chown(file, STRANGER, STRANGER)
    done = run(*command.split(), cwd=directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.toml: was found, not named, and is not read: others can write to its directory" in done.stderr
    assert {found.name for found in directory.iterdir()} == {"config.toml", "root-only"}


def test_check_config_calls_nothing_that_a_file_names(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        f"[plugins.p]\nuse = 'subprocess:Popen'\noptions = {{ '/usr/bin/touch' = 1, '{tmp_path}/pwned' = 1 }}\n"
    )
    done = run("check-config", cwd=tmp_path)
    assert done.returncode == 2
    assert "plugins.p.use: must have an async method session_ended(event) (got 'subprocess:Popen')" in done.stderr
    assert not (tmp_path / "pwned").exists()
