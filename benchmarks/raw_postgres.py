"""The floors on PostgreSQL: the daemon's statements alone, on the same tables, over one connection."""

import json
import sys
import time
from random import Random

import psycopg

from benchmarks.load import session_id

# Ids in one statement of touches; how many such batches are made before the measurement begins
BATCH, BATCHES = 300, 100
ENDED = 100  # sessions in one statement of ends

TOUCH = """
UPDATE lmdaemon.session SET seen_ms = %s, seen_at = %s WHERE operator = 'acme' AND session_id = ANY (%s)"""
END = """
WITH ended AS (
    UPDATE lmdaemon.session SET reason = 'inactivity', ended_at = %s WHERE id = ANY (%s) AND reason IS NULL
    RETURNING id, operator, ended_at)
INSERT INTO lmdaemon.delivery
    (nonce, session, operator, sink, state, created_at, due_at, aged_from_at, held_base_ms, body)
SELECT 'x', id, operator, 'http', 'pending', ended_at, ended_at, ended_at, 0, %s FROM ended"""
BODY = (
    b'{"providerId":"w0","sessionId":"00000000-000000000000","externalPlayerId":"p00000000","token":"tok-0123456789"}'
)


def touches(url: str, rows: int, seconds: float, seed: int) -> dict[str, float]:
    """For `seconds`, touches batches of random ids, each by one statement with its own commit."""
    rng = Random(seed)
    batches = [[session_id(number) for number in rng.sample(range(rows), BATCH)] for _ in range(BATCHES)]
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as sql:
        began, touched = time.perf_counter(), 0
        while (now := time.perf_counter()) < began + seconds:
            seen = time.time_ns() // 1_000_000
            sql.execute(TOUCH, (seen, seen, batches[touched // BATCH % BATCHES]))
            touched += BATCH
    return {"answered": touched, "seconds": now - began}


def ends(url: str, rows: int, seconds: float, seed: int) -> dict[str, float]:
    """Ends the latest `rows` sessions, with a delivery for each."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as sql:
        found = sql.execute("SELECT id FROM lmdaemon.session ORDER BY id DESC LIMIT %s", (rows,)).fetchall()
        ids = sorted(one[0] for one in found)
        began = time.perf_counter()
        for first in range(0, rows, ENDED):
            sql.execute(END, (time.time_ns() // 1_000_000, ids[first : first + ENDED], BODY))
        return {"answered": rows, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    json.dump({"touches": touches, "ends": ends}[sys.argv[1]](**json.loads(sys.argv[2])), sys.stdout)
