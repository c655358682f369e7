"""Shell completion: the shells accept the scripts, which complete commands, options and file names."""

import shutil
import subprocess
from pathlib import Path

import pytest
from commands import run

from lmdaemon.commands import cli


def script(shell: str, directory: Path) -> str:
    done = run("completion", shell, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_its_options_are_completed(tmp_path: Path, shell: str) -> None:
    found = script(shell, tmp_path)
    for words in cli.COMMANDS:
        assert words.split()[-1] in found, words
    for option in ("idle-timeout", "client-cert", "hash-key-file", "sink"):
        assert option in found, option


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_the_script(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "script").write_text(script(shell, tmp_path))
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, capture_output=True, timeout=60)


def completed(directory: Path, *words: str) -> list[str]:
    """What bash offers as completions of the last of these words."""
    (directory / "script").write_text(script("bash", directory))
    program = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
"$(complete -p lmdaemon | sed 's/.*-F \\([^ ]*\\).*/\\1/')" lmdaemon "${COMP_WORDS[COMP_CWORD]}" ''
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "-c", program, "bash", *words], cwd=directory, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_offers_what_can_stand_there(tmp_path: Path) -> None:
    (tmp_path / "my-file.toml").touch()
    assert completed(tmp_path, "lmdaemon", "sta") == ["status"]
    assert completed(tmp_path, "lmdaemon", "sessions", "sh") == ["show"]
    assert "--idle-timeout" in completed(tmp_path, "lmdaemon", "sessions", "open", "--")
    assert completed(tmp_path, "lmdaemon", "deliveries", "list", "--state", "de") == ["delivered", "dead"]
    assert completed(tmp_path, "lmdaemon", "--config", "my") == ["my-file.toml"]


def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError")
    done = run("completion", "bash", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "lmdaemon: completion needs shtab: pip install 'lmdaemon[completion]'\n"
