"""The configuration as frozen structs: its tables as written, and `Settings`, which the daemon works with."""

import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from lmdaemon.config.target import Target
from lmdaemon.config.values import Duration, Listen, Network
from lmdaemon.dialects import Codes, Dialect
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX
from lmdaemon.tls import Pem, Profile


class ServerTable(msgspec.Struct, frozen=True):
    """`[server]` as written."""

    listen: Listen = Listen("127.0.0.1:8080", "127.0.0.1", 8080)
    trusted_proxies: tuple[Network, ...] = ()
    keepalive: Duration = Duration(75)
    tls_cert_file: str = ""
    tls_key_file: str = ""
    client_ca_file: str = ""


class ApiTable(msgspec.Struct, frozen=True):
    """`[api]` as written."""

    listen: Listen = Listen("127.0.0.1:8081", "127.0.0.1", 8081)
    token_file: str = ""
    token_env: str = ""
    read_token_file: str = ""
    read_token_env: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    client_ca_file: str = ""
    console: bool = True


class DatabaseTable(msgspec.Struct, frozen=True):
    """`[database]` as written."""

    path: str = "lmdaemon.sqlite3"
    keep_ended: Duration = Duration(90 * 86400)
    url: str = ""
    password_file: str = ""
    password_env: str = ""
    migrate: bool = True


class SessionsTable(msgspec.Struct, frozen=True):
    """`[sessions]` as written."""

    idle_timeout: Duration = Duration(1800)
    max_lifetime: Duration = Duration(0)
    restart_grace: Duration = Duration(60)
    downtime: Literal["pause", "count"] = "pause"
    mass_expiry: Literal["warn", "pause"] = "warn"
    daemon_grace: Duration = Duration(10)


class DeliveryTable(msgspec.Struct, frozen=True):
    """`[delivery]` as written."""

    timeout: Duration = Duration(10)
    schedule: tuple[Duration, ...] = tuple(map(Duration, (5, 30, 120, 600, 1800, 7200, 18000, 36000, 36000)))
    max_age: Duration = Duration(72 * 3600)
    concurrency: int = 4


class LogTable(msgspec.Struct, frozen=True):
    """`[log]` as written."""

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
    mass_expiry: Literal["warn", "pause"] | None = None
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
    """`[plugins.NAME]` as written."""

    use: str
    operators: tuple[str, ...] | None = None
    timeout: Duration = Duration(10)
    concurrency: int = 4
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class DialectTable(msgspec.Struct, frozen=True, kw_only=True):
    """`[dialects.NAME]` as written."""

    path: str
    content: Literal["json", "form"] = "json"
    fields: dict[str, str]
    required: tuple[str, ...]
    codes: Codes = Codes()
    extra: bool = True


class Tls(msgspec.Struct, frozen=True):
    """The TLS settings of a listener, made of its files. A file that changes later has no effect until a reload."""

    cert: Pem  # the listener's own certificate first, then those of its issuers
    context: ssl.SSLContext | None  # None if a file could not be read, as when a command is run by another user


class Postgres(msgspec.Struct, frozen=True):
    """A database on PostgreSQL. The struct's repr does not show it, so that no password gets into a log."""

    url: str  # without a password
    password: str | None  # None: libpq looks in its own places, such as PGPASSFILE, or needs none
    migrate: bool  # whether a start brings the schema up to date

    def __repr__(self) -> str:
        return "Postgres(…)"


