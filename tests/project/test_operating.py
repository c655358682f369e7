"""The runbook has an entry for each alert, health check and log event that may call a person, and for nothing else."""

import ast
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import serving

import lmdaemon
from lmdaemon.log import LIMITS

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs" / "operating.md").read_text()
ALERTS = yaml.safe_load((ROOT / "docs" / "monitoring" / "alerts.yml").read_text())
# By method of Log, the level of a line that may call a person
CALLING = {"warning": "warning", "error": "error", "exception": "error"}
LEVELS = {"info": "info"} | CALLING
LOGS = {"log", "events"}  # the variables that hold a module's Log


def section(title: str) -> dict[str, str]:
    """The entries of a section, by their headings."""
    body = re.split(r"^## ", RUNBOOK.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    parts = re.split(r"^### (.*)\n", body, flags=re.MULTILINE)[1:]
    assert len(set(parts[::2])) == len(parts[::2])
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of every module of lmdaemon, by its path."""
    return {str(path): ast.parse(path.read_text()) for path in sorted(Path(lmdaemon.__file__).parent.rglob("*.py"))}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of a Log: the module, the call, the method."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            named = isinstance(owner, ast.Name) and owner.id in LOGS
            made = isinstance(owner, ast.Call) and ast.unparse(owner.func).rpartition(".")[2] == "Log"
            if (named or made) and node.func.attr in {"debug", *LEVELS}:
                yield path, node, node.func.attr


def test_every_event_has_its_name_written_out() -> None:
    for module, call, _ in calls():
        event = call.args[0]
        if isinstance(event, ast.Name):  # one of two names; the line above chooses it
            continue
        assert isinstance(event, ast.Constant), f"{module}:{call.lineno}"
        assert re.fullmatch(r"[a-z]+\.[a-z_0-9]+", event.value), f"{module}:{call.lineno}: {event.value}"


def test_no_warning_hides_behind_a_variable() -> None:
    for module, call, method in calls():
        assert method not in CALLING or isinstance(call.args[0], ast.Constant), f"{module}:{call.lineno}"
    for path, tree in trees().items():
        lines = Path(path).read_text().splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and re.match(r"(log\.)?Log\(", ast.unparse(node.value)):
                assert ast.unparse(node.targets[0]) in LOGS, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr in CALLING and ast.unparse(node.value) in LOGS:
                assert f"{ast.unparse(node)}(" in lines[node.lineno - 1], path


def test_each_event_from_info_upwards_has_an_entry_with_its_level() -> None:
    levels: dict[str, set[str]] = {}
    for module, call, method in calls():
        for name in names_of(module, call) if method in LEVELS else ():
            levels.setdefault(name, set()).add(LEVELS[method])
    assert len(levels) > 60
    assert list(section("Log events")) == [f"{name} ({', '.join(sorted(of))})" for name, of in sorted(levels.items())]


def facts_of(module: str, call: ast.Call) -> set[str]:
    """The names of the facts that a call logs. For `**facts`, these are the keys that the function around the
    call puts into `facts`, or else any function of the module.
    """
    tree = trees()[module]
    inside = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and call.lineno in lines_of(node)]
    found: set[str] = set()
    for keyword in call.keywords:
        if keyword.arg is not None:
            found.add(keyword.arg)
            continue
        assert isinstance(keyword.value, ast.Name), f"{module}:{call.lineno}: give the dictionary a name"
        # Innermost function first. If the dictionary is a parameter, another function of the module has made it.
        for scope in [*reversed(inside), tree]:
            if names := keys_put_into(keyword.value.id, scope):
                found |= names
                break
    return found


def lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def keys_put_into(name: str, scope: ast.AST) -> set[str]:
    """The keys of the dictionary of this name, found from what is assigned to it and to its items."""
    keys: set[str] = set()
    for node in ast.walk(scope):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name and node.value is not None:
            literals = [part for part in ast.walk(node.value) if isinstance(part, ast.Dict)]
            keys |= {key.value for one in literals for key in one.keys if isinstance(key, ast.Constant)}
        elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
            keys |= {target.slice.value} if isinstance(target.slice, ast.Constant) else set()
    return keys


def names_of(module: str, call: ast.Call) -> list[str]:
    """The event that a call logs, or both events if a line above chooses between two."""
    if isinstance(call.args[0], ast.Constant):
        return [call.args[0].value]
    chosen = ast.unparse(call.args[0])
    return [
        part.value
        for node in ast.walk(trees()[module])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == chosen
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant) and "." in part.value
    ]


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def facts_by_event() -> dict[str, list[set[str]]]:
    """For each event, the names of the facts of each call that logs it. Lines of level debug are left out: they are not
    limited and call nobody.
    """
    found: dict[str, list[set[str]]] = {}
    for module, call, method in calls():
        if method != "debug":
            for name in names_of(module, call):
                found.setdefault(name, []).append(facts_of(module, call))
    return found


def test_each_limit_is_of_an_event_and_of_facts_that_it_has() -> None:
    """If a limit told lines apart by a fact that they do not have, all of them would count as repeats of one line."""
    events = facts_by_event()
    wrong = {event: "nowhere logged" for event in LIMITS if event not in events}
    wrong |= {
        event: f"has no {name}"
        for event, limit in LIMITS.items()
        for facts in events.get(event, [])
        for name in limit.same
        if name not in facts
    }
    assert wrong == {}


def test_the_runbook_looks_at_facts_that_the_event_has() -> None:
    events = facts_by_event()
    for heading, entry in section("Log events").items():
        event = heading.partition(" ")[0]
        look = entry.partition("**Look**")[2].partition("**Do**")[0]
        named = set(re.findall(r"`([a-z_]+)`", look)) - {"suppressed", *NO_FACTS}
        for facts in events[event]:
            assert named <= facts, event


NO_FACTS = {"df", "dmesg", "listen", "timeout"}  # not facts, but commands for looking and keys of the configuration


def test_each_alert_has_an_entry() -> None:
    alerts = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert list(section("Alerts")) == alerts


async def test_each_health_check_has_an_entry(tmp_path: Path) -> None:
    async with serving(tmp_path) as daemon:
        async with daemon.client.get(daemon.api + "/health") as answer:
            checks = (await answer.json(content_type=None))["checks"]
    assert list(section("Health checks")) == [f"health: {name}" for name in checks]


@pytest.mark.parametrize("title", ["Alerts", "Health checks", "Log events"])
def test_each_entry_says_what_it_means_where_to_look_and_what_to_do(title: str) -> None:
    alerts = section("Alerts")
    for heading, text in section(title).items():
        parts = re.findall(r"^- \*\*(\w+)\*\* \S", text, re.MULTILINE)
        assert parts == ["Means", "Look", "Do"], heading
        for named in re.findall(r"\bLmdaemon\w+", text):
            assert named in alerts, f"{heading}: {named}"


def test_the_runbook_names_only_metrics_events_and_commands_that_exist() -> None:
    source = "".join(path.read_text() for path in Path(lmdaemon.__file__).parent.rglob("*.py"))
    for event in re.findall(r"`([a-z]+\.[a-z_]+)`", RUNBOOK):
        if event not in ("config.toml", "database.path"):
            assert f'"{event}"' in source, event
    for metric in re.findall(r"`lmdaemon_(\w+)`", RUNBOOK):
        assert f'"{metric}"' in source or f'"lmdaemon_{metric}"' in source, metric


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_journal_examples_find_what_they_say(tmp_path: Path) -> None:
    lines = [
        {"event": "delivery.retry", "level": "warning", "operator": "acme", "reason": "timeout"},
        {"event": "session.ended", "level": "info", "operator": "other", "session": "s-1", "reason": "closed"},
        {"event": "daemon.serving", "level": "info"},
    ]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands = re.findall(r"^journalctl [^|\n]*-o cat +\| (jq [^#\n]*)", RUNBOOK, re.MULTILINE)
    found = [
        subprocess.run(
            ["sh", "-c", f"cat {tmp_path}/log | {command}"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for command in commands
    ]
    assert [json.loads(one)["operator"] for one in found[:2]] == ["acme", "other"]
    assert sorted(line.split(maxsplit=1)[1] for line in found[2].splitlines()) == [
        "delivery.retry timeout",
        "session.ended closed",
    ]
