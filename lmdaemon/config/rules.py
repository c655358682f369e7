"""Rules beyond the types of single values: bounds, and what must fit together between keys, tables and operators.

Each function records what is wrong in `findings`; none reads a file.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import parse_qsl

import msgspec

from lmdaemon.config import target
from lmdaemon.config.findings import ABSENT, Findings, meant, suggestion
from lmdaemon.config.settings import (
    ApiTable,
    DatabaseTable,
    DeliveryTable,
    DialectTable,
    Operator,
    OperatorTable,
    PluginTable,
    ServerTable,
    SessionsTable,
)
from lmdaemon.config.target import Target
from lmdaemon.config.values import PATH, endpoint_key, holds_everybody
from lmdaemon.dialects import Codes, Dialect, breaks_hash
from lmdaemon.log import NOT_A_URL, safe_url
from lmdaemon.model import id_problem
from lmdaemon.retry import FINAL_CODES

KEEPALIVE_MIN_S, KEEPALIVE_MAX_S = 1.0, 3600.0  # proxies keep an idle connection open for one to ten minutes
KEEP_ENDED_ADVISED_S = 7 * 86400.0
UNKNOWN_PER_MINUTE_MAX = 1_000_000
HASHED_RULE = "must have no & and no =, which separate the fields that are hashed"
# A PostgreSQL connection URI (libpq, "Connection URIs"). Several hosts are separated by commas; without a host libpq
# uses its default
_DATABASE_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^@/?#\s]*)@)?(?P<hosts>[^@/?#\s]*)(?:/(?P<name>[^/?#\s]*))?(?:\?(?P<query>[^#\s]*))?"
)
FIELD_MEANINGS = ("provider", "session", "player", "token", "request", "hash")


# -- one table


def check_server(findings: Findings, table: ServerTable) -> None:
    """Checks [server]."""
    if not KEEPALIVE_MIN_S <= table.keepalive <= KEEPALIVE_MAX_S:
        findings.error("server.keepalive", 'must be between "1s" and "1h"')


def check_database(findings: Findings, table: DatabaseTable, written: object) -> None:
    """Checks [database]. `written` is the table as it is in the file: only a `path` that is written there contradicts
    `url`, and the default does not.
    """
    if not table.path or "\0" in table.path:
        findings.error("database.path", "must name a file", table.path)
    if table.keep_ended <= 0:
        findings.error("database.keep_ended", "must not be zero")
    elif table.keep_ended < KEEP_ENDED_ADVISED_S:
        findings.warn("database.keep_ended", "below 7d a late repeat of a notice may be taken for a new one")

    named = "database.password_file" if table.password_file else "database.password_env"
    if table.url:
        check_database_url(findings, table.url)
        if isinstance(written, dict) and "path" in written:
            findings.error("database.url", "and path must not both be given")
    elif table.password_file or table.password_env:
        findings.error(named, "is for a database.url, and there is none")


def check_database_url(findings: Findings, url: str) -> None:
    """Checks the URL of a database. It is never shown, because it may have a password in it."""
    at = "database.url"
    match = _DATABASE_URL.fullmatch(url)
    if match is None or not url.isprintable():
        findings.error(at, "must be a URL such as postgresql://user@host/name, with special characters percent-escaped")
        return
    secret = {"password", "sslpassword"} & {name.lower() for name, _ in parse_qsl(match["query"] or "", True)}
    if ":" in (match["user"] or "") or secret:
        findings.error(at, "must not hold a password: name its file in password_file, or a variable in password_env")
    if find_spec("psycopg") is None:
        findings.error(at, "needs psycopg, which is not installed: pip install 'lmdaemon[postgres]'")
    elif findings.sound("database", "url"):
        import psycopg  # only here, because the import takes longer than reading the whole configuration

        try:
            psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:  # a parameter that libpq does not know, a broken escape
            findings.error(at, f"must be a URL that libpq can read: {str(error).strip()}")


def check_spans(findings: Findings, table: SessionsTable | OperatorTable, at: str) -> None:
    """Checks that idle_timeout is long enough."""
    if table.idle_timeout is not None and table.idle_timeout < 1:
        findings.error(f"{at}.idle_timeout", 'must be at least "1s"')


def check_policy(findings: Findings, table: DeliveryTable | OperatorTable | PluginTable, at: str) -> None:
    """Checks the bounds of the delivery settings: time-out, schedule, max_age, concurrency."""
    if table.timeout is not None and table.timeout <= 0:
        findings.error(f"{at}.timeout", "must not be zero")
    if table.concurrency is not None and not 1 <= table.concurrency <= 1000:
        findings.error(f"{at}.concurrency", "must be between 1 and 1000", table.concurrency)
    if isinstance(table, PluginTable):
        return
    if table.max_age is not None and table.max_age <= 0:
        findings.error(f"{at}.max_age", "must not be zero")
    if table.schedule is not None and not 1 <= len(table.schedule) <= 100:
        findings.error(f"{at}.schedule", "must list between 1 and 100 waits", len(table.schedule))
    if any(wait <= 0 for wait in table.schedule or ()):
        findings.error(f"{at}.schedule", "must not contain a wait of zero")


def check_path(findings: Findings, path: str, at: str) -> None:
    """Checks the path of an endpoint."""
    if not PATH.fullmatch(path):
        findings.error(at, "must start with / and have only letters, digits and -._~!$&'()*+,;=:@/", path)
    elif re.search(r"//|/\.{1,2}(/|$)", path):
        findings.error(at, "must not have //, /./ or /../, which a sender may resolve", path)
    elif endpoint_key(path) == "/health":
        findings.error(at, "must not be /health, which is taken", path)


def check_dialect(findings: Findings, table: DialectTable, at: str) -> None:
    """Checks a [dialects.NAME] table."""
    if findings.sound(at, "path"):
        check_path(findings, table.path, f"{at}.path")
    for meaning, wire_name in table.fields.items():
        if meaning not in FIELD_MEANINGS:
            rule = f"must be one of {', '.join(FIELD_MEANINGS)}" + suggestion(meaning, FIELD_MEANINGS)
            findings.error(f"{at}.fields.{meaning}", rule)
        if id_problem(wire_name):
            findings.error(f"{at}.fields.{meaning}", id_problem(wire_name) or "", wire_name)
        elif "hash" in table.fields and breaks_hash(wire_name):
            findings.error(f"{at}.fields.{meaning}", HASHED_RULE, wire_name)
    if len(set(table.fields.values())) < len(table.fields):
        findings.error(f"{at}.fields", "must not use one wire name twice")
    for meaning in (field.name for field in msgspec.structs.fields(Codes)):
        code = getattr(table.codes, meaning)
        if code is not None and not 0 < code < 1_000_000:
            findings.error(f"{at}.codes.{meaning}", "must be between 1 and 999999; 0 means success", code)
    finals = FINAL_CODES | ({table.codes.final} if findings.sound(f"{at}.codes", "final") else set())
    if table.codes.retry in finals and findings.sound(f"{at}.codes", "retry"):
        rule = f"must be none of {', '.join(map(str, sorted(finals)))}, which ask not to try again"
        findings.error(f"{at}.codes.retry", rule, table.codes.retry)
    if not findings.sound(at, "required"):
        return
    # A name in `required` may be meant that stands in `fields` misspelt, or with a value that cannot be used
    misspelt = {meant(name, FIELD_MEANINGS) for name in table.fields if name not in FIELD_MEANINGS}
    are_lost = not table.fields and not findings.sound(at, "fields")
    for meaning in table.required:
        is_unclear = are_lost or meaning in misspelt or not findings.sound(f"{at}.fields", meaning)
        if meaning not in table.fields and not is_unclear:
            findings.error(f"{at}.required", "must name keys of fields", meaning)
    for meaning in ("provider", "session", "player"):
        if meaning not in table.required:
            findings.error(f"{at}.required", f"must contain {meaning!r}: a notice without it means nothing")


def check_plugin(findings: Findings, table: PluginTable, at: str, operators: Mapping[str, object]) -> None:
    """Checks a [plugins.NAME] table."""
    if findings.sound(at, "use") and not re.fullmatch(r"[\w.]+:[\w.]+", table.use):
        findings.error(f"{at}.use", 'must be "module:attribute"', table.use)
    for operator in table.operators or ():
        if operator not in operators:
            findings.error(f"{at}.operators", "must name operators of this file", operator)
    check_policy(findings, table, at)


# -- one operator


def check_operator(findings: Findings, table: OperatorTable, at: str) -> None:
    """Checks an [operators.NAME] table."""
    if not table.accept:
        findings.error(f"{at}.accept", 'must name a dialect; endpoint = "" switches receiving off')
    if not 0 <= table.unknown_per_minute <= UNKNOWN_PER_MINUTE_MAX:
        rule = f"must be between 0 (no bound) and {UNKNOWN_PER_MINUTE_MAX}"
        findings.error(f"{at}.unknown_per_minute", rule, table.unknown_per_minute)
    check_spans(findings, table, at)
    check_policy(findings, table, at)


def check_provider_id(findings: Findings, table: OperatorTable, at: str) -> None:
    """Checks an operator's provider_id."""
    problem = id_problem(table.provider_id)
    if problem and findings.sound(at, "provider_id"):
        findings.error(f"{at}.provider_id", problem, table.provider_id)


