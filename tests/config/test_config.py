"""The configuration file: the shipped file is right, all errors of a wrong file are reported at once, and no secret is
shown.
"""

import base64
import math
import os
import re
import ssl
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from certificates import DAY, make
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdaemon.config import reader, values
from lmdaemon.config import settings as settings_room
from lmdaemon.config.findings import ConfigError, Findings
from lmdaemon.config.secrets import Secrets
from lmdaemon.config.settings import (
    ApiTable,
    ApiToken,
    DatabaseTable,
    DeliveryTable,
    DialectTable,
    LogTable,
    OperatorTable,
    PluginTable,
    Policy,
    ServerTable,
    SessionsTable,
    Settings,
    changes,
)
from lmdaemon.config.tables import Tables
from lmdaemon.config.target import HOST_RULE, SHAPE_RULE, USER_INFO_RULE
from lmdaemon.dialects import SHIPPED, Codes

CONFIG_TOML = Path(__file__).parents[2] / "config.toml"
MARK = "hush-4711-hush-4711"  # stands in every secret of these tests, and in nothing that may be shown
OPERATOR = '[operators.a]\nprovider_id = "p"\n'
OPEN = '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR
QUOTA_RULE = "must be between 0 (no bound) and 1000000"
DIALECT = (
    '[dialects.x]\npath = "/x"\nfields = { provider = "p", session = "s", player = "u" }\n'
    'required = ["provider", "session", "player"]\n'
)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LMDAEMON_CONFIG", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "UNSET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLANK", " \n")
    monkeypatch.setenv("SECRET", MARK)
    monkeypatch.setenv("LATIN1", os.fsdecode("é".encode("latin-1")))


def secret(path: Path, content: str | bytes = MARK, mode: int = 0o600) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def whsec(size: int) -> str:
    return "whsec_" + base64.b64encode(bytes(size)).decode()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of secret files, good and bad, for a config.toml in the same directory."""
    secret(tmp_path / "secret")
    secret(tmp_path / "tokens", f"{MARK}-1\r\n\n  {MARK}-2  \n")
    secret(tmp_path / "blank", " \n\n")
    secret(tmp_path / "latin1", "é".encode("latin-1"))
    secret(tmp_path / "utf16", MARK.encode("utf-16"))
    secret(tmp_path / "zero", f"{MARK}\n{MARK}\0\n")
    secret(tmp_path / "comments", f"# {MARK}\n\n  # {MARK}\n")
    secret(tmp_path / "badname", f"# {MARK}\n\n{MARK} of ops:{MARK}\n")
    secret(tmp_path / "unnamed", "ops: \n")
    secret(tmp_path / "signing", whsec(24))
    secret(tmp_path / "whsec23", f"# old\n{whsec(24)}\n\n{whsec(23)}\n")
    secret(tmp_path / "whsec65", whsec(65))
    secret(tmp_path / "unpadded", whsec(25).rstrip("="))
    secret(tmp_path / "accents", whsec(24) + "é")
    secret(tmp_path / "cert.pem", CERTIFICATE)
    secret(tmp_path / "key.pem", KEY)
    return tmp_path


def load(home: Path, text: str, *, secrets: Secrets = "required") -> Settings:
    file = home / "config.toml"
    file.write_text(text)
    return reader.load(file, secrets=secrets)


def findings(home: Path, text: str, *, secrets: Secrets = "required") -> list[str]:
    """The errors of a file. The file's name must stand before each, and is left out here."""
    with pytest.raises(ConfigError) as caught:
        load(home, text, secrets=secrets)
    assert str(caught.value) == "\n".join(caught.value.findings)
    prefix = f"{home / 'config.toml'}: "
    assert all(finding.startswith(prefix) for finding in caught.value.findings)
    return [finding.removeprefix(prefix) for finding in caught.value.findings]


# -- the shipped file

STRUCTS: Mapping[str, type[msgspec.Struct]] = {
    "server": ServerTable,
    "api": ApiTable,
    "database": DatabaseTable,
    "sessions": SessionsTable,
    "delivery": DeliveryTable,
    "log": LogTable,
    "operators.demo": OperatorTable,
    "plugins.release_lock": PluginTable,
    "dialects.old": DialectTable,
    "dialects.old.codes": Codes,
}
INHERITED = {
    field.name: field.default for table in (SessionsTable, DeliveryTable) for field in msgspec.structs.fields(table)
}


def switched_on() -> str:
    """The shipped file, with every setting that is commented out put into force."""
    return re.sub(r"^# (?=\w+ = |\[)", "", CONFIG_TOML.read_text("utf-8"), flags=re.MULTILINE)


def comments() -> dict[str, str]:
    """The comment of each key path: the one beside the key (with the lines that continue it), or else the lines above
    the key.
    """
    found: dict[str, str] = {}
    table = last = above = ""
    for line in switched_on().splitlines():
        if header := re.match(r"\[([\w.]+)\]", line):
            table = header[1]
            found[table] = above
        elif key := re.match(r"(\w+) = ", line):
            last = f"{table}.{key[1]}"
            found[last] = beside(line) or above
        elif line.startswith(" "):
            found[last] += " " + line.strip("# ")
        above = f"{above} {line.strip('# ')}".strip() if line.startswith("#") else ""
    return found


def beside(line: str) -> str:
    for at in (match.start() for match in re.finditer("#", line)):
        try:
            tomllib.loads(line[:at])
        except tomllib.TOMLDecodeError:
            continue  # the # is inside the value
        return line[at:].strip("# ")
    return ""


def read(kind: Any, value: object) -> Any:
    found_wrong = Findings()
    found = Tables(found_wrong).value(kind, value, "key")
    assert found_wrong.errors == []
    return found


def test_shipped_file_loads_without_error_and_warning() -> None:
    settings = reader.load(CONFIG_TOML)
    assert settings.warnings == ()
    demo = settings.operators["demo"]
    assert (demo.provider_id, demo.notify, demo.allow_private_network) == ("luckymonaco", True, True)
    assert demo.url == f"http://{settings.server.listen.text}{demo.paths[0]}"
    assert (settings.server.listen.text, settings.api.listen.text) == ("127.0.0.1:8080", "127.0.0.1:8081")
    assert settings.restart_grace_s == 2
    assert list(settings.operators) == ["demo"]
    assert settings.plugins == {}


def test_shipped_file_loads_with_every_key_switched_on(tmp_path: Path) -> None:
    settings = load(tmp_path, switched_on())
    assert settings.warnings == ()
    assert list(settings.plugins) == ["release_lock"]


def test_shipped_file_fits_120_columns() -> None:
    assert [line for line in CONFIG_TOML.read_text("utf-8").splitlines() if len(line) > 120] == []


def test_shipped_file_shows_every_table() -> None:
    structs = {
        name for name, value in vars(settings_room).items() if name.endswith("Table") and isinstance(value, type)
    }
    assert structs | {"Codes"} == {struct.__name__ for struct in STRUCTS.values()}
    assert {table.partition(".")[0] for table in STRUCTS} == tomllib.loads(switched_on()).keys()


@pytest.mark.parametrize("table", STRUCTS)
def test_shipped_file_shows_every_key_with_its_true_default_and_a_comment(table: str) -> None:
    shown: dict[str, Any] = tomllib.loads(switched_on())
    for part in table.split("."):
        shown = shown[part]
    said = comments()
    fields = msgspec.structs.fields(STRUCTS[table])
    assert set(shown) == {field.name for field in fields}
    for field in fields:
        key = f"{table}.{field.name}"
        comment = said[key]
        assert len(comment) >= 10, f"{key} has no comment"
        claimed = re.search(r'default: ("[^"]*"|\[.*?\]|true|false|\d+)', comment)
        value = read(field.type, tomllib.loads(f"x = {claimed[1]}")["x"] if claimed else shown[field.name])
        if field.required:
            assert comment.lower().startswith("required: "), key
        elif isinstance(field.default, Codes):
            assert all(value.of(code) == field.default.of(code) for code in shown[field.name]), key
        elif STRUCTS[table] is Codes:
            assert value == Codes().of(field.name), key
        elif field.default is None and field.name in INHERITED and table.startswith("operators."):
            assert re.fullmatch(r"default: as in \[(sessions|delivery)\]", comment), key
            assert value == INHERITED[field.name], key
        elif field.default is None:
            assert comment.startswith("default: "), key
        else:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            assert value == default, f"{key}: the file says {value!r}, the default is {default!r}"


# -- good files


def test_empty_file_has_a_default_for_everything(home: Path) -> None:
    settings = load(home, "")
    assert (settings.server, settings.api, settings.log) == (ServerTable(), ApiTable(), LogTable())
    assert settings.database == home / "lmdaemon.sqlite3"
    assert (settings.keep_ended_s, settings.restart_grace_s, settings.count_downtime) == (90 * 86400, 60, False)
    assert (settings.operators, settings.plugins, settings.api_tokens, settings.warnings) == ({}, {}, (), ())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("0s", 0), ("30s", 30), ("15m", 900), ("2h", 7200), ("7d", 604800), ("3650d", 315360000)],
)
def test_duration_is_read_in_its_unit(text: str, seconds: float) -> None:
    assert values.duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "host", "port", "unix", "loopback"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, "", True),
        ("127.9.9.9:0", "127.9.9.9", 0, "", True),
        ("localhost:1", "localhost", 1, "", True),
        ("[::1]:65535", "::1", 65535, "", True),
        ("unix:/run/lmdaemon/api.sock", "", 0, "/run/lmdaemon/api.sock", True),
        ("0.0.0.0:80", "0.0.0.0", 80, "", False),
        ("[::]:80", "::", 80, "", False),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, "", False),
        ("192.0.2.1:80", "192.0.2.1", 80, "", False),
        ("localhost.example.com:80", "localhost.example.com", 80, "", False),
    ],
)
def test_listen_address_is_read_and_known_as_loopback_or_not(
    text: str, host: str, port: int, unix: str, loopback: bool
) -> None:
    found = values.listen(text)
    assert (found.host, found.port, found.unix, found.loopback) == (host, port, unix, loopback)


def test_operator_inherits_what_it_does_not_set(home: Path) -> None:
    settings = load(
        home,
        '[sessions]\nidle_timeout = "5m"\nmax_lifetime = "8h"\n[delivery]\ntimeout = "3s"\nschedule = ["1s"]\n'
        'max_age = "1h"\nconcurrency = 7\n[operators.a]\nprovider_id = "p"\n[operators.b]\nprovider_id = "q"\n'
        'idle_timeout = "1s"\nmax_lifetime = "0s"\ntimeout = "4s"\nschedule = ["2s", "3s"]\nmax_age = "2h"\n'
        'concurrency = 1\n[plugins.p]\nuse = "m:f"\ntimeout = "9s"\n',
    )
    a, b = settings.operators["a"], settings.operators["b"]
    assert (a.idle_s, a.lifetime_s, a.policy) == (300, 28800, Policy(3, (1,), 3600, 7))
    assert (b.idle_s, b.lifetime_s, b.policy) == (1, 0, Policy(4, (2, 3), 7200, 1))
    assert settings.plugins["p"].policy == Policy(9, (1,), 3600, 4)


