"""The architecture as a test: which package may import which, one home for each library, and names that can be read."""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import lmdaemon

ROOT = Path(lmdaemon.__file__).parent
TESTS = Path(__file__).parents[1]
# What each part may import. A part is a package, or a module beside the packages; `ground` stands for the modules that
# everybody may use.
GROUND = {
    *(
        "__init__",
        "version",
        "model",
        "agreement",
        "clock",
        "limits",
        "log",
        "pulse",
        "systemd",
        "causes",
        "dialects",
        "retry",
        "gates",
        "metrics",
    ),
    *("gates", "textfile", "threads", "trust", "rights", "tls"),
}
MAY_IMPORT = {
    "ground": set(),
    "config": {"ground"},
    "plugins": {"ground", "config"},
    "masks": {"ground", "config"},
    "shapes": {"ground", "masks"},
    "store": {"ground"},
    "store.sqlite": {"ground", "store"},
    "store.postgres": {"ground", "store"},
    # The only module that chooses an engine
    "store.open": {"ground", "config", "store", "store.sqlite", "store.postgres"},
    # The parts that do the work: none imports another, and none knows an engine.
    "delivery": {"ground", "config", "plugins", "masks", "store"},
    "web": {"ground", "config", "plugins", "masks", "shapes", "store"},
    "alarms": {"ground", "store"},
    "disk": {"ground", "store"},
    "sweeper": {"ground", "store", "alarms"},
    "pruner": {"ground", "store"},
    "health": {"ground", "config", "shapes", "store", "alarms", "disk"},
    "readings": {"ground", "config", "store", "delivery", "web", "sweeper", "health", "disk"},
    "reloader": {"ground", "config", "plugins"},
    "status": {"ground", "store", "health"},
    "listeners": {"ground", "config", "web"},
    "parts": {
        "ground",
        "config",
        "plugins",
        "store",
        "store.open",
        "delivery",
        "web",
        "sweeper",
        "health",
        "pruner",
        "disk",
        "readings",
        "reloader",
        "status",
        "listeners",
        "trials",
    },
    "daemon": {"ground", "config", "plugins", "store", "store.open", "status", "parts"},
    "workbench": {"ground", "config", "masks", "delivery"},
    # `trials` imports the workbench only when a test notice or a check is asked for
    "trials": {"ground", "config", "delivery", "workbench"},
    "commands": {
        "ground",
        "config",
        "plugins",
        "masks",
        "shapes",
        "store",
        "store.open",
        "delivery",
        "web",
        "daemon",
        "workbench",
    },
    "commands.backup": {"ground", "config", "commands", "store", "store.sqlite"},  # `backup` copies SQLite's file
    "__main__": {"commands"},
}
HOMES = {
    "aiohttp": {"web", "delivery", "listeners", "commands.client", "workbench"},
    "aiosqlite": {"store.sqlite.thread"},
    "msgspec": {"config", "store.contract", "store.rules", "dialects", "shapes", "web", "commands.export"},
    "prometheus_client": {"metrics"},
    "psycopg": {"store.postgres", "config.rules"},
    "sqlite3": {"store.sqlite", "commands.backup"},
    "tomllib": {"config.reader", "workbench.script", "workbench.journal"},
}


def module_of(source: Path) -> str:
    """The module's dotted name below lmdaemon: `store.sqlite.file`, or `store` for the package itself."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_of(source): source for source in ROOT.rglob("*.py")}


def imported(source: Path) -> set[str]:
    """The dotted names of everything that a module imports, also inside functions. For lmdaemon itself, these are names
    of modules.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: relative import"
            names |= {own_or_whole(f"{node.module}.{alias.name}") for alias in node.names}
    return names


def own_or_whole(name: str) -> str:
    """The module that a name of lmdaemon is in: `lmdaemon.store.rules` for `lmdaemon.store.rules.decide`. Other names
    are returned unchanged.
    """
    if name.partition(".")[0] != "lmdaemon":
        return name
    below = name.partition(".")[2]
    while below and below not in SOURCES:
        below = below.rpartition(".")[0]
    return f"lmdaemon.{below or '__init__'}"


@functools.cache
def imports() -> dict[str, set[str]]:
    """Everything that each module imports."""
    return {module: imported(source) for module, source in SOURCES.items()}


def own() -> dict[str, set[str]]:
    """The modules of lmdaemon that each module imports."""
    return {
        module: {name.partition(".")[2] for name in names if name.startswith("lmdaemon.")}
        for module, names in imports().items()
    }


def part_of(module: str) -> str:
    if module in GROUND:
        return "ground"
    parts = [part for part in MAY_IMPORT if module == part or module.startswith(f"{part}.")]
    assert parts, f"{module} is in no part: name it here, and in the picture of docs/architecture.md"
    return max(parts, key=len)


def test_every_module_is_in_a_part_and_every_part_is_there() -> None:
    assert {part_of(module) for module in SOURCES} == MAY_IMPORT.keys()


def test_a_module_imports_from_its_own_part_and_those_its_part_may_import() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, others in own().items()
        for other in others
        if part_of(other) != part_of(module) and part_of(other) not in MAY_IMPORT[part_of(module)]
    }
    assert wrong == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(own()).prepare()  # raises CycleError


def test_each_library_has_one_home() -> None:
    strangers = {
        f"{module} imports {library}"
        for module, names in imports().items()
        for library, homes in HOMES.items()
        if library in {name.split(".")[0] for name in names}
        and not any(module == home or module.startswith(f"{home}.") for home in homes)
    }
    assert strangers == set()


def test_names_of_tests_are_under_70_characters() -> None:
    """A longer explanation belongs into the test's docstring."""
    sources = list(TESTS.rglob("test_*.py"))
    functions = [node for source in sources for node in ast.walk(ast.parse(source.read_text())) if is_test(node)]
    assert len(functions) > 1000
    assert [node.name for node in functions if len(node.name) >= 70] == []


def is_test(node: ast.AST) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")


def test_the_tests_that_the_reliability_page_names_are_there() -> None:
    """Each row about a fault names a file below `tests`, and may name a class or the beginning of a test's name."""
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+)…?)?`", page)
    assert len(named) > 30
    for file, name in named:
        source = (TESTS / file).read_text()
        assert re.search(rf"^ *(async def|def|class) {name}", source, re.MULTILINE), f"{file}::{name}"
