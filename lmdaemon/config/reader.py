"""config.toml → frozen `Settings`, or every error in the file at once with its key path.

Reads the file, and the secret files and environment variables it names, and nothing else; it must never print a secret.
"""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lmdaemon import textfile, tls, trust
from lmdaemon.config import rules, syntax
from lmdaemon.config.certificates import Certificates
from lmdaemon.config.findings import ConfigError, ContentError, Findings, meant, suggestion
from lmdaemon.config.secrets import SecretFiles, Secrets, exists
from lmdaemon.config.settings import (
    ApiTable,
    DatabaseTable,
    DeliveryTable,
    DialectTable,
    LogTable,
    Operator,
    OperatorTable,
    Plugin,
    PluginTable,
    Policy,
    Postgres,
    ServerTable,
    SessionsTable,
    Settings,
)
from lmdaemon.config.tables import Tables
from lmdaemon.config.values import endpoint_key
from lmdaemon.dialects import SHIPPED, Dialect

PATHS = ("./config.toml", "/etc/lmdaemon/config.toml")
TABLES = ("server", "api", "database", "sessions", "delivery", "log", "operators", "plugins", "dialects")
Needs = Sequence[str] | None  # names of tables; None: all of the file
_HEAD = re.compile(r"\[([A-Za-z0-9_.-]+)\][ \t]*(#.*)?$", re.MULTILINE)
_T = TypeVar("_T", bound=msgspec.Struct)


def find(explicit: Path | None) -> tuple[Path, bool]:
    """The configuration file: that of `--config`, $LMDAEMON_CONFIG, ./config.toml or /etc/lmdaemon/config.toml; and
    whether it was found in a default place and not named by the user.

    Raises ConfigError when there is none.
    """
    named = explicit or os.environ.get("LMDAEMON_CONFIG")
    if named:
        return Path(named), False
    for candidate in PATHS:
        if exists(Path(candidate)):
            return Path(candidate), True
    raise ConfigError([f"no configuration file: looked for {', '.join(PATHS)}; name one with --config"])


def of_command(explicit: Path | None, *, secrets: Secrets = "required", needs: Needs = None) -> Settings:
    """The settings for a command. `explicit` is the file of its --config. Raises ConfigError with every finding."""
    path, found = find(explicit)
    return load(path, found=found, secrets=secrets, needs=needs)


def for_daemon(explicit: Path | None) -> Settings:
    """As `of_command`, with absolute paths, because a plug-in may change the current directory."""
    path, found = find(explicit)
    try:
        absolute = path.absolute()
    except OSError as error:  # the current directory was deleted
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    return load(absolute, found=found, named=path)


def load(
    path: Path,
    *,
    found: bool = False,
    named: Path | None = None,
    secrets: Secrets = "required",
    needs: Needs = None,
) -> Settings:
    """Reads and checks the whole file. Raises ConfigError with every finding.

    With `found`, the file was found in a default place and not named by the user; it is refused when somebody else may
    have written it. `secrets` says how a missing secret is treated: as an error ("required"); as an error unless the
    daemon may be able to read it where this process cannot ("readable", for check-config); or as a warning
    ("optional", for commands that need no operator's secrets).

    `named` is the path as the findings and the settings show it, by default `path` itself.

    `needs` are the tables that the caller needs. Errors in other tables are then not raised but listed in
    `Settings.unusable`, and the keys that they are about have their defaults.
    """
    named = named or path
    reader = Reader(path, named=named, found=found, secrets=secrets, needs=needs)
    text = _text(path, named, found=found)
    try:
        raw = tomllib.loads(text)
    # TOMLDecodeError, or an integer with more digits than Python converts
    except (ValueError, RecursionError) as error:
        finding = f"not valid TOML: {syntax.complaint(text, error)}"
        salvaged = None if needs is None else _salvaged(text, needs)
        if salvaged is None:
            raise ContentError([f"{named}: {finding}"]) from error
        reader.findings.errors.append(finding)
        raw = salvaged
    settings = reader.settings(raw)
    if settings is None:
        raise ContentError([f"{named}: {finding}" for finding in reader.findings.errors])
    return settings


