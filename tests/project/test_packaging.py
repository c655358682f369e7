"""The wheel has everything that the daemon needs, and constraints.txt has everything that is installed to test it."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from shutil import copytree

import aiohttp
import pytest
from commands import API_TOKEN, PLAYER_TOKEN, configure, environment, poll
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
)  # extras, beside what lmdaemon always needs


def pinned() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def installed(names: set[str]) -> dict[str, str]:
    """The distributions that are needed for these, as far as they are installed; their versions."""
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
    """Also what the requirements require: a version that nobody has pinned is one that nobody chose."""
    found, pins = installed({str(one) for one in requirements()}), pinned()
    assert {name: pins.get(name) for name in found} == found


# -- the wheel


def pip(*words: object, python: object = sys.executable) -> "subprocess.CompletedProcess[str]":
    command = [python, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, for a build takes up what an older one has left beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    probe = pip("download", "--quiet", "--no-deps", "--retries=1", "--timeout=20", "--dest", directory, "setuptools")
    if probe.returncode:
        pytest.skip(f"pip reaches no registry: {probe.stderr.strip().splitlines()[-1]}")
    copytree(ROOT / "lmdaemon", directory / "source/lmdaemon", ignore=lambda _, names: {"__pycache__"} & {*names})
    for name in ("pyproject.toml", "README.md"):
        (directory / "source" / name).write_bytes((ROOT / name).read_bytes())
    built = pip("wheel", "--quiet", "--no-deps", "--wheel-dir", directory / "built", directory / "source")
    assert built.returncode == 0, built.stderr
    (found,) = (directory / "built").iterdir()
    return found


def test_the_wheel_has_every_module_and_data_file(wheel: Path) -> None:
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "lmdaemon").rglob("*") if path.is_file()}
    ours = {path for path in tree if "__pycache__" not in path}
    with zipfile.ZipFile(wheel) as packed:
        inside = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert inside == ours


async def test_a_daemon_from_the_wheel_alone_opens_a_session(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own with what lmdaemon requires and nothing of the tests, far from the sources."""
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    done = pip(
        "--python",
        place / "bin/python",
        "install",
        "--quiet",
        "--no-compile",
        "--constraint",
        CONSTRAINTS,
        "--only-binary=:all:",
        wheel,
    )
    assert done.returncode == 0, done.stderr
    assert not list(place.glob("lib/python3*/site-packages/pytest"))
    file = configure(tmp_path)
    address = tomllib.loads(file.read_text())["api"]["listen"]
    command = [place / "bin/lmdaemon", "--config", file, "serve"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=log)
    try:
        said = (tmp_path / "log").read_text
        poll(lambda: "daemon.serving" in said() or process.poll() is not None)
        assert process.poll() is None, said()
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_TOKEN}"}) as client:
            url = f"http://{address}/v1/operators/acme/sessions/s1"
            async with client.put(url, json={"playerId": "p1", "token": PLAYER_TOKEN}) as answer:
                assert (answer.status, (await answer.json())["state"]) == (201, "active")
        shown = subprocess.run(
            [place / "bin/lmdaemon", "--config", file, "status"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"^acme +1 ", shown.stdout, re.MULTILINE)
    finally:
        process.terminate()
        assert process.wait(60) == 0
