"""Clients that are generated from the OpenAPI document. Three generators accept the document, two linters find no fault
in it, and one generated client calls a running daemon.

`make clients` runs these tests. Their tools are installed once into build/clients, from PyPI and npm. If they cannot be
installed, the tests are skipped with the reason.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from generators import TOOLS, install, node_modules
from support import LISTEN, load, scripted_operator, serving

from lmdaemon.web import openapi

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3600)]

RUN_S = 120
PYTHON_PACKAGES = ("openapi-python-client", "datamodel-code-generator")
TOKEN = "api-token-of-the-tests"

OPERATORS = """
[operators.acme]
provider_id = "luckymonaco"
accept = ["v4", "v4.01", "pragmatic"]
hash_key_file = "hash.key"
[operators.bravo]
provider_id = "kyren"
dialect = "v1"
accept = ["v1", "own"]
[dialects.own]
path = "/own-path"
fields = { provider = "providerId", session = "sessionId", player = "playerId", token = "token" }
required = ["provider", "session", "player"]
extra = false
"""
SETTINGS = {"open": OPERATORS, "tokens": '[api]\ntoken_file = "token"\n' + OPERATORS, "nobody": ""}


@pytest.fixture(scope="module")
def generators() -> Path:
    """The directory with the programs of the Python generators, and a Python in which they are installed."""
    home = TOOLS / f"python{sys.version_info.major}.{sys.version_info.minor}"
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install(
        home / ".ready", " ".join(PYTHON_PACKAGES), [sys.executable, "-m", "venv", str(home)], [*pip, *PYTHON_PACKAGES]
    )
    return home / "bin"


@pytest.fixture(scope="module")
def node() -> Path:
    """The directory with the programs of the npm packages."""
    return node_modules() / ".bin"


@pytest.fixture(params=SETTINGS)
def document(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "hash.key").write_text("key")
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(openapi.document(load(tmp_path / "config.toml", SETTINGS[request.param]))))
    return file


def run(directory: Path, *command: str | Path) -> str:
    """The output of one of these programs, which must succeed."""
    environment = os.environ | {
        "REDOCLY_TELEMETRY": "off",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*map(str, command)],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def has_endpoints(document: Path) -> bool:
    """Whether the document has a notice endpoint. The schemas of answers to notices are in it in any case, and unused
    without an endpoint.
    """
    return "/V4/SessionExpired" in document.read_text()


def test_redocly_finds_nothing_wrong(document: Path, node: Path) -> None:
    # The project states no licence
    skipped = ["info-license", *(() if has_endpoints(document) else ("no-unused-components",))]
    options = [option for rule in skipped for option in ("--skip-rule", rule)]
    said = run(document.parent, node / "redocly", "lint", *options, document.name)
    assert "Your API description is valid" in said
    assert "Warning was generated" not in said, said


def test_spectral_finds_nothing_wrong(document: Path, node: Path) -> None:
    unused = "error" if has_endpoints(document) else "off"
    rules = f"{{info-contact: off, oas3-unused-component: {unused}}}"
    (document.parent / ".spectral.yaml").write_text(f'extends: ["spectral:oas"]\nrules: {rules}\n')
    run(document.parent, node / "spectral", "lint", "--fail-severity", "warn", "-r", ".spectral.yaml", document.name)


def test_typescript_types_say_what_is_in_an_answer(document: Path, node: Path) -> None:
    run(document.parent, node / "openapi-typescript", document.name, "-o", "lmdaemon.d.ts")
    (document.parent / "use.ts").write_text("""
import type { components, operations } from "./lmdaemon";
type Schemas = components["schemas"];
const opening: Schemas["Opening"] = { playerId: "p", token: "t", attributes: { table: 7 } };
export function shown(session: Schemas["Session"], health: Schemas["Health"]): string {
  const why: "inactivity" | "max_lifetime" | "closed" | "reported" | null = session.reason;
  return `${opening.playerId} ${why} ${session.expiresAt ?? ""} ${health.checks?.store[0].walBytes}`;
}
export const operator: operations["touchSession"]["parameters"]["path"]["operator"] = "any-name";
""")
    run(document.parent, node / "tsc", "--strict", "--noEmit", "use.ts")


def test_pydantic_models_read_and_write_what_the_daemon_speaks(document: Path, generators: Path) -> None:
    run(
        document.parent,
        *(generators / "datamodel-codegen", "--input", document.name, "--input-file-type", "openapi"),
        *("--output-model-type", "pydantic_v2.BaseModel", "--formatters", "builtin", "--output", "models.py"),
    )
    run(
        document.parent,
        generators / "python",
        "-c",
        """
