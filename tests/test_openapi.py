"""The OpenAPI document: valid, complete, and true, for a fuzzer that believes every word of it finds nothing."""

import asyncio
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from certificates import make
from schemathesis.specs.openapi.definitions import OPENAPI_31
from support import LISTEN, Serving, load, scripted_operator, serving, until

from lmdaemon import config, openapi
from lmdaemon.api import Api
from lmdaemon.model import id_problem

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

# A refused notice is HTTP 200 with its code in the body (protocol.md), so 200 is what a bad one gets, too.
# A session that has ended cannot be touched: 410 is to touch what 409 is to open, which the fuzzer knows.
# No schema can say which plug-ins have deliveries, nor what time it is: an unknown sink and a time ahead are a 400.
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
include-operation-id = "retryDeliveries"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "409"]
"""

# Where a path stands in the document and also fits a template, it is the path that counts (OpenAPI 3.1, Paths Object).
# Numbers in attributes that are refused are told in words: a schema for them would make clients that nobody can read.
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
    return not isinstance(case.body, dict) or is_kept(case.body.get("attributes"))
"""


async def fuzz(daemon: Serving, base: str, directory: Path, *arguments: str) -> dict[str, Any]:
    """Runs schemathesis with every check against one listener, by the document that the daemon serves."""
    (directory / "checks.toml").write_text(CHECKS)
    (directory / "hooks.py").write_text(HOOKS)
    report = directory / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "checks.toml"]
    command += ["run", daemon.api + "/openapi.json", "--url", base, "--header", f"Authorization: Bearer {TOKEN}"]
    command += ["--checks", "all", "--generation-deterministic", "--max-examples", "10", "--no-color"]
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


async def test_the_daemon_answers_as_documented_and_refuses_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "lmdaemon")  # a line for each refusal would bury what the fuzzer found
    (tmp_path / "token").write_text(TOKEN)
    async with scripted_operator(*[{"error": 120}] * 5) as operator:
        toml = LISTEN + 'token_file = "token"\n' + FUZZED.format(url=operator.url)
        async with serving(tmp_path, toml) as daemon:
            await end_sessions(daemon, 10)
            private = await fuzz(daemon, daemon.api, tmp_path, "--exclude-tag", "notices")
            public = await fuzz(
                daemon,
                daemon.server,
                tmp_path,
                *("--include-tag", "notices", "--include-path", "/health"),
                *("--phases", "examples,coverage,fuzzing"),  # there is nothing to link: each notice stands alone
            )
    assert private["operations"]["tested"] == private["operations"]["selected"] == 18
    assert public["operations"]["tested"] == public["operations"]["selected"] == 5
    # A fuzzer that never got through would prove nothing. For these two it needs the links of its last phase, which
    # it does not count: they take what must exist in the right state.
    unheard = {name for report in (private, public) for name in report["valid_rates"] if not accepted(report, name)}
    assert unheard <= {
        "POST /v1/deliveries/{id}/retry",
        "POST /v1/operators/{operator}/sessions/{sessionId}/touch",
    }


def accepted(report: dict[str, Any], operation: str) -> int:
    return sum(phase["accepted"] for phase in report["valid_rates"][operation].values())


async def end_sessions(daemon: Serving, count: int) -> None:
    """Sessions that have ended and whose notices are settled, so that there are deliveries, dead ones among them."""
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


def settings_of(directory: Path, toml: str) -> config.Settings:
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
    assert [str(error) for error in jsonschema_rs.Draft202012Validator(OPENAPI_31).iter_errors(found)] == []
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
    api = Api(*[None] * 5)
    api.configure(settings)
    routes = {(route.resource.canonical, route.method.lower()) for route in api.application().router.routes()}
    endpoints = {("/V4/SessionExpired", "post"), ("/v1/SessionExpired", "post"), ("/sessionexpired", "post")}
    listed = {(path, method) for path, method, _ in operations(openapi.document(settings))}
    # HEAD goes without saying where there is GET
    head = {(path, "head") for path, method in routes if method == "get"}
    assert listed | head == (routes | endpoints) - {("/health/", "get")}


def test_an_operator_without_an_endpoint_adds_no_path(directory: Path) -> None:
    found = document(directory, '[operators.acme]\nprovider_id = "p"\nendpoint = ""\n')
    assert [path for path, _, operation in operations(found) if operation["tags"] == ["notices"]] == []


def test_an_endpoint_with_the_path_of_a_private_call_stands_beside_it(directory: Path) -> None:
    found = document(directory, '[operators.acme]\nprovider_id = "p"\nendpoint = "/metrics"\n')
    item = found["paths"]["/metrics"]
    assert item["servers"][0]["url"] == "http://127.0.0.1:8081"
    assert item["post"]["servers"][0]["url"] == "http://127.0.0.1:8080"
    assert "servers" not in item["get"]
    assert list(jsonschema_rs.Draft202012Validator(OPENAPI_31).iter_errors(found)) == []


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
    assert [server["url"] for server in found["paths"]["/V4/SessionExpired"]["servers"]] == [url]
    assert [server["url"] for server in found["paths"]["/v1/operators"]["servers"]] == ["http://127.0.0.1:8081"]
    assert [server["url"] for server in found["paths"]["/health"]["servers"]] == ["http://127.0.0.1:8081", url]
    assert list(jsonschema_rs.Draft202012Validator(OPENAPI_31).iter_errors(found)) == []


