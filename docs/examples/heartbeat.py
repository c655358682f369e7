"""A game server's heartbeat: one call for all its sessions, many times within the idle time.

`python heartbeat.py 127.0.0.1:8081 acme` reads session ids from standard input, a line each (`+ID` joined, `-ID`
left), and touches those that are in every two seconds. Prints the ids that have ended or are unknown, so that the game
can send their players away.
"""

import json
import os
import selectors
import sys
import time
from http.client import HTTPConnection, HTTPException

EVERY_S = 2.0  # a fifth of the shortest idle time is plenty


def touch(address: str, operator: str, sessions: set[str]) -> set[str]:
    """Those of the sessions that are over. Raises OSError while the daemon cannot be reached: just go on."""
    connection = HTTPConnection(address, timeout=10)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('LMDAEMON_TOKEN', '')}"}
    body = json.dumps({"sessionIds": sorted(sessions)})
    try:
        connection.request("POST", f"/v1/operators/{operator}/sessions/touch", body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ConnectionError(f"status {answer.status}: {answer.read(200)!r}")
        told = json.load(answer)
    except HTTPException as error:
        raise ConnectionError(type(error).__name__) from error
    finally:
        connection.close()
    return {*told["ended"], *told["unknown"]}


def main(address: str, operator: str) -> None:
    sessions: set[str] = set()
    os.set_blocking(sys.stdin.fileno(), False)
    ready = selectors.DefaultSelector()
    ready.register(sys.stdin, selectors.EVENT_READ)
    rest, due_at = b"", 0.0
    while True:
        if ready.select(max(0.0, due_at - time.monotonic())):
            read = os.read(sys.stdin.fileno(), 65536)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                (sessions.add if line[:1] == b"+" else sessions.discard)(line[1:].decode())
        if sessions and time.monotonic() >= due_at:
            due_at = time.monotonic() + EVERY_S
            try:
                over = touch(address, operator, sessions)
            except OSError as error:  # idleness stands still while the daemon is down, so nothing is lost
                print(f"heartbeat: {error}", file=sys.stderr)
                continue
            sessions -= over
            print("\n".join(sorted(over)), end="\n" if over else "", flush=True)


main(*sys.argv[1:])
