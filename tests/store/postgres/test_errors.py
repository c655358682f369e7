"""Every SQLSTATE in the table of errors, as the exception that psycopg raises for it."""

import psycopg
import pytest

from lmdaemon.store.postgres.errors import MEANINGS, meaning, said

CODES = {
    "08006": "lost",
    "08001": "lost",
    "57P01": "lost",
    "57P02": "lost",
    "57P03": "lost",
    "57P04": "lost",
    "57P05": "lost",
    "25P03": "lost",
    "25P04": "lost",
    "25006": "lost",
    "40001": "again",
    "40000": "outage",
    "40P01": "again",
    "42501": "outage",
    "42P01": "outage",
    "3D000": "outage",
    "53100": "outage",
    "53200": "outage",
    "53300": "outage",
    "55P03": "outage",
    "57014": "outage",
    "58030": "outage",
    "28000": "outage",
    "28P01": "outage",
    "XX000": "outage",
    "XX002": "outage",
    "22012": "conflict",
    "23503": "conflict",
    "23505": "conflict",
    "22021": "poison",
    "22P05": "poison",
    "23514": "poison",
    "22003": "poison",
    "54000": "poison",
}


@pytest.mark.parametrize("code", CODES)
def test_an_error_means_what_the_table_says(code: str) -> None:
    assert meaning(psycopg.errors.lookup(code)()) == CODES[code]


def test_each_entry_of_the_table_has_a_case() -> None:
    assert {entry for entry in MEANINGS if not any(code.startswith(entry) for code in CODES)} == set()


def test_what_no_server_has_said_is_a_lost_connection() -> None:
    assert meaning(psycopg.OperationalError("server closed the connection unexpectedly")) == "lost"
    assert meaning(psycopg.ProgrammingError("cannot adapt type")) == "poison"


def test_an_error_is_told_in_one_line() -> None:
    error = psycopg.OperationalError("connection failed:\n\tIs the server running?\n")
    assert said(error) == "connection failed: Is the server running?"