def test_only_graces_and_max_lifetime_may_be_zero(home: Path) -> None:
    """Found by their type and not from a list, so that a new duration is tested, too."""
    refused = set()
    for table, struct in STRUCTS.items():
        head = {"operators.demo": OPERATOR, "plugins.release_lock": '[plugins.x]\nuse = "m:f"\n'}
        for field in msgspec.structs.fields(struct):
            if "Duration" not in str(field.type):
                continue
            zero = '["0s"]' if "tuple" in str(field.type) else '"0s"'
            text = f"{head.get(table, f'[{table}]')}\n{field.name} = {zero}\n"
            try:
                load(home, text)
            except ConfigError:
                refused.add(field.name)
            else:
                assert field.name in ("restart_grace", "daemon_grace", "max_lifetime"), f"{table}.{field.name} may be 0"
    assert refused == {"keepalive", "keep_ended", "idle_timeout", "timeout", "schedule", "max_age"}


@pytest.mark.parametrize(
    ("keys", "paths"),
    [
        ("", ("/v4/sessionexpired",)),
        ('accept = ["v4.01", "v4.02"]', ("/v4/sessionexpired",)),
        ('accept = ["v4", "v1"]', ("/v4/sessionexpired", "/v1/sessionexpired")),
        ('endpoint = "/acme/~x;y=(1)"', ("/acme/~x;y=(1)",)),
        ('endpoint = ""', ()),
    ],
)
def test_endpoint_defaults_to_the_paths_of_the_accepted_dialects(home: Path, keys: str, paths: tuple[str, ...]) -> None:
    assert tuple(map(values.endpoint_key, load(home, OPERATOR + keys).operators["a"].paths)) == paths


@pytest.mark.parametrize(
    "text",
    [
        # Two operators on one path with different provider ids; the same id on two paths; an operator that receives
        # nothing.
        OPERATOR + '[operators.b]\nprovider_id = "q"\n',
        OPERATOR + '[operators.b]\nprovider_id = "P"\nendpoint = "/b"\n',
        OPERATOR + '[operators.b]\nprovider_id = "p"\nendpoint = ""\n',
        # Listening beyond loopback is allowed: something authenticates a sender, or there is no endpoint
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'auth = "none"\n',
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'token_check = "session"\n',
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'token_check = "partner"\npartner_token_env = "SECRET"\n',
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'allow_from = ["192.0.2.0/24"]\n',
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'accept = ["pragmatic"]\nhash_key_file = "secret"\n',
        # The hash is checked whether it is required or not (tests/ground/test_dialects.py)
        OPEN
        + 'accept = ["x"]\nhash_key_file = "secret"\n'
        + DIALECT.replace('player = "u"', 'player = "u", hash = "h"'),
        '[server]\nlisten = "0.0.0.0:80"\n' + OPERATOR + 'endpoint = ""\n',
        '[server]\nlisten = "unix:/run/x"\n' + OPERATOR,
        '[api]\nlisten = "0.0.0.0:81"\ntoken_file = "tokens"\n',
        # Port 0 means another port for each listener
        '[server]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "127.0.0.1:0"\n',
        # One dialect under several names, two dialects that their fields tell apart, two that their content types tell
        # apart
        OPERATOR + 'accept = ["v4.01", "v4.02", "v1", "v4", "pragmatic", "v4"]\nhash_key_env = "SECRET"\n',
        OPERATOR + 'token_check = "session"\naccept = ["v4", "pragmatic"]\nhash_key_env = "SECRET"\n',
        OPERATOR + 'url = "http://10.0.0.1:8080/x"\nallow_private_network = true\nnotify = true\n',
        OPERATOR + 'url = "HTTPS://user:pw@operator.example/x?key=1"\nnotify = true\n',
        OPERATOR + 'client_cert_file = "cert.pem"\nclient_key_file = "key.pem"\nca_file = "cert.pem"\n',
        '[plugins.p]\nuse = "hooks.sub:Class.method"\noperators = ["a"]\n' + OPERATOR,
        DIALECT + "codes = { bad_parameters = 1, final = 999999 }\n",
    ],
)
def test_allowed_combination_loads_without_warning(home: Path, text: str) -> None:
    assert load(home, text).warnings == ()


def test_dialect_of_the_file_is_used_like_a_shipped_one(home: Path) -> None:
    operator = load(home, DIALECT + OPERATOR + 'dialect = "x"\naccept = ["x", "v4"]\n').operators["a"]
    assert (operator.sends.name, operator.sends.path, operator.sends.codes) == ("x", "/x", Codes())
    assert operator.receives == (operator.sends, SHIPPED["v4"])


def test_plugin_options_arrive_as_written(home: Path) -> None:
    plugin = load(home, '[plugins.p]\nuse = "m:f"\noptions = { a = { b = [1, "x"] }, on = 2024-10-13 }\n').plugins["p"]
    assert plugin.options == tomllib.loads('a = { b = [1, "x"] }\non = 2024-10-13\n')
    assert plugin.listens_to("anyone")


def test_plugin_listens_to_the_operators_it_names(home: Path) -> None:
    text = OPERATOR + '[operators.b]\nprovider_id = "q"\n[plugins.p]\nuse = "m:f"\noperators = ["b"]\n'
    plugin = load(home, text).plugins["p"]
    assert (plugin.listens_to("a"), plugin.listens_to("b")) == (False, True)


# -- bad files: each has exactly one error, given here in full

DURATION_RULE = 'must be a duration such as "250ms", "30s", "15m", "2h" or "7d"'
LISTEN_RULE = 'must be "host:port", "[v6]:port" or "unix:/path"'
NETWORK_RULE = "must be a network such as 192.0.2.0/24 without host bits, or an address"
NAMES_RULE = "names must be 1 to 64 letters, digits, dots, hyphens or underscores, a letter or digit first"
PATH_RULE = "must start with / and have only letters, digits and -._~!$&'()*+,;=:@/"
PATH_DOTS_RULE = "must not have //, /./ or /../, which a sender may resolve"
LIFTED = "; allow_private_network = true lifts this"
WHSEC_RULE = "must be whsec_ followed by base64 of 24 to 64 bytes"
EXPOSED = (
    "operators.a.auth: nothing authenticates a sender on 0.0.0.0:80: set token_check, allow_from, a dialect with a "
    'hash or server.client_ca_file, or write auth = "none"'
)
KNOWN = "v4, v4.01, v4.02, v1, pragmatic"

