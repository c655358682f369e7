"""The whole store compared with plain dictionaries, under random operations. Batches and guesses must change no
answer.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from chance import examples
from clocks import HandClock
from engines import Engine
from operations import comparable
from pair import PairEngine
from plain_store import PlainStore, sinks_of_two

from lmdaemon import retry
from lmdaemon.model import Delivery, Gate
from lmdaemon.store.contract import (
    Claim,
    Closing,
    GateChange,
    Opening,
    Operation,
    Probe,
    Recording,
    RetryOne,
    Settlement,
    Store,
    Sweep,
    Touching,
)

IDLE_MS = 1000


@pytest.mark.parametrize("seed", range(examples(40)))
async def test_the_store_does_what_plain_dictionaries_do(engine: Engine, clock: HandClock, seed: int) -> None:
    random = Random(seed)
    async with engine.open(clock) as db:
        db.configured, db.sinks_of = frozenset({"acme", "other"}), sinks_of_two
        plain, set_back_ms = PlainStore({"acme", "other"}, sinks_of_two), 0
        await db.end_due(idle=False)  # on an engine with owners, the store owns both operators from here on
        # Fewer for a pair of daemons, where each operation is a transaction or more
        for _ in range(8 if isinstance(engine, PairEngine) else 25):
            note_ids(plain, engine.rows("delivery"))
            due = [row for lane in await db.claimable([Claim("acme", s, [], 3) for s in SINKS]) for row in lane]
            batch = [some_operation(random, db, due, plain) for _ in range(random.choice([1, 2, 6, 20]))]
            plain.now_ms, plain.now_at = db.service_clock.now_ms(), clock.wall_ms()
            if set_back_ms:
                set_back(plain, set_back_ms)
                set_back_ms = 0
            answers = await asyncio.gather(*(carried_out(db, operation) for operation in batch))
            expected = [plain.do(operation) for operation in batch]
            told = [
                answer.ended if isinstance(o, Sweep) else comparable(answer)
                for o, answer in zip(batch, answers, strict=True)
            ]
            assert told == expected
            assert_same(engine, db, plain)
            for _ in range(random.choice([0, 0, 1, 3])):
                clock.advance(1)
                db.service_clock.now_ms()
            if random.random() < 0.1:
                await engine.step_wall(clock, db, -random.choice([30, 3600]))
                set_back_ms = db.set_back_ms  # read at once, because a daemon may begin a transaction by itself


SINKS = ("http", "plugin:x")


def note_ids(plain: PlainStore, rows: list[dict[str, Any]]) -> None:
    """Public ids are random, so the plain store takes them from the tables."""
    for row in rows:
        key = (row["operator"], row["session_id"], row["sink"])
        plain.deliveries[key]["webhook_id"] = f"msg_{row['id']}_{row['nonce']}"


def set_back(plain: PlainStore, by_ms: int) -> None:
    def back(at: int) -> int:
        return max(plain.now_at, at - by_ms) if at > plain.now_at else at

    for row in plain.deliveries.values():
        if row["state"] == "pending":
            row["due_at"] = back(row["due_at"])
    for operator, gate in plain.gates.items():
        times = {name: back(getattr(gate, name)) for name in ("not_before_at", "probe_at", "paced_until_at")}
        plain.gates[operator] = dataclasses.replace(gate, **times)


async def carried_out(db: Store, operation: Operation[Any]) -> Any:
    """Calls the verb that queues this operation. Returns the answer in a comparable form."""
    match operation:
        case Opening():
            return await db.open_session(operation)
        case Touching(operator, session_ids):
            return await db.touch(operator, session_ids)
        case Closing(operator, session_id):
            return await db.end(operator, session_id)
        case Recording():
            return await db.record(operation)
        case Sweep(as_of_ms):
            return await db.end_due(idle=as_of_ms is not None)
        case Settlement():
            return await db.settle(operation)
        case GateChange(operator, alter):
            return await db.set_gate(operator, alter)
        case RetryOne(webhook_id):
            return await db.retry_one(webhook_id)
        case Probe():
            return await db.probe()
    raise AssertionError(operation)


def assert_same(engine: Engine, db: Store, plain: PlainStore) -> None:
    sessions = {(row["operator"], row["session_id"]): row for row in engine.rows("session")}
    assert sessions.keys() == plain.sessions.keys()
    for key, session in plain.sessions.items():
        expected = {name: value for name, value in session.items() if name != "token"}
        assert {name: sessions[key][name] for name in expected} == expected, key
        token = sessions[key]["token"]
        assert (token or "").startswith("\x1f") or token == session["token"]
    deliveries = {(row["operator"], row["session_id"], row["sink"]): row for row in engine.rows("delivery")}
    assert deliveries.keys() == plain.deliveries.keys()
    for key, delivery in plain.deliveries.items():
        expected = {name: value for name, value in delivery.items() if name != "webhook_id"}
        assert {name: deliveries[key][name] for name in expected} == expected, key
    counted = {name: (one.live, one.pending, one.dead) for name, one in db.figures.items()}
    assert {name: of for name, of in counted.items() if any(of)} == {
        n: of for n, of in plain.figures.items() if any(of)
    }
    gates = {operator: db.gate(operator) for operator in {*db.figures, *plain.gates}}
    assert {name: gate for name, gate in gates.items() if gate != Gate()} == {
        name: gate for name, gate in plain.gates.items() if gate != Gate()
    }
    live = [row for row in sessions.values() if row["reason"] is None]
    assert db.next_due_ms is None or not live or db.next_due_ms <= min(row["due_ms"] for row in live)


def some_operation(random: Random, db: Store, due: list[Delivery], plain: PlainStore) -> Operation[Any]:
    names = [*"abcdefg", '\U0001f3b2 "ü\\']
    operator, name = random.choice(["acme", "acme", "other"]), random.choice(names) * random.choice([1, 2])
    token, player = random.choice(["t", "t", None]), random.choice("ppppq")
    ids = [row["webhook_id"] for row in plain.deliveries.values() if "webhook_id" in row]
    kinds: list[Callable[[], Operation[Any]]] = [
        lambda: Touching(operator, [name]),
        lambda: Touching(operator, [name]),
        lambda: Touching(operator, random.choices(names, k=3)),
        lambda: Opening(operator, name, player, token, None, IDLE_MS, 0),
        lambda: Opening(operator, f"{name}-", player, token, None, IDLE_MS, 2000),
        lambda: Recording(
            operator,
            name + random.choice(["", "", "+"]),
            player,
            token,
            compare_token=random.random() < 0.05,
            accept_unknown=random.random() > 0.05,
            extra=random.choice([None, '{"x":1}']),
            idle_ms=IDLE_MS,
        ),
        lambda: Closing(operator, name),
        lambda: Sweep(db.service_clock.now_ms() if random.random() < 0.8 else None),
        lambda: GateChange("acme", random.choice([lambda gate: retry.hold(gate, 5, "by_hand"), lambda gate: Gate()])),
        lambda: RetryOne(random.choice(ids) if ids else "msg_1_none"),
        Probe,
    ]
    if due and random.random() < 0.4:
        return Settlement(
            random.choice(due),
            random.choice(["pending", "delivered", "dead"]),
            random.choice([10, 5_000_000]),
            1,
            {"error": random.choice([None, "x"])},
            gate=failed_or_not(failed=random.random() < 0.5),
        )
    return random.choice(kinds)()


def failed_or_not(*, failed: bool) -> Callable[[Gate, int], Gate]:
    return lambda gate, now_at: dataclasses.replace(
        gate, failures=gate.failures + 1 if failed else 0, not_before_at=now_at + 100_000
    )
