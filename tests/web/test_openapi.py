"""The OpenAPI document is valid, complete and true: a fuzzer that takes it at its word finds no error."""

import asyncio
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jsonschema_rs
import pytest
from certificates import make
from chance import examples
from documented import closed
from support import LISTEN, Serving, load, scripted_operator, serving, until

from lmdaemon.config.settings import Settings
from lmdaemon.model import id_problem
from lmdaemon.web import openapi
from lmdaemon.web.api import Api
from lmdaemon.web.problems import KINDS
from lmdaemon.web.routes import CALLS

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
TOKEN = "api-token-of-the-tests"

OPERATORS = """
[operators.acme]
provider_id = "luckymonaco"
[operators.bravo]
provider_id = "kyren"
accept = ["v4", "v4.01", "v1"]
dialect = "v4.01"
allow_from = ["127.0.0.0/8"]
[operators.casino]
provider_id = "pp"
accept = ["pragmatic"]
hash_key_file = "hash.key"
"""

# -- the fuzzer

FUZZED = """
[sessions]
restart_grace = "0s"
[operators.acme]
provider_id = "luckymonaco"
accept = ["v4", "v4.01", "form"]
allow_from = ["127.0.0.0/8"]
notify = true
url = "{url}"
allow_private_network = true
[operators.bravo]
provider_id = "kyren"
accept = ["v1"]
[dialects.form]
path = "/notices"
content = "form"
fields = {{ provider = "providerId", session = "sessionId", player = "playerId", token = "token" }}
required = ["provider", "session", "player"]
"""

# Exceptions for the fuzzer.
# A refused notice is answered with HTTP 200 and a code in the body, so bad data may get 200.
# Touching an ended session is answered with 410, where opening one is answered with 409. The fuzzer knows only 409.
# OpenAPI cannot express that one of two parameters is needed, which sinks have deliveries, or the present time. So a
# request without either parameter, with an unknown sink or with a time in the future is answered with 400.
CHECKS = """
[[operations]]
include-tag = "notices"
[operations.checks.negative_data_rejection]
expected-statuses = ["200", "403", "413", "415"]
[[operations]]
include-operation-id = "touchSession"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "410"]
[[operations]]
include-operation-id = "listDeliveries"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400"]
[[operations]]
include-operation-id = "findSessions"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400"]
[[operations]]
include-operation-id = "retryDeliveries"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "409"]
[[operations]]
include-operation-id = "discardDeliveries"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404"]
"""

# If a path of the document also fits another path's template, the path without a template counts (OpenAPI 3.1, Paths
# Object).
# Which numbers are refused in attributes is described in words: as a schema it would make unreadable clients.
HOOKS = """
import schemathesis

def is_kept(value):
    if isinstance(value, dict):
        return all(map(is_kept, value.values()))
    if isinstance(value, list):
        return all(map(is_kept, value))
    return not isinstance(value, (int, float)) or abs(value) <= 2**53

@schemathesis.hook
def filter_case(context, case):
    if case.operation.path.endswith("/{sessionId}") and case.path_parameters.get("sessionId") == "touch":
        return False
    return is_kept(case.body) if isinstance(case.body, dict) else True
"""


@cache
def validator() -> Any:
    """A validator of OpenAPI documents. The import is inside because it takes half a second, and no other test needs
    it.
    """
    from schemathesis.specs.openapi.definitions import OPENAPI_31

    return jsonschema_rs.Draft202012Validator(OPENAPI_31)