def test_a_listener_with_tls_is_named_by_https(directory: Path) -> None:
    make(directory, "own")
    toml = '[server]\ntls_cert_file = "own.crt"\ntls_key_file = "own.key"\n[operators.acme]\nprovider_id = "p"\n'
    found = document(directory, toml)
    both = ["http://127.0.0.1:8081", "https://127.0.0.1:8080"]
    assert [server["url"] for server in found["paths"]["/health"]["servers"]] == both


def test_every_private_call_asks_for_a_token_where_one_is_configured(directory: Path) -> None:
    found = document(directory, SETTINGS["tokens"])
    needs = {(path, method): operation["security"] for path, method, operation in operations(found)}
    for (path, method), security in needs.items():
        if path == "/health":
            assert security == [{"bearer": []}, {}]
        elif found["paths"][path][method]["tags"] == ["notices"]:
            assert security == []
        else:
            assert security == [{"bearer": []}]
            assert "401" in found["paths"][path][method]["responses"]
    assert found["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}


def test_without_a_token_every_change_may_be_refused_to_a_browser(directory: Path) -> None:
    found = document(directory, OPERATORS)
    private = [one for one in operations(found) if one[2]["tags"] != ["notices"]]
    assert {method for _, method, operation in private if "403" in operation["responses"]} == {"put", "post"}
    assert not [
        method
        for _, method, operation in private
        if method not in ("get", "head") and "403" not in operation["responses"]
    ]
    assert [path for path, _, operation in private if "421" not in operation["responses"]] == []
    secured = [one for one in operations(document(directory, SETTINGS["tokens"])) if one[2]["tags"] != ["notices"]]
    assert [path for path, _, operation in secured if "421" in operation["responses"]] == []


def test_without_a_token_no_call_asks_for_one(directory: Path) -> None:
    found = document(directory, OPERATORS)
    assert not any(operation.get("security") for _, _, operation in operations(found))
    assert not any("401" in operation["responses"] for _, _, operation in operations(found))
    assert "securitySchemes" not in found["components"]


@pytest.mark.parametrize(("status", "header"), [("401", "WWW-Authenticate"), ("405", "Allow"), ("503", "Retry-After")])
def test_headers_that_come_with_a_status_are_documented(directory: Path, status: str, header: str) -> None:
    responses = document(directory, SETTINGS["tokens"])["components"]["responses"]
    name, _ = openapi._PROBLEMS[int(status)]
    assert responses[name]["headers"][header]["required"] is True


@pytest.mark.parametrize(
    ("dialects", "required", "told"),
    [
        (["v4"], True, None),
        (["v4.01"], False, None),
        (["v4", "v4.01"], False, "Required for o0."),
    ],
    ids=["all", "none", "some"],
)
def test_the_token_is_required_to_open_where_every_operator_must_be_sent_one(
    directory: Path, dialects: list[str], required: bool, told: str | None
) -> None:
    operators = (
        f'[operators.o{number}]\nprovider_id = "p{number}"\ndialect = "{dialect}"\n'
        for number, dialect in enumerate(dialects)
    )
    opening = document(directory, "".join(operators))["components"]["schemas"]["Opening"]
    assert ("token" in opening["required"]) is required
    assert (told or "") in opening["properties"]["token"]["description"]
    assert ("Required" in opening["properties"]["token"]["description"]) is (told is not None)


def test_answer_codes_are_those_of_the_dialects_of_the_path(directory: Path) -> None:
    paths = document(directory, OPERATORS)["paths"]

    def codes(path: str) -> list[int]:
        answer = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        return answer["properties"]["error"]["enum"]

    assert codes("/sessionexpired") == [0, 2, 4, 5, 7, 100, 120]
    assert codes("/v1/SessionExpired") == [0, 7, 54, 55, 57, 100, 120, 998, 999]


def test_only_an_endpoint_with_an_allow_list_answers_403(directory: Path) -> None:
    paths = document(directory, SETTINGS["tokens"])["paths"]
    public = [path for path in paths if "notices" in paths[path].get("post", {}).get("tags", [])]
    assert {path for path in public if "403" in paths[path]["post"]["responses"]} == {
        "/V4/SessionExpired",
        "/v1/SessionExpired",
    }


@pytest.mark.parametrize("id_text", ["a", "Ünïcode/ &%", "x" * 256, "0" * 256, "\u00a0", "\u2028", "𝄞"])
def test_what_is_an_id_to_the_code_is_one_to_the_document(directory: Path, id_text: str) -> None:
    assert is_id(directory, id_text)
    assert id_problem(id_text) is None


@pytest.mark.parametrize("id_text", ["", "x" * 257, "a\n", "\n", "a\x00b", "\x1f", "\x7f", "\x80", "\x9f", 1, None])
def test_what_is_no_id_to_the_code_is_none_to_the_document(directory: Path, id_text: Any) -> None:
    assert not is_id(directory, id_text)
    assert not isinstance(id_text, str) or id_problem(id_text) is not None


def is_id(directory: Path, value: Any) -> bool:
    return jsonschema_rs.is_valid(document(directory, "")["components"]["schemas"]["Id"], value)


@pytest.mark.parametrize("secret", ["key-of-the-hash", TOKEN, "partner-token"])
def test_the_document_holds_no_secret(directory: Path, secret: str) -> None:
    (directory / "hash.key").write_text("key-of-the-hash")
    (directory / "partner").write_text("partner-token")
    toml = (
        SETTINGS["tokens"] + '[operators.d]\nprovider_id = "d"\ntoken_check = "partner"\npartner_token_file = "partner"'
    )
    assert secret not in json.dumps(document(directory, toml))