NOT_SHOWN = "(what it has is not shown: is it the secret?)"
BAD_FILES = [
    # unknown tables and keys
    ("[sever]", "sever: is no table of this file (did you mean 'server'?)"),
    ("listen = 'x'", "listen: is no table of this file"),
    ("[server]\nlistn = 'x'", "server.listn: is no key of this table (did you mean 'listen'?)"),
    ("[log]\nzzz = 1", "log.zzz: is no key of this table"),
    (OPERATOR + "hash_key = 'x'", "operators.a.hash_key: is no key of this table (did you mean 'hash_key_env'?)"),
    (
        DIALECT + "codes = { bad_tokn = 4 }",
        "dialects.x.codes.bad_tokn: is no key of this table (did you mean 'bad_token'?)",
    ),
    # wrong types: one value of each kind
    ("server = 1", "server: must be a table"),
    (
        "[operators]\nprovider_id = 'p'\nurl = 'https://h.example/'\naccept = ['v4']\nnotfy = true",
        "operators: write [operators.NAME], with a name of your choice, above provider_id and 3 more",
    ),
    (
        "[dialects]\nfields = { provider = 'p' }\npath = '/x'",
        "dialects: write [dialects.NAME], with a name of your choice, above path and 1 more",
    ),
    (
        "[plugins]\nuse = 'm:f'\n[plugins.p]\nuse = 'm:f'",
        "plugins: write [plugins.NAME], with a name of your choice, above use",
    ),
    ("[[operators]]", "operators: must be a table"),
    ("[operators]\na = 'x'", "operators.a: must be a table"),
    ("dialects = false", "dialects: must be a table"),
    ("plugins = []", "plugins: must be a table"),
    ("[plugins.p]\nuse = 'm:f'\noptions = 'x'", "plugins.p.options: must be a table"),
    ("[database]\npath = 1", "database.path: must be a string (got 1)"),
    (
        "[database]\npath = 2024-10-13T00:00:00",
        "database.path: must be a string (got datetime.datetime(2024, 10, 13, 0, 0))",
    ),
    ("[database]\npath = ['x']", "database.path: must be a string (got a list)"),
    ("[database]\npath = { x = 1 }", "database.path: must be a string (got a table)"),
    ("[delivery]\nconcurrency = '4'", "delivery.concurrency: must be an integer (got '4')"),
    ("[delivery]\nconcurrency = 4.0", "delivery.concurrency: must be an integer (got 4.0)"),
    ("[delivery]\nconcurrency = true", "delivery.concurrency: must be an integer (got True)"),
    ("[delivery]\nschedule = '5s'", "delivery.schedule: must be a list (got '5s')"),
    ("[server]\ntrusted_proxies = '10.0.0.0/8'", "server.trusted_proxies: must be a list (got '10.0.0.0/8')"),
    (OPERATOR + "notify = 'yes'", "operators.a.notify: must be true or false (got 'yes')"),
    (OPERATOR + "allow_private_network = 1", "operators.a.allow_private_network: must be true or false (got 1)"),
    (OPERATOR + "accept = ['v4', 5]", "operators.a.accept[1]: must be a string (got 5)"),
    ("[log]\nlevel = 'trace'", 'log.level: must be one of "debug", "info", "warning", "error" (got \'trace\')'),
    ("[log]\nformat = 'xml'", 'log.format: must be one of "auto", "text", "json" (got \'xml\')'),
    ("[sessions]\ndowntime = 'stop'", 'sessions.downtime: must be one of "pause", "count" (got \'stop\')'),
    (OPERATOR + "unknown_session = 'x'", 'operators.a.unknown_session: must be one of "accept", "reject" (got \'x\')'),
    (
        OPERATOR + "token_check = 'x'",
        'operators.a.token_check: must be one of "present", "session", "partner" (got \'x\')',
    ),
    (OPERATOR + "auth = 'any'", "operators.a.auth: must be one of \"none\" (got 'any')"),
    # durations
    ("[sessions]\nidle_timeout = 30", f"sessions.idle_timeout: {DURATION_RULE} (got 30)"),
    ("[sessions]\nidle_timeout = 'soon'", f"sessions.idle_timeout: {DURATION_RULE} (got 'soon')"),
    ("[sessions]\nidle_timeout = '-5s'", f"sessions.idle_timeout: {DURATION_RULE} (got '-5s')"),
    ("[sessions]\nidle_timeout = '1.5s'", f"sessions.idle_timeout: {DURATION_RULE} (got '1.5s')"),
    ("[sessions]\nidle_timeout = '1h30m'", f"sessions.idle_timeout: {DURATION_RULE} (got '1h30m')"),
    ("[sessions]\nidle_timeout = '5S'", f"sessions.idle_timeout: {DURATION_RULE} (got '5S')"),
    ("[sessions]\nidle_timeout = '٣s'", f"sessions.idle_timeout: {DURATION_RULE} (got '٣s')"),
    ("[sessions]\nidle_timeout = '999ms'", 'sessions.idle_timeout: must be at least "1s"'),
    ("[sessions]\nidle_timeout = '0s'", 'sessions.idle_timeout: must be at least "1s"'),
    ("[sessions]\nmax_lifetime = '3651d'", "sessions.max_lifetime: must be at most \"3650d\" (got '3651d')"),
    (OPERATOR + "idle_timeout = '0s'", 'operators.a.idle_timeout: must be at least "1s"'),
    ("[server]\nkeepalive = '999ms'", 'server.keepalive: must be between "1s" and "1h"'),
    ("[server]\nkeepalive = '3601s'", 'server.keepalive: must be between "1s" and "1h"'),
    ("[database]\nkeep_ended = '0d'", "database.keep_ended: must not be zero"),
    ("[delivery]\ntimeout = '0s'", "delivery.timeout: must not be zero"),
    ("[delivery]\nmax_age = '0s'", "delivery.max_age: must not be zero"),
    ("[delivery]\nschedule = ['1s', '0s']", "delivery.schedule: must not contain a wait of zero"),
    ("[delivery]\nschedule = ['1s', 5]", f"delivery.schedule[1]: {DURATION_RULE} (got 5)"),
    ("[delivery]\nschedule = []", "delivery.schedule: must list between 1 and 100 waits (got 0)"),
    (f"[delivery]\nschedule = {['1s'] * 101}", "delivery.schedule: must list between 1 and 100 waits (got 101)"),
    ("[delivery]\nconcurrency = 0", "delivery.concurrency: must be between 1 and 1000 (got 0)"),
    ("[delivery]\nconcurrency = 1001", "delivery.concurrency: must be between 1 and 1000 (got 1001)"),
    (
        "[delivery]\nconcurrency = 0x" + "f" * 4000,  # Python refuses to write a decimal number of this length
        "delivery.concurrency: must be between 1 and 1000 (got a number of more than 64 bits)",
    ),
    (OPERATOR + "timeout = '0s'", "operators.a.timeout: must not be zero"),
    (OPERATOR + "max_age = '0s'", "operators.a.max_age: must not be zero"),
    (OPERATOR + "schedule = []", "operators.a.schedule: must list between 1 and 100 waits (got 0)"),
    (OPERATOR + "concurrency = -1", "operators.a.concurrency: must be between 1 and 1000 (got -1)"),
    # listen addresses and the database
    ("[server]\nlisten = 8080", f"server.listen: {LISTEN_RULE} (got 8080)"),
    ("[server]\nlisten = '127.0.0.1'", f"server.listen: {LISTEN_RULE} (got '127.0.0.1')"),
    ("[server]\nlisten = ':8080'", f"server.listen: {LISTEN_RULE} (got ':8080')"),
    ("[server]\nlisten = '::1:8080'", f"server.listen: {LISTEN_RULE} (got '::1:8080')"),
    ("[server]\nlisten = '[::::]:80'", f"server.listen: {LISTEN_RULE} (got '[::::]:80')"),
    ("[server]\nlisten = '[127.0.0.1]:80'", f"server.listen: {LISTEN_RULE} (got '[127.0.0.1]:80')"),
    ("[server]\nlisten = 'x:٨٠'", f"server.listen: {LISTEN_RULE} (got 'x:٨٠')"),
    (
        "[server]\nlisten = 'localhost:65536'",
        "server.listen: must have a port of at most 65535 (got 'localhost:65536')",
    ),
    (
        "[server]\nlisten = 'unix:run/x'",
        "server.listen: must be \"unix:\" and an absolute path of at most 107 bytes (got 'unix:run/x')",
    ),
    (
        f"[server]\nlisten = 'unix:/{'x' * 107}'",
        f"server.listen: must be \"unix:\" and an absolute path of at most 107 bytes (got 'unix:/{'x' * 107}')",
    ),
    ("[api]\nlisten = '127.0.0.1:8080'", "api.listen: must differ from server.listen (got '127.0.0.1:8080')"),
    (
        "[server]\nlisten = 'unix:/run/x'\n[api]\nlisten = 'unix:/run/x'",
        "api.listen: must differ from server.listen (got 'unix:/run/x')",
    ),
    (
        "[api]\nlisten = '[::]:8081'",
        "api.token_file: is required when api.listen is beyond loopback (got '[::]:8081')",
    ),
    ("[database]\npath = ''", "database.path: must name a file (got '')"),
    ('[database]\npath = "a\\u0000"', "database.path: must name a file (got 'a\\x00')"),
    # networks
    ("[server]\ntrusted_proxies = ['10.0.0.1/8']", f"server.trusted_proxies[0]: {NETWORK_RULE} (got '10.0.0.1/8')"),
    (OPERATOR + "allow_from = ['192.0.2.1', 'x']", f"operators.a.allow_from[1]: {NETWORK_RULE} (got 'x')"),
    (OPERATOR + "allow_from = [['10.0.0.0', 8]]", f"operators.a.allow_from[0]: {NETWORK_RULE} (got a list)"),
    (OPERATOR + "allow_from = [167772160]", f"operators.a.allow_from[0]: {NETWORK_RULE} (got 167772160)"),
    # names
    ("[operators.'a b']\nprovider_id = 'p'", f"operators: {NAMES_RULE} (got 'a b')"),
    ("[operators.'']\nprovider_id = 'p'", f"operators: {NAMES_RULE} (got '')"),
    ("[operators._a]\nprovider_id = 'p'", f"operators: {NAMES_RULE} (got '_a')"),
    ("[operators.'..']\nprovider_id = 'p'", f"operators: {NAMES_RULE} (got '..')"),
    (f"[operators.{'a' * 65}]\nprovider_id = 'p'", f"operators: {NAMES_RULE} (got '{'a' * 65}')"),
    ("[plugins.'a/b']\nuse = 'm:f'", f"plugins: {NAMES_RULE} (got 'a/b')"),
    ("[dialects.'ä']", f"dialects: {NAMES_RULE} (got 'ä')"),
    ("[operators.a]", "operators.a.provider_id: is required"),
    ("[operators.a]\nprovider_id = 5", "operators.a.provider_id: must be a string (got 5)"),
    ("[operators.a]\nprovider_id = ''", "operators.a.provider_id: must not be empty (got '')"),
    (
        '[operators.a]\nprovider_id = "a\\nb"',
        "operators.a.provider_id: must not contain control characters (got 'a\\nb')",
    ),
    # dialects
    (OPERATOR + "dialect = 'v5'", f"operators.a.dialect: is no dialect; known are {KNOWN} (got 'v5')"),
    (OPERATOR + "accept = ['v4', 'V4']", f"operators.a.accept[1]: is no dialect; known are {KNOWN} (got 'V4')"),
    (DIALECT + OPERATOR + "dialect = 'y'", f"operators.a.dialect: is no dialect; known are {KNOWN}, x (got 'y')"),
    (OPERATOR + "accept = []", 'operators.a.accept: must name a dialect; endpoint = "" switches receiving off'),
    (DIALECT.replace(".x]", ".v4]"), "dialects.v4: is the name of a shipped dialect; choose another"),
    (DIALECT.replace('path = "/x"\n', ""), "dialects.x.path: is required"),
    (DIALECT.replace('"/x"', '"x"'), f"dialects.x.path: {PATH_RULE} (got 'x')"),
    (DIALECT.replace('"/x"', '"/Health/"'), "dialects.x.path: must not be /health, which is taken (got '/Health/')"),
    (DIALECT + "content = 'xml'", 'dialects.x.content: must be one of "json", "form" (got \'xml\')'),
    (DIALECT.replace('player = "u"', "player = 1"), "dialects.x.fields.player: must be a string (got 1)"),
    (
        DIALECT.replace('player = "u"', 'player = "u", token = ""'),
        "dialects.x.fields.token: must not be empty (got '')",
    ),
    (DIALECT.replace('player = "u"', 'player = "s"'), "dialects.x.fields: must not use one wire name twice"),
    (
        DIALECT.replace('player = "u"', 'player = "u", uuid = "uuid"'),
        "dialects.x.fields.uuid: must be one of provider, session, player, token, request, hash",
    ),
    (DIALECT + "extra = 'yes'", "dialects.x.extra: must be true or false (got 'yes')"),
    (
        DIALECT.replace('player = "u"', 'player = "u=", hash = "h"'),
        "dialects.x.fields.player: must have no & and no =, which separate the fields that are hashed (got 'u=')",
    ),
    (
        "[operators.a]\nprovider_id = 'a&b'\naccept = ['pragmatic']\nhash_key_file = 'secret'",
        "operators.a.provider_id: must have no & and no =, which separate the fields that are hashed (got 'a&b')",
    ),
    (OPERATOR + "unknown_per_minute = -1", f"operators.a.unknown_per_minute: {QUOTA_RULE} (got -1)"),
    (OPERATOR + "unknown_per_minute = 1000001", f"operators.a.unknown_per_minute: {QUOTA_RULE} (got 1000001)"),
    (OPERATOR + "unknown_per_minute = '5'", "operators.a.unknown_per_minute: must be an integer (got '5')"),
    (DIALECT.replace('"player"]', '"player", "hash"]'), "dialects.x.required: must name keys of fields (got 'hash')"),
    (
        DIALECT.replace(', "player"]', "]"),
        "dialects.x.required: must contain 'player': a notice without it means nothing",
    ),
    (
        "[dialects.x]\npath = '/x'\nrequired = ['provider', 'session', 'player']",
        "dialects.x.fields: is required",
    ),
    (DIALECT.replace('["provider", "session", "player"]', "'all'"), "dialects.x.required: must be a list (got 'all')"),
    (DIALECT + "codes = []", "dialects.x.codes: must be a table"),
    (DIALECT + "codes = { retry = 'x' }", "dialects.x.codes.retry: must be an integer (got 'x')"),
    (
        DIALECT + "codes = { bad_token = 0 }",
        "dialects.x.codes.bad_token: must be between 1 and 999999; 0 means success (got 0)",
    ),
    (
        DIALECT + "codes = { retry = 5, final = 5 }",
        "dialects.x.codes.retry: must be none of 5, 120, 999, which ask not to try again (got 5)",
    ),
    (
        DIALECT + "codes = { retry = 999 }",
        "dialects.x.codes.retry: must be none of 120, 999, which ask not to try again (got 999)",
    ),
    (
        DIALECT + "codes = { final = 1000000 }",
        "dialects.x.codes.final: must be between 1 and 999999; 0 means success (got 1000000)",
    ),
    # endpoint paths
    (OPERATOR + "endpoint = 'expired'", f"operators.a.endpoint: {PATH_RULE} (got 'expired')"),
    (OPERATOR + "endpoint = '/a?b'", f"operators.a.endpoint: {PATH_RULE} (got '/a?b')"),
    (OPERATOR + "endpoint = '/a b'", f"operators.a.endpoint: {PATH_RULE} (got '/a b')"),
    (OPERATOR + "endpoint = '/a%20b'", f"operators.a.endpoint: {PATH_RULE} (got '/a%20b')"),
    (OPERATOR + "endpoint = '/{brand}/V4'", f"operators.a.endpoint: {PATH_RULE} (got '/{{brand}}/V4')"),
    (OPERATOR + "endpoint = '/<brand>'", f"operators.a.endpoint: {PATH_RULE} (got '/<brand>')"),
    (OPERATOR + "endpoint = '//x'", f"operators.a.endpoint: {PATH_DOTS_RULE} (got '//x')"),
    (OPERATOR + "endpoint = '/a/../x'", f"operators.a.endpoint: {PATH_DOTS_RULE} (got '/a/../x')"),
    (OPERATOR + "endpoint = '/a/.'", f"operators.a.endpoint: {PATH_DOTS_RULE} (got '/a/.')"),
    (OPERATOR + "endpoint = '/ä'", f"operators.a.endpoint: {PATH_RULE} (got '/ä')"),
    (OPERATOR + "endpoint = '/HEALTH'", "operators.a.endpoint: must not be /health, which is taken (got '/HEALTH')"),
    (
        OPERATOR + "[operators.b]\nprovider_id = 'P'",
        "operators.b.endpoint: is shared with operators.a under the same provider_id (got '/V4/SessionExpired')",
    ),
    (
        OPERATOR + "[operators.b]\nprovider_id = 'p'\nendpoint = '/v4/sessionexpired/'",
        "operators.b.endpoint: is shared with operators.a under the same provider_id (got '/v4/sessionexpired/')",
    ),
    (
        DIALECT.replace('"p"', '"providerId"').replace('"s"', '"sessionId"').replace('"u"', '"externalPlayerId"')
        + OPERATOR
        + "accept = ['v4', 'x']\nendpoint = '/e'",
        "operators.a.accept: x and v4 cannot be told apart on /e",
    ),
    (
        DIALECT.replace('"p"', '"providerId"').replace('"s"', '"sessionId"').replace('"u"', '"externalPlayerId"')
        + OPERATOR
        + "accept = ['x']\nendpoint = '/e'\n[operators.b]\nprovider_id = 'q'\nendpoint = '/E/'",
        "operators.b.accept: v4 and x cannot be told apart on /E/",
    ),
    # what authenticates a sender, and what does not
    (
        OPERATOR + "accept = ['v4', 'v1']\ntoken_check = 'session'",
        "operators.a.token_check: needs dialects with a token; v1 has none (got 'session')",
    ),
    (
        OPERATOR + "accept = ['v4.01']\ntoken_check = 'partner'\npartner_token_env = 'SECRET'",
        "operators.a.token_check: needs dialects with a token; v4.01 has none (got 'partner')",
    ),
    (
        OPERATOR + "token_check = 'partner'",
        'operators.a.partner_token_file: is required for token_check = "partner"',
    ),
    (
        OPERATOR + "accept = ['v4', 'pragmatic']",
        "operators.a.hash_key_file: is required for dialect pragmatic, which has a hash",
    ),
    (
        OPERATOR + "dialect = 'pragmatic'",
        "operators.a.hash_key_file: is required for dialect pragmatic, which has a hash",
    ),
    (OPEN, EXPOSED),
    (OPEN.replace("0.0.0.0:80", "www.example:80"), EXPOSED.replace("0.0.0.0:80", "www.example:80")),
    # A filter that lets every address in authenticates nobody, and neither does a header that every client may set.
    (OPEN + "allow_from = ['192.0.2.1', '0.0.0.0/0']", EXPOSED),
    (OPEN + "allow_from = ['::/0']", EXPOSED),
    (
        OPEN.replace('"\n', "\"\ntrusted_proxies = ['10.0.0.0/8', '0.0.0.0/0']\n", 1) + "allow_from = ['192.0.2.1']",
        EXPOSED,
    ),
    # A hash authenticates nobody if a dialect without a hash is accepted as well.
    (OPEN + "accept = ['pragmatic', 'v4']\nhash_key_env = 'SECRET'", EXPOSED),
    (
        OPEN
        + "accept = ['x', 'pragmatic', 'v4']\nhash_key_env = 'SECRET'\n"
        + DIALECT.replace('player = "u"', 'player = "u", hash = "h"'),
        EXPOSED,
    ),
    # URLs
    (OPERATOR + "notify = true", "operators.a.url: is required when notify = true"),
    (OPERATOR + "url = 'http://op.example/x'", f"operators.a.url: must be https (got 'http://op.example/x'){LIFTED}"),
    (OPERATOR + "url = 'ftp://op.example/x'", f"operators.a.url: {SHAPE_RULE} (got 'ftp://op.example/x')"),
    (OPERATOR + "url = 'op.example/x'", f"operators.a.url: {SHAPE_RULE}"),
    (OPERATOR + "url = 'https:///x'", f"operators.a.url: {SHAPE_RULE}"),
    (
        OPERATOR + "url = 'https://op.example/a b'",
        "operators.a.url: must not have spaces, control characters, \\, \", < or > (got 'https://op.example/a b')",
    ),
    (
        OPERATOR + "url = 'https://op.example\\@other.example/'",
        "operators.a.url: must not have spaces, control characters, \\, \", < or > (got 'https://other.example/')",
    ),
    (
        OPERATOR + "url = 'https://op{x}.example/'",
        f"operators.a.url: {HOST_RULE} (got 'https://op{{x}}.example/')",
    ),
    (OPERATOR + "url = 'https://op.example:99999/'", f"operators.a.url: {HOST_RULE}"),
    (OPERATOR + "url = 'https://[::1/'", f"operators.a.url: {HOST_RULE}"),
    (OPERATOR + "url = 'https://user:12/s3cret@op.example/'", f"operators.a.url: {USER_INFO_RULE}"),
    (OPERATOR + "url = 'https://user:s3/cret@op.example/'", f"operators.a.url: {USER_INFO_RULE}"),
    (OPERATOR + "url = 'https://user:12?s3cret@op.example/'", f"operators.a.url: {USER_INFO_RULE}"),
    (OPERATOR + "url = 'https://user#s3cret@op.example/'", f"operators.a.url: {USER_INFO_RULE}"),
    # TLS
    (
        OPERATOR + "client_cert_file = 'cert.pem'",
        "operators.a.client_cert_file: and client_key_file must be given together",
    ),
    (
        OPERATOR + "client_key_file = 'key.pem'",
        "operators.a.client_cert_file: and client_key_file must be given together",
    ),
    (
        OPERATOR + "ca_file = 'none.pem'",
        "operators.a.ca_file: cannot be read: No such file or directory ({home}/none.pem)",
    ),
    (
        OPERATOR + "client_cert_file = 'cert.pem'\nclient_key_file = 'none.pem'",
        "operators.a.client_key_file: cannot be read: No such file or directory ({home}/none.pem)",
    ),
    # secrets
    (
        "[api]\ntoken_file = 'none'",
        "api.token_file: cannot be read: No such file or directory ({home}/none)",
    ),
    ("[api]\ntoken_file = '/'", "api.token_file: cannot be read: Is a directory (/)"),
    ('[api]\ntoken_file = "a\\u0000"', "api.token_file: cannot be read: embedded null byte ({home}/a\0)"),
    ("[api]\ntoken_file = 'blank'", "api.token_file: must not be empty ({home}/blank)"),
    (
        "[api]\ntoken_file = 'latin1'",
        "api.token_file: is Latin-1 or another encoding that is not UTF-8 (line 1); save it as UTF-8 ({home}/latin1)",
    ),
    (
        "[api]\ntoken_file = 'utf16'",
        "api.token_file: is UTF-16; save it as UTF-8 ({home}/utf16)",
    ),
    ("[api]\ntoken_file = 'zero'", "api.token_file: must not have a zero byte (line 2) ({home}/zero)"),
    (
        "[api]\ntoken_env = 'LATIN1'",
        "api.token_env: is Latin-1 or another encoding that is not UTF-8 (line 1); save it as UTF-8 ($LATIN1)",
    ),
    (
        '[api]\ntoken_env = "a\\u0000"',
        "api.token_env: must name an environment variable that is set (what it has is not shown: is it the secret?)",
    ),
    ("[api]\ntoken_env = 1234567890", "api.token_env: must be a string"),
    *(
        (
            f"{table}{key}_env = 'the-secret itself'",
            f"{at}.{key}_env: must name an environment variable that is set {NOT_SHOWN}",
        )
        for table, at, key in (
            ("[api]\n", "api", "token"),
            ("[database]\nurl = 'postgresql:///x'\n", "database", "password"),
            (OPERATOR, "operators.a", "hash_key"),
            (OPERATOR, "operators.a", "signing_secret"),
            (OPERATOR + "token_check = 'partner'\n", "operators.a", "partner_token"),
        )
    ),
    (
        "[api]\ntoken_env = 'c0ffee00c0ffee'",
        f"api.token_env: must name an environment variable that is set {NOT_SHOWN}",
    ),
    ("[api]\ntoken_file = 'comments'", "api.token_file: must not have comments alone"),
    (
        OPERATOR + "token_check = 'partner'\npartner_token_file = 'comments'",
        "operators.a.partner_token_file: must not have comments alone",
    ),
    (OPERATOR + "signing_secret_file = 'comments'", "operators.a.signing_secret_file: must not have comments alone"),
    (
        "[api]\ntoken_file = 'badname'",
        f"api.token_file: line 3: what stands before a colon is the token's name, and {values.NAME_RULE}",
    ),
    ("[api]\ntoken_file = 'unnamed'", "api.token_file: line 1: has a name without a token"),
    (
        "[api]\ntoken_file = 'secret'\nread_token_file = 'secret'",
        "api.read_token_file: line 1: is a token of token_file too, which may change things",
    ),
    (
        "[api]\nread_token_file = 'tokens'",
        "api.read_token_file: needs token_file beside it: else nobody may change anything",
    ),
    ("[api]\ntoken_env = 'UNSET'", "api.token_env: must name an environment variable that is set (got 'UNSET')"),
    ("[api]\ntoken_env = 'BLANK'", "api.token_env: must name an environment variable that is set (got 'BLANK')"),
    ("[api]\ntoken_file = 'secret'\ntoken_env = 'SECRET'", "api.token_file: and token_env must not both be given"),
    (
        OPERATOR + "hash_key_file = 'secret'\nhash_key_env = 'SECRET'",
        "operators.a.hash_key_file: and hash_key_env must not both be given",
    ),
    (
        OPERATOR + "partner_token_file = 'secret'\npartner_token_env = 'SECRET'",
        "operators.a.partner_token_file: and partner_token_env must not both be given",
    ),
    (
        OPERATOR + "signing_secret_file = 'secret'\nsigning_secret_env = 'SECRET'",
        "operators.a.signing_secret_file: and signing_secret_env must not both be given",
    ),
    (OPERATOR + "signing_secret_file = 'secret'", f"operators.a.signing_secret_file: line 1: {WHSEC_RULE}"),
    (OPERATOR + "signing_secret_file = 'whsec23'", f"operators.a.signing_secret_file: line 4: {WHSEC_RULE}"),
    (OPERATOR + "signing_secret_file = 'whsec65'", f"operators.a.signing_secret_file: line 1: {WHSEC_RULE}"),
    (OPERATOR + "signing_secret_file = 'unpadded'", f"operators.a.signing_secret_file: line 1: {WHSEC_RULE}"),
    (OPERATOR + "signing_secret_file = 'accents'", f"operators.a.signing_secret_file: line 1: {WHSEC_RULE}"),
    (OPERATOR + "signing_secret_env = 'SECRET'", f"operators.a.signing_secret_env: line 1: {WHSEC_RULE}"),
    # plug-ins
    ("[plugins.p]", "plugins.p.use: is required"),
    ("[plugins.p]\nuse = ''", "plugins.p.use: must be \"module:attribute\" (got '')"),
    ("[plugins.p]\nuse = 'acme_hooks'", "plugins.p.use: must be \"module:attribute\" (got 'acme_hooks')"),
    ("[plugins.p]\nuse = 'm:f'\ntimeout = '0s'", "plugins.p.timeout: must not be zero"),
    ("[plugins.p]\nuse = 'm:f'\nconcurrency = 0", "plugins.p.concurrency: must be between 1 and 1000 (got 0)"),
    (
        OPERATOR + "[plugins.p]\nuse = 'm:f'\noperators = ['a', 'b']",
        "plugins.p.operators: must name operators of this file (got 'b')",
    ),
    ("[plugins.p]\nuse = 'm:f'\nschedule = ['1s']", "plugins.p.schedule: is no key of this table"),
]


