"""What an error of PostgreSQL means for a batch, by its SQLSTATE.

Source: PostgreSQL, appendix A "PostgreSQL Error Codes".
"""

from typing import Literal

import psycopg

Meaning = Literal["lost", "outage", "again", "conflict", "poison"]

# By class (two characters) or code (five); an entry for a code takes precedence over one for its class. All others mean
# `poison`: the operation itself cannot be stored, and fails alone.
MEANINGS: dict[str, Meaning] = {
    # The connection is gone, and whether a transaction was committed has to be looked up.
    "08": "lost",  # connection exceptions
    "57P01": "lost",  # admin_shutdown: the backend was terminated
    "57P02": "lost",  # crash_shutdown
    "57P03": "lost",  # cannot_connect_now: starting up, shutting down or recovering
    "57P04": "lost",  # database_dropped
    "57P05": "lost",  # idle_session_timeout
    "25P03": "lost",  # idle_in_transaction_session_timeout
    "25P04": "lost",  # transaction_timeout
    "25006": "lost",  # read_only_sql_transaction: it is a standby by now; another host may take writes
    # The server refused, and trying again later may help.
    "40": "outage",  # transaction rollback
    "42501": "outage",  # insufficient_privilege: somebody has changed the rights
    "42P01": "outage",  # undefined_table: somebody has changed the schema
    "3D000": "outage",  # invalid_catalog_name: the database is gone
    "53": "outage",  # insufficient resources: disk full, out of memory, too many connections
    "55": "outage",  # object not in prerequisite state: lock_not_available
    "57": "outage",  # operator intervention: query_canceled, as by statement_timeout
    "58": "outage",  # system error: I/O
    "28": "outage",  # invalid authorization
    "XX": "outage",  # internal error, corrupted data or index
    # Nothing of the batch was stored, and it can be sent again unchanged.
    "40001": "again",  # serialization_failure
    "40P01": "again",  # deadlock_detected: two daemons' batches have waited for each other's rows
    # The batch was decided on facts that are no longer true, so it is decided again.
    "22012": "conflict",  # division_by_zero: how the statements of `batch` say that a count is not as expected
    "23503": "conflict",  # foreign_key_violation: a session to prune has a delivery that is pending again
    "23505": "conflict",  # unique_violation: a session to add is known
}


def meaning(error: psycopg.Error) -> Meaning:
    """What an error means. One without an SQLSTATE comes from libpq and not from the server: the connection was
    lost.
    """
    code = error.sqlstate
    if code is None:
        return "lost" if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) else "poison"
    return MEANINGS.get(code) or MEANINGS.get(code[:2], "poison")


def said(error: BaseException) -> str:
    """What an error says, in one line. libpq names hosts and users there, never a password."""
    return " ".join(str(error).split()) or type(error).__name__
