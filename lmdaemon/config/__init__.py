"""config.toml → frozen `Settings`, or every error in the file at once with its key path.

Called by `cli` (start, check-config) and `daemon` (reload). Reads the file, the secret files and environment variables
it names, and nothing else; it must never print a secret.
"""

import base64
import difflib
import ipaddress
import os
import re
import ssl
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from lmdaemon import textfile, tls, trust
from lmdaemon.config import target
from lmdaemon.config.target import Target
from lmdaemon.dialects import SHIPPED, Codes, Dialect, breaks_hash
from lmdaemon.log import NOT_A_URL, safe_url
from lmdaemon.model import id_problem
from lmdaemon.tls import Certificate, Pem, Profile

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TlsFiles = tuple[Pem | None, Pem | None, Pem | None]  # CAs, our certificate, its key
Secrets = Literal["required", "readable", "optional"]

PATHS = ("./config.toml", "/etc/lmdaemon/config.toml")
KEEPALIVE_MIN_S, KEEPALIVE_MAX_S = 1.0, 3600.0  # proxies keep an idle connection for a minute to ten
KEEP_ENDED_ADVISED_S = 7 * 86400.0
TOKEN_ADVISED = 16  # characters
UNKNOWN_PER_MINUTE_MAX = 1_000_000
DURATION_MAX_S = 3650 * 86400.0
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAME_RULE = "must be 1 to 64 letters, digits, dots, hyphens or underscores, a letter or digit first"
# RFC 3986, section 3.3, but for percent-escapes: any other character arrives escaped, and would never match
_PATH = re.compile(r"/[A-Za-z0-9/._~!$&'()*+,;=:@-]*")
HASHED_RULE = "must have no & and no =, which separate the fields that are hashed"
_FIELD_MEANINGS = ("provider", "session", "player", "token", "request", "hash")


class ConfigError(Exception):
    """The configuration cannot be used. `findings` are complete sentences: file, key path, rule, value."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


class Duration(float):
    """A span in seconds, written `"250ms"`, `"30s"`, `"15m"`, `"2h"` or `"7d"`."""


class Listen(msgspec.Struct, frozen=True):
    """Where to listen: host and port, or a unix socket's path."""

    text: str
    host: str = ""
    port: int = 0
    unix: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it. A name counts as reachable from outside, but for localhost."""
        if self.unix or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")


@lru_cache(256)
def names_itself(host: str, listen: Listen) -> bool:
    """Whether a Host header, with any port, names this machine's loopback or what is configured to be listened on. A
    page from elsewhere that has its own name resolve to this machine (DNS rebinding) gives that name.
    """
    match = _HOST.fullmatch(host.lower())
    name = (match[1] or match[2] or "") if match else ""
    return bool(name) and (name == listen.host.lower() or Listen(host, host=name).loopback)


class ServerTable(msgspec.Struct, frozen=True):
    listen: Listen = Listen("127.0.0.1:8080", "127.0.0.1", 8080)
    trusted_proxies: tuple[Network, ...] = ()
    keepalive: Duration = Duration(75)
    tls_cert_file: str = ""
    tls_key_file: str = ""
    client_ca_file: str = ""


class ApiTable(msgspec.Struct, frozen=True):
    listen: Listen = Listen("127.0.0.1:8081", "127.0.0.1", 8081)
    token_file: str = ""
    token_env: str = ""
    read_token_file: str = ""
    read_token_env: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    client_ca_file: str = ""


class DatabaseTable(msgspec.Struct, frozen=True):
    path: str = "lmdaemon.sqlite3"
    keep_ended: Duration = Duration(90 * 86400)


class SessionsTable(msgspec.Struct, frozen=True):
    idle_timeout: Duration = Duration(1800)
    max_lifetime: Duration = Duration(0)
    restart_grace: Duration = Duration(60)
    downtime: Literal["pause", "count"] = "pause"


class DeliveryTable(msgspec.Struct, frozen=True):
    timeout: Duration = Duration(10)
    schedule: tuple[Duration, ...] = tuple(map(Duration, (5, 30, 120, 600, 1800, 7200, 18000, 36000, 36000)))
    max_age: Duration = Duration(72 * 3600)
    concurrency: int = 4


class LogTable(msgspec.Struct, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class OperatorTable(msgspec.Struct, frozen=True, kw_only=True):
    """`[operators.NAME]` as written. None means: inherited from [sessions] or [delivery]."""

    provider_id: str
    dialect: str = "v4"
    accept: tuple[str, ...] = ("v4",)
    endpoint: str | None = None
    unknown_session: Literal["accept", "reject"] = "accept"
    unknown_per_minute: int = 0
    token_check: Literal["present", "session", "partner"] = "present"
    partner_token_file: str = ""
    partner_token_env: str = ""
    hash_key_file: str = ""
    hash_key_env: str = ""
    allow_from: tuple[Network, ...] = ()
    auth: Literal["", "none"] = ""
    notify: bool = False
    url: str = ""
    idle_timeout: Duration | None = None
    max_lifetime: Duration | None = None
    timeout: Duration | None = None
    schedule: tuple[Duration, ...] | None = None
    max_age: Duration | None = None
    concurrency: int | None = None
    ca_file: str = ""
    client_cert_file: str = ""
    client_key_file: str = ""
    allow_private_network: bool = False
    signing_secret_file: str = ""
    signing_secret_env: str = ""


class PluginTable(msgspec.Struct, frozen=True, kw_only=True):
    use: str
    operators: tuple[str, ...] | None = None
    timeout: Duration = Duration(10)
    concurrency: int = 4
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class DialectTable(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    content: Literal["json", "form"] = "json"
    fields: dict[str, str]
    required: tuple[str, ...]
    codes: Codes = Codes()
    extra: bool = True


class Tls(msgspec.Struct, frozen=True):
    """What a listener speaks TLS with, as its files were when they were read."""

    cert: Pem  # its own certificate first
    context: ssl.SSLContext | None  # None where a file could not be read, as for administration by another user


class Policy(msgspec.Struct, frozen=True):
    """How a sink is tried: spans in seconds, attempts at once."""

    timeout_s: float
    schedule_s: tuple[float, ...]
    max_age_s: float
    concurrency: int


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An operator with everything inherited, looked up and read: what the daemon works with."""

    name: str
    provider_id: str
    sends: Dialect
    receives: tuple[Dialect, ...]
    paths: tuple[str, ...]  # as configured; looked up in lower case without a trailing slash
    accept_unknown: bool
    unknown_per_minute: int = 0  # no bound
    token_check: str
    partner_tokens: tuple[str, ...]
    hash_key: str | None
    allow_from: tuple[Network, ...]
    auth_none: bool
    notify: bool
    url: str  # as written, for showing it without its secrets
    target: Target | None  # what is sent; None without a URL
    idle_s: float
    lifetime_s: float
    policy: Policy
    allow_private_network: bool
    ca_file: Pem | None
    client_cert_file: Pem | None
    client_key_file: Pem | None
    tls: Profile  # made of these three
    signing_keys: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"Operator({self.name!r})"  # the rest holds secrets