async def fuzz(daemon: Serving, base: str, directory: Path, *arguments: str) -> dict[str, Any]:
    """Runs schemathesis with all its checks on one listener, with the document that the daemon serves."""
    (directory / "checks.toml").write_text(CHECKS)
    (directory / "hooks.py").write_text(HOOKS)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with daemon.client.get(daemon.api + "/openapi.json", headers=headers) as answer:
        document = closed(await answer.json())
    # Added here is what the document says only in words: the names of the operators, that these need a token to open a
    # session, and that a session with the id "touch" is opened and shown at the path of the bulk touch.
    document["components"]["parameters"]["operator"]["schema"]["enum"] = ["acme", "bravo"]
    for name in ("Opening", "OpeningOfMany"):
        document["components"]["schemas"][name]["required"].append("token")
    one = document["paths"]["/v1/operators/{operator}/sessions/{sessionId}"]
    for method in ("put", "get"):
        of_touch = {"operationId": one[method]["operationId"] + "Touch"}
        document["paths"]["/v1/operators/{operator}/sessions/touch"][method] = one[method] | of_touch
    (directory / "openapi.json").write_text(json.dumps(document))
    report = directory / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "checks.toml"]
    command += ["run", "openapi.json", "--url", base, "--header", f"Authorization: Bearer {TOKEN}"]
    command += ["--checks", "all", "--generation-deterministic", "--max-examples", str(examples(10)), "--no-color"]
    command += ["--report", "json", "--report-json-path", str(report), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(directory)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.fuzzer
async def test_the_daemon_answers_as_documented_and_refuses_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "lmdaemon")  # one log line for each refusal would hide what the fuzzer found
    (tmp_path / "token").write_text(TOKEN)
    async with scripted_operator(*[{"error": 120}] * 5) as operator:
        toml = LISTEN + 'token_file = "token"\n' + FUZZED.format(url=operator.url)
        async with serving(tmp_path, toml) as daemon:
            await end_sessions(daemon, 10)
            # Event streams end late or never; test_watching and test_trying compare their events with the document
            streams = [one.name for one in CALLS if one.events]
            left_out = [word for name in streams for word in ("--exclude-operation-id", name)]
            private = await fuzz(daemon, daemon.api, tmp_path, "--exclude-tag", "notices", *left_out)
            public = await fuzz(
                daemon,
                daemon.server,
                tmp_path,
                *("--include-tag", "notices", "--include-path", "/health"),
                *("--phases", "examples,coverage,fuzzing"),  # no phase of links: notices do not refer to each other
            )
    assert private["operations"]["tested"] == private["operations"]["selected"] == 29
    assert public["operations"]["tested"] == public["operations"]["selected"] == 5
    # A fuzzer whose requests are all refused would prove nothing. The calls listed here need an object in a certain
    # state. The fuzzer has one at best in its last phase, whose requests it does not count.
    unheard = {name for report in (private, public) for name in report["valid_rates"] if not accepted(report, name)}
    assert unheard <= {
        "POST /v1/deliveries/{id}/retry",
        "POST /v1/operators/{operator}/probe",
        "POST /v1/operators/{operator}/sessions/{sessionId}/touch",
    }


def accepted(report: dict[str, Any], operation: str) -> int:
    return sum(phase["accepted"] for phase in report["valid_rates"][operation].values())


