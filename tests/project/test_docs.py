"""The documents agree with the code in settings, modules, dialects, limits and version."""

import gzip
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import runbook
from support import serving

from lmdaemon import __version__, causes, dialects, shapes
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
from lmdaemon.limits import LIMITS
from lmdaemon.store import contract, rules, writer
from lmdaemon.store.sqlite import pages
from lmdaemon.web import bodies, connection, endpoint, handshakes, listener, recent
from lmdaemon.web.problems import KINDS
from lmdaemon.web.routes import CALLS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
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


def page(name: str) -> str:
    """The text of `docs/NAME.md`."""
    return (DOCS / f"{name}.md").read_text()


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of tables in a text, including the head and the line below it."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def settings(table: str) -> dict[str, str]:
    """Each key with its default, as the configuration page shows them for this table."""
    section = page("configuration").partition(f"## {table}\n")[2].partition("\n## ")[0]
    return {cells[0].strip("`"): cells[1].strip("`") for cells in rows(section)[2:]}


@pytest.mark.parametrize("table", TABLES)
def test_the_configuration_page_names_every_setting_and_no_other(table: str) -> None:
    assert list(settings(table)) == [field.name for field in msgspec.structs.fields(TABLES[table])]


@pytest.mark.parametrize("table", TABLES)
def test_the_configuration_page_shows_the_true_defaults(table: str) -> None:
    """Each key with its default is TOML, and reading it gives the same value as leaving the key out.

    Where there is no default, the page says "required". Where leaving the key out means the value of another table, the
    page's cell is empty.
    """
    findings = Findings()
    tables = Tables(findings)
    fields = {field.name: field for field in msgspec.structs.fields(TABLES[table])}
    shown = settings(table)
    assert shown
    for name, text in shown.items():
        field = fields[name]
        if text == "required":
            assert field.required, name
        elif text:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            (value,) = tomllib.loads(f"{name} = {text}").values()
            assert tables.value(field.type, value, name) == default, name
        else:
            assert not field.required, name
    assert findings.errors == []


def test_the_runbook_of_the_console_is_that_of_the_documents() -> None:
    """`make runbook` renews the console's file."""
    assert json.loads(gzip.decompress(runbook.FILE.read_bytes())) == runbook.entries()
    assert len(runbook.entries()) > 15


@pytest.mark.parametrize("name", dialects.SHIPPED)
def test_the_endpoint_page_shows_each_dialect(name: str) -> None:
    dialect = dialects.SHIPPED[name]
    (cells,) = (cells for cells in rows(page("endpoint")) if cells[0].startswith(f"`{name}`"))
    assert cells[1] == f"`{dialect.path}`"
    if "as v4.01" in cells[2]:
        assert dialect.same_wire(dialects.SHIPPED["v4.01"])
    else:
        required = cells[2].partition(";")[0].split(", ")
        assert required == [dialect.fields[meaning] for meaning in dialect.required]


@pytest.mark.parametrize("name", dialects.SHIPPED)
def test_the_protocol_page_shows_each_dialect_and_its_codes(name: str) -> None:
    dialect = dialects.SHIPPED[name]
    shapes, answers_ = (page("protocol").partition(f"## {head}")[2] for head in ("Dialects", "Answers"))
    (cells,) = (cells for cells in rows(shapes) if cells[0].startswith(f"`{name}`") and len(cells) == 5)
    assert cells[2] == f"`{dialect.path}`"
    assert cells[3] == f"`{dialect.fields['player']}`"
    others = set(re.findall(r"`(\w+)`", cells[4].partition(";")[0]))
    needed = {dialect.fields[meaning] for meaning in dialect.required}
    assert needed == {"providerId", "sessionId", cells[3].strip("`"), *others}
    table = rows(answers_)
    (column,) = (at for at, head in enumerate(table[0]) if f"`{name}`" in head.split(", "))
    codes = {cells[0].partition(" (")[0]: cells[column] for cells in table[2:10]}
    meanings = {
        "bad parameters": "bad_parameters",
        "bad or expired token": "bad_token",
        "bad hash": "bad_hash",
        "unknown session": "unknown_session",
        "another player than the session's": "player_mismatch",
        "internal error, retry": "retry",
        "internal error, do not retry": "final",
    }
    expected = {words: str(dialect.codes.of(meaning)) for words, meaning in meanings.items()}
    if "hash" not in dialect.fields:
        expected["bad hash"] = "–"
    assert codes == {"success": "0"} | expected


def test_the_session_api_page_has_every_problem_with_what_to_do() -> None:
    shown = {cells[0]: cells[1:] for cells in rows(page("session-api").partition("## Problems")[2]) if len(cells) == 4}
    statuses = {code: {str(status)} for call in CALLS for code, status in call.may_fail_with}
    for call in CALLS:
        for code, status in call.may_fail_with:
            statuses[code].add(str(status))
    for code, kind in KINDS.items():
        expected = ", ".join(sorted(statuses.get(code, {str(kind.status)})))
        assert shown[f"`{code}`"] == [expected, kind.meaning, kind.to_do], code
    assert len(shown) == len(KINDS) + 2  # the table also has a head and a line below it


