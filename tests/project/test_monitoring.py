"""Alert rules and dashboard use only what the daemon really exports. Each alert fires when it should, and only then."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import make
from chance import DEEP
from support import LISTEN, Serving, scripted_operator, serving, until

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docs" / "monitoring" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "monitoring" / "dashboard.json"
CASES = ROOT / "tests" / "monitoring" / "alerts_test.yml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
BY_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": set()}
TARGET_LABELS = {"job", "instance"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)

CONFIG = """
[sessions]
restart_grace = "0s"
[operators.acme]
provider_id = "luckymonaco"
notify = true
url = "{url}"
allow_private_network = true
"""
SESSION = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": 1}
NOTICE = {"providerId": "luckymonaco", "sessionId": "told", "externalPlayerId": "p", "token": "tok-3n"}


def promtool(*words: str, text: str | None = None) -> str:
    done = subprocess.run(["promtool", *words], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


async def live(daemon: Serving, silent: asyncio.Event) -> None:
    """Causes something for each metric with labels: an expiry, a touch, a notice, errors, a pending delivery. The
    public listener uses TLS.
    """
    public = daemon.server.replace("http:", "https:")
    session = f"{daemon.api}/v1/operators/acme/sessions/s-1"
    for method, url, body, status in (
        ("PUT", session, SESSION, 201),
        ("POST", session + "/touch", None, 204),
        ("POST", f"{daemon.api}/v1/operators/nobody/hold", None, 404),
        ("POST", f"{public}/V4/SessionExpired", NOTICE, 200),
        ("GET", f"{public}/V4/SessionExpired", None, 405),
    ):
        async with daemon.client.request(method, url, json=body, ssl=False) as answer:
            assert answer.status == status
    await until(lambda: daemon.store.live == 0)
    await until(silent.is_set)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The metrics of a daemon that has done everything there are metrics for."""

    async def run() -> str:
        silent = asyncio.Event()

        async def never(_: object) -> None:
            silent.set()
            await asyncio.sleep(60)

        async with scripted_operator(*[never] * 9) as operator:
            directory = tmp_path_factory.mktemp("exported")
            make(directory, "own")
            own = 'tls_cert_file = "own.crt"\ntls_key_file = "own.key"\n'
            shown = 'client_cert_file = "own.crt"\nclient_key_file = "own.key"\n'
            toml = LISTEN.replace("[api]", own + "[api]") + CONFIG.format(url=operator.url) + shown
            async with serving(directory, toml + 'timeout = "1s"\n') as daemon:
                await live(daemon, silent)
                async with daemon.client.get(daemon.api + "/metrics") as answer:
                    return await answer.text()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def series(exported: str) -> dict[str, set[str]]:
    """The labels of each series, by its name."""
    found: dict[str, set[str]] = {}
    for line in exported.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_every_metric_that_is_declared_has_a_series(exported: str, series: dict[str, set[str]]) -> None:
    declared = re.findall(r"^# TYPE (\w+) (\w+)$", exported, re.MULTILINE)
    assert len(declared) > 40
    for name, kind in declared:
        assert (f"{name}_bucket" if kind == "histogram" else name) in series, name
    assert not [name for name in series if name.endswith("_created")]  # each would add a second series


@needs_promtool
def test_prometheus_finds_nothing_to_complain_about(exported: str) -> None:
    assert promtool("check", "metrics", text=exported) == ""


@needs_promtool
def test_the_alert_rules_are_valid() -> None:
    promtool("check", "rules", str(ALERTS))


@pytest.mark.slow
@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    """The rules are evaluated once a minute, and in CI as often as Prometheus does."""
    promtool("test", "rules", str(CASES if DEEP else looked_at_every("1m", tmp_path, ALERTS)))


def looked_at_every(interval: str, directory: Path, alerts: Path) -> Path:
    """A copy of the cases for this file of alerts, evaluated at this interval."""
    cases = CASES.read_text().replace("../../docs/monitoring/alerts.yml", str(alerts))
    (directory / "cases.yml").write_text(cases.replace("evaluation_interval: 15s", f"evaluation_interval: {interval}"))
    return directory / "cases.yml"


