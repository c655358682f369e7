"""Commands with a broken file: they read what they need of it, warn of the other errors, and do their work."""

from pathlib import Path

import pytest

from lmdaemon.config import reader
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Settings

SOUND = '[api]\nlisten = "127.0.0.1:7001"\n[database]\npath = "here.sqlite3"\n'
NEEDS = ("api", "database")


def load(home: Path, text: str, needs: tuple[str, ...] = NEEDS) -> Settings:
    file = home / "config.toml"
    file.write_text(text)
    return reader.load(file, secrets="optional", needs=needs)


def refused(home: Path, text: str, needs: tuple[str, ...] = NEEDS) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(home, text, needs)
    return caught.value.findings


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ('[sessions]\nidle_timeout = "soon"\n', "sessions.idle_timeout: must be a duration"),
        ('[operators.a]\nprovider_id = "p"\nnotify = true\n', "operators.a.url: is required"),
        ("[operators.a]\nprovider_id = 'p\n", "not valid TOML: "),
        ("[sesions]\n", "sesions: is no table of this file (did you mean 'sessions'?)"),
        ("[sessions]\nidle_timeout = 1\nidle_timeout = 1\n", "not valid TOML: "),
        ('[operators.a]\nurl = "https://api.example/"\nx\n', "not valid TOML: "),
    ],
)
@pytest.mark.parametrize("above", [True, False])
def test_errors_in_other_tables_are_told_and_harmless(tmp_path: Path, broken: str, told: str, above: bool) -> None:
    settings = load(tmp_path, broken + SOUND if above else SOUND + broken)
    assert any(finding.startswith(told) for finding in settings.unusable)
    assert settings.api.listen.text == "127.0.0.1:7001"
    assert settings.database == tmp_path / "here.sqlite3"


@pytest.mark.parametrize(
    "text",
    [
        SOUND.replace("7001", "70010"),
        SOUND.replace("path = ", "path "),
        SOUND.replace("[api]", "[api"),
        SOUND.replace("[api]", "api]"),
        '[sessions]\nx\n[api]\n[api]\nlisten = "127.0.0.1:7001"\n',
        'x\napi.listen = "127.0.0.1:7001"\n',
        'x\n[api.listen]\n"127.0.0.1:7001"\n',
        "x\n[ api ]\n",
        SOUND.replace("[api]", "[apl]"),
        SOUND.replace("[api]", "[administration]"),
        SOUND.replace("[database]", "[databse]") + "x\n",
    ],
)
def test_errors_in_the_tables_that_are_needed_are_refused(tmp_path: Path, text: str) -> None:
    """An error may hide a table that is there in another form, so such a file is not read as one without the table."""
    assert refused(tmp_path, text)


def test_a_broken_file_without_the_table_has_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "[sessions\n").api.listen.text == "127.0.0.1:8081"


def test_what_needs_all_of_the_file_is_refused_as_before(tmp_path: Path) -> None:
    text = SOUND + '[sessions]\nidle_timeout = "soon"\n'
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError):
        reader.load(tmp_path / "config.toml")


def test_an_operator_is_needed_without_the_others(tmp_path: Path) -> None:
    text = '[operators.a]\nprovider_id = "p"\n[operators.b]\nprovider_id = 5\n'
    assert load(tmp_path, text, ("operators.a",)).operators["a"].provider_id == "p"
    assert refused(tmp_path, text, ("operators.b",)) == [
        f"{tmp_path}/config.toml: operators.b.provider_id: must be a string (got 5)"
    ]