class Policy(msgspec.Struct, frozen=True):
    """How deliveries to a sink are attempted. Spans are in seconds; `concurrency` is the number of simultaneous
    attempts.
    """

    timeout_s: float
    schedule_s: tuple[float, ...]
    max_age_s: float
    concurrency: int


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An operator as the daemon works with it: inherited settings are filled in, and secrets and files are read."""

    name: str
    provider_id: str
    sends: Dialect
    receives: tuple[Dialect, ...]
    paths: tuple[str, ...]  # as written in the file; compared in lower case and without a trailing slash
    accept_unknown: bool
    unknown_per_minute: int = 0  # no bound
    token_check: str
    partner_tokens: tuple[str, ...]
    hash_key: str | None
    allow_from: tuple[Network, ...]
    auth_none: bool
    notify: bool
    url: str  # as written, for showing it without its secrets
    target: Target | None  # the parts of the URL that are sent; None without a URL
    idle_s: float
    lifetime_s: float
    mass_expiry: Literal["warn", "pause"]
    policy: Policy
    allow_private_network: bool
    ca_file: Pem | None
    client_cert_file: Pem | None
    client_key_file: Pem | None
    tls: Profile  # made of the CA, the certificate and the key
    signing_keys: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"Operator({self.name!r})"  # the rest holds secrets


class ApiToken(msgspec.Struct, frozen=True):
    """A bearer token for the private API. `name`, if it has one, is for the log."""

    secret: bytes
    name: str = ""
    may_change: bool = True

    def __repr__(self) -> str:
        return f"ApiToken({self.name!r})"


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """A plug-in, with its policy and options."""

    name: str
    use: str
    operators: tuple[str, ...] | None  # None: all operators
    policy: Policy
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Plugin({self.name!r})"  # its options may hold a secret

    def listens_to(self, operator: str) -> bool:
        """Whether the plug-in is called for sessions of this operator."""
        return self.operators is None or operator in self.operators


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration, checked. `warnings` are for the log: things that are allowed but may be mistakes."""

    file: Path
    named: Path  # the same file as messages show it; the daemon's own `file` is absolute
    found: bool  # the file was found in a default place and not named by the user
    server: ServerTable
    api: ApiTable
    api_tokens: tuple[ApiToken, ...]  # tokens that may change something come first
    tls: Mapping[str, Tls]  # by listener; one without TLS is not in it
    pems: Mapping[str, Pem]  # files of certificates and keys, by key path
    database: Path
    postgres: Postgres | None  # the PostgreSQL database; None: the SQLite file is used
    keep_ended_s: float
    restart_grace_s: float
    daemon_grace_s: float
    count_downtime: bool
    log: LogTable
    operators: Mapping[str, Operator]
    plugins: Mapping[str, Plugin]
    # By name, as written in the file with defaults filled in; for comparing two readings by key
    tables: Mapping[str, msgspec.Struct]
    secrets: Mapping[str, str]  # digests of secrets and files, by key path; for noticing that their content has changed
    warnings: tuple[str, ...]
    unusable: tuple[str, ...]  # errors in tables that were not needed; empty if the whole file was needed
    handed_over: tuple[str, ...]  # keys whose files lie in $CREDENTIALS_DIRECTORY, which systemd fills at a start only

    def __repr__(self) -> str:
        return f"Settings({str(self.file)!r})"

    def delivers(self, operator: str, sink: str) -> bool:
        """Whether deliveries to this sink of the operator are tried at all: to its URL with `notify`, or to a plug-in
        that listens to it.
        """
        known = self.operators.get(operator)
        if known is None or sink == HTTP_SINK:
            return known is not None and known.notify
        plugin = self.plugins.get(sink.removeprefix(PLUGIN_PREFIX))
        return plugin is not None and plugin.listens_to(operator)


# Keys whose change takes effect with the next start, not with a reload
NEEDS_RESTART = {
    "server.listen",
    "api.listen",
    "database.path",
    "database.url",
    "database.password_file",
    "database.password_env",
    "database.migrate",
}


def changes(old: Settings, new: Settings) -> Iterator[str]:
    """The key paths that differ between two readings: tables that were added or removed, and keys whose value, or the
    content of the secret or certificate file they name, is different. Values are left out, because some are secrets.
    """
    yield from sorted(old.tables.keys() ^ new.tables.keys())
    before, after = by_key(old), by_key(new)
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            yield key


def by_key(settings: Settings) -> dict[str, Any]:
    """By key path, the value and, if the key names a secret or a file of certificates, the digest of its content."""
    digests = dict(settings.secrets) | {key: pem.digest for key, pem in settings.pems.items()}
    values: dict[str, Any] = {}
    for name, table in settings.tables.items():
        values.update(flat(table, name))
    return {key: (value, digests.get(key)) for key, value in values.items()}


def flat(table: msgspec.Struct, at: str) -> Iterator[tuple[str, Any]]:
    """The values of a table by key path, such as `api.listen`."""
    for name, value in msgspec.structs.asdict(table).items():
        if isinstance(value, Codes):  # a table within it
            yield from flat(value, f"{at}.{name}")
        else:
            yield f"{at}.{name}", value


def taken_over(new: Settings, started: Settings) -> Settings:
    """The settings in force after a reload: `new`, but keys that need a restart have the values of the start."""
    tables, secrets = dict(new.tables), dict(new.secrets)
    for key in NEEDS_RESTART:
        name, _, field = key.rpartition(".")
        tables[name] = replace(tables[name], **{field: getattr(started.tables[name], field)})
        secrets.pop(key, None)
    secrets |= {key: digest for key, digest in started.secrets.items() if key in NEEDS_RESTART}
    return replace(
        new,
        server=replace(new.server, listen=started.server.listen),
        api=replace(new.api, listen=started.api.listen),
        database=started.database,
        postgres=started.postgres,
        tables=tables,
        secrets=secrets,
    )
