"""Output on a terminal: progress of long work, tables of the terminal's width, a status that refreshes. None of this
goes to a file or pipe.
"""

import re
from collections.abc import Iterator

import pytest
from commands import Running, configure, daemon, poll, run
from terminals import Terminal

from lmdaemon.commands.shared import NARROWEST, fitted


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("terminal")
    configure(directory)
    with daemon(directory) as running:
        running.started()
        running.open("acme", "a-session-with-a-long-name" * 4)
        yield running


@pytest.mark.parametrize("columns", [80, 0])
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("backup", "copy-{}"), "copying: "),
        (("sessions", "export", "--output", "export-{}"), "exporting: "),
        (("sessions", "export"), "exporting: "),
    ],
)
def test_long_work_shows_its_progress_on_a_terminal_and_nowhere_else(
    lm: Running, words: tuple[str, ...], shown: str, columns: int
) -> None:
    """The progress line is erased at the end."""
    on_terminal = (word.format(f"terminal-{columns}") for word in words)
    terminal = Terminal(lm.directory, *on_terminal, columns=columns, only_messages=True)
    assert terminal.ended() == 0, terminal.text
    assert shown in terminal.text
    assert terminal.text.rpartition("\r")[2].strip() == ""
    done = run(*(word.format(f"elsewhere-{columns}") for word in words), cwd=lm.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout


def test_rows_that_go_to_the_terminal_have_no_progress_between_them(lm: Running) -> None:
    terminal = Terminal(lm.directory, "sessions", "export")
    assert terminal.ended() == 0
    assert "exporting" not in terminal.text


def test_a_table_is_as_wide_as_the_terminal_and_whole_elsewhere(lm: Running) -> None:
    terminal = Terminal(lm.directory, "status", columns=60)
    assert terminal.ended() == 0
    table = terminal.text.replace("\r", "").split("\n\n")[-1]
    assert max(map(len, table.splitlines())) <= 60
    whole = run("status", cwd=lm.directory).stdout.split("\n\n")[-1]
    assert "oldestPendingSeconds" in whole
    assert "…" in table
    assert "…" not in whole


@pytest.mark.parametrize(
    ("widths", "room", "found"),
    [
        ([4, 10, 20], 100, [4, 10, 20]),
        ([4, 10, 20], 38, [4, 10, 20]),
        ([4, 10, 20], 37, [4, 10, 19]),
        ([4, 20, 20], 34, [4, 13, 13]),
        ([50, 20, 20], 40, [50, NARROWEST, NARROWEST]),
        ([50], 40, [50]),
    ],
)
def test_the_widest_columns_give_way_first(widths: list[int], room: int, found: list[int]) -> None:
    assert fitted(widths, room) == found


def test_a_status_that_follows_shows_what_has_changed(lm: Running) -> None:
    terminal = Terminal(lm.directory, "status", "--watch", "1", columns=200)
    poll(lambda: "acme" in terminal.read())
    lm.open("acme", "another")
    poll(lambda: re.search(r"acme +2 ", terminal.read()))
    terminal.process.terminate()
    terminal.ended()
    assert "\x1b[" in terminal.text  # each status overwrites the one before
