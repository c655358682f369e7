"""The floors on PostgreSQL: what its statements cost by themselves, on the same tables, over one connection."""

import json
import sys
import time
from random import Random

import psycopg

from benchmarks.load import session_id

BATCH, BATCHES = 300, 100  # ids in one statement of touches; batches made before the time runs
ENDED = 100  # in one statement of ends

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
    """Batches of random ids, one autocommit statement each, for so long."""
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
    """Ends the latest sessions, so many in all, with a delivery each."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as sql:
        found = sql.execute("SELECT id FROM lmdaemon.session ORDER BY id DESC LIMIT %s", (rows,)).fetchall()
        ids = sorted(one[0] for one in found)
        began = time.perf_counter()
        for first in range(0, rows, ENDED):
            sql.execute(END, (time.time_ns() // 1_000_000, ids[first : first + ENDED], BODY))
        return {"answered": rows, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    json.dump({"touches": touches, "ends": ends}[sys.argv[1]](**json.loads(sys.argv[2])), sys.stdout)
