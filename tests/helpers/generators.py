"""Programs that make clients of the OpenAPI document, installed once into build/clients, from PyPI and npm. Where they
cannot be had, a test that needs them is skipped and says so.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "build" / "clients"
INSTALL_S = 300
# openapi-typescript has no release yet for the TypeScript that came after this one.
NODE_PACKAGES = ("openapi-typescript", "openapi-fetch", "typescript@5", "@redocly/cli", "@stoplight/spectral-cli")


def install(stamp: Path, wanted: str, *commands: list[str]) -> None:
    """Runs the commands unless they have run before for the same packages; skips the test where they fail."""
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