class ApiToken(msgspec.Struct, frozen=True):
    """What a caller of the private API may show. `name`, if it has one, is for the log."""

    secret: bytes
    name: str = ""
    may_change: bool = True

    def __repr__(self) -> str:
        return f"ApiToken({self.name!r})"


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    use: str
    operators: tuple[str, ...] | None  # None: all
    policy: Policy
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Plugin({self.name!r})"  # its options may hold a secret

    def listens_to(self, operator: str) -> bool:
        return self.operators is None or operator in self.operators


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration, checked. `warnings` are for the log: allowed, but worth a look."""

    file: Path
    found: bool  # the file was found, not named
    server: ServerTable
    api: ApiTable
    api_tokens: tuple[ApiToken, ...]  # those that may change something first
    tls: Mapping[str, Tls]  # by listener; one without TLS is not in it
    pems: Mapping[str, Pem]  # files of certificates and keys, by key path
    database: Path
    keep_ended_s: float
    restart_grace_s: float
    count_downtime: bool
    log: LogTable
    operators: Mapping[str, Operator]
    plugins: Mapping[str, Plugin]
    tables: Mapping[str, msgspec.Struct]  # as written, with their defaults, by name: what changed is told by their keys
    secrets: Mapping[str, str]  # digests of what the daemon was given in files or the environment, by key path
    warnings: tuple[str, ...]
    handed_over: tuple[str, ...]  # keys whose files lie in $CREDENTIALS_DIRECTORY, which systemd fills at a start only

    def __repr__(self) -> str:
        return f"Settings({str(self.file)!r})"


def find(explicit: Path | None) -> tuple[Path, bool]:
    """The configuration file: `--config`, $LMDAEMON_CONFIG, ./config.toml, /etc/lmdaemon/config.toml; and whether it
    was found, not named.

    Raises ConfigError when there is none.
    """
    named = explicit or os.environ.get("LMDAEMON_CONFIG")
    if named:
        return Path(named), False
    for candidate in PATHS:
        if _exists(Path(candidate)):
            return Path(candidate), True
    raise ConfigError([f"no configuration file: looked for {', '.join(PATHS)}; name one with --config"])


def of_command(explicit: Path | None, *, secrets: Secrets = "required") -> Settings:
    """The settings for a command that was given `--config`, or None. Raises ConfigError with every finding."""
    path, found = find(explicit)
    return load(path, found=found, secrets=secrets)


def load(path: Path, *, found: bool = False, secrets: Secrets = "required") -> Settings:
    """Reads and checks the whole file. Raises ConfigError with every finding.

    One that was found, not named, is refused when somebody else may have written it. `secrets` says what a missing
    secret is: an error ("required"); an error unless the daemon may see it where this process does not ("readable", for
    check-config); or a warning, for administration, which needs none of the operators' ("optional").
    """
    reader = _Reader(path, found=found, secrets=secrets)
    settings = reader.settings(_tables(path, found=found))
    if settings is None:
        raise ConfigError([f"{path}: {finding}" for finding in reader.errors])
    return settings


def _tables(path: Path, *, found: bool) -> dict[str, Any]:
    """The file as TOML. Raises ConfigError."""
    try:
        text = textfile.decode(trust.read(path) if found else path.read_bytes())
    except trust.UntrustedError as error:
        finding = f"was found, not named, and is not read: {error}. If you know it, name it: --config {path}"
        raise ConfigError([f"{path}: {finding}"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number longer than Python reads
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: not valid TOML: nested too deeply"]) from error


def duration(text: object) -> Duration:
    """Reads a duration. Raises ValueError with the rule."""
    match = re.fullmatch(r"([0-9]{1,12})(ms|s|m|h|d)", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('must be a duration such as "250ms", "30s", "15m", "2h" or "7d"')
    seconds = int(match[1]) * _UNITS[match[2]]
    if seconds > DURATION_MAX_S:
        raise ValueError('must be at most "3650d"')
    return Duration(seconds)


def listen(text: object) -> Listen:
    """Reads a listen address. Raises ValueError with the rule."""
    rule = 'must be "host:port", "[v6]:port" or "unix:/path"'
    if not isinstance(text, str):
        raise ValueError(rule)  # noqa: TRY004 - one kind of error for one kind of finding
    if text.startswith("unix:"):
        if not text.startswith("unix:/") or "\0" in text or len(text.encode()) > 107 + len("unix:"):
            raise ValueError('must be "unix:" and an absolute path of at most 107 bytes')
        return Listen(text, unix=text.removeprefix("unix:"))
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([A-Za-z0-9_.-]+)):([0-9]{1,5})", text)
    if match is None:
        raise ValueError(rule)
    if match[1]:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ValueError(rule) from None
    if int(match[3]) > 65535:
        raise ValueError("must have a port of at most 65535")
    return Listen(text, host=match[1] or match[2], port=int(match[3]))


def network(text: object) -> Network:
    """Reads a network or a single address. Raises ValueError with the rule."""
    rule = "must be a network such as 192.0.2.0/24 without host bits, or an address"
    if not isinstance(text, str):  # ip_network would take 8 for 0.0.0.8
        raise ValueError(rule)  # noqa: TRY004 - one kind of error for one kind of finding
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(rule) from None


def whsec(line: str) -> bytes:
    """Reads a Standard Webhooks signing secret. Raises ValueError with the rule, never with the value."""
    try:
        key = base64.b64decode(line.removeprefix("whsec_"), validate=True) if line.startswith("whsec_") else b""
    except ValueError:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("each line must be whsec_ followed by base64 of 24 to 64 bytes")
    return key


def endpoint_key(path: str) -> str:
    """What an endpoint path is looked up by: lower case, repeated slashes as one, none at the end."""
    if "//" in path:
        path = re.sub("/{2,}", "/", path)
    return path.lower().rstrip("/") or "/"


_READERS: Mapping[Any, Callable[[object], Any]] = {Duration: duration, Listen: listen, Network: network}
_RULES: Mapping[Any, str] = {
    str: "must be a string",
    int: "must be an integer",
    bool: "must be true or false",
}


def _shown(value: object) -> str:
    if isinstance(value, dict | list):  # what is in it may be a secret
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 64:  # repr refuses the longest
        return "a number of more than 64 bits"
    text = repr(safe_url(value) if isinstance(value, str) and "://" in value else value)
    return text if len(text) <= 120 else text[:117] + "..."


_T = TypeVar("_T", bound=msgspec.Struct)
_ABSENT = object()


class _Reader:
    """One reading of one file: collects every finding under its key path instead of stopping at the first."""

    def __init__(self, path: Path, *, secrets: Secrets, found: bool = False) -> None:
        self.path = path
        self.found = found
        self.secrets = secrets
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.pems: dict[str, Pem] = {}
        self.tables: dict[str, msgspec.Struct] = {}
        self.digests: dict[str, str] = {}
        self.handed_over: list[str] = []
        self.profiles: dict[TlsFiles, Profile] = {}

    def error(self, key: str, rule: str, value: object = _ABSENT) -> None:
        self.errors.append(f"{key}: {rule}" + ("" if value is _ABSENT else f" (got {_shown(value)})"))

    def sound(self, at: str, *keys: str) -> bool:
        """Whether no error stands under these keys, so that a rule between them finds what was meant."""
        places = tuple(f"{at}.{key}{end}" for key in keys for end in ":.[")
        return not any(error.startswith(places) for error in self.errors)

    def settings(self, tables: dict[str, Any]) -> Settings | None:
        """Everything checked, or None when there are errors."""
        kinds = ("server", "api", "database", "sessions", "delivery", "log", "operators", "plugins", "dialects")
        for name in tables:
            if name not in kinds:
                self.error(name, "is no table of this file" + _suggestion(name, kinds))
        server = self.table(ServerTable, tables.get("server", {}), "server") or ServerTable()
        api = self.table(ApiTable, tables.get("api", {}), "api") or ApiTable()
        database = self.table(DatabaseTable, tables.get("database", {}), "database") or DatabaseTable()
        sessions = self.table(SessionsTable, tables.get("sessions", {}), "sessions") or SessionsTable()
        delivery = self.table(DeliveryTable, tables.get("delivery", {}), "delivery") or DeliveryTable()
        log = self.table(LogTable, tables.get("log", {}), "log") or LogTable()
        dialects = self.dialects(tables.get("dialects", {}))
        self.check_spans(sessions, "sessions")
        self.check_policy(delivery, "delivery")
        if not KEEPALIVE_MIN_S <= server.keepalive <= KEEPALIVE_MAX_S:
            self.error("server.keepalive", 'must be between "1s" and "1h"')
        if not database.path or "\0" in database.path:
            self.error("database.path", "must name a file", database.path)
        if database.keep_ended <= 0:
            self.error("database.keep_ended", "must not be zero")
        elif database.keep_ended < KEEP_ENDED_ADVISED_S:
            self.warnings.append("database.keep_ended: below 7d a late repeat of a notice may be taken for a new one")
        operators = {
            name: operator
            for name, raw in self.named(tables.get("operators", {}), "operators")
            if (operator := self.operator(name, raw, dialects, sessions, delivery)) is not None
        }
        names = tables.get("operators", {})
        plugins = {
            name: plugin
            for name, raw in self.named(tables.get("plugins", {}), "plugins")
            if (plugin := self.plugin(name, raw, delivery, names if isinstance(names, dict) else {})) is not None
        }
        self.check_shared_paths(operators)
        self.check_exposure(server, operators)
        spoken = {"server": self.listener_tls(server, "server"), "api": self.listener_tls(api, "api")}
        api_tokens = self.api_tokens(api)
        if not api.listen.loopback and not (api.token_file or api.token_env):
            self.error("api.token_file", f"is required when api.listen is beyond loopback (got {api.listen.text!r})")
        listens = self.sound("server", "listen") and self.sound("api", "listen")
        if listens and server.listen == api.listen and (server.listen.port or server.listen.unix):
            self.error("api.listen", "must differ from server.listen", api.listen.text)
        self.warnings.extend(tls.endings(self.pems, datetime.now(UTC)))
        if self.errors:
            return None
        return Settings(
            file=self.path,
            found=self.found,
            server=server,
            api=api,
            api_tokens=api_tokens,
            tls={name: one for name, one in spoken.items() if one is not None},
            database=self.database_path(database.path),
            keep_ended_s=float(database.keep_ended),
            restart_grace_s=float(sessions.restart_grace),
            count_downtime=sessions.downtime == "count",
            log=log,
            operators=operators,
            plugins=plugins,
            warnings=tuple(self.warnings),
            pems=self.pems,
            tables=self.tables,
            secrets=self.digests,
            handed_over=tuple(self.handed_over),
        )

    # -- tables into structs

    def table(self, kind: type[_T], raw: object, at: str) -> _T | None:
        """One table of the file into its struct; None when it is no table."""
        table = self.struct(kind, raw, at)
        if table is not None:
            self.tables[at] = table
        return table

    def struct(self, kind: type[_T], raw: object, at: str) -> _T | None:
        """A table, or one within it, into its struct; None when it is no table. A key that does not fit is recorded and
        stands at its default (a required one empty), so that the rules between keys can still be checked.
        """
        if not isinstance(raw, dict):
            self.error(at, "must be a table")  # without the value: it may be a secret in the wrong place
            return None
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        for key in raw:
            if key not in fields:
                self.error(f"{at}.{key}", "is no key of this table" + _suggestion(key, fields))
        values: dict[str, Any] = {}
        for name, field in fields.items():
            before = len(self.errors)
            if name in raw:
                values[name] = self.value(field.type, raw[name], f"{at}.{name}")
            elif field.required:
                self.error(f"{at}.{name}", "is required")
            if len(self.errors) > before:
                values.pop(name, None)
                if field.required:
                    values[name] = (get_origin(field.type) or field.type)()
        return kind(**values)

    def value(self, kind: Any, value: object, at: str) -> Any:
        """One value into its type; records an error and returns None when it does not fit."""
        options = get_args(kind)
        if get_origin(kind) in (UnionType, Union) and type(None) in options:
            (kind,) = (option for option in options if option is not type(None))
        if get_origin(kind) is tuple:
            if not isinstance(value, list):
                self.error(at, "must be a list", value)
                return None
            (element, _) = get_args(kind)
            return tuple(self.value(element, item, f"{at}[{index}]") for index, item in enumerate(value))
        if get_origin(kind) is dict:
            if not isinstance(value, dict):
                return self.error(at, "must be a table")
            return {key: self.value(options[1], item, f"{at}.{key}") for key, item in value.items()}
        if kind in _READERS:
            try:
                return _READERS[kind](value)
            except ValueError as error:
                return self.error(at, str(error), value)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(kind, value, at)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            choices = ", ".join(f'"{choice}"' for choice in get_args(kind) if choice)
            rule = f"must be one of {choices}" if get_origin(kind) is Literal else _RULES[kind]
            return self.error(at, rule, value)

    def named(self, raw: object, at: str) -> Iterable[tuple[str, object]]:
        """The sub-tables of `[operators]`, `[plugins]` or `[dialects]` whose names can stand in a URL and a log."""
        if not isinstance(raw, dict):
            self.error(at, "must be a table")
            return
        for name, table in raw.items():
            if NAME.fullmatch(name):
                yield name, table
            else:
                self.error(at, f"names {_NAME_RULE}", name)

    # -- the parts

    def dialects(self, raw: object) -> dict[str, Dialect | None]:
        """Every dialect by name; None for one with errors, which no rule between dialects can use."""
        known: dict[str, Dialect | None] = dict(SHIPPED)
        for name, table in self.named(raw, "dialects"):
            at = f"dialects.{name}"
            if name in SHIPPED:
                self.error(at, "is the name of a shipped dialect; choose another")
                continue
            before = len(self.errors)
            known[name] = None
            parsed = self.table(DialectTable, table, at)
            if parsed is not None:
                self.check_dialect(parsed, at)
            if parsed is not None and len(self.errors) == before:
                known[name] = Dialect(
                    name,
                    parsed.path,
                    parsed.fields,
                    parsed.required,
                    parsed.content,
                    parsed.codes,
                    parsed.extra,
                )
        return known

    def check_dialect(self, table: DialectTable, at: str) -> None:
        if self.sound(at, "path"):
            self.check_path(table.path, f"{at}.path")
        for meaning, wire_name in table.fields.items():
            if meaning not in _FIELD_MEANINGS:
                self.error(f"{at}.fields.{meaning}", f"must be one of {', '.join(_FIELD_MEANINGS)}")
            if id_problem(wire_name):
                self.error(f"{at}.fields.{meaning}", id_problem(wire_name) or "", wire_name)
            elif "hash" in table.fields and breaks_hash(wire_name):
                self.error(f"{at}.fields.{meaning}", HASHED_RULE, wire_name)
        if len(set(table.fields.values())) < len(table.fields):
            self.error(f"{at}.fields", "must not use one wire name twice")
        for meaning in (field.name for field in msgspec.structs.fields(Codes)):
            code = getattr(table.codes, meaning)
            if code is not None and not 0 < code < 1_000_000:
                self.error(f"{at}.codes.{meaning}", "must be between 1 and 999999; 0 means success", code)
        if not self.sound(at, "fields", "required"):
            return
        for meaning in table.required:
            if meaning not in table.fields:
                self.error(f"{at}.required", "must name keys of fields", meaning)
        for meaning in ("provider", "session", "player"):
            if meaning not in table.required:
                self.error(f"{at}.required", f"must contain {meaning!r}: a notice without it means nothing")

    def operator(
        self,
        name: str,
        raw: object,
        dialects: Mapping[str, Dialect | None],
        sessions: SessionsTable,
        delivery: DeliveryTable,
    ) -> Operator | None:
        at = f"operators.{name}"
        table = self.table(OperatorTable, raw, at)
        if table is None:
            return None
        problem = id_problem(table.provider_id)
        if problem and self.sound(at, "provider_id"):
            self.error(f"{at}.provider_id", problem, table.provider_id)
        sends = self.dialect(table.dialect, dialects, f"{at}.dialect") or SHIPPED["v4"]
        receives = tuple(
            dialect
            for index, accepted in enumerate(table.accept)
            if (dialect := self.dialect(accepted, dialects, f"{at}.accept[{index}]")) is not None
        )
        if not table.accept:
            self.error(f"{at}.accept", 'must name a dialect; endpoint = "" switches receiving off')
        if not 0 <= table.unknown_per_minute <= UNKNOWN_PER_MINUTE_MAX:
            rule = f"must be between 0 (no bound) and {UNKNOWN_PER_MINUTE_MAX}"
            self.error(f"{at}.unknown_per_minute", rule, table.unknown_per_minute)
        self.check_spans(table, at)
        self.check_policy(table, at)
        target = self.target(table, at)
        files = self.tls_files(table, at)
        hash_key = self.secret(table, "hash_key", at)
        partner_tokens = self.partner_tokens(table, at)
        signing_keys = self.signing_keys(table, at)
        self.check_authentication(table, sends, receives, at)
        return Operator(
            name=name,
            provider_id=table.provider_id,
            sends=sends,
            receives=receives,
            paths=self.paths(table, receives, at),
            accept_unknown=table.unknown_session == "accept",
            unknown_per_minute=table.unknown_per_minute,
            token_check=table.token_check,
            partner_tokens=partner_tokens,
            hash_key=hash_key,
            allow_from=table.allow_from,
            auth_none=table.auth == "none",
            notify=table.notify,
            url=table.url,
            target=target,
            idle_s=_first(table.idle_timeout, sessions.idle_timeout),
            lifetime_s=_first(table.max_lifetime, sessions.max_lifetime),
            policy=Policy(
                _first(table.timeout, delivery.timeout),
                _first(table.schedule, delivery.schedule),
                _first(table.max_age, delivery.max_age),
                _first(table.concurrency, delivery.concurrency),
            ),
            allow_private_network=table.allow_private_network,
            ca_file=files[0],
            client_cert_file=files[1],
            client_key_file=files[2],
            tls=self.tls_profile(table, target, files, at),
            signing_keys=signing_keys,
        )

    def dialect(self, name: str, dialects: Mapping[str, Dialect | None], at: str) -> Dialect | None:
        if name not in dialects:
            self.error(at, f"is no dialect; known are {', '.join(dialects)}", name)
        return dialects.get(name)

    def paths(self, table: OperatorTable, receives: tuple[Dialect, ...], at: str) -> tuple[str, ...]:
        if table.endpoint == "":
            return ()
        if table.endpoint is None:
            return tuple({endpoint_key(dialect.path): dialect.path for dialect in receives}.values())
        self.check_path(table.endpoint, f"{at}.endpoint")
        return (table.endpoint,)

    def plugin(self, name: str, raw: object, delivery: DeliveryTable, operators: Mapping[str, object]) -> Plugin | None:
        at = f"plugins.{name}"
        table = self.table(PluginTable, raw, at)
        if table is None:
            return None
        if self.sound(at, "use") and not re.fullmatch(r"[\w.]+:[\w.]+", table.use):
            self.error(f"{at}.use", 'must be "module:attribute"', table.use)
        for operator in table.operators or ():
            if operator not in operators:
                self.error(f"{at}.operators", "must name operators of this file", operator)
        self.check_policy(table, at)
        policy = Policy(table.timeout, delivery.schedule, delivery.max_age, table.concurrency)
        return Plugin(name=name, use=table.use, operators=table.operators, policy=policy, options=table.options)

    def listener_tls(self, table: ServerTable | ApiTable, at: str) -> Tls | None:
        """What a listener speaks TLS with; None when it speaks none, or its certificate cannot be had."""
        if bool(table.tls_cert_file) != bool(table.tls_key_file):
            self.error(f"{at}.tls_cert_file", "and tls_key_file must be given together")
            return None
        if not table.tls_cert_file:
            if table.client_ca_file:
                self.error(f"{at}.client_ca_file", "needs tls_cert_file: only over TLS a client can show a certificate")
            return None
        cert = self.certificates(table.tls_cert_file, f"{at}.tls_cert_file")
        key = self.private_key(table.tls_key_file, f"{at}.tls_key_file")
        ca = self.certificates(table.client_ca_file, f"{at}.client_ca_file", latest=True)
        if cert is None:
            return None
        context = None
        if key is not None and (ca is not None or not table.client_ca_file):
            context = self.server_context(cert, key, ca, f"{at}.tls_cert_file")
        return Tls(cert, context)

    def server_context(self, cert: Pem, key: Pem, ca: Pem | None, at: str) -> ssl.SSLContext | None:
        try:
            context = tls.server_context(cert.path, key.path, ca and ca.path)
            if not cert.certificates:
                self.error(at, f"has a certificate that cannot be read ({cert.path})")
        except OSError as error:  # ssl.SSLError is one
            upside_down = "; it begins with an issuer's: the server's own must come first"
            hint = upside_down if tls.starts_with_issuer(cert.certificates) else ""
            if ca is not None and not tls.readable(ca.path):
                self.error(at.replace("tls_cert", "client_ca"), tls.unusable(error))
            else:
                self.error(self.blamed(error, cert, at), tls.unusable(error) + hint)
            return None
        if out_of_order := tls.out_of_order(cert.certificates):
            self.warnings.append(f"{at}: {out_of_order}: {cert.path}")
        return context

    # -- rules

    def check_path(self, path: str, at: str) -> None:
        if not _PATH.fullmatch(path):
            self.error(at, "must start with / and have only letters, digits and -._~!$&'()*+,;=:@/", path)
        elif re.search(r"//|/\.{1,2}(/|$)", path):
            self.error(at, "must not have //, /./ or /../, which a sender may resolve", path)
        elif endpoint_key(path) == "/health":
            self.error(at, "must not be /health, which is taken", path)

    def check_spans(self, table: SessionsTable | OperatorTable, at: str) -> None:
        if table.idle_timeout is not None and table.idle_timeout < 1:
            self.error(f"{at}.idle_timeout", 'must be at least "1s"')

    def check_policy(self, table: DeliveryTable | OperatorTable | PluginTable, at: str) -> None:
        if table.timeout is not None and table.timeout <= 0:
            self.error(f"{at}.timeout", "must not be zero")
        if table.concurrency is not None and not 1 <= table.concurrency <= 1000:
            self.error(f"{at}.concurrency", "must be between 1 and 1000", table.concurrency)
        if isinstance(table, PluginTable):
            return
        if table.max_age is not None and table.max_age <= 0:
            self.error(f"{at}.max_age", "must not be zero")
        if table.schedule is not None and not 1 <= len(table.schedule) <= 100:
            self.error(f"{at}.schedule", "must list between 1 and 100 waits", len(table.schedule))
        if any(wait <= 0 for wait in table.schedule or ()):
            self.error(f"{at}.schedule", "must not contain a wait of zero")

    def target(self, table: OperatorTable, at: str) -> Target | None:
        if not table.url:
            if table.notify:
                self.error(f"{at}.url", "is required when notify = true")
            return None
        shown: object = safe_url(table.url)
        if shown == NOT_A_URL:  # what of it is a password cannot be told
            shown = _ABSENT
        try:
            found = target.read(table.url)
        except ValueError as error:
            self.error(f"{at}.url", str(error), shown)
            return None
        if table.allow_private_network:
            return found
        allowed = "; allow_private_network = true lifts this"
        if found.url.scheme != "https":
            self.error(f"{at}.url", "must be https", shown)
            self.errors[-1] += allowed
        if found.private:
            self.error(f"{at}.url", "must not be a loopback, private or metadata address", shown)
            self.errors[-1] += allowed
        return found

    def tls_files(self, table: OperatorTable, at: str) -> TlsFiles:
        """Those that are named, read and looked into; None for one that is not, or cannot be used."""
        if bool(table.client_cert_file) != bool(table.client_key_file):
            self.error(f"{at}.client_cert_file", "and client_key_file must be given together")
        return (
            self.certificates(table.ca_file, f"{at}.ca_file", latest=True),
            self.certificates(table.client_cert_file, f"{at}.client_cert_file"),
            self.private_key(table.client_key_file, f"{at}.client_key_file"),
        )

    def certificates(self, name: str, at: str, *, latest: bool = False) -> Pem | None:
        """A file of certificates: all of them, or only the one that ends `latest`, where one will do."""
        content = self.read(name, at) if name else None
        if content is None:
            return None
        if not tls.holds_certificate(content):
            self.error(at, f"must hold a certificate in PEM form ({self.beside(name)})")
            return None
        found: list[Certificate] = []
        with suppress(ValueError):  # what is wrong with it, OpenSSL says
            found = tls.certificates(content)
        if latest:
            found = sorted(found, key=lambda one: one.not_after)[-1:]
        pem = self.pems[at] = Pem(self.beside(name), tls.digest(content), tuple(found))
        return pem

    def private_key(self, name: str, at: str) -> Pem | None:
        content = self.read(name, at, secret=True) if name else None
        if content is None:
            return None
        if not tls.holds_private_key(content):
            self.error(at, f"must hold a private key in PEM form, without a passphrase ({self.beside(name)})")
            return None
        pem = self.pems[at] = Pem(self.beside(name), tls.digest(content))
        return pem

    def tls_profile(self, table: OperatorTable, target: Target | None, files: TlsFiles, at: str) -> Profile:
        """What these files make, tried. The system's CAs alone, which cost 20 ms, only where they will be used."""
        profile = self.profiles.setdefault(files, Profile(*files))
        ca, cert, key = files
        named = (table.ca_file, table.client_cert_file, table.client_key_file)
        whole = [bool(name) for name in named] == [file is not None for file in files] and bool(cert) == bool(key)
        used = table.notify and target is not None and target.url.scheme == "https" and self.secrets != "optional"
        if whole and (used or any(named)):
            if ca is not None and cert is not None:  # alone first: an error does not say which file it is about
                alone: TlsFiles = (ca, None, None)
                self.check_usable(self.profiles.setdefault(alone, Profile(*alone)), f"{at}.ca_file")
            if self.sound(at, "ca_file"):
                self.check_usable(profile, f"{at}.client_cert_file" if cert else f"{at}.ca_file", cert)
        return profile

    def check_usable(self, profile: Profile, at: str, cert: Pem | None = None) -> None:
        try:
            _ = profile.context
        except OSError as error:  # ssl.SSLError is one
            self.error(at if cert is None else self.blamed(error, cert, at), tls.unusable(error))

    @staticmethod
    def blamed(error: OSError, cert: Pem, at: str) -> str:
        """The key of the file that an error of a certificate and its key is about: where one of them is damaged and the
        certificate can be read, it is the other.
        """
        is_key = tls.damaged(error) and tls.readable(cert.path)
        return at.removesuffix("cert_file") + "key_file" if is_key else at

    def check_authentication(
        self, table: OperatorTable, sends: Dialect, receives: tuple[Dialect, ...], at: str
    ) -> None:
        if table.token_check != "present":
            for dialect in receives:
                if "token" not in dialect.fields:
                    self.error(
                        f"{at}.token_check", f"needs dialects with a token; {dialect.name} has none", table.token_check
                    )
        if table.token_check == "partner" and not (table.partner_token_file or table.partner_token_env):
            self.error(f"{at}.partner_token_file", 'is required for token_check = "partner"')
        hashed = [dialect.name for dialect in (sends, *receives) if "hash" in dialect.fields]
        if hashed and breaks_hash(table.provider_id):
            self.error(f"{at}.provider_id", HASHED_RULE, table.provider_id)
        if hashed and not (table.hash_key_file or table.hash_key_env):
            self.error(f"{at}.hash_key_file", f"is required for dialect {hashed[0]}, which has a hash")

    def check_shared_paths(self, operators: Mapping[str, Operator]) -> None:
        """Path and provider id must lead to one operator, and a body on a path to one dialect."""
        taken: dict[tuple[str, str], str] = {}
        dialects: dict[str, list[Dialect]] = {}
        for operator in operators.values():
            if not self.sound(f"operators.{operator.name}", "provider_id", "endpoint"):
                continue
            for path in operator.paths:
                key = (endpoint_key(path), operator.provider_id.casefold())
                if key in taken:
                    self.error(
                        f"operators.{operator.name}.endpoint",
                        f"is shared with operators.{taken[key]} under the same provider_id",
                        path,
                    )
                taken.setdefault(key, operator.name)
                served = dialects.setdefault(endpoint_key(path), [])
                for dialect in operator.receives:
                    for other in served:
                        if _ambiguous(dialect, other):
                            self.error(
                                f"operators.{operator.name}.accept",
                                f"{dialect.name} and {other.name} cannot be told apart on {path}",
                            )
                    if dialect not in served:
                        served.append(dialect)

    def check_exposure(self, server: ServerTable, operators: Mapping[str, Operator]) -> None:
        if server.listen.loopback or server.client_ca_file:
            return
        for operator in operators.values():
            if not self.sound(f"operators.{operator.name}", "accept", "token_check", "allow_from", "auth"):
                continue
            hashed = all("hash" in dialect.required for dialect in operator.receives)
            # Where everybody is a proxy, everybody names the address he comes from.
            filtered = operator.allow_from and not _holds_everybody((*operator.allow_from, *server.trusted_proxies))
            trusts_anyone = operator.token_check == "present" and not filtered and not hashed
            if operator.paths and trusts_anyone and not operator.auth_none:
                self.error(
                    f"operators.{operator.name}.auth",
                    f"nothing authenticates a sender on {server.listen.text}: set token_check, allow_from, a dialect "
                    'with a hash or server.client_ca_file, or write auth = "none"',
                )

    # -- secrets and files

    def beside(self, name: str) -> Path:
        """A named file: absolute, in $CREDENTIALS_DIRECTORY, or beside the configuration file."""
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials and not Path(name).is_absolute():
            handed_over = Path(credentials) / name
            if _exists(handed_over):
                return handed_over
        return self.path.parent / name

    @staticmethod
    def may_be_handed_over(name: str) -> bool:
        """Whether systemd may hand this file to the daemon and not to this process, which is one of its ExecReload=.

        systemd 252 shows ExecReload= the credentials' directory closed, 257 none at all (systemd/systemd#35227). A
        process of that kind has $MAINPID (systemd.exec(5)).
        """
        return not Path(name).is_absolute() and "MAINPID" in os.environ and "CREDENTIALS_DIRECTORY" not in os.environ

    def database_path(self, name: str) -> Path:
        state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        return (Path(state) if state else self.path.parent) / name

    def missing(self, at: str, finding: str) -> None:
        self.warnings.append(f"{at}: unchecked: {finding}")

    def secret(self, table: msgspec.Struct, key: str, at: str) -> str | None:
        """The secret named by `KEY_file` or `KEY_env`, without the line break at its end; None when not named."""
        file_name, variable = getattr(table, f"{key}_file"), getattr(table, f"{key}_env")
        if file_name and variable:
            self.error(f"{at}.{key}_file", f"and {key}_env must not both be given")
            return None
        if variable:
            return self.secret_variable(variable, f"{at}.{key}_env")
        return self.secret_file(file_name, f"{at}.{key}_file") if file_name else None

    def secret_variable(self, variable: str, at: str) -> str | None:
        content = os.environb.get(os.fsencode(variable), b"") if id_problem(variable) is None else b""
        if not content.strip():
            finding = f"must name an environment variable that is set (got {variable!r})"
            report = self.missing if self.secrets == "optional" else self.error
            report(at, finding)
            return None
        return self.secret_text(content, at, f"${variable}")

    def secret_file(self, name: str, at: str) -> str | None:
        content = self.read(name, at, secret=True)
        return None if content is None else self.secret_text(content, at, str(self.beside(name)))

    def secret_text(self, content: bytes, at: str, source: str) -> str | None:
        try:
            self.digests[at] = tls.digest(content)
            value = textfile.decode(content).rstrip("\r\n")
        except ValueError as error:
            self.error(at, f"{error} ({source})")
            return None
        if not value.strip():
            self.error(at, f"must not be empty ({source})")
            return None
        return value

    def read(self, name: str, at: str, *, secret: bool = False) -> bytes | None:
        """A named file's content; records why it cannot be had."""
        path = self.beside(name)
        try:
            content = path.read_bytes()
            mode = stat.S_IMODE(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            finding = f"cannot be read: {getattr(error, 'strerror', error)} ({path})"
            unseen = self.secrets == "readable" and (
                isinstance(error, PermissionError) or self.may_be_handed_over(name)
            )
            report = self.missing if unseen or self.secrets == "optional" else self.error
            report(at, finding)
            return None
        if path != self.path.parent / name:
            self.handed_over.append(at)
        if secret and mode & 0o004:
            self.warnings.append(f"{at}: others can read this secret (mode {mode:o}): {path}")
        return content

    def secret_lines(self, table: msgspec.Struct, key: str, at: str) -> list[tuple[int, str]]:
        """Several secrets with the numbers of their lines, for rotation. Blank lines and comments (#) are none."""
        value = self.secret(table, key, at)
        lines = textfile.entries(value) if value else []
        if value and not lines:
            self.error(self.place_of(table, key, at), "must not have comments alone")
        return lines

    def place_of(self, table: msgspec.Struct, key: str, at: str) -> str:
        return f"{at}.{key}_{'env' if getattr(table, f'{key}_env') else 'file'}"

    def partner_tokens(self, table: OperatorTable, at: str) -> tuple[str, ...]:
        place = self.place_of(table, "partner_token", at)
        lines = self.secret_lines(table, "partner_token", at)
        for number, token in lines:
            self.check_length(token, f"{place}: line {number}")
        return tuple(token for _, token in lines)

    def api_tokens(self, table: ApiTable) -> tuple[ApiToken, ...]:
        """Each line is a token, or a name for the log, a colon and a token. Those that may change something first."""
        found: dict[bytes, ApiToken] = {}
        for key, may_change in (("token", True), ("read_token", False)):
            place = self.place_of(table, key, "api")
            for number, line in self.secret_lines(table, key, "api"):
                at = f"{place}: line {number}"
                name, _, secret = line.partition(":") if ":" in line else ("", "", line)
                token = ApiToken(secret.strip().encode(), name, may_change)
                if ":" in line and not NAME.fullmatch(name):
                    self.error(at, f"what stands before a colon is the token's name, and {_NAME_RULE}")
                elif not token.secret:
                    self.error(at, "has a name without a token")
                elif found.setdefault(token.secret, token).may_change != may_change:
                    self.error(at, "is a token of token_file too, which may change things")
                self.check_length(secret.strip(), at)
        if (table.read_token_file or table.read_token_env) and not (table.token_file or table.token_env):
            self.error("api.read_token_file", "needs token_file beside it: else nobody may change anything")
        return tuple(found.values())

    def check_length(self, token: str, at: str) -> None:
        if 0 < len(token) < TOKEN_ADVISED:
            self.warnings.append(f"{at}: a token of fewer than {TOKEN_ADVISED} characters may be guessed")

    def signing_keys(self, table: OperatorTable, at: str) -> tuple[bytes, ...]:
        try:
            return tuple(whsec(line) for _, line in self.secret_lines(table, "signing_secret", at))
        except ValueError as error:
            self.error(self.place_of(table, "signing_secret", at), str(error))
            return ()


def _holds_everybody(networks: Iterable[Network]) -> bool:
    return any(network.prefixlen == 0 for network in networks)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # not for this user: reading it says the rest
        return True


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _ambiguous(one: Dialect, other: Dialect) -> bool:
    """Whether some body fits both and would be read differently: then a sender could choose the weaker reading."""
    if one.content != other.content or one.same_wire(other):
        return False
    return one.required_names <= other.required_names or other.required_names <= one.required_names


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def changes(old: Settings, new: Settings) -> Iterator[str]:
    """The tables that came or went, and the keys that differ in value, or in the secret or the certificates that they
    name. As they stand in the file, and without the values, some of which are secrets.
    """
    yield from sorted(old.tables.keys() ^ new.tables.keys())
    before, after = _by_key(old), _by_key(new)
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            yield key


def _by_key(settings: Settings) -> dict[str, Any]:
    """Every key's value and, where it names a secret or a file of certificates, the digest of that."""
    digests = dict(settings.secrets) | {key: pem.digest for key, pem in settings.pems.items()}
    values: dict[str, Any] = {}
    for name, table in settings.tables.items():
        values.update(_flat(table, name))
    return {key: (value, digests.get(key)) for key, value in values.items()}


def _flat(table: msgspec.Struct, at: str) -> Iterator[tuple[str, Any]]:
    for name, value in msgspec.structs.asdict(table).items():
        if isinstance(value, Codes):  # a table within it
            yield from _flat(value, f"{at}.{name}")
        else:
            yield f"{at}.{name}", value
