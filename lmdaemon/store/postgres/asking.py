"""Passes requests on to the daemon that owns an operator, when another daemon has received one that only the owner can
fulfil.

The daemon that has received it adds a row to the table `asked`. The owner sees the row at its next look and writes the
answer into it. Then the first daemon takes the answer and deletes the row.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from lmdaemon.store.contract import StoreError, Wish
from lmdaemon.store.postgres.company import NOW
from lmdaemon.store.postgres.reads import Reads
from lmdaemon.store.postgres.signals import Signals
from lmdaemon.store.postgres.thread import Connection
from lmdaemon.store.projection import Projection

ANSWER_S = 0.1  # between two reads of the answer
STALE_MS = 120_000  # after this time nobody waits for the answer any more

# Adds a question, and deletes old ones, which were left by daemons that are gone.
ASK = f"""
WITH stale AS (DELETE FROM lmdaemon.asked WHERE asked_at < {NOW} - {STALE_MS})
INSERT INTO lmdaemon.asked (operator, what, asked_at) VALUES (%s, %s, {NOW}) RETURNING id"""
# The answer to a question; NULL until there is one.
ANSWER_TO = "SELECT answer FROM lmdaemon.asked WHERE id = %s"
# Deletes a question when its answer was taken, or is not waited for any longer.
FORGET = "DELETE FROM lmdaemon.asked WHERE id = %s"
# Stores the owner's answer.
ANSWER = "UPDATE lmdaemon.asked SET answer = %s WHERE id = %s"
# The questions that have no answer yet, as JSON: the fields of Question.
UNANSWERED = f"""(SELECT json_agg(json_build_array(id, operator, what))::text FROM lmdaemon.asked
    WHERE answer IS NULL AND asked_at >= {NOW} - {STALE_MS})"""


class Question(NamedTuple):
    """What is asked of the owner of an operator."""

    number: int
    operator: str
    what: Wish


class Asking:
    """Asks the owners of operators, and does what other daemons ask of this one."""

    def __init__(self, projection: Projection, reads: Reads, signals: Signals) -> None:
        self._projection = projection
        self._reads = reads
        self._signals = signals
        self._answering: set[int] = set()  # questions of others that this daemon has begun to answer

    async def ask(self, operator: str, wish: Wish, within_s: float) -> str:
        """Asks the owner of an operator, and returns the answer. Raises StoreError when there is none within
        `within_s`.
        """
        number = await self._reads.read(ask, operator, wish)
        self._signals.hint.set()
        try:
            async with asyncio.timeout(within_s):
                return await self._answer_to(number)
        except TimeoutError:
            raise StoreError(f"the daemon that owns {operator} has not answered within {within_s:g} s") from None
        finally:
            with suppress(StoreError):
                await self._reads.read(forget, number)

    async def _answer_to(self, number: int) -> str:
        while True:
            found = await self._reads.read(answer_to, number)
            if found is not None:
                return found
            await asyncio.sleep(ANSWER_S)

    async def answer(self, number: int, text: str) -> None:
        """Answers another daemon. Raises StoreError."""
        await self._reads.read(answer, number, text)

    async def see_to(self, asked: Sequence[Question]) -> None:
        """Does what other daemons ask of this one as the owner of operators. Raises StoreError."""
        self._answering &= {question.number for question in asked}
        for number, operator, what in asked:
            if number in self._answering or not self._projection.owns(operator):
                continue
            self._answering.add(number)
            if what == "release_ends":
                await self.answer(number, "yes" if self._projection.let_ends_go_on(operator) else "")
                continue
            for observer in self._projection.observers:
                observer.probe_asked(number, operator)


def ask(sql: Connection, operator: str, what: Wish) -> int:
    """Adds a question, and returns its number."""
    row = sql.execute(ASK, (operator, what)).fetchone()
    assert row is not None  # noqa: S101 - for the type checker: it returns a row or raises
    return int(row[0])


def answer_to(sql: Connection, number: int) -> str | None:
    """The answer to a question; None while there is no answer."""
    row = sql.execute(ANSWER_TO, (number,)).fetchone()
    return None if row is None else row[0]


def forget(sql: Connection, number: int) -> None:
    """Withdraws a question, answered or not."""
    sql.execute(FORGET, (number,))


def answer(sql: Connection, number: int, text: str) -> None:
    """Stores the answer to a question."""
    sql.execute(ANSWER, (text, number))
