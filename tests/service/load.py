"""Clients that open sessions while a file exists, each on a connection of its own. `load.py API FILE`

Prints which openings were acknowledged and which failed. A slow answer does not count as failed.
"""

import itertools
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

API, ON = sys.argv[1], Path(sys.argv[2])
opened: list[str] = []
failed: list[str] = []


def work(worker: int) -> None:
    for number in itertools.count():
        if not ON.exists():
            return
        name = f"load-{worker}-{number}"
        body = json.dumps({"playerId": "p-1", "token": "tok-5", "idleTimeoutSeconds": 3600}).encode()
        request = urllib.request.Request(f"{API}/v1/operators/acme/sessions/{name}", body, method="PUT")
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60):
                opened.append(name)
        except OSError as error:
            failed.append(f"{name}: {error!r}")


with ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(8)))
print(json.dumps({"opened": opened, "failed": failed}))