@pytest.mark.parametrize(("text", "finding"), BAD_FILES, ids=[finding[:60] for _, finding in BAD_FILES])
def test_bad_file_is_told_place_rule_and_value(home: Path, text: str, finding: str) -> None:
    assert findings(home, text) == [finding.replace("{home}", str(home))]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "op.localhost",
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",  # CGNAT (shared by a carrier's customers)
        "169.254.169.254",  # a cloud's metadata service
        "198.18.0.1",  # reserved for benchmarks
        "192.0.2.1",  # reserved for documentation
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",  # a cloud's metadata service
        "[fec0::1]",  # site-local
        "[ff0e::1]",
        "[2001:db8::1]",
        "[::ffff:127.0.0.1]",  # IPv4-mapped
        "[::127.0.0.1]",  # IPv4-compatible
        "[64:ff9b::10.0.0.1]",  # NAT64
        "[64:ff9b:1::1]",  # local NAT64
        "[2002:7f00:1::]",  # 6to4
        "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",  # Teredo
    ],
)
def test_url_of_a_private_address_is_refused_unless_allowed(home: Path, host: str) -> None:
    text = f"{OPERATOR}url = 'https://{host}:8443/x'\n"
    rule = f"must not be a loopback, private or metadata address (got 'https://{host}:8443/x'){LIFTED}"
    assert findings(home, text) == [f"operators.a.url: {rule}"]
    assert load(home, text + "allow_private_network = true").operators["a"].url == f"https://{host}:8443/x"


