"""Three daemons on one PostgreSQL database are restarted one after the other, as for an upgrade."""

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import Cluster, cluster
from postgres import own_server
from processes import wait_for
from simulated import simulated_beside
from witness import OPERATOR

NAMES = ("acme", "bravo", "charlie", "delta")
IDLE_S = 4


@contextmanager
def touching(c: Cluster, urls: list[str]) -> Iterator[list[int]]:
    """A game server that touches these sessions through any daemon that answers. Yields a list of the answers other
    than 204 and 503.
    """
    over, refused = threading.Event(), list[int]()

    def touch() -> None:
        while not over.wait(0.2):
            for path in urls:
                for daemon in list(c.daemons.values()):
                    try:
                        status, _ = daemon.call("POST", f"{daemon.api}{path}/touch")
                    except OSError:
                        continue  # this daemon is down, so the next one is asked
                    if status == 503:
                        continue
                    if status != 204:
                        refused.append(status)
                    break

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield refused
    finally:
        over.set()
        thread.join()


def test_a_rolling_restart_ends_nobody_early_and_leaves_nobody(tmp_path: Path) -> None:
    """Each end is sent once."""
    with simulated_beside() as operator, own_server() as database:
        toml = "".join(OPERATOR.format(name=name, url=operator.url) for name in NAMES)
        with cluster(database, tmp_path, toml) as c:
            paths = {
                (name, kind): f"/v1/operators/{name}/sessions/{kind}" for name in NAMES for kind in ("idle", "live")
            }
            body = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": IDLE_S}
            for path in paths.values():
                assert c.call("PUT", c.api + path, body)[0] == 201
            with touching(c, [path for (_, kind), path in paths.items() if kind == "live"]) as refused:
                for name in c.daemons:
                    assert c.daemons[name].stop(signal.SIGTERM) == 0
                    c.wait_for(*(other for other in c.daemons if other != name))
                    c.start(name)
                    c.wait_for(*c.daemons)
                wait_for(lambda: len(c.rows("SELECT 1 FROM session WHERE reason IS NOT NULL")) == len(NAMES))
                wait_for(lambda: not c.rows("SELECT 1 FROM delivery WHERE state <> 'delivered'"))
            assert refused == []
            rows = c.rows("SELECT session_id, reason, ended_at - opened_at FROM session")
            assert Counter(row[:2] for row in rows) == {("live", None): len(NAMES), ("idle", "inactivity"): len(NAMES)}
            assert min(row[2] for row in rows if row[2] is not None) >= IDLE_S * 1000
            assert operator.journal.tally["notices"] == len(NAMES)
            assert c.events("daemon.expelled") == []
