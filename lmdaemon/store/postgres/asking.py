"""What only the daemon that owns an operator can do, when another one is asked for it: rows of `asked`.

The one that was asked adds a row, the owner sees it at its next look and writes the answer into it, and the first one
takes that and deletes the row.
"""

from typing import NamedTuple

from lmdaemon.store.contract import Wish
from lmdaemon.store.postgres.company import NOW
from lmdaemon.store.postgres.thread import Connection

ANSWER_S = 0.1  # between two looks for the answer
STALE_MS = 120_000  # by then nobody waits for the answer any more

# Asks, and deletes what was asked by daemons that have gone since.
ASK = f"""
WITH stale AS (DELETE FROM lmdaemon.asked WHERE asked_at < {NOW} - {STALE_MS})
INSERT INTO lmdaemon.asked (operator, what, asked_at) VALUES (%s, %s, {NOW}) RETURNING id"""
# The answer, once there is one.
ANSWER_TO = "SELECT answer FROM lmdaemon.asked WHERE id = %s"
# Whoever asked has the answer, or waits no longer.
FORGET = "DELETE FROM lmdaemon.asked WHERE id = %s"
# The answer of the owner.
ANSWER = "UPDATE lmdaemon.asked SET answer = %s WHERE id = %s"
# What has no answer yet, as JSON: the fields of Question.
UNANSWERED = f"""(SELECT json_agg(json_build_array(id, operator, what))::text FROM lmdaemon.asked
    WHERE answer IS NULL AND asked_at >= {NOW} - {STALE_MS})"""


class Question(NamedTuple):
    """What is asked of the owner of an operator."""

    number: int
    operator: str
    what: Wish


def ask(sql: Connection, operator: str, what: Wish) -> int:
    """Returns the number of the question."""
    row = sql.execute(ASK, (operator, what)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    return int(row[0])


def answer_to(sql: Connection, number: int) -> str | None:
    """The answer; None while there is none."""
    row = sql.execute(ANSWER_TO, (number,)).fetchone()
    return None if row is None else row[0]


def forget(sql: Connection, number: int) -> None:
    """Withdraws a question, answered or not."""
    sql.execute(FORGET, (number,))


def answer(sql: Connection, number: int, text: str) -> None:
    """Answers a question."""
    sql.execute(ANSWER, (text, number))