@pytest.mark.parametrize(
    "host",
    [
        "operator.example",
        "localhost.example",
        "8.8.8.8",
        "[2606:4700::1111]",
        "[::ffff:8.8.8.8]",
        "[64:ff9b::8.8.8.8]",
        "[2002:808:808::]",
    ],
)
def test_url_of_a_public_address_or_a_name_is_taken(home: Path, host: str) -> None:
    assert load(home, f"{OPERATOR}url = 'https://{host}/x'\n").operators["a"].url == f"https://{host}/x"


# -- all at once


def test_every_error_of_a_file_is_reported_at_once(home: Path) -> None:
    text = """
        sever = 1
        [server]
        listen = "0.0.0.0:80"
        [api]
        listen = "0.0.0.0:81"
        [sessions]
        idle_timeout = 5
        [dialects.x]
        path = "x"
        typo = 1
        fields = { provider = "p", uuid = "p" }
        required = ["hash"]
        codes = { retry = 0 }
        [operators.a]
        url = "http://127.0.0.1/"
        endpoint = "/health"
        hash_key_file = "none"
        [operators.b]
        provider_id = "p"
        dialect = "v9"
        concurrency = 0
        client_key_file = "key.pem"
        [operators.c]
        provider_id = "P"
        allow_from = ["x"]
        [plugins.p]
        operators = ["d"]
        timeout = "0s"
    """
    assert [finding.partition(": ")[0] for finding in findings(home, text)] == [
        "sever",
        "sessions.idle_timeout",
        "dialects.x.typo",
        "dialects.x.path",
        "dialects.x.fields.uuid",
        "dialects.x.fields",
        "dialects.x.codes.retry",
        "dialects.x.required",  # it names a hash, which is no field
        "dialects.x.required",  # it lacks provider,
        "dialects.x.required",  # session
        "dialects.x.required",  # and player
        "operators.a.provider_id",
        "operators.a.url",  # the URL is not https
        "operators.a.url",  # the URL has a loopback address
        "operators.a.hash_key_file",
        "operators.a.endpoint",
        "operators.b.dialect",
        "operators.b.concurrency",
        "operators.b.client_cert_file",
        "operators.c.allow_from[0]",
        "plugins.p.use",
        "plugins.p.operators",
        "plugins.p.timeout",
        "operators.c.endpoint",
        "operators.a.auth",
        "operators.b.auth",
        "api.token_file",
    ]


