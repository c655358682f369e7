"""constraints.txt pins everything that is installed for the tests of the daemon."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = (
    "fast",
    "postgres",
    "completion",
    "man",
    "workbench",
    "test",
    "lint",
)  # extras whose requirements are pinned, besides what lmdaemon always needs


def pinned() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def installed(names: set[str]) -> dict[str, str]:
    """The installed distributions that these need, directly or not, with their versions."""
    found: dict[str, str] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        try:
            one = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found[name] = one.version
        for text in one.requires or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append(need)
    return found


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for extra in TESTED for text in extras[extra])]
    return [Requirement(text) for text in texts]


def test_everything_that_is_required_is_pinned_to_a_version_that_fits() -> None:
    pins = pinned()
    for required in requirements():
        assert pins[canonicalize_name(required.name)] in required.specifier, required


@pytest.mark.skipif("NEWEST" in os.environ, reason="runs with newer versions, as was asked for")
def test_what_runs_these_tests_is_what_is_pinned() -> None:
    """Requirements of the requirements are pinned, too: a version that is not pinned could change at any time."""
    found, pins = installed({str(one) for one in requirements()}), pinned()
    assert {name: pins.get(name) for name in found} == found