def checked_target(findings: Findings, table: OperatorTable, at: str) -> Target | None:
    """The operator's URL, read; None if there is none that can be used."""
    if not table.url:
        if table.notify:
            findings.error(f"{at}.url", "is required when notify = true")
        return None
    shown: object = safe_url(table.url)
    if shown == NOT_A_URL:  # the value is not shown, because it is unknown which part of it is a password
        shown = ABSENT
    try:
        found = target.read(table.url)
    except ValueError as error:
        findings.error(f"{at}.url", str(error), shown)
        return None
    if table.allow_private_network:
        return found
    allowed = "; allow_private_network = true lifts this"
    if found.url.scheme != "https":
        findings.error(f"{at}.url", "must be https", shown, allowed)
    if found.private:
        findings.error(f"{at}.url", "must not be a loopback, private or metadata address", shown, allowed)
    return found


def check_authentication(
    findings: Findings, table: OperatorTable, sends: Dialect, receives: tuple[Dialect, ...], at: str
) -> None:
    """Checks that token_check, tokens, hash key and dialects of an operator fit together."""
    if table.token_check != "present":
        for dialect in receives:
            if "token" not in dialect.fields:
                rule = f"needs dialects with a token; {dialect.name} has none"
                findings.error(f"{at}.token_check", rule, table.token_check)
    if table.token_check == "partner" and not (table.partner_token_file or table.partner_token_env):
        findings.error(f"{at}.partner_token_file", 'is required for token_check = "partner"')
    hashed = [dialect.name for dialect in (sends, *receives) if "hash" in dialect.fields]
    if hashed and breaks_hash(table.provider_id):
        findings.error(f"{at}.provider_id", HASHED_RULE, table.provider_id)
    if hashed and not (table.hash_key_file or table.hash_key_env):
        findings.error(f"{at}.hash_key_file", f"is required for dialect {hashed[0]}, which has a hash")