async def end_sessions(daemon: Serving, count: int) -> None:
    """Makes sessions that have ended and whose notices are settled, so that there are deliveries, some of them dead."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for number in range(count):
        path = f"{daemon.api}/v1/operators/acme/sessions/seed-{number}"
        async with daemon.client.put(path, json={"playerId": "p", "token": "t"}, headers=headers) as opened:
            assert opened.status == 201
        async with daemon.client.post(path + "/close", headers=headers) as closed:
            assert closed.status == 200

    async def settled() -> bool:
        async with daemon.client.get(f"{daemon.api}/v1/operators", headers=headers) as answer:
            shown = (await answer.json())["items"][0]
        return shown["pending"] == 0 and shown["dead"] == 5

    await until(settled)


# -- the document

SETTINGS = {
    "nothing": "",
    "operators": OPERATORS,
    "tokens": LISTEN.replace("[api]", '[api]\ntoken_file = "token"') + OPERATORS,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "hash.key").write_text("key")
    (tmp_path / "token").write_text(TOKEN)
    return tmp_path


def settings_of(directory: Path, toml: str) -> Settings:
    return load(directory / "config.toml", toml)


def document(directory: Path, toml: str) -> dict[str, Any]:
    return openapi.document(settings_of(directory, toml))


def operations(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in found["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item[method]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


@pytest.mark.parametrize("toml", SETTINGS.values(), ids=SETTINGS)
def test_document_is_valid_openapi_3_1(directory: Path, toml: str) -> None:
    found = document(directory, toml)
    assert [str(error) for error in validator().iter_errors(found)] == []
    for schema in found["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema)


@pytest.mark.parametrize("toml", SETTINGS.values(), ids=SETTINGS)
def test_every_reference_leads_somewhere_and_every_schema_is_used(directory: Path, toml: str) -> None:
    found = document(directory, toml)
    named = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "parameters")
        for name in found["components"][kind]
    }
    assert set(references(found)) <= named
    unused = {name for name in named - set(references(found)) if name.startswith("#/components/schemas/")}
    assert unused == set()


@pytest.mark.parametrize("toml", SETTINGS.values(), ids=SETTINGS)
def test_every_operation_has_a_summary_and_a_name_of_its_own(directory: Path, toml: str) -> None:
    found = list(operations(document(directory, toml)))
    assert [(path, method) for path, method, operation in found if not operation["summary"].strip()] == []
    names = Counter(operation["operationId"] for _, _, operation in found if "operationId" in operation)
    assert [name for name, count in names.items() if count > 1] == []


def test_document_lists_exactly_the_routes_that_are_served(directory: Path) -> None:
    settings = settings_of(directory, OPERATORS)
    api = Api(MagicMock())
    api.configure(settings)
    served = {(route.resource.canonical, route.method.lower()) for route in api.application().router.routes()}
    # The console is a page for people, not a call
    routes = {one for one in served if not one[0].startswith("/console")}
    endpoints = {("/V4/SessionExpired", "post"), ("/v1/SessionExpired", "post"), ("/sessionexpired", "post")}
    listed = {(path, method) for path, method, _ in operations(openapi.document(settings))}
    # The document does not list HEAD, which is answered wherever GET is
    head = {(path, "head") for path, method in routes if method == "get"}
    # Opening and showing a session with the id "touch" is described at touchSessions
    same = {("/v1/operators/{operator}/sessions/touch", method) for method in ("put", "get")}
    assert listed | head == (routes | endpoints) - {("/health/", "get")} - same


def test_an_operator_without_an_endpoint_adds_no_path(directory: Path) -> None:
    found = document(directory, '[operators.acme]\nprovider_id = "p"\nendpoint = ""\n')
    assert [path for path, _, operation in operations(found) if operation["tags"] == ["notices"]] == []


def test_an_endpoint_with_the_path_of_a_private_call_stands_beside_it(directory: Path) -> None:
    found = document(directory, '[operators.acme]\nprovider_id = "p"\nendpoint = "/metrics"\n')
    item = found["paths"]["/metrics"]
    assert item["post"]["servers"][0]["url"] == "http://127.0.0.1:8080"
    assert "servers" not in item | item["get"]
    assert list(validator().iter_errors(found)) == []


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("0.0.0.0:8080", "http://{host}:8080"),
        ("[::]:8080", "http://{host}:8080"),
        ("unix:/run/lmdaemon/server.sock", "http://localhost"),
    ],
)
def test_each_path_names_the_listener_it_is_found_at(directory: Path, listen: str, url: str) -> None:
    operator = '[operators.acme]\nprovider_id = "p"\nauth = "none"\n'
    found = document(directory, f'[server]\nlisten = "{listen}"\n' + operator)
    assert [server["url"] for server in found["paths"]["/V4/SessionExpired"]["post"]["servers"]] == [url]
    # For all paths that name no servers
    assert [server["url"] for server in found["servers"]] == ["http://127.0.0.1:8081"]
    assert {path for path, item in found["paths"].items() if "servers" in item} == {"/health"}
    assert [server["url"] for server in found["paths"]["/health"]["servers"]] == ["http://127.0.0.1:8081", url]
    assert list(validator().iter_errors(found)) == []


def test_a_listener_with_tls_of_its_own_is_found_at_https(directory: Path) -> None:
    make(directory, "server")
    tls = 'tls_cert_file = "server.crt"\ntls_key_file = "server.key"\n'
    found = document(directory, f"[server]\n{tls}[api]\n{tls}" + OPERATORS)
    assert [server["url"] for server in found["paths"]["/health"]["servers"]] == [
        "https://127.0.0.1:8081",
        "https://127.0.0.1:8080",
    ]
    assert found["servers"][0]["url"] == "https://127.0.0.1:8081"


def test_a_listener_that_asks_for_client_certificates_says_so(directory: Path) -> None:
    make(directory, "ca", authority=True)
    make(directory, "server")
    tls = 'tls_cert_file = "server.crt"\ntls_key_file = "server.key"\nclient_ca_file = "ca.crt"\n'
    found = document(directory, f'[server]\n{tls}[api]\ntoken_file = "token"\n{tls}' + OPERATORS)
    assert found["security"] == [{"bearer": [], "clientCertificate": []}]
    assert found["paths"]["/health"]["get"]["security"] == [
        {"bearer": [], "clientCertificate": []},
        {"clientCertificate": []},
    ]
    assert found["paths"]["/sessionexpired"]["post"]["security"] == [{"clientCertificate": []}]
    assert found["components"]["securitySchemes"].keys() == {"bearer", "clientCertificate"}
    assert found["components"]["securitySchemes"]["clientCertificate"]["type"] == "mutualTLS"


def test_every_private_call_asks_for_a_token_where_one_is_configured(directory: Path) -> None:
    found = document(directory, SETTINGS["tokens"])
    assert found["security"] == [{"bearer": []}]
    assert found["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, _, operation in operations(found):
        if path == "/health":
            assert operation["security"] == [{"bearer": []}, {}]
        elif operation["tags"] == ["notices"]:
            assert operation["security"] == []
        else:
            assert "security" not in operation


def test_without_a_token_no_call_asks_for_one(directory: Path) -> None:
    found = document(directory, OPERATORS)
    assert found["security"] == []
    assert not any(operation.get("security") for _, _, operation in operations(found))
    assert found["components"]["securitySchemes"] == {}


def test_every_private_call_says_how_it_is_refused(directory: Path) -> None:
    found = document(directory, OPERATORS)
    for path, method, operation in operations(found):
        if operation["tags"] != ["notices"] and path != "/health":
            refusals = {"401", "421", "500"} | ({"403"} if method != "get" else set())
            assert refusals <= operation["responses"].keys(), (path, method)


# -- what others generate from it


def test_what_clients_are_generated_from_depends_on_no_configuration(directory: Path) -> None:
    """The private side depends on the configuration only in the servers and in whether a token is asked for. The public
    side depends on it only in its paths.
    """
    bare, full = (private_side(document(directory, SETTINGS[name])) for name in ("nothing", "tokens"))
    assert bare == full


def private_side(found: dict[str, Any]) -> dict[str, Any]:
    for path, item in [*found["paths"].items()]:
        if item.get("post", {}).get("tags") == ["notices"]:
            del found["paths"][path]
    for name in [*found["components"]["schemas"]]:
        if name.startswith("Notice") and name != "NoticeAnswer":
            del found["components"]["schemas"][name]
    found["paths"]["/health"]["servers"] = None
    for method in ("get", "head"):
        found["paths"]["/health"][method].pop("security", None)
    components = found["components"] | {"securitySchemes": None}
    return found | {"servers": None, "security": None, "components": components}


def test_an_operator_in_a_path_is_any_name_that_a_configuration_may_have(directory: Path) -> None:
    found = document(directory, OPERATORS)
    schema = found["components"]["parameters"]["operator"]["schema"]
    assert "enum" not in schema
    for name in ("acme", "not-configured", "A_9.x", "0" * 64):
        assert jsonschema_rs.is_valid(schema, name)
    for name in ("", "-acme", "a/b", "ä", "0" * 65, "a\n"):
        assert not jsonschema_rs.is_valid(schema, name)
    with_operator = [one for path, _, one in operations(found) if "{operator}" in path]
    assert all("404" in operation["responses"] for operation in with_operator)


def test_every_operation_can_be_called_by_a_name_in_generated_code(directory: Path) -> None:
    found = [operation for _, _, operation in operations(document(directory, OPERATORS))]
    names = [operation["operationId"] for operation in found]
    assert [name for name in names if not re.fullmatch("[a-z][A-Za-z0-9]*", name)] == []
    assert {"reportV4SessionExpired", "reportV1SessionExpired", "reportSessionExpired"} < set(names)
    assert [operation["operationId"] for operation in found if not operation["description"].strip()] == []


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        (["/V4/SessionExpired"], ["reportV4SessionExpired"]),
        (["/v4/sessionexpired"], ["reportV4SessionExpired"]),
        (["/casino-1/42/ended"], ["reportCasino142Ended"]),
        (["/"], ["reportNotice"]),
        (["/a-b", "/a/b", "/ab"], ["reportAB", "reportAB_2", "reportAb_3"]),
    ],
)
def test_a_notice_is_named_after_its_path(directory: Path, endpoints: list[str], expected: list[str]) -> None:
    toml = "".join(
        f'[operators.o{number}]\nprovider_id = "p"\nendpoint = "{endpoint}"\n'
        for number, endpoint in enumerate(endpoints)
    )
    paths = document(directory, toml)["paths"]
    assert [paths[endpoint]["post"]["operationId"] for endpoint in endpoints] == expected


def test_an_operator_more_leaves_the_names_of_the_others_as_they_are(directory: Path) -> None:
    def names(toml: str) -> dict[str, str]:
        found = operations(document(directory, toml))
        return {path: operation["operationId"] for path, _, operation in found}

    more = OPERATORS + '[operators.delta]\nprovider_id = "d"\naccept = ["v4.02"]\ndialect = "v4.02"\n'
    more += 'endpoint = "/delta"\n'
    assert names(OPERATORS).items() < names(more).items()


def test_answers_may_get_further_members_and_requests_may_not(directory: Path) -> None:
    schemas = document(directory, "")["components"]["schemas"]
    closed = {name for name, schema in schemas.items() if schema.get("additionalProperties") is False}
    about_dead = {"RetryDead", "Discard", "DiscardDead"}
    assert closed == {"Opening", "OpeningOfMany", "BulkOpen", "BulkTouch", "Hold", "TestNotice"} | about_dead


def test_health_is_one_schema_that_keeps_every_check(directory: Path) -> None:
    schemas = document(directory, "")["components"]["schemas"]
    assert schemas["Health"]["required"] == ["status"]
    assert schemas["Health"]["properties"].keys() == {"status", "version", "description", "checks"}
    assert "store" in schemas["Checks"]["properties"]


@pytest.mark.parametrize(("status", "header"), [("401", "WWW-Authenticate"), ("503", "Retry-After")])
def test_headers_that_come_with_a_status_are_documented(directory: Path, status: str, header: str) -> None:
    found = document(directory, SETTINGS["tokens"])
    answers = [one["responses"][status] for _, _, one in operations(found) if status in one["responses"]]
    problems = [one for one in answers if "application/problem+json" in one.get("content", {})]
    assert problems
    assert all(one["headers"][header]["required"] for one in problems)


def test_every_problem_is_told_with_its_code_its_meaning_and_what_to_do(directory: Path) -> None:
    found = {call["operationId"]: call for _, _, call in operations(document(directory, SETTINGS["tokens"]))}
    for call in CALLS:
        for code, status in call.may_fail_with:
            _, meaning, to_do = KINDS[code]
            assert f"`{code}`: {meaning} {to_do}" in found[call.name]["responses"][str(status)]["description"]


def test_a_notice_says_what_each_code_means(directory: Path) -> None:
    paths = document(directory, OPERATORS)["paths"]
    pragmatic, v1 = (paths[path]["post"]["description"] for path in ("/sessionexpired", "/v1/SessionExpired"))
    assert "- pragmatic: 0 taken, 7 `bad_parameters` or `unknown_session`, 4 `bad_token`, 5 `bad_hash`, " in pragmatic
    assert "2 `player_mismatch`, 100 `retry`, 120 `final`" in pragmatic
    assert "- v1: 0 taken, 57 `bad_parameters` or" in v1
    assert "998 `retry`, 999 `final`" in v1


@pytest.mark.parametrize("id_text", ["a", "Ünïcode/ &%", "x" * 256, "0" * 256, "\u00a0", "\u2028", "𝄞"])
def test_what_is_an_id_to_the_code_is_one_to_the_document(id_text: str) -> None:
    assert is_id(id_text)
    assert id_problem(id_text) is None


@pytest.mark.parametrize("id_text", ["", "x" * 257, "a\n", "\n", "a\x00b", "\x1f", "\x7f", "\x80", "\x9f", 1, None])
def test_what_is_no_id_to_the_code_is_none_to_the_document(id_text: Any) -> None:
    assert not is_id(id_text)
    assert not isinstance(id_text, str) or id_problem(id_text) is not None


def is_id(value: Any) -> bool:
    return jsonschema_rs.is_valid(openapi.schemas()["Session"]["properties"]["playerId"], value)


@pytest.mark.parametrize("secret", ["key-of-the-hash", TOKEN, "partner-token"])
def test_the_document_holds_no_secret(directory: Path, secret: str) -> None:
    (directory / "hash.key").write_text("key-of-the-hash")
    (directory / "partner").write_text("partner-token")
    toml = (
        SETTINGS["tokens"] + '[operators.d]\nprovider_id = "d"\ntoken_check = "partner"\npartner_token_file = "partner"'
    )
    assert secret not in json.dumps(document(directory, toml))
