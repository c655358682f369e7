"""Every statement finds its rows through an index."""

import re
import sqlite3

import pytest

from lmdaemon.store.sqlite import archive, pages, rows, store
from lmdaemon.store.sqlite import batch as batches
from lmdaemon.store.sqlite.store import Store

STATEMENTS = {
    name: re.sub(r"NEW\.\w+", "1", statement)
    for module in (archive, rows, batches, pages, store)
    for name, statement in vars(module).items()
    if isinstance(statement, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", statement)
}
# The part of SQLite's plan that shows how a statement finds its rows.
BY = {
    "_SESSION_BY_KEY": "(operator=? AND session_id=?)",
    "SESSIONS_BY_KEY": "(operator=? AND session_id=?)",
    "TOUCH": "SEARCH session USING INDEX sqlite_autoindex_session_1 (operator=? AND session_id=?)",
    "STATES": "(operator=? AND session_id=?)",
    "END": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "DUE": "INDEX session_due (due_ms<?)",
    "DUE_LIFETIME": "INDEX session_lifetime (lifetime_at>? AND lifetime_at<?)",
    "NEXT": "INDEX session_due",
    "MOVE_DUE": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "MOVE_LIFETIME": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "_LANE": "INDEX delivery_due (operator=? AND sink=?)",
    "SETTLE": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "FORGET_TOKENS": "SEARCH session USING INTEGER PRIMARY KEY (rowid=?)",
    "REVIVE": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "DEAD": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "_DIED": "INDEX delivery_dead (operator=? AND settled_at>? AND settled_at<?)",
    "_ENDED_OF_PLAYER": "INDEX session_player (operator=? AND player_id=?)",
    "_ENDED_OF_ID": "(operator=? AND session_id=?)",
    "TO_DISCARD": "INTEGER PRIMARY KEY",
    "DISCARD": "SEARCH delivery USING INTEGER PRIMARY KEY (rowid=?)",
    "_OF_LANE": "COVERING INDEX delivery_lane (operator=? AND sink=? AND state=? AND rowid<?)",
    "_DELIVERIES_OF": "(session=?)",
    "_OLDEST_PENDING": "COVERING INDEX delivery_lane (operator=? AND sink=? AND state=?)",
    "ENDED_BEFORE": "INDEX session_ended_at (ended_at>? AND ended_at<?)",
    "_SESSIONS_OF": "INTEGER PRIMARY KEY",
    "_DELIVERIES_OF_ALL": "(session=?)",
    "OLD_DELIVERIES": "(session=?)",
    "PENDING_OF": "INTEGER PRIMARY KEY",
    "PRUNE_DELIVERIES": "(session=?)",
    "PRUNE_SESSIONS": "INTEGER PRIMARY KEY",
}
# Statements that may scan an index or a table: the first row of an index; all pending deliveries, after the wall clock
# was set back; all operators, at a start.
SCANS = {
    "NEXT": "SCAN session USING INDEX session_due",
    "SET_BACK": "SCAN delivery USING INDEX delivery_due",
    "_OPERATORS": "SCAN operator",
}


@pytest.mark.parametrize("name", sorted(STATEMENTS.keys() - {"PUT_CLOCK"}))
async def test_every_statement_goes_through_an_index(db: Store, name: str) -> None:
    statement = STATEMENTS[name]
    arguments = {"operator": "x"} if ":operator" in statement else ["1"] * statement.count("?")
    plan = await explain(db, statement, arguments)
    assert BY.get(name, "") in plan
    scans = re.findall(r"SCAN (?:session|delivery|operator|clock|d|s)\b[^|]*", plan)
    assert [scan.strip() for scan in scans] == ([SCANS[name]] if name in SCANS else [])


def test_every_expected_plan_is_of_a_statement_that_there_is() -> None:
    assert STATEMENTS.keys() >= BY.keys() | SCANS.keys()


async def explain(db: Store, statement: str, arguments: object) -> str:
    def read(sql: sqlite3.Connection) -> str:
        return " | ".join(row[3] for row in sql.execute("EXPLAIN QUERY PLAN " + statement, arguments))  # type: ignore[arg-type]

    return await db.db.reads.read(read)
