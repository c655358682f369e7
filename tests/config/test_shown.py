"""The settings as they are shown: as lines of a configuration file, without any secret."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from lmdaemon.config import reader, shown, values
from lmdaemon.config.findings import Findings
from lmdaemon.config.settings import Settings
from lmdaemon.config.tables import Tables

SECRET = "hush-4711-hush-4711"
FILE = f"""
[server]
listen = "[::1]:8080"
trusted_proxies = ["192.0.2.0/24"]
[api]
token_file = "tokens"
[delivery]
schedule = ["250ms", "90s", "36h"]
[operators.a]
provider_id = "p"
notify = true
url = "https://user:{SECRET}@wallet.example/x?key={SECRET}"
idle_timeout = "5m"
hash_key_env = "HASH_KEY"
[plugins.p]
use = "m:f"
options = {{ password = "{SECRET}", nested = {{ more = "{SECRET}" }} }}
[dialects.d]
path = "/d"
fields = {{ provider = "a", session = "b", player = "c" }}
required = ["provider", "session", "player"]
codes = {{ retry = 9 }}
"""


def load(home: Path, text: str) -> Settings:
    (home / "tokens").write_text(f"ops:{SECRET}\n")
    (home / "tokens").chmod(0o600)
    (home / "config.toml").write_text(text)
    return reader.load(home / "config.toml")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASH_KEY", SECRET)
    return tmp_path


def test_a_variable_whose_name_may_be_a_secret_is_not_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "key")
    found = shown.in_force(load(home, FILE.replace('"HASH_KEY"', f'"{SECRET}"')))
    assert found["operators.a.hash_key_env"] == shown.MASKED


def test_every_value_is_toml_that_reads_as_what_is_in_force(home: Path) -> None:
    settings = load(home, FILE)
    found = shown.in_force(settings)
    for name, table in settings.tables.items():
        for field in msgspec.structs.fields(table):
            key, value = f"{name}.{field.name}", getattr(table, field.name)
            if field.name in ("url", "options") or key not in found or key in shown.inherited(settings):
                continue
            findings = Findings()
            assert Tables(findings).value(field.type, tomllib.loads(f"x = {found[key]}")["x"], key) == value, key
            assert findings.errors == []


def test_keys_that_an_operator_inherits_are_shown_and_marked(home: Path) -> None:
    settings = load(home, FILE)
    found, elsewhere = shown.in_force(settings), shown.inherited(settings)
    assert found["operators.a.schedule"] == '["250ms", "90s", "36h"]'
    assert "operators.a.schedule" in elsewhere
    assert found["operators.a.idle_timeout"] == '"5m"'
    assert "operators.a.idle_timeout" not in elsewhere
    assert found["dialects.d.codes.retry"] == "9"


def test_of_a_secret_its_source_is_shown_alone(home: Path) -> None:
    found = shown.in_force(load(home, FILE))
    assert (found["api.token_file"], found["operators.a.hash_key_env"]) == ('"tokens"', '"HASH_KEY"')
    assert found["operators.a.url"] == '"https://wallet.example/x"'
    assert found["plugins.p.options"] == '{ password = "…", nested = "…" }'
    assert SECRET not in str(found)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("postgresql://lm@db1:5432,db2/lmdaemon?passfile=/etc/x", "postgresql://db1:5432,db2/lmdaemon"),
        ("postgresql:///lmdaemon", "postgresql:///lmdaemon"),
        ("postgresql://?service=lmdaemon", "postgresql://"),
    ],
)
def test_of_a_database_its_place_is_shown(home: Path, url: str, found: str) -> None:
    assert shown.in_force(load(home, f'[database]\nurl = "{url}"\n'))["database.url"] == f'"{found}"'


def test_differences_have_both_values(home: Path) -> None:
    before = load(home, FILE)
    text = FILE.replace('"5m"', '"6m"').replace("[delivery]", "[delivery]\nconcurrency = 9").replace("[plugins.p]", "")
    text = text.replace('use = "m:f"', "").replace("options", "# options").replace("key=", "other=")
    load(home, text + '[operators.b]\nprovider_id = "b"\n')
    (home / "tokens").write_text(f"ops:{SECRET}-2\n")
    after = reader.load(home / "config.toml")
    assert {(one.key, one.old, one.new, one.content) for one in shown.differences(before, after)} == {
        ("operators.b", None, "{ … }", False),
        ("plugins.p", "{ … }", None, False),
        ("delivery.concurrency", "4", "9", False),
        ("operators.a.idle_timeout", '"5m"', '"6m"', False),
        ("operators.a.url", '"https://wallet.example/x"', '"https://wallet.example/x"', False),
        ("api.token_file", '"tokens"', '"tokens"', True),
    }


@pytest.mark.parametrize("text", ["0s", "1ms", "250ms", "1s", "90s", "15m", "36h", "7d", "3650d"])
def test_a_duration_is_written_as_it_was_read(text: str) -> None:
    assert values.spell(values.duration(text)) == text


def test_daemons_compare_what_operators_get_and_nothing_of_a_machine(home: Path) -> None:
    def of(old: str = "", new: str = "") -> str:
        assert old in FILE
        return shown.digest(load(home, FILE.replace(old, new) if old else FILE))

    before = of()
    for old, new in (
        ('"5m"', '"6m"'),
        ('"90s"', '"91s"'),
        ("retry = 9", "retry = 8"),
        ("wallet.example/x", "wallet.example/y"),
        ('use = "m:f"', 'use = "m:g"'),
        ("[delivery]", '[sessions]\ndaemon_grace = "1s"\n[delivery]'),
        ("[delivery]", '[database]\nkeep_ended = "91d"\n[delivery]'),
    ):
        assert of(old, new) != before, new
    for old, new in (
        ("[::1]:8080", "127.0.0.1:8080"),
        ("[delivery]", '[log]\nlevel = "debug"\n[delivery]'),
        (f"key={SECRET}", "key=other"),
        ("HASH_KEY", "HOME"),
    ):
        assert of(old, new) == before, new
