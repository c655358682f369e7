"""The documents tell the truth: settings, modules, dialects, limits and version as they are in the code."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from support import serving

from lmdaemon import __version__, causes, dialects
from lmdaemon.config.findings import Findings
from lmdaemon.config.settings import (
    ApiTable,
    DatabaseTable,
    DeliveryTable,
    DialectTable,
    LogTable,
    OperatorTable,
    PluginTable,
    ServerTable,
    SessionsTable,
)
from lmdaemon.config.tables import Tables
from lmdaemon.delivery import answers, resolver, sender
from lmdaemon.store import contract, rules
from lmdaemon.store.sqlite import file as database
from lmdaemon.store.sqlite import pages, store
from lmdaemon.web import api, bodies, endpoint, handshakes, listener
from lmdaemon.web import requests as http

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
TABLES = {
    "[server]": ServerTable,
    "[api]": ApiTable,
    "[database]": DatabaseTable,
    "[sessions]": SessionsTable,
    "[delivery]": DeliveryTable,
    "[log]": LogTable,
    "[operators.NAME]": OperatorTable,
    "[plugins.NAME]": PluginTable,
    "[dialects.NAME]": DialectTable,
}


def row(first: str) -> list[str]:
    """The cells of the README's table row that begins with this cell."""
    (found,) = (line for line in README.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.parametrize("table", TABLES)
def test_readme_names_every_setting_and_no_other(table: str) -> None:
    shown = re.findall(r"`([a-z_]+)(?: = [^`]*)?`", row(f"`{table}`")[1])
    assert shown == [field.name for field in msgspec.structs.fields(TABLES[table])]


@pytest.mark.parametrize("table", TABLES)
def test_readme_shows_the_true_defaults(table: str) -> None:
    """Each `key = value` is TOML, and reading it gives what leaving it out gives."""
    defaults = TABLES[table]
    settings = re.findall(r"`([a-z_]+ = [^`]*)`", row(f"`{table}`")[1])
    assert settings
    findings = Findings()
    tables = Tables(findings)
    fields = {field.name: field for field in msgspec.structs.fields(defaults)}
    for setting in settings:
        ((name, value),) = tomllib.loads(setting).items()
        field = fields[name]
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        assert tables.value(field.type, value, name) == default, setting
    assert findings.errors == []


@pytest.mark.parametrize("name", dialects.SHIPPED)
def test_readme_shows_each_dialect_with_its_codes(name: str) -> None:
    dialect = dialects.SHIPPED[name]
    (line,) = (line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == f"`{dialect.path}`"
    if "as v4.01" in cells[2]:
        assert dialect.same_wire(dialects.SHIPPED["v4.01"])
    else:
        required = cells[2].partition(";")[0].split(", ")
        assert required == [dialect.fields[meaning] for meaning in dialect.required]
    meanings = ("bad_parameters", "bad_token", "bad_hash", "unknown_session", "player_mismatch", "retry", "final")
    codes = [str(dialect.codes.of(meaning)) for meaning in meanings]
    if "hash" not in dialect.fields:
        codes[2] = "–"
    assert cells[3:] == codes


def test_readme_shows_the_true_limits() -> None:
    table = README.partition("## Limits")[2].partition("## Decisions")[0].replace(",", "")
    for limit in (
        f"{endpoint.BODY_MAX // 1024} KiB; API body {api.BODY_MAX // 1024} KiB",
        f"bulk touch {bodies.BULK_IDS_MAX} ids and {api.BULK_BODY_MAX // 1024**2} MiB",
        f"attributes {api.ATTRIBUTES_MAX // 1024} KiB",
        f"{listener.LINE_MAX // 1024} KiB; {listener.HEADERS_MAX} of at most 8190 bytes",
        f"bytes; {listener.HEAD_MAX // 1024} KiB altogether",
        f"each head has {listener.HEAD_TIMEOUT_S:g} s",
        f"a body has {http.BODY_TIMEOUT_S:g} s",
        f"less than {listener.TAKEN_MIN // 1024} KiB of waiting answers in {listener.WRITE_TIMEOUT_S:g} s",
        f"{listener.STRANGERS_MAX // 1024**2} MiB for what has arrived",
        f"{listener.KNOWN_MAX // 1024**2} MiB for what is",
        f"has not arrived whole has {listener.HEARD_WITHIN_S:g} s",
        f"waits {listener.KEEPALIVE_S:g} s for its next request",
        f"{listener.CONNECTIONS_MAX} to each listener",
        f"{api.PAGE_DEFAULT} rows by default {api.PAGE_MAX} or {pages.PAGE_BYTES // 1024**2} MiB at most",
        f"{pages.PLAYER_ROWS} of a player's sessions are looked at",
        f"a handshake has {handshakes.HANDSHAKE_TIMEOUT_S:g} s and counts as a connection",
        f"orderly end has {handshakes.GOODBYE_TIMEOUT_S:g} s",
        f"1 s to {api.IDLE_MAX_S // 86400} days",
        f"{database.QUEUE_MAX} then 503; up to {database.BATCH_MAX} in one transaction",
        f"{database.QUEUE_ROWS} then 503; up to {contract.BATCH_ROWS} in one transaction",
        f"readers waiting for the disk | {database.READS_MAX} then 503",
        f"one at a time; {database.LOOKS_MAX} may wait; {database.LOOK_S:g} s for each with its wait; then 503",
        f"| {sender.ANSWER_MAX // 1024} KiB of the body are read of a head of at most {answers.HEAD_MAX // 1024} KiB",
        f"and {answers.HEADERS_MAX} headers; {answers.WIRE_MAX // 1024**2} MiB to carry the body",
        f"(1xx) | {answers.INTERIM_MAX} then",
        f"{resolver.LOOKUPS_MAX} each on a thread of its own",
        f"ten a second for an operator {store.RETRIES_MAX} in one call",
        f"{database.WAL_MAX // 1024**2} MiB and one transaction",
        f"warns at {store.LARGE_WAL // 1024**2} MiB",
        f"{contract.SWEEP_ROWS} sessions in one operation",
        f"the latest {rules.HISTORY_MAX}",
        f"{rules.PRUNE_ROWS} sessions in one operation",
    ):
        assert limit in table, limit


def test_the_delivery_page_explains_each_cause() -> None:
    page, _, holds = (ROOT / "docs" / "delivery.md").read_text().partition("An operator is held")
    words = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in (page, holds)]
    patterns = {causes.status_of(1), causes.code_of(1)}
    assert set(words[0]) == {*get_args(causes.Cause), *(pattern.replace("1", "N") for pattern in patterns)}
    assert set(words[1]) == set(get_args(causes.HoldCause))
    assert [len(set(found)) for found in words] == [len(found) for found in words]


def test_architecture_has_a_word_on_every_module() -> None:
    modules = {path.stem for path in (ROOT / "lmdaemon").rglob("*.py")} - {"__init__", "__main__", "version"}
    described = set(re.findall(r"\*\*(\w+)\*\*", ARCHITECTURE))
    assert modules <= described


def test_links_between_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_anchors_of_the_readme_exist() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in README.splitlines()}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_opens_with_the_two_commands() -> None:
    assert README.splitlines()[2:5] == [
        "```sh",
        "make run     # creates .venv, installs, serves with the shipped config.toml",
        "make test    # installs what the tests need, runs them",
    ]