def test_each_alert_has_a_case_that_fires_and_one_that_must_not() -> None:
    fires, silent = set(), set()
    for group in yaml.safe_load(CASES.read_text())["tests"]:
        expected = [
            {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in case.get("exp_samples", [])}
            for case in group["promql_expr_test"]
        ]
        assert all("ALERTS" in case["expr"] for case in group["promql_expr_test"])
        all_of_them = set().union(*expected)
        fires |= all_of_them
        silent |= {alert for alert in all_of_them if any(alert not in one for one in expected)}
    names = {rule["alert"] for rule in RULES}
    assert fires == names
    assert silent == names


@pytest.mark.slow
@needs_promtool
def test_an_alert_that_never_fires_would_be_noticed(tmp_path: Path) -> None:
    dead = [rule | {"expr": f"({rule['expr']}) > +Inf"} for rule in RULES]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": [{"name": "dead", "rules": dead}]}))
    # These rules never fire, so evaluating them seldom is enough
    with pytest.raises(AssertionError) as failed:
        promtool("test", "rules", str(looked_at_every("10m", tmp_path, tmp_path / "alerts.yml")))
    assert {rule["alert"] for rule in RULES if rule["alert"] in str(failed.value)} == {rule["alert"] for rule in RULES}


def test_each_alert_says_how_urgent_it_is_and_where_its_entry_is() -> None:
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook_url"] == f"docs/operating.md#{rule['alert'].lower()}"
        assert rule["alert"] in headings


# -- names and labels in the queries


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard, with its legend."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"], target["legendFormat"]
    for variable in dashboard["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable.get("definition", "label_values(up, job)"))
        assert asked
        yield f"count by ({asked[2]}) ({asked[1]})", ""


QUERIES = [(rule["expr"], "") for rule in RULES] + list(dashboard_queries())


def test_what_alerts_and_dashboard_ask_for_exists(series: dict[str, set[str]]) -> None:
    known = series | BY_PROMETHEUS
    for query, legend in QUERIES:
        names = set(re.findall(r"\b(?:lmdaemon|process|up)(?:_\w+)?\b(?!\")", re.sub(r'"[^"]*"', '""', query)))
        assert names, query
        assert names <= known.keys(), query
        for name, matchers in re.findall(r"\b(\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= known[name] | TARGET_LABELS, (name, query)
        of_all = set().union(*(known[name] for name in names)) | TARGET_LABELS
        groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
        grouped = {label for group in groups for label in re.split(r",\s*", group)}
        assert grouped <= of_all, query
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= (grouped or of_all), query


def test_a_literal_label_value_is_one_that_is_exported(exported: str) -> None:
    asked = [found for query, _ in QUERIES for found in re.findall(r"\b(lmdaemon_\w+)\{([^}]*)\}", query)]
    for name, matchers in asked:
        for label, value in re.findall(r'(\w+)="([^"$]*)"', matchers):
            assert re.search(rf'^{name}{{.*{label}="{value}"', exported, re.MULTILINE), f'{name} {label}="{value}"'


@needs_promtool
def test_prometheus_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": re.sub(r"\$\w+", "x", query)}
        for number, (query, _) in enumerate(dashboard_queries())
    ]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "queries.yml"))


def test_the_dashboard_begins_with_whether_it_lives_stores_and_is_in_time() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    first = [panel["title"] for panel in dashboard["panels"] if 0 < panel["gridPos"]["y"] < 5]
    assert first == [
        "Alive",
        "Can store",
        "Running transaction",
        "Loops late",
        "Expiry lag p99",
        "Mass expiry",
        "Operators held or broken",
        "Dead deliveries",
    ]
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "instance", "operator"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"} == {"${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_metric_of_the_daemon_is_shown_or_alerted_on(exported: str) -> None:
    asked = " ".join(query for query, _ in QUERIES)
    for name in re.findall(r"^# TYPE (lmdaemon_\w+)", exported, re.MULTILINE):
        assert name in asked, name
