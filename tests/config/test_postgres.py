"""`[database] url`: a PostgreSQL database instead of the file, the rules for the URL, and where its password may
stand.
"""

from pathlib import Path

import pytest

from lmdaemon.config import reader, rules
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Settings

PASSWORD = "hush-4711-hush-4711"
URL = "postgresql://lm@db1.example:5432,db2.example/lmdaemon?target_session_attrs=read-write"


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)


def load(home: Path, text: str) -> Settings:
    file = home / "config.toml"
    file.write_text(text)
    return reader.load(file)


def finding(home: Path, text: str) -> str:
    """The only error of the file."""
    with pytest.raises(ConfigError) as caught:
        load(home, text)
    (found,) = caught.value.findings
    assert PASSWORD not in found
    return found.removeprefix(f"{home}/config.toml: ")


def test_a_url_takes_the_place_of_the_file(tmp_path: Path) -> None:
    settings = load(tmp_path, f'[database]\nurl = "{URL}"\nmigrate = false\nkeep_ended = "8d"\n')
    assert settings.postgres is not None
    assert (settings.postgres.url, settings.postgres.password, settings.postgres.migrate) == (URL, None, False)


@pytest.mark.parametrize("key", ["password_file", "password_env"])
def test_the_password_comes_from_a_file_or_a_variable_and_is_never_shown(tmp_path: Path, key: str) -> None:
    (tmp_path / "DB_PASSWORD").write_text(PASSWORD + "\n")
    (tmp_path / "DB_PASSWORD").chmod(0o600)
    settings = load(tmp_path, f'[database]\nurl = "{URL}"\n{key} = "DB_PASSWORD"\n')
    assert settings.postgres is not None
    assert settings.postgres.password == PASSWORD
    assert PASSWORD not in f"{settings!r} {settings.postgres!r} {settings.tables!r} {settings.warnings!r}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///lmdaemon",
        "postgres://db",
        "postgresql://lm%40corp@[2001:db8::1]:5433/lm?passfile=/etc/lmdaemon/pgpass",
        "postgresql://?service=lmdaemon",
    ],
)
def test_urls_as_libpq_reads_them_are_taken(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, f'[database]\nurl = "{url}"\n').postgres is not None


SHAPE = "must be a URL such as postgresql://user@host/name, with special characters percent-escaped"
NO_PASSWORD = "must not hold a password: name its file in password_file, or a variable in password_env"


@pytest.mark.parametrize(
    ("written", "key", "rule"),
    [
        (f'url = "{URL}"\npath = "lmdaemon.sqlite3"', "url", "and path must not both be given"),
        (f'url = "postgresql://lm:{PASSWORD}@db/lm"', "url", NO_PASSWORD),
        (f'url = "postgresql://lm@db/lm?password={PASSWORD}"', "url", NO_PASSWORD),
        (f'url = "postgresql://lm@db/lm?sslpassword={PASSWORD}"', "url", NO_PASSWORD),
        (f'url = "postgresql://lm:{PASSWORD}@x@db/lm"', "url", SHAPE),
        (f'url = "mysql://lm:{PASSWORD}@db/lm"', "url", SHAPE),
        ('url = "host=db dbname=lm"', "url", SHAPE),
        ('url = "postgresql://db/lm#x"', "url", SHAPE),
        (
            'url = "postgresql://db/lm?sslmod=require"',
            "url",
            'must be a URL that libpq can read: invalid URI query parameter: "sslmod"',
        ),
        (
            'url = "postgresql://db/l%zz"',
            "url",
            'must be a URL that libpq can read: invalid percent-encoded token: "l%zz"',
        ),
        ('password_env = "DB_PASSWORD"', "password_env", "is for a database.url, and there is none"),
        (
            f'url = "{URL}"\npassword_env = "DB_PASSWORD"\npassword_file = "x"',
            "password_file",
            "and password_env must not both be given",
        ),
    ],
)
def test_what_contradicts_itself_or_holds_a_password_is_refused(
    tmp_path: Path, written: str, key: str, rule: str
) -> None:
    assert finding(tmp_path, f"[database]\n{written}\n") == f"database.{key}: {rule}"


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "needs psycopg, which is not installed: pip install 'lmdaemon[postgres]'"
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    assert finding(tmp_path, f'[database]\nurl = "{URL}"\n') == f"database.url: {rule}"


def test_settings_of_several_daemons_and_of_mass_expiry(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[sessions]\nmass_expiry = "pause"\ndaemon_grace = "0s"\n[api]\nconsole = false\n[operators.a]\n'
        'provider_id = "a"\n[operators.b]\nprovider_id = "b"\nmass_expiry = "warn"\n',
    )
    assert (settings.daemon_grace_s, settings.api.console) == (0, False)
    assert {name: one.mass_expiry for name, one in settings.operators.items()} == {"a": "pause", "b": "warn"}
    assert load(tmp_path, "").daemon_grace_s == 10