CODE_RULE = "must be between 1 and 999999; 0 means success"
FAULTY_DIALECT = """
    [dialects.q]
    path = "/x"
    fields = { provider = "p", session = "s", foo = "x" }
    required = ["provider", "player"]
    codes = { retry = 120, final = 0, zzz = 1 }
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            FAULTY_DIALECT,
            [
                "codes.zzz: is no key of this table",
                "fields.foo: must be one of provider, session, player, token, request, hash",
                f"codes.final: {CODE_RULE} (got 0)",
                "codes.retry: must be none of 120, 999, which ask not to try again (got 120)",
                "required: must name keys of fields (got 'player')",
                "required: must contain 'session': a notice without it means nothing",
            ],
        ),
        (
            DIALECT.replace(".x]", ".q]") + 'codes = { retry = "a", final = 0 }',
            ["codes.retry: must be an integer (got 'a')", f"codes.final: {CODE_RULE} (got 0)"],
        ),
        # What is told first may be the reason for the rest, which is then not told
        (
            DIALECT.replace(".x]", ".q]") + 'codes = { retry = "a", final = 100 }',
            ["codes.retry: must be an integer (got 'a')"],
        ),
        (
            DIALECT.replace(".x]", ".q]").replace('player = "u"', 'plyer = "u&"'),
            ["fields.plyer: must be one of provider, session, player, token, request, hash (did you mean 'player'?)"],
        ),
        (
            DIALECT.replace(".x]", ".q]").replace('"u"', "5").replace(', "session"', ""),
            [
                "fields.player: must be a string (got 5)",
                "required: must contain 'session': a notice without it means nothing",
            ],
        ),
    ],
)
def test_an_error_in_a_table_within_a_dialect_hides_no_other(home: Path, text: str, expected: list[str]) -> None:
    assert findings(home, text) == [f"dialects.q.{finding}" for finding in expected]


def test_files_of_a_listener_are_read_whatever_else_is_wrong(home: Path) -> None:
    missing = "cannot be read: No such file or directory"
    text = '[server]\ntls_cert_file = "x.pem"\n[api]\nclient_ca_file = "ca.pem"\n'
    assert findings(home, text) == [
        "server.tls_cert_file: and tls_key_file must be given together",
        f"server.tls_cert_file: {missing} ({home}/x.pem)",
        "api.client_ca_file: needs tls_cert_file: only over TLS a client can show a certificate",
        f"api.client_ca_file: {missing} ({home}/ca.pem)",
    ]


def test_an_operator_with_an_error_is_still_compared_with_the_others(home: Path) -> None:
    text = OPEN + "url = 'ftp://op.example/'\n[operators.b]\nprovider_id = 'P'\nauth = 'none'\ntimeout = '0s'\n"
    assert findings(home, text) == [
        f"operators.a.url: {SHAPE_RULE} (got 'ftp://op.example/')",
        "operators.b.timeout: must not be zero",
        "operators.b.endpoint: is shared with operators.a under the same provider_id (got '/V4/SessionExpired')",
        EXPOSED,
    ]


@pytest.mark.parametrize(
    "text",
    [
        # Each text has one mistake, which could make a rule between several keys report a second one wrongly.
        OPEN + "token_check = 'sesion'",
        OPEN + "allow_from = ['10.0.0.1/8']",
        OPEN + "auth = 'nobody'",
        OPEN + "accept = ['pragmatik']",
        OPERATOR + "[operators.b]\nprovider_id = 'p'\nendpoint = 5",
        "[operators.a]\n[operators.b]\nprovider_id = ''\n",
        "[server]\nlisten = 'x'\n[api]\nlisten = '127.0.0.1:8080'",
        DIALECT.replace("{ provider", "{ prvider") + OPERATOR + "accept = ['x', 'v4']\ntoken_check = 'session'",
        DIALECT.replace('fields = { provider = "p", session = "s", player = "u" }\n', "") + OPERATOR + "accept = ['x']",
    ],
)
def test_mistake_is_not_reported_as_another(home: Path, text: str) -> None:
    found = findings(home, text)
    keys = {finding.partition(":")[0].partition("[")[0] for finding in found}
    assert len(found) == len(keys) <= 2
    assert not any(word in finding for finding in found for word in ("authenticates", "shared", "differ", "apart"))


# -- the file itself


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"[server\n", "not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 8)"),
        (b"[log]\n[log]\n", "not valid TOML: Cannot declare ('log',) twice (at line 2, column 5)"),
        (b"\nx = \xff", "is Latin-1 or another encoding that is not UTF-8 (line 2); save it as UTF-8"),
        ("[log]\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("[log]\n".encode("utf-32-be"), "is UTF-32; save it as UTF-8"),
        (b"[log]\nlevel = 'info'\n\0", "must not have a zero byte (line 3)"),
        (b"x = " + b"[" * 100_000, "not valid TOML: nested too deeply"),
    ],
)
def test_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes, finding: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        reader.load(file)
    assert caught.value.findings == [f"{file}: {finding}"]


UNQUOTED = "text needs quotation marks"
UNCLOSED = "a quotation mark is missing in this line"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (f"x = {MARK}", UNQUOTED),
        ("x = 30m", UNQUOTED),
        ("x = 127.0.0.1:80", UNQUOTED),
        ("x = https://h/", UNQUOTED),
        ("x = /v4", UNQUOTED),
        ('x = ["v1", v4]', UNQUOTED),
        ("x = [5s, 10s]", UNQUOTED),
        ("x = [\n  5s,\n]", UNQUOTED),
        ("x = { a = 5s }", UNQUOTED),
        (f'x = "{MARK}', UNCLOSED),
        (f'x = "{MARK}\r', UNCLOSED),
        (f"x = '{MARK}\ny = ''", UNCLOSED),
        ('x = ["5s, "10s"]', UNCLOSED),
        ("x = 'a", "a quotation mark is missing"),
        ("x =", ""),
        ("x = True", ""),
        ("x y = 1", ""),
        ("[a b]", ""),
        ('x = ["a"', ""),
    ],
)
def test_a_slip_with_quotation_marks_gets_a_hint_that_quotes_nothing(tmp_path: Path, line: str, hint: str) -> None:
    (found,) = findings(tmp_path, f"[log]\n{line}\n")
    assert re.fullmatch(r"not valid TOML: [^:]* \((at line [23], column \d+|at end of document)\)(: )?" + hint, found)
    assert MARK not in found


def test_number_too_long_for_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid TOML: Exceeds the limit"):
        load(tmp_path, "x = " + "9" * 5000)


@pytest.mark.parametrize(("name", "reason"), [("none.toml", "No such file or directory"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reader.load(tmp_path / name)
    assert caught.value.findings == [f"{tmp_path / name}: cannot be read: {reason}"]


def test_file_is_found_in_the_promised_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    system = tmp_path / "etc.toml"
    monkeypatch.setattr(reader, "PATHS", ("./config.toml", str(system)))
    with pytest.raises(ConfigError) as caught:
        reader.find(None)
    assert caught.value.findings == [
        f"no configuration file: looked for ./config.toml, {system}; name one with --config"
    ]
    system.touch()
    assert reader.find(None) == (system, True)
    Path("config.toml").touch()
    assert reader.find(None) == (Path("config.toml"), True)
    monkeypatch.setenv("LMDAEMON_CONFIG", "from-environment.toml")
    assert reader.find(None) == (Path("from-environment.toml"), False)
    assert reader.find(Path("named.toml")) == (Path("named.toml"), False)


def test_file_in_a_directory_closed_to_this_user_is_named_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)  # patched, because root may run the tests and may enter every directory
    assert reader.find(None) == (Path(reader.PATHS[0]), True)


def test_database_lies_in_the_state_directory_else_beside_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(home, "[database]\npath = 'x/y.db'\n").database == home / "x/y.db"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/lmdaemon:/var/lib/other")
    assert load(home, "[database]\npath = 'x/y.db'\n").database == Path("/var/lib/lmdaemon/x/y.db")
    assert load(home, "[database]\npath = '/srv/y.db'\n").database == Path("/srv/y.db")


# -- secrets

ALL_SECRETS = f"""
    [api]
    token_file = "tokens"
    {OPERATOR}
    accept = ["v4", "pragmatic"]
    token_check = "partner"
    partner_token_env = "SECRET"
    hash_key_file = "secret"
    signing_secret_file = "whsec"
    url = "https://user:{MARK}@operator.example/x?key={MARK}"
    notify = true
    [plugins.p]
    use = "m:f"
    options = {{ password = "{MARK}" }}
