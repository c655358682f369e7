"""`lmdaemon config`: the settings in force, and what a reload would change. Both come from the running daemon. If none
runs, the settings of the file are shown.
"""

import argparse
import asyncio
from typing import Any

from lmdaemon.commands.arguments import CLIENT_CERTIFICATE, JSON, command
from lmdaemon.commands.client import Client, Unreachable
from lmdaemon.commands.configured import administered
from lmdaemon.commands.shared import STOPPED, line, print_json, quiet_libraries, say
from lmdaemon.config import reader
from lmdaemon.config.shown import in_force, inherited

CHANGE_SHAPE = {
    "key": str,
    "old": (str, type(None)),
    "new": (str, type(None)),
    "content": bool,
    "needsRestart": bool,
}
CONFIGURATION_SHAPE = {"settings": dict, "inherited": [str], "changes": [CHANGE_SHAPE], "errors": [str]}


@command(*CLIENT_CERTIFICATE, JSON)
def config(args: argparse.Namespace) -> int:
    """Shows the settings in force: the daemon's, or the file's while no daemon runs."""
    try:
        shown = {"source": "daemon", **_of_daemon(args)}
    except Unreachable as error:
        say(f"lmdaemon: {error}; these are the settings of the file", "WARNING")
        shown = {"source": "file", **_of_file(args)}
    if args.json:
        print_json(shown)
    else:
        _print(shown)
    return STOPPED


def _of_daemon(args: argparse.Namespace) -> Any:
    settings = administered(args)
    quiet_libraries()

    async def ask() -> Any:
        async with Client(settings, args.client_cert, args.client_key) as client:
            return await client.call("GET", "v1", "config", shape=CONFIGURATION_SHAPE)

    return asyncio.run(ask())


def _of_file(args: argparse.Namespace) -> dict[str, Any]:
    settings = reader.of_command(args.config, secrets="optional")
    return {
        "file": str(settings.file),
        "settings": in_force(settings),
        "inherited": inherited(settings),
        "changes": [],
        "errors": [],
    }


def _print(shown: dict[str, Any]) -> None:
    """Prints the settings, a line each; then what a reload would change."""
    elsewhere = set(shown["inherited"])
    for key, value in shown["settings"].items():
        print(line(f"{key} = {value}") + ("  # inherited" if key in elsewhere else ""))
    if shown["source"] == "file":
        return
    print()
    if shown["errors"]:
        print("A reload would be refused and change nothing:")
        for finding in shown["errors"]:
            print(f"  {line(finding)}")
    elif shown["changes"]:
        print("A reload would change:")
        for change in shown["changes"]:
            print(f"  {line(_changed(change))}")
    else:
        print("A reload would change nothing.")


def _changed(change: dict[str, Any]) -> str:
    how = "its content" if change["content"] else " → ".join(change[side] or "(none)" for side in ("old", "new"))
    return f"{change['key']}: {how}" + (" (needs a restart)" if change["needsRestart"] else "")
