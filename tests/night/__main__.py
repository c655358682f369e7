"""`make night SITUATION=slow`: plays a situation on this machine and opens a shell in which to find out what is
wrong.
"""

import os
import subprocess
import sys

from scene import CannotBePlayedError, scene
from situations import SITUATIONS


def main(name: str = "", *commands: str) -> int:
    """Without a name, prints the situations. With commands, runs them instead of a shell."""
    if name not in SITUATIONS:
        print("make night SITUATION=…, one of:\n")
        for other, situation in SITUATIONS.items():
            print(f"  {other:12} {situation.heard}")
        return 2 if name else 0
    situation = SITUATIONS[name]
    with scene() as played:
        print("Setting it up …", flush=True)
        try:
            names = situation.play(played)
        except CannotBePlayedError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"\nYou hear: {situation.heard}.")
        print("Who, what, since when, why, what happens by itself, what can be done? Two commands are enough:\n")
        for command in situation.asks:
            print(f"  {command.format(**names)}")
        print(
            f"\nIts directory: {played.directory}. This shell knows lmdaemon; leave it to end everything.\n", flush=True
        )
        shell = [os.environ.get("SHELL", "sh")] if not commands else ["sh", "-c", "\n".join(commands)]
        subprocess.run(shell, cwd=played.directory, env=played.environment, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
