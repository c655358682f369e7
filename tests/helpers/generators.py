"""Programs that generate clients from the OpenAPI document. They are installed once into build/clients, from PyPI and
npm. If they cannot be installed, the tests that need them are skipped with the reason.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "build" / "clients"
INSTALL_S = 300
# TypeScript 5, because no release of openapi-typescript supports a later version yet.
NODE_PACKAGES = ("openapi-typescript", "openapi-fetch", "typescript@5", "@redocly/cli", "@stoplight/spectral-cli")


def install(stamp: Path, wanted: str, *commands: list[str]) -> None:
    """Runs the commands unless they have run before for the same packages. Skips the test if one fails."""
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(stamp.parent, ignore_errors=True)
    stamp.parent.mkdir(parents=True)
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"{wanted} cannot be installed: {error}")
        if done.returncode:
            pytest.skip(f"{wanted} cannot be installed: {(done.stderr or done.stdout).strip()[-200:]}")
    stamp.write_text(wanted)


def node_modules() -> Path:
    """The directory of the npm packages; their programs are in its `.bin`."""
    home = TOOLS / "node"
    npm = ["npm", "install", "--prefix", str(home), "--no-audit", "--no-fund", "--silent"]
    install(home / ".ready", " ".join(NODE_PACKAGES), [*npm, *NODE_PACKAGES])
    return home / "node_modules"