# -- operators and listeners together


def check_shared_paths(findings: Findings, operators: Mapping[str, Operator]) -> None:
    """Checks that path and provider id together name only one operator, and that a body sent to a path can have only
    one dialect.
    """
    taken: dict[tuple[str, str], str] = {}
    dialects: dict[str, list[Dialect]] = {}
    for operator in operators.values():
        at = f"operators.{operator.name}"
        if not findings.sound(at, "provider_id", "endpoint"):
            continue
        for path in operator.paths:
            key = (endpoint_key(path), operator.provider_id.casefold())
            if key in taken:
                rule = f"is shared with operators.{taken[key]} under the same provider_id"
                findings.error(f"{at}.endpoint", rule, path)
            taken.setdefault(key, operator.name)
            served = dialects.setdefault(endpoint_key(path), [])
            for dialect in operator.receives:
                for other in served:
                    if _ambiguous(dialect, other):
                        rule = f"{dialect.name} and {other.name} cannot be told apart on {path}"
                        findings.error(f"{at}.accept", rule)
                if dialect not in served:
                    served.append(dialect)


def check_exposure(findings: Findings, server: ServerTable, operators: Mapping[str, Operator]) -> None:
    """Checks that something authenticates the senders if other machines can reach the endpoints."""
    if server.listen.loopback or server.client_ca_file:
        return
    for operator in operators.values():
        at = f"operators.{operator.name}"
        if not findings.sound(at, "accept", "token_check", "allow_from", "auth"):
            continue
        # A hash is checked also where it is not required: a notice without it is refused
        hashed = all("hash" in dialect.fields for dialect in operator.receives)
        # If every address is a trusted proxy, a sender can claim any address, and allow_from proves nothing
        filtered = operator.allow_from and not holds_everybody((*operator.allow_from, *server.trusted_proxies))
        trusts_anyone = operator.token_check == "present" and not filtered and not hashed
        if operator.paths and trusts_anyone and not operator.auth_none:
            findings.error(
                f"{at}.auth",
                f"nothing authenticates a sender on {server.listen.text}: set token_check, allow_from, a dialect "
                'with a hash or server.client_ca_file, or write auth = "none"',
            )


def check_listeners(findings: Findings, server: ServerTable, api: ApiTable) -> None:
    """Checks that the API has a token where one is required, and that the two addresses differ."""
    if not api.listen.loopback and not (api.token_file or api.token_env):
        findings.error("api.token_file", f"is required when api.listen is beyond loopback (got {api.listen.text!r})")
    sound = findings.sound("server", "listen") and findings.sound("api", "listen")
    if sound and server.listen == api.listen and (server.listen.port or server.listen.unix):
        findings.error("api.listen", "must differ from server.listen", api.listen.text)


def _ambiguous(one: Dialect, other: Dialect) -> bool:
    """Whether a body could be valid in both dialects with different meanings; a sender could then choose the less
    strict one.
    """
    if one.content != other.content or one.same_wire(other):
        return False
    return one.required_names <= other.required_names or other.required_names <= one.required_names