import models
touch = models.BulkTouch(sessionIds=["a", "b"])
assert touch.model_dump_json() == '{"sessionIds":["a","b"]}'
health = models.Health.model_validate({"status": "warn"})
assert health.status is models.HealthStatus.warn and health.checks is None
assert {"Session", "SessionPage", "SessionState", "EndReason", "Delivery", "DeliveryState"} <= set(dir(models))
assert not [name for name in dir(models) if name[-1:].isdigit() and not name.startswith("Notice")], dir(models)
""",
    )


def generated(directory: Path, document: Path, generators: Path) -> None:
    run(
        directory,
        *(generators / "openapi-python-client", "generate", "--path", document, "--output-path", "lmclient"),
        *("--meta", "none", "--fail-on-warning"),
    )


def test_a_python_client_is_generated_without_a_warning(document: Path, generators: Path) -> None:
    generated(document.parent, document, generators)
    names = {file.stem for file in (document.parent / "lmclient" / "api").rglob("*.py")}
    assert {"open_session", "touch_session", "touch_sessions", "close_session", "list_deliveries"} < names
    models = {file.stem for file in (document.parent / "lmclient" / "models").rglob("*.py")}
    assert [name for name in models if "type_" in name or "_response_4" in name or "_item" in name] == []


USE = """
import sys
from lmclient import AuthenticatedClient, Client
from lmclient.api.daemon import get_health
from lmclient.api.deliveries import get_delivery, list_deliveries
from lmclient.api.notices import report_v4_session_expired
from lmclient.api.operators import hold_operator, list_operators, release_operator
from lmclient.api.sessions import (
    close_session, get_session, list_sessions, open_session, touch_session, touch_sessions,
)
from lmclient.models import (
    BulkTouch, DeliveryState, EndReason, NoticeV4, Opening, OpeningAttributes, Problem, SessionState,
)

private, public, token = sys.argv[1:]
client = AuthenticatedClient(base_url=private, token=token, raise_on_unexpected_status=True)
stranger = AuthenticatedClient(base_url=private, token="wrong", raise_on_unexpected_status=True)
outside = Client(base_url=public, raise_on_unexpected_status=True)

attributes = OpeningAttributes.from_dict({"table": 7})
opening = Opening(player_id="p", token="t", idle_timeout_seconds=900, attributes=attributes)
for number in range(5):
    opened = open_session.sync("acme", f"s/{number}", client=client, body=opening)
    assert opened.state is SessionState.ACTIVE and opened.reason is None, opened
    assert opened.attributes["table"] == 7 and opened.expires_at > opened.opened_at, opened
assert open_session.sync_detailed("acme", "s/0", client=client, body=opening).status_code == 200

assert touch_session.sync_detailed("acme", "s/0", client=client).status_code == 204
unknown = touch_session.sync_detailed("acme", "none", client=client)
assert unknown.status_code == 404 and isinstance(unknown.parsed, Problem), unknown
assert touch_session.sync("nobody", "s/0", client=client).status == 404  # an operator that is not configured
assert touch_session.sync("acme", "s/0", client=stranger).status == 401
touched = touch_sessions.sync("acme", client=client, body=BulkTouch(session_ids=["s/0", "s/1", "none"]))
assert (touched.touched, touched.unknown, touched.ended) == (2, ["none"], []), touched

closed = close_session.sync("acme", "s/0", client=client)
assert closed.state is SessionState.ENDED and closed.reason is EndReason.CLOSED and closed.expires_at is None, closed
gone = touch_session.sync("acme", "s/0", client=client)
assert gone.status == 410 and gone.session.session_id == "s/0", gone
notice = NoticeV4(provider_id="luckymonaco", session_id="s/1", external_player_id="p", token="t")
assert report_v4_session_expired.sync(client=outside, body=notice).error == 0
(delivery,) = get_session.sync("acme", "s/1", client=client).deliveries
assert delivery.session_id == "s/1", delivery

seen, after = [], None
while True:
    page = list_sessions.sync("acme", client=client, limit=2, **({"after": after} if after else {}))
    assert len(page.items) <= 2, page
    seen += [session.session_id for session in page.items]
    after = page.next_
    if after is None:
        break
assert seen == [f"s/{number}" for number in (4, 3, 2, 1, 0)], seen
ended = list_sessions.sync("acme", client=client, state=SessionState.ENDED)
assert [session.session_id for session in ended.items] == ["s/1", "s/0"], ended
assert len(list_deliveries.sync(client=client, operator="acme", sink="http").items) == 2
assert get_delivery.sync(delivery.id, client=client).state in (DeliveryState.PENDING, DeliveryState.DELIVERED)

assert hold_operator.sync("acme", client=client).held is True
assert release_operator.sync("acme", client=client).held is False
assert [operator.operator for operator in list_operators.sync(client=client).items] == ["acme"]
health = get_health.sync(client=client)
assert health.status == "pass" and health.checks.store[0].sessions == 3, health
assert health.checks.operators[0].held == [], health
outside_health = get_health.sync(client=outside)
assert outside_health.status == "pass" and not outside_health.checks, outside_health
"""


async def test_a_generated_client_opens_touches_closes_and_pages(tmp_path: Path, generators: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    async with scripted_operator() as operator:
        toml = LISTEN + 'token_file = "token"\n[sessions]\nrestart_grace = "0s"\n'
        toml += f'[operators.acme]\nprovider_id = "luckymonaco"\nnotify = true\nurl = "{operator.url}"\n'
        async with serving(tmp_path, toml + "allow_private_network = true\n") as daemon:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with daemon.client.get(daemon.api + "/openapi.json", headers=headers) as answer:
                (tmp_path / "openapi.json").write_bytes(await answer.read())
            await asyncio.to_thread(generated, tmp_path, tmp_path / "openapi.json", generators)
            (tmp_path / "use.py").write_text(USE)
            arguments = (daemon.api, daemon.server, TOKEN)
            await asyncio.to_thread(run, tmp_path, generators / "python", "use.py", *arguments)