async def test_the_readmes_endpoint_of_ones_own_takes_what_the_page_says_and_nothing_else(tmp_path: Path) -> None:
    section = README.partition("### From the provider's page")[2].partition("\n## ")[0]
    toml = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    curl = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert toml
    assert curl
    (tmp_path / "partner.tokens").write_text("agreed-4711\n")
    (tmp_path / "partner.tokens").chmod(0o600)
    config_text = toml[1].replace("0.0.0.0:8080", "127.0.0.1:0") + '[api]\nlisten = "127.0.0.1:0"\n'
    # The proxy's network is this machine's, here
    async with serving(tmp_path, config_text.replace("10.0.0.0/8", "127.0.0.0/8")) as daemon:
        for token, address, status, error in (
            ("agreed-4711", "198.51.100.7", 200, 0),
            ("another", "198.51.100.7", 200, 7),
            ("agreed-4711", "203.0.113.9", 403, 7),
        ):
            words = curl[1].replace("'$(cat partner.tokens)'", token).replace("\\\n", " ")
            url, *headers, body = re.findall(r"localhost:8080(\S+)|-H '([^']*)'|-d '([^']*)'", words)
            named = dict(header[1].split(": ", 1) for header in headers) | {"X-Forwarded-For": address}
            async with daemon.client.post(daemon.server + url[0], data=body[2], headers=named) as answer:
                assert (answer.status, (await answer.json())["error"]) == (status, error)