def _salvaged(text: str, needs: Sequence[str]) -> dict[str, Any] | None:
    """The needed tables of a file that has a syntax error elsewhere. Each table is read from its header to the next
    header. None if a needed table cannot be read by itself, or if its name also stands elsewhere at the beginning of a
    line.
    """
    parts = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    wanted = [part for part in parts if (head := _HEAD.match(part)) and head[1] in needs]
    elsewhere = "".join(part for part in parts if part not in wanted)
    if _hides(re.findall(r"^[ \t[]*[\"']?(\w+)", "\n".join(part.partition("\n")[0] for part in parts), re.M), needs):
        return None
    if any(re.search(rf"^[ \t[]*[\"']?{re.escape(name)}\b", elsewhere, re.MULTILINE) for name in needs):
        return None
    try:
        return tomllib.loads("".join(wanted))
    except (ValueError, RecursionError):
        return None


def _hides(names: Iterable[str], needs: Sequence[str]) -> bool:
    """Whether one of these unknown names is probably a misspelt name of a needed table."""
    return any(meant(name, TABLES) in (None, *needs) for name in names if name not in TABLES)


def _text(path: Path, named: Path, *, found: bool) -> str:
    """The file as text. Raises ConfigError."""
    try:
        return textfile.decode(trust.read(path) if found else path.read_bytes())
    except trust.UntrustedError as error:
        finding = f"was found, not named, and is not read: {error}. If you know it, name it: --config {named}"
        raise ConfigError([f"{named}: {finding}"]) from error
    except OSError as error:
        raise ConfigError([f"{named}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"{named}: {error}"]) from error


class Reader:
    """One reading of one file: collects every finding under its key path instead of stopping at the first."""

    def __init__(
        self,
        path: Path,
        *,
        secrets: Secrets,
        named: Path | None = None,
        found: bool = False,
        needs: Needs = None,
    ) -> None:
        self._path = path
        self._named = named or path
        self._found = found
        self._secrets = secrets
        self._needs = needs
        self.findings = Findings()
        self._tables = Tables(self.findings)
        self._files = SecretFiles(path, secrets, self.findings)
        self._certificates = Certificates(self._files, self.findings)

    def settings(self, raw: dict[str, Any]) -> Settings | None:
        """The checked settings; None if there are errors in the tables that are needed (without `needs`: in any)."""
        findings = self.findings
        for name in raw:
            if name not in TABLES:
                findings.error(name, "is no table of this file" + suggestion(name, TABLES))
        server = self._single(ServerTable, raw, "server")
        api = self._single(ApiTable, raw, "api")
        database = self._single(DatabaseTable, raw, "database")
        sessions = self._single(SessionsTable, raw, "sessions")
        delivery = self._single(DeliveryTable, raw, "delivery")
        log = self._single(LogTable, raw, "log")
        dialects = self._dialects(raw.get("dialects", {}))
        rules.check_spans(findings, sessions, "sessions")
        rules.check_policy(findings, delivery, "delivery")
        rules.check_server(findings, server)
        rules.check_database(findings, database, raw.get("database"))
        postgres = self._postgres(database)
        operators = self._operators(raw.get("operators", {}), dialects, sessions, delivery)
        plugins = self._plugins(raw.get("plugins", {}), delivery, raw.get("operators", {}))
        rules.check_shared_paths(findings, operators)
        rules.check_exposure(findings, server, operators)
        spoken = {
            "server": self._certificates.of_listener(server, "server"),
            "api": self._certificates.of_listener(api, "api"),
        }
        api_tokens = self._files.api_tokens(api)
        rules.check_listeners(findings, server, api)
        findings.warnings.extend(tls.endings(self._certificates.pems, datetime.now(UTC)))
        if findings.errors if self._needs is None else self._missed(raw):
            return None
        return Settings(
            file=self._path,
            named=self._named,
            found=self._found,
            server=server,
            api=api,
            api_tokens=api_tokens,
            tls={name: one for name, one in spoken.items() if one is not None},
            database=self._database_path(database.path),
            postgres=postgres,
            keep_ended_s=float(database.keep_ended),
            restart_grace_s=float(sessions.restart_grace),
            daemon_grace_s=float(sessions.daemon_grace),
            count_downtime=sessions.downtime == "count",
            log=log,
            operators=operators,
            plugins=plugins,
            warnings=tuple(findings.warnings),
            unusable=tuple(findings.errors),
            pems=self._certificates.pems,
            tables=self._tables.read,
            secrets=self._files.digests,
            handed_over=tuple(self._files.handed_over),
        )

    def _missed(self, raw: Mapping[str, Any]) -> bool:
        """Whether the needed tables have errors, or one of them may stand under a misspelt name."""
        return bool(self.findings.about(self._needs or ())) or _hides(raw, self._needs or ())

    def _single(self, kind: type[_T], raw: Mapping[str, Any], name: str) -> _T:
        """A table that can stand only once, such as [server]; its defaults if it is missing or no table."""
        return self._tables.table(kind, raw.get(name, {}), name) or kind()

    def _postgres(self, table: DatabaseTable) -> Postgres | None:
        password = self._files.secret(table, "password", "database")
        return Postgres(table.url, password, table.migrate) if table.url else None

    def _database_path(self, name: str) -> Path:
        state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        return (Path(state) if state else self._path.parent) / name

    # -- dialects

    def _dialects(self, raw: object) -> dict[str, Dialect | None]:
        """Every dialect by name. A dialect with errors is None, and no rule between dialects is checked for it."""
        known: dict[str, Dialect | None] = dict(SHIPPED)
        for name, table in self._tables.named(DialectTable, raw, "dialects"):
            at = f"dialects.{name}"
            if name in SHIPPED:
                self.findings.error(at, "is the name of a shipped dialect; choose another")
                continue
            before = len(self.findings.errors)
            known[name] = None
            parsed = self._tables.table(DialectTable, table, at)
            if parsed is not None:
                rules.check_dialect(self.findings, parsed, at)
            if parsed is not None and len(self.findings.errors) == before:
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

    def _dialect(self, name: str, dialects: Mapping[str, Dialect | None], at: str) -> Dialect | None:
        if name not in dialects:
            self.findings.error(at, f"is no dialect; known are {', '.join(dialects)}", name)
        return dialects.get(name)

    # -- operators

    def _operators(
        self,
        raw: object,
        dialects: Mapping[str, Dialect | None],
        sessions: SessionsTable,
        delivery: DeliveryTable,
    ) -> dict[str, Operator]:
        found: dict[str, Operator] = {}
        for name, written in self._tables.named(OperatorTable, raw, "operators"):
            table = self._tables.table(OperatorTable, written, f"operators.{name}")
            if table is not None:
                found[name] = self._operator(name, table, dialects, sessions, delivery)
        return found

    def _operator(
        self,
        name: str,
        table: OperatorTable,
        dialects: Mapping[str, Dialect | None],
        sessions: SessionsTable,
        delivery: DeliveryTable,
    ) -> Operator:
        at = f"operators.{name}"
        rules.check_provider_id(self.findings, table, at)
        sends = self._dialect(table.dialect, dialects, f"{at}.dialect") or SHIPPED["v4"]
        receives = tuple(
            dialect
            for index, accepted in enumerate(table.accept)
            if (dialect := self._dialect(accepted, dialects, f"{at}.accept[{index}]")) is not None
        )
        rules.check_operator(self.findings, table, at)
        target = rules.checked_target(self.findings, table, at)
        files = self._certificates.of_operator(table, at)
        hash_key = self._files.secret(table, "hash_key", at)
        partner_tokens = self._files.partner_tokens(table, at)
        signing_keys = self._files.signing_keys(table, at)
        rules.check_authentication(self.findings, table, sends, receives, at)
        encrypted = table.notify and target is not None and target.url.scheme == "https"
        return Operator(
            name=name,
            provider_id=table.provider_id,
            sends=sends,
            receives=receives,
            paths=self._paths(table, receives, at),
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
            mass_expiry=_first(table.mass_expiry, sessions.mass_expiry),
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
            tls=self._certificates.profile(table, files, at, used=encrypted and self._secrets != "optional"),
            signing_keys=signing_keys,
        )

    def _paths(self, table: OperatorTable, receives: tuple[Dialect, ...], at: str) -> tuple[str, ...]:
        if table.endpoint == "":
            return ()
        if table.endpoint is None:
            return tuple({endpoint_key(dialect.path): dialect.path for dialect in receives}.values())
        rules.check_path(self.findings, table.endpoint, f"{at}.endpoint")
        return (table.endpoint,)

    # -- plug-ins

    def _plugins(self, raw: object, delivery: DeliveryTable, operators: object) -> dict[str, Plugin]:
        found: dict[str, Plugin] = {}
        for name, written in self._tables.named(PluginTable, raw, "plugins"):
            at = f"plugins.{name}"
            table = self._tables.table(PluginTable, written, at)
            if table is None:
                continue
            rules.check_plugin(self.findings, table, at, operators if isinstance(operators, dict) else {})
            policy = Policy(table.timeout, delivery.schedule, delivery.max_age, table.concurrency)
            found[name] = Plugin(
                name=name, use=table.use, operators=table.operators, policy=policy, options=table.options
            )
        return found


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