"""


def test_secrets_are_read_one_a_line_where_several_may_be_valid(home: Path) -> None:
    secret(home / "whsec", f"{whsec(24)}\n{whsec(64)}\n")
    settings = load(home, ALL_SECRETS)
    operator = settings.operators["a"]
    assert settings.api_tokens == (ApiToken(f"{MARK}-1".encode()), ApiToken(f"{MARK}-2".encode()))
    assert operator.partner_tokens == (MARK,)
    assert operator.hash_key == MARK
    assert operator.signing_keys == (bytes(24), bytes(64))


def test_hash_key_loses_only_the_line_break_at_its_end(home: Path) -> None:
    secret(home / "key", f" {MARK} \r\n")
    assert load(home, OPERATOR + "hash_key_file = 'key'").operators["a"].hash_key == f" {MARK} "


def test_relative_secret_is_looked_up_among_the_credentials_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = home / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    text = "[api]\ntoken_file = 'secret'\n"
    assert load(home, text).api_tokens == (ApiToken(MARK.encode()),)
    secret(credentials / "secret", "handed over")
    assert load(home, text).api_tokens == (ApiToken(b"handed over"),)
    assert load(home, f"[api]\ntoken_file = '{home}/secret'\n").api_tokens == (ApiToken(MARK.encode()),)


def test_a_missing_secret_is_told_with_every_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "api.token_file: cannot be read: No such file or directory"
    monkeypatch.chdir(home)
    Path("config.toml").write_text("[api]\ntoken_file = 'none'\n")

    def told() -> list[str]:
        with pytest.raises(ConfigError) as caught:
            reader.load(Path("config.toml"))
        return caught.value.findings

    assert told() == [f"config.toml: {missing} ({home}/none)"]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    assert told() == [f"config.toml: {missing} (looked for /run/credentials/x/none, then for {home}/none)"]
    Path("config.toml").write_text("[api]\ntoken_file = '/none'\n")
    assert told() == [f"config.toml: {missing} (/none)"]


def test_tokens_have_names_comments_and_rights(home: Path) -> None:
    secret(home / "changing", f"# rotated 2026-01 by ops\n\n  # next: May\nlobby-1:{MARK}:with:colons\n{MARK}-bare\n")
    secret(home / "reading", f"grafana: {MARK}-reads\n")
    settings = load(home, "[api]\ntoken_file = 'changing'\nread_token_file = 'reading'\n")
    assert settings.api_tokens == (
        ApiToken(f"{MARK}:with:colons".encode(), "lobby-1"),
        ApiToken(f"{MARK}-bare".encode()),
        ApiToken(f"{MARK}-reads".encode(), "grafana", may_change=False),
    )
    assert settings.warnings == ()


@pytest.mark.parametrize("content", ["123456789012345", "ops:123456789012345"])
def test_a_token_that_may_be_guessed_is_warned_about_without_showing_it(home: Path, content: str) -> None:
    secret(home / "short", f"# ours\n{content}\n{content}6\n")
    text = "[api]\ntoken_file = 'tokens'\nread_token_file = 'short'\n"
    assert load(home, text).warnings == (
        "api.read_token_file: line 2: a token of fewer than 16 characters may be guessed",
    )


@pytest.mark.parametrize("by", ["file", "env"])
@pytest.mark.parametrize("before", ["", "\ufeff"], ids=["bare", "byte-order mark"])
def test_every_secret_is_the_same_with_a_byte_order_mark(
    home: Path, monkeypatch: pytest.MonkeyPatch, by: str, before: str
) -> None:
    def kept(name: str, content: str) -> str:
        secret(home / name, before + content)
        monkeypatch.setenv(name, before + content)
        return name

    settings = load(
        home,
        f"[api]\ntoken_{by} = '{kept('T', MARK + chr(10))}'\nread_token_{by} = '{kept('R', MARK + '-r' + chr(13))}'\n"
        f"{OPERATOR}accept = ['v4', 'pragmatic']\ntoken_check = 'present'\npartner_token_{by} = '{kept('P', MARK)}'\n"
        f"hash_key_{by} = '{kept('H', MARK + chr(13) + chr(10))}'\nsigning_secret_{by} = '{kept('S', whsec(24))}'\n",
    )
    operator = settings.operators["a"]
    assert [token.secret.decode() for token in settings.api_tokens] == [MARK, f"{MARK}-r"]
    assert (operator.partner_tokens, operator.hash_key, operator.signing_keys) == ((MARK,), MARK, (bytes(24),))


def test_a_byte_order_mark_and_foreign_line_breaks_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbf[log]\r\nlevel = 'debug'\r\n")
    assert reader.load(tmp_path / "config.toml").log.level == "debug"


def test_certificates_are_found_like_secrets(home: Path) -> None:
    text = "client_cert_file = 'cert.pem'\nclient_key_file = 'key.pem'\nca_file = 'cert.pem'\n"
    operator = load(home, OPERATOR + text).operators["a"]
    files = (operator.ca_file, operator.client_cert_file, operator.client_key_file)
    assert [file and file.path.name for file in files] == ["cert.pem", "cert.pem", "key.pem"]
    assert load(home, OPERATOR).operators["a"].ca_file is None


NO_CERTIFICATE = "must hold a certificate in PEM form ({home}/"
NO_KEY = "must hold a private key in PEM form, without a passphrase ({home}/"


@pytest.mark.parametrize(
    ("keys", "finding"),
    [
        ("ca_file = 'secret'", "ca_file: " + NO_CERTIFICATE + "secret)"),
        ("ca_file = 'empty'", "ca_file: " + NO_CERTIFICATE + "empty)"),
        ("ca_file = 'key.pem'", "ca_file: " + NO_CERTIFICATE + "key.pem)"),
        ("ca_file = 'cert.der'", "ca_file: " + NO_CERTIFICATE + "cert.der)"),
        ("ca_file = 'cut.pem'", "ca_file: cannot be used for TLS: "),
        ("ca_file = 'cut.pem'\n{pair}", "ca_file: cannot be used for TLS: "),
        ("client_cert_file = 'empty'\nclient_key_file = 'key.pem'", "client_cert_file: " + NO_CERTIFICATE + "empty)"),
        ("client_cert_file = 'cut.pem'\nclient_key_file = 'key.pem'", "client_cert_file: cannot be used for TLS: "),
        (
            "ca_file = 'cert.pem'\nclient_cert_file = 'cut.pem'\nclient_key_file = 'key.pem'",
            "client_cert_file: cannot be",
        ),
        ("client_cert_file = 'cert.pem'\nclient_key_file = 'secret'", "client_key_file: " + NO_KEY + "secret)"),
        # the key has a passphrase, which must not be asked for
        ("client_cert_file = 'cert.pem'\nclient_key_file = 'locked.pem'", "client_key_file: " + NO_KEY + "locked.pem)"),
        ("client_cert_file = 'cert.pem'\nclient_key_file = 'other.key'", "client_cert_file: does not fit its key"),
        (
            "client_cert_file = 'cert.pem'\nclient_key_file = 'cut.key'",
            "client_key_file: cannot be used for TLS: it is damaged",
        ),
        (
            "client_cert_file = 'torn.pem'\nclient_key_file = 'key.pem'",
            "client_cert_file: cannot be used for TLS: it is damaged",
        ),
        ("ca_file = 'torn.pem'", "ca_file: cannot be used for TLS: it is damaged"),
    ],
)
def test_certificate_that_tls_cannot_use_is_an_error(home: Path, keys: str, finding: str) -> None:
    secret(home / "locked.pem", LOCKED_KEY)
    secret(home / "empty", "")
    secret(home / "cert.der", ssl.PEM_cert_to_DER_cert(CERTIFICATE))
    lines = CERTIFICATE.splitlines(keepends=True)
    secret(home / "cut.pem", "".join(lines[:3] + lines[-1:]))
    secret(home / "torn.pem", CERTIFICATE.replace(lines[1], "!" + lines[1][1:]))
    secret(home / "cut.key", KEY[: len(KEY) // 2])
    make(home, "other")
    pair = "client_cert_file = 'cert.pem'\nclient_key_file = 'key.pem'"
    (found,) = findings(home, OPERATOR + keys.format(pair=pair))
    assert found.startswith("operators.a." + finding.replace("{home}", str(home)))
    assert MARK not in found


@pytest.mark.parametrize(
    ("begins", "ends", "warned"),
    [
        (-DAY, 100 * DAY, None),
        (-DAY, 20 * DAY, "expires on "),
        (-2 * DAY, -DAY, "has expired on "),
        (DAY, 2 * DAY, "is not valid before "),
    ],
)
def test_certificate_that_is_not_valid_or_ends_soon_is_warned_about(
    home: Path, begins: timedelta, ends: timedelta, warned: str | None
) -> None:
    """The finding is a warning, because one operator's certificate must not keep the daemon from starting for all
    others.
    """
    one = make(home, "one", begins=begins, ends=ends)
    for keys, at in (
        ("ca_file = 'one.crt'", "ca_file"),
        ("client_cert_file = 'one.crt'\nclient_key_file = 'one.key'", "client_cert_file"),
    ):
        found = load(home, OPERATOR + keys).warnings
        if warned is None:
            assert found == ()
        else:
            assert len(found) == 1
            assert found[0].startswith(f"operators.a.{at}: {warned}")
            assert found[0].endswith(f" (one): {one.cert}")


def test_an_authority_that_has_expired_beside_its_successor_is_no_matter(home: Path) -> None:
    old, new = make(home, "old", authority=True, ends=-DAY / 2), make(home, "new", authority=True)
    secret(home / "both.pem", old.cert.read_bytes() + new.cert.read_bytes())
    assert load(home, OPERATOR + "ca_file = 'both.pem'").warnings == ()


def test_changed_content_of_a_certificate_file_is_a_change_of_its_key(home: Path) -> None:
    text = OPERATOR + "client_cert_file = 'one.crt'\nclient_key_file = 'one.key'\nca_file = 'cert.pem'\n"
    make(home, "one")
    before = load(home, text)
    assert list(changes(before, load(home, text))) == []
    make(home, "one")
    assert list(changes(before, load(home, text))) == [
        "operators.a.client_cert_file",
        "operators.a.client_key_file",
    ]


CHANGEABLE = """\
[server]
[api]
token_file = "tokens"
[sessions]
[dialects.d]
path = "/d"
fields = { provider = "a", session = "b", player = "c", token = "t" }
required = ["provider", "session", "player", "token"]
[dialects.d.codes]
[plugins.p]
use = "m:f"
[delivery]
[database]
[operators."a.b"]
provider_id = "p"
partner_token_env = "PARTNER"
token_check = "partner"
signing_secret_file = "signing"
"""


@pytest.mark.parametrize(
    ("table", "written", "key"),
    [
        ("[server]", 'listen = "127.0.0.1:1"', "server.listen"),
        ("[database]", 'path = "other"', "database.path"),
        ("[database]", 'keep_ended = "8d"', "database.keep_ended"),
        ("[sessions]", 'idle_timeout = "1m"', "sessions.idle_timeout"),
        ("[sessions]", 'restart_grace = "1s"', "sessions.restart_grace"),
        ("[sessions]", 'downtime = "count"', "sessions.downtime"),
        ("[delivery]", "concurrency = 5", "delivery.concurrency"),
        ("[dialects.d.codes]", "retry = 99", "dialects.d.codes.retry"),
        ("[plugins.p]", "options = { x = 1 }", "plugins.p.options"),
        ('[operators."a.b"]', 'dialect = "v4.01"', "operators.a.b.dialect"),
        ('[operators."a.b"]', 'accept = ["v4", "d"]', "operators.a.b.accept"),
        ('[operators."a.b"]', 'unknown_session = "reject"', "operators.a.b.unknown_session"),
        ('[operators."a.b"]', 'auth = "none"', "operators.a.b.auth"),
        ('[operators."a.b"]', 'endpoint = "/e"', "operators.a.b.endpoint"),
        ('[operators."a.b"]', 'url = "https://h.example/"', "operators.a.b.url"),
        ('[operators."a.b"]', 'max_age = "1h"', "operators.a.b.max_age"),
        ("[server]", '[operators.new]\nprovider_id = "n"\n[server]', "operators.new"),
    ],
)
def test_what_changed_is_told_by_its_key_in_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, table: str, written: str, key: str
) -> None:
    monkeypatch.setenv("PARTNER", MARK)
    before = load(home, CHANGEABLE)
    changed = CHANGEABLE.replace(table, written if table in written else f"{table}\n{written}", 1)
    assert list(changes(before, load(home, changed))) == [key]
    assert list(changes(load(home, changed), load(home, CHANGEABLE))) == [key]


def test_what_is_written_otherwise_or_as_its_default_is_no_change(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTNER", MARK)
    same = CHANGEABLE.replace("[sessions]", '# more\n[sessions]\nidle_timeout = "1800s"\nmax_lifetime = "0s"')
    assert list(changes(load(home, CHANGEABLE), load(home, same))) == []


def test_a_secret_that_changed_is_told_by_the_key_that_names_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTNER", MARK)
    before = load(home, CHANGEABLE)
    monkeypatch.setenv("PARTNER", MARK + "2")
    secret(home / "tokens", "ops:" + MARK)
    secret(home / "signing", whsec(40))
    assert list(changes(before, load(home, CHANGEABLE))) == [
        "api.token_file",
        "operators.a.b.partner_token_env",
        "operators.a.b.signing_secret_file",
    ]


@pytest.mark.parametrize(
    ("text", "at", "name"),
    [
        ("[api]\ntoken_file = 'tokens'", "api.token_file", "tokens"),
        (OPERATOR + "hash_key_file = 'secret'", "operators.a.hash_key_file", "secret"),
        (
            OPERATOR + "client_cert_file = 'cert.pem'\nclient_key_file = 'key.pem'",
            "operators.a.client_key_file",
            "key.pem",
        ),
    ],
)
def test_secret_that_others_can_read_is_warned_about(home: Path, text: str, at: str, name: str) -> None:
    for mode in (0o640, 0o600, 0o400):
        (home / name).chmod(mode)
        assert load(home, text).warnings == ()
    (home / name).chmod(0o644)
    assert load(home, text).warnings == (f"{at}: others can read this secret (mode 644): {home / name}",)


@pytest.mark.parametrize(("other", "warned"), [("A", True), ("a2", False)])
def test_names_that_differ_only_in_case_are_warned_about(home: Path, other: str, warned: bool) -> None:
    text = f'{OPERATOR}[operators.{other}]\nprovider_id = "q"\n'
    warning = f"operators.{other}: is not operators.a: upper and lower case make different names"
    assert load(home, text).warnings == ((warning,) if warned else ())


@pytest.mark.parametrize(("kept", "warned"), [("7d", False), ("167h", True), ("1ms", True)])
def test_keeping_ended_sessions_below_7_days_is_warned_about(home: Path, kept: str, warned: bool) -> None:
    warning = "database.keep_ended: below 7d a late repeat of a notice may be taken for a new one"
    assert load(home, f"[database]\nkeep_ended = '{kept}'\n").warnings == ((warning,) if warned else ())


@pytest.mark.parametrize(
    "text",
    [
        "[api]\ntoken_file = 'secret'\n",
        OPERATOR + "client_cert_file = 'cert.pem'\nclient_key_file = 'key.pem'\nhash_key_file = 'secret'\n",
    ],
)
def test_secret_closed_to_this_user_stops_the_daemon_but_not_check_config(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    read_bytes = Path.read_bytes

    def closed(path: Path) -> bytes:
        if path.name in ("secret", "key.pem"):
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", closed)  # patched, because root may run the tests and can read every file
    found = findings(home, text)
    assert all(": cannot be read: Permission denied (" in finding for finding in found)
    settings = load(home, text, secrets="readable")
    assert settings.warnings == tuple(finding.replace(": ", ": unchecked: ", 1) for finding in found)


def test_a_secret_that_is_missing_is_an_error_for_check_config_too(home: Path) -> None:
    text = "[api]\ntoken_file = 'misspelt'\n" + OPERATOR + "hash_key_env = 'UNSET'\n"
    with pytest.raises(ConfigError) as caught:
        load(home, text, secrets="readable")
    assert [finding.partition(": ")[2] for finding in caught.value.findings] == [
        "operators.a.hash_key_env: must name an environment variable that is set (got 'UNSET')",
        f"api.token_file: cannot be read: No such file or directory ({home}/misspelt)",
    ]


def test_what_systemd_hands_over_is_unchecked_in_an_exec_reload(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd 257 gives the credentials to no process of ExecReload=, and gives it $MAINPID."""
    text = "[api]\ntoken_file = 'handed-over'\n"
    monkeypatch.setenv("MAINPID", "1")
    settings = load(home, text, secrets="readable")
    unseen = f"unchecked: cannot be read: No such file or directory ({home}/handed-over)"
    assert settings.warnings == (f"api.token_file: {unseen}",)
    absolute = text.replace("handed-over", f"{home}/handed-over")
    with pytest.raises(ConfigError, match="No such file"):
        load(home, absolute, secrets="readable")  # a credential is never named by an absolute path
    with pytest.raises(ConfigError, match="No such file"):
        load(home, text)  # the daemon's own reading is strict
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(home))
    with pytest.raises(ConfigError, match="No such file"):
        load(home, text, secrets="readable")  # strict, too: a process that gets the credentials


