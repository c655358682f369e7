"""Finds conditions of the server that endanger the daemons' promises: settings with which a crash could lose commits, a
failover that could, and an old snapshot that prevents vacuum from removing the dead rows that touches leave.
"""

from typing import NamedTuple

from lmdaemon.store.postgres.thread import Connection

OLD_S = 300.0  # the age of a snapshot that is too old; every touch since then has left a dead row

UNSAFE = ("off", "local")  # values of synchronous_commit with which a commit may be lost after it was acknowledged

# Settings that decide whether a commit is safe from a crash, as they are on the connection that asks.
DURABILITY = "SELECT current_setting('synchronous_commit'), current_setting('fsync')"
# Whether a failover could lose commits: replicas are attached, and none has to confirm a commit.
REPLICAS = """
SELECT (SELECT count(*) FROM pg_stat_replication) > 0 AND current_setting('synchronous_standby_names') = ''"""
# The oldest snapshots because of which vacuum cannot remove dead rows, each with who holds it: sessions, replicas,
# prepared transactions.
SNAPSHOTS = """
SELECT * FROM (
    SELECT backend_xmin::text, coalesce(nullif(application_name, ''), 'a session') || ', process ' || pid,
           age(backend_xmin)
    FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
         AND coalesce(backend_type, '') NOT IN ('autovacuum worker', 'walsender')
    UNION ALL SELECT xmin::text, 'the replication slot ' || slot_name, age(xmin)
    FROM pg_replication_slots WHERE xmin IS NOT NULL
    UNION ALL SELECT backend_xmin::text, 'the replica ' || application_name, age(backend_xmin)
    FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
    UNION ALL SELECT transaction::text, 'the prepared transaction ' || gid, age(transaction)
    FROM pg_prepared_xacts WHERE database = current_database()) AS held (xmin, holder, age)
ORDER BY age DESC LIMIT 20"""


class Held(NamedTuple):
    """A snapshot, and who holds it."""

    xmin: str
    holder: str


def unsafe_settings(sql: Connection) -> list[str]:
    """What is wrong, in words, with the settings of the writing connection `sql`. A start refuses such a
    `synchronous_commit`; here it was changed later, by a reload of the server or for the role before a connection was
    made anew.
    """
    synchronous_commit, fsync = sql.execute(DURABILITY).fetchone() or ("", "")
    found = []
    if synchronous_commit in UNSAFE:
        found.append(unsafe_commit(synchronous_commit))
    if fsync == "off":
        found.append("fsync is off, so that a crash of the server's machine could lose what was acknowledged")
    return found


def unsafe_commit(value: str) -> str:
    """What is wrong with this value of synchronous_commit, in words."""
    could_lose = f"synchronous_commit is {value!r}, so that a crash could lose what was acknowledged"
    return f"{could_lose}; it must be on, remote_write or remote_apply"


class Strains:
    """Looks for a failover that could lose commits, and for old snapshots. The age of a snapshot counts from the first
    look that has seen it, because the server does not tell every role when a snapshot was taken.
    """

    def __init__(self) -> None:
        self._since_s: dict[Held, float] = {}  # since when each snapshot has been seen (monotonic s)

    def look(self, sql: Connection, now_s: float) -> str | None:
        """What was found, in words; None if nothing was."""
        replicas = sql.execute(REPLICAS).fetchone()
        snapshots = [Held(xmin, holder) for xmin, holder, _ in sql.execute(SNAPSHOTS)]
        found = []
        if replicas is not None and replicas[0]:
            found.append("a failover could lose what was acknowledged: replicas are attached, and none is synchronous")
        if (old := self.old(snapshots, now_s)) is not None:
            found.append(old)
        return "; ".join(found) or None

    def old(self, snapshots: list[Held], now_s: float) -> str | None:
        """The snapshot that has been held for longest, if that is too long."""
        self._since_s = {one: self._since_s.get(one, now_s) for one in snapshots}
        oldest, since_s = min(self._since_s.items(), key=lambda item: item[1], default=(None, now_s))
        if oldest is None or now_s - since_s < OLD_S:
            return None
        held = f"{oldest.holder}, for {(now_s - since_s) / 60:.0f} min"
        return f"an old snapshot keeps vacuum from removing dead rows, and the tables grow: {held}"