def test_the_limits_page_shows_the_true_limits() -> None:
    table = page("limits").replace(",", "")
    for limit in (
        f"{endpoint.BODY_MAX // 1024} KiB; API body {bodies.BODY_MAX // 1024} KiB",
        f"bulk touch {bodies.BULK_IDS_MAX} ids and {shapes.BULK_BODY_MAX // 1024**2} MiB",
        f"bulk opening {bodies.BULK_IDS_MAX} sessions and {shapes.BULK_BODY_MAX // 1024**2} MiB",
        f"attributes {shapes.ATTRIBUTES_MAX // 1024} KiB",
        f"{LIMITS.listeners_max} then 503; one for which {LIMITS.waiting_max} events wait is cut off",
        f"{recent.SLOTS} seconds and {recent.SLOTS} minutes of the {LIMITS.charted_max} operators that count most",
        f"{connection.LINE_MAX // 1024} KiB; {connection.HEADERS_MAX} of at most 8190 bytes",
        f"bytes; {connection.HEAD_MAX // 1024} KiB altogether",
        f"each head has {LIMITS.head_s:g} s",
        f"a body has {LIMITS.body_s:g} s",
        f"less than {connection.TAKEN_MIN // 1024} KiB of waiting answers in {LIMITS.write_s:g} s",
        f"{LIMITS.strangers_max // 1024**2} MiB for what has arrived",
        f"{LIMITS.known_max // 1024**2} MiB for what is",
        f"has not arrived whole has {LIMITS.heard_within_s:g} s",
        f"waits {listener.KEEPALIVE_S:g} s for its next request",
        f"{LIMITS.connections_max} to each listener",
        f"{shapes.PAGE_DEFAULT} rows by default {shapes.PAGE_MAX} or {contract.PAGE_BYTES // 1024**2} MiB at most",
        f"{pages.PLAYER_ROWS} of a player's sessions are looked at",
        f"a handshake has {LIMITS.handshake_s:g} s and counts as a connection",
        f"orderly end has {handshakes.GOODBYE_TIMEOUT_S:g} s",
        f"1 s to {shapes.IDLE_MAX_S // 86400} days",
        f"{LIMITS.store.queue_max} then 503; up to {writer.BATCH_MAX} in one transaction",
        f"{LIMITS.store.queue_rows} then 503; up to {contract.BATCH_ROWS} in one transaction",
        f"readers waiting for the disk | {LIMITS.store.reads_max} then 503",
        f"one at a time; {LIMITS.store.looks_max} may wait; {LIMITS.store.look_s:g} s for each with its wait; then 503",
        f"| {sender.ANSWER_MAX // 1024} KiB of the body are read of a head of at most {answers.HEAD_MAX // 1024} KiB",
        f"and {answers.HEADERS_MAX} headers; {answers.WIRE_MAX // 1024**2} MiB to carry the body",
        f"(1xx) | {answers.INTERIM_MAX} then",
        f"{resolver.LOOKUPS_MAX} each on a thread of its own and as many of operators",
        f"ten a second for an operator {LIMITS.store.dead_max} in one call",
        f"{LIMITS.store.wal_max // 1024**2} MiB and one transaction",
        f"warns at {LIMITS.store.large_wal // 1024**2} MiB",
        f"{contract.SWEEP_ROWS} sessions in one operation",
        f"on PostgreSQL {LIMITS.store.crowd_rows} while",
        f"the latest {rules.HISTORY_MAX}",
        f"{rules.PRUNE_ROWS} sessions in one operation",
    ):
        assert limit in table, limit


def test_the_delivery_page_explains_each_cause() -> None:
    causes_, _, holds = page("delivery").partition("An operator is held")
    words = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in (causes_, holds)]
    patterns = {causes.status_of(1), causes.code_of(1)}
    assert set(words[0]) == {*get_args(causes.Cause), *(pattern.replace("1", "N") for pattern in patterns)}
    assert set(words[1]) == set(get_args(causes.HoldCause))
    assert [len(set(found)) for found in words] == [len(found) for found in words]


def test_architecture_has_a_word_on_every_module() -> None:
    modules = {path.stem for path in (ROOT / "lmdaemon").rglob("*.py")} - {"__init__", "__main__", "version"}
    described = set(re.findall(r"\*\*(\w+)\*\*", page("architecture")))
    assert modules <= described


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and the documents' site make them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_between_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
    for document in documents:
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{document.name}: {path}#{anchor}"


def test_the_readme_is_short_and_a_map_of_every_page() -> None:
    """The README is for the first five minutes. It names the page on which everything else is described."""
    assert len(README.splitlines()) <= 200
    table = README.partition("## The documents")[2].partition("\n## ")[0]
    mapped = [path for cells in rows(table) for path in re.findall(r"^\[[^]]+\]\(docs/([^)#]+)\)", cells[0])]
    assert sorted(mapped) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_no_change_is_told_twice() -> None:
    """Merges of the list go line by line, so a bullet that was moved may reappear at its old place."""
    entries = re.findall(r"^- .*?(?=^- |^#|\Z)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE | re.DOTALL)
    told = [" ".join(entry.split()) for entry in entries]
    assert told
    assert [entry for entry in told if told.count(entry) > 1] == []


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_opens_with_the_two_commands() -> None:
    assert README.splitlines()[2:5] == [
        "```sh",
        "make run     # creates .venv, installs, serves with the shipped config.toml",
        "make test    # installs what the tests need, runs them",
    ]


async def test_the_endpoint_of_ones_own_takes_what_the_page_says(tmp_path: Path) -> None:
    section = page("endpoint").partition("## From the provider's page")[2].partition("\n## ")[0]
    toml = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    curl = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert toml
    assert curl
    (tmp_path / "partner.tokens").write_text("agreed-4711\n")
    (tmp_path / "partner.tokens").chmod(0o600)
    config_text = toml[1].replace("0.0.0.0:8080", "127.0.0.1:0") + '[api]\nlisten = "127.0.0.1:0"\n'
    # In this test, the proxy has an address of this machine
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