def test_administration_needs_no_secret_of_the_daemons(home: Path) -> None:
    text = "[api]\ntoken_file = 'handed-over'\n" + OPERATOR + "hash_key_env = 'UNSET'\n"
    assert load(home, text, secrets="optional").warnings == (
        "operators.a.hash_key_env: unchecked: must name an environment variable that is set (got 'UNSET')",
        f"api.token_file: unchecked: cannot be read: No such file or directory ({home}/handed-over)",
    )


def test_no_repr_shows_a_secret(home: Path) -> None:
    secret(home / "whsec", whsec(24))
    settings = load(home, ALL_SECRETS)
    operator, plugin = settings.operators["a"], settings.plugins["p"]
    assert (MARK in operator.url, plugin.options["password"]) == (True, MARK)
    for text in map(repr, (settings, operator, plugin, settings.operators, settings.plugins, settings.warnings)):
        assert MARK not in text
        assert whsec(24) not in text


@pytest.mark.parametrize(
    "keys",
    [
        f"url = 'http://user:{MARK}@op.example/x?key={MARK}#{MARK}'",
        f"url = 'https://user:{MARK}@127.0.0.1/x?key={MARK}'",
        f"url = 'ftp://{MARK}@op.example/x?key={MARK}'",
        f"url = 'https://user:{MARK}@op.example:99999/'",
        f"url = 'https://user:{MARK}/more@op.example/'",  # Python's own error message quotes what it takes for the port
        f"url = 'https://user:{MARK}@op℀.example/'",  # here Python's error message quotes all of it
        f"url = 'https://user:{MARK}@op.example/a b?{MARK}'",
        f"url = 'https:/user:{MARK}@op.example/'",
        f"url = '//user:{MARK}@op.example/?{MARK}'",
        f"url = 'user:{MARK}@op.example/?{MARK}'",
        f"url = ['https://user:{MARK}@op.example/']",
        f"url = {{ secret = '{MARK}' }}",
        f"endpoint = 'https://user:{MARK}@op.example/?{MARK}'",
        f"hash_key = '{MARK}'",
        f"hash_key = {{ file = '{MARK}' }}",
        f"signing_secret_file = ['{MARK}']",
        "signing_secret_env = 'SECRET'",
        "signing_secret_file = 'secret'",
        "ca_file = 'secret'",
        "client_cert_file = 'secret'\nclient_key_file = 'secret'",
        "hash_key_file = 'secret'\nhash_key_env = 'SECRET'",
        f"[operators]\nhash_key = '{MARK}'",
        f"[api]\ntoken = '{MARK}'",
        f"api = '{MARK}'",
        f"[plugins.p]\nuse = 'm:f'\noptions = '{MARK}'",
        f"[plugins.p]\nuse = 'm'\noptions = {{ password = '{MARK}' }}",
    ],
)
def test_no_error_shows_a_secret(home: Path, keys: str) -> None:
    elsewhere = keys.startswith(("[", "api"))
    with pytest.raises(ConfigError) as caught:
        load(home, keys if elsewhere else OPERATOR + keys)
    assert MARK not in f"{caught.value} {caught.value!r} {caught.value.findings}"


# -- random files

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAUSIBLE = st.sampled_from(  # split: a list of them would be formatted one a line
    """
    5s 0s 7d p P v4 v1 x pragmatic session partner present none accept reject m:f secret SECRET cert.pem token hash a
    /x /X/ /health 0.0.0.0:80 127.0.0.1:8080 [::1]:0 unix:/x 10.0.0.0/8 https://op.example/x http://127.0.0.1/ https://[
    """.split()  # noqa: SIM905
)
SCALAR = (
    PLAUSIBLE
    | TEXT
    | st.booleans()
    | st.integers()
    | st.integers(-(16**5000), 16**5000)
    | st.floats()
    | st.datetimes()
    | st.dates()
    | st.times()
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | PLAUSIBLE, inner, max_size=4),
    max_leaves=6,
)

FITTING: Mapping[str, st.SearchStrategy[Any]] = {
    "provider_id": st.sampled_from(["p", "P", "q"]),
    "accept": st.lists(st.sampled_from(["v4", "v1", "x", "pragmatic"]), min_size=1, max_size=3),
    "hash_key_env": st.sampled_from(["", "SECRET"]),
    "token_check": st.sampled_from(["present", "session"]),
    "use": st.just("m:f"),
    "path": st.sampled_from(["/x", "/V4/SessionExpired"]),
    "fields": st.fixed_dictionaries(
        {"provider": st.just("providerId"), "session": st.just("sessionId"), "player": st.just("externalPlayerId")},
        optional={"token": st.just("token"), "hash": st.just("hash") | TEXT},
    ),
    "required": st.permutations(["provider", "session", "player", "hash"]).map(lambda order: order[:3])
    | st.just(["provider", "session", "player"]),
    "listen": st.sampled_from(["0.0.0.0:80", "127.0.0.1:8080", "[::1]:0"]),
}


def tables_like(struct: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    """Tables that fit `struct` except for a key or two, so that the rules between keys and tables are reached as
    well.
    """
    names = [field.name for field in msgspec.structs.fields(struct)]
    fitting = st.fixed_dictionaries({name: FITTING[name] for name in names if name in FITTING})
    spoilt = st.dictionaries(st.sampled_from(names) | TEXT, PLAUSIBLE | VALUE, max_size=2)
    return st.tuples(fitting, fitting | spoilt).map(lambda pair: pair[0] | pair[1])


def named(struct: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    tables = tables_like(struct)
    return st.dictionaries(st.sampled_from(["a", "b", "x"]), tables, max_size=3) | st.dictionaries(TEXT, tables | VALUE)


FILE = st.fixed_dictionaries(
    {"operators": named(OperatorTable), "dialects": named(DialectTable)},
    optional={"plugins": named(PluginTable), "server": tables_like(ServerTable)},
) | st.dictionaries(
    st.sampled_from(sorted({table.partition(".")[0] for table in STRUCTS})) | TEXT,
    st.one_of(*map(tables_like, STRUCTS.values())) | VALUE,
    max_size=5,
)


@pytest.fixture(scope="module")
def quiet_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config")
    secret(path / "secret")
    secret(path / "cert.pem", CERTIFICATE)
    return path


@settings(deadline=None)
@given(tables=FILE, secrets=st.sampled_from(["required", "readable", "optional"]))
def test_any_tables_become_settings_or_findings(quiet_home: Path, tables: dict[str, Any], secrets: Secrets) -> None:
    reading = reader.Reader(quiet_home / "config.toml", secrets=secrets)
    found = reading.settings(tables)
    assert (found is None) == bool(reading.findings.errors)
    for finding in reading.findings.errors + reading.findings.warnings:
        assert ": " in finding
        assert MARK not in finding
    if found is not None:
        assert set(found.operators) == set(tables.get("operators", {}))
        assert all(0 < operator.policy.timeout_s < math.inf for operator in found.operators.values())


@settings(deadline=None)
@given(content=st.binary(max_size=60) | st.text(st.sampled_from("[]{}='\"#\n.,ax10"), max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_a_config_error(quiet_home: Path, content: bytes) -> None:
    file = quiet_home / "any.toml"
    file.write_bytes(content)
    try:
        found = reader.load(file).warnings
    except ConfigError as error:
        found = tuple(error.findings)
        assert found
    assert all(isinstance(finding, str) for finding in found)


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUYYwTHeT0vLiSaBvaux61QKK1LI8wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjQwMzQ3NTZaGA8yMTI2MTAzMTAzNDc1
NlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABC5g
nOP4ciyKSpavS9Okjb0cD3vSgGFT7+4jRPV0GcYXWPg2Wc6hQ57B10h9+/utwzGi
J9fe2CrSfhmZo0tS1aWjUzBRMB0GA1UdDgQWBBQBpdnLIOyepSwLNMqzfzIRdIvf
FDAfBgNVHSMEGDAWgBQBpdnLIOyepSwLNMqzfzIRdIvfFDAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQD0mR3l79YetimBKXOTMaY69JA3xQo8rPN9
QFMXAVYJkgIgcVoQpoIcD0qfYRLwc41h6WfEYTN9vjjwY5JEihGDTPA=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQglWunmZRccmIG4VDL
CBPlM5kp/HMRDeRyDItEdNxhFXihRANCAAQuYJzj+HIsikqWr0vTpI29HA970oBh
U+/uI0T1dBnGF1j4NlnOoUOewddIffv7rcMxoifX3tgq0n4ZmaNLUtWl
-----END PRIVATE KEY-----
"""  # a key made for this test alone
LOCKED_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-256-CBC,B1E8B4BA02B6B2207BA7D62AACB43260

Rt0am2YfYCOe6n9M6gO3as2mLLWu60uhZlcc2PdbC5UrNazdkX1VDORjc54Fuyiv
FJ8KssJqNaCfuBII2nJXb1TEfKM+qjmHNXhB6HQy5lgtXm0W+gNa4OhQrdezDaTa
L2TeVXlkHEtTzhNy67G7GbP7C1jvg//9qMR6isKKMv8=
-----END EC PRIVATE KEY-----
"""
