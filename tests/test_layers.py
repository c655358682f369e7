"""The architecture as a test: every module has a level and imports from below; every library has one home."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lmdaemon

LEVELS = {
    5: {"cli", "__main__", "serve", "admin", "client", "send", "backup", "export", "files", "command", "streams"},
    4: {"daemon"},
    3: {"endpoint", "api", "sweeper", "delivery", "health"},  # the doers never import each other
    2: {"store", "plugins", "sender", "listener"},
    1: {"config", "dialects", "retry", "clock", "metrics", "log", "database", "systemd", "openapi", "http", "pulse"}
    | {"answers", "masks"}
    | {
        "documents",
        "shapes",
        "rows",
        "rules",
        "batches",
        "contract",
        "projection",
        "resolver",
        "tls",
        "egress",
        "target",
    }
    | {"handshakes"}
    | {"textfile", "trust", "peer", "bodies", "rights", "pages"}
    | {"__init__"},
    0: {"model", "version", "causes", "quota"},
}
HOMES = {
    "aiosqlite": {"database"},
    "msgspec": {"bodies", "config", "contract", "dialects", "openapi", "shapes"},
    "prometheus_client": {"metrics"},
    "tomllib": {"config"},
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}
PEERS_MAY_MEET = {1, 5}  # without a circle


def imported(source: Path) -> set[str]:
    """Dotted names of everything a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


SOURCES = {source.stem: source for source in Path(lmdaemon.__file__).parent.rglob("*.py")}
IMPORTS = {module: imported(source) for module, source in SOURCES.items()}
OWN = {
    module: {name.split(".")[1] for name in names if name.startswith("lmdaemon.")} & SOURCES.keys()
    for module, names in IMPORTS.items()
}


def test_every_module_has_a_level() -> None:
    assert SOURCES.keys() - LEVEL.keys() == set()


def test_a_module_imports_only_from_below_its_level() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, others in OWN.items()
        for other in others
        if LEVEL[other] > LEVEL[module] or (LEVEL[other] == LEVEL[module] and LEVEL[module] not in PEERS_MAY_MEET)
    }
    assert wrong == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(OWN).prepare()  # raises CycleError


def test_each_library_has_one_home() -> None:
    strangers = {
        f"{module} imports {library}"
        for module, names in IMPORTS.items()
        for library, homes in HOMES.items()
        if library in {name.split(".")[0] for name in names} and module not in homes
    }
    assert strangers == set()
