"""What a batch changes: `rules.decide`, tested with tables of cases."""

import dataclasses
from typing import Any

import pytest
from operations import comparable, counted

from lmdaemon.model import Delivery, Gate, Session
from lmdaemon.store import silence
from lmdaemon.store.contract import (
    Closing,
    Figures,
    GateChange,
    NewDelivery,
    Opening,
    Operation,
    Probe,
    Pruning,
    Recording,
    RetryDead,
    RetryOne,
    Settlement,
    Sweep,
    Touching,
)
from lmdaemon.store.rules import Changes, Facts, FactsNeeded, World, decide, must_look_up

IDLE_MS = 1000
WORLD = World(service_ms=5000, wall_at=900_000, last_session=7, configured=frozenset({"acme"}))


def opening(session_id: str = "s", operator: str = "acme", player_id: str = "p", token: str | None = "t") -> Opening:
    return Opening(operator, session_id, player_id, token, None, IDLE_MS, 0)


def recording(session_id: str = "s", **facts: Any) -> Recording:
    given = {"player_id": "p", "token": "t", "compare_token": False, "accept_unknown": True, "extra": None, **facts}
    return Recording(operator="acme", session_id=session_id, idle_ms=IDLE_MS, **given)


def session(session_id: str = "s", number: int = 1, seen_ms: int = 0, reason: Any = None, **facts: Any) -> Session:
    row = Session(
        id=number,
        operator="acme",
        session_id=session_id,
        player_id="p",
        token="t",
        attributes=None,
        extra=None,
        idle_ms=IDLE_MS,
        opened_at=0,
        seen_ms=seen_ms,
        seen_at=0,
        lifetime_at=None,
        ended_at=None if reason is None else 1,
        reason=reason,
    )
    return row._replace(**facts)


def known(*sessions: Session, asked: str = "s", **facts: Any) -> Facts:
    """The facts for a batch that asked about one session id."""
    return Facts(asked={"acme": {asked}}, sessions=sessions, **facts)


ACTIVE, ENDED = session(), session(reason="closed")

# For each operation and what is stored of its session: the answer, and the sessions that end.
CASES: list[tuple[str, Operation[Any], Facts, object, list[str]]] = [
    ("open unknown", opening(), known(), "created", []),
    ("open again", opening(), known(ACTIVE), "open", []),
    ("open ended", opening(), known(ENDED), "ended", []),
    ("open with another player", opening(player_id="q"), known(ACTIVE), "differs", []),
    ("open with another token", opening(token="u"), known(ACTIVE), "differs", []),
    ("open without its token", opening(token=None), known(ACTIVE), "differs", []),
    ("touch active", Touching("acme", ["s"]), known(ACTIVE), (1, [], []), []),
    ("touch ended", Touching("acme", ["s"]), known(ENDED), (0, [], ["s"]), []),
    ("touch unknown", Touching("acme", ["s"]), known(), (0, ["s"], []), []),
    ("close active", Closing("acme", "s"), known(ACTIVE), "closed", ["closed"]),
    ("close ended", Closing("acme", "s"), known(session(reason="reported")), "reported", []),
    ("close unknown", Closing("acme", "s"), known(), None, []),
    ("record unknown", recording(), known(), "ended", ["reported"]),
    ("record unknown, refused", recording(accept_unknown=False), known(), "unknown_session", []),
    ("record unknown, token asked", recording(compare_token=True), known(), "bad_token", []),
    ("record active", recording(), known(ACTIVE), "ended", ["reported"]),
    ("record active, refused if unknown", recording(accept_unknown=False), known(ACTIVE), "ended", ["reported"]),
    ("record active, wrong token", recording(compare_token=True, token="u"), known(ACTIVE), "bad_token", []),
    ("record active, another player", recording(player_id="q"), known(ACTIVE), "player_mismatch", []),
    ("record ended", recording(), known(ENDED), "repeated", []),
    ("record ended, another player", recording(player_id="q"), known(ENDED), "player_mismatch", []),
    ("sweep idle", Sweep(1000), known(due=[ACTIVE]), (1, 1), ["inactivity"]),
    ("sweep a moment before", Sweep(999), known(due=[ACTIVE]), (0, 1), []),
    ("sweep touched", Sweep(1000), known(due=[session(seen_ms=1)]), (0, 1), []),
    ("sweep outlived, not idle", Sweep(None), known(outlived=[ACTIVE]), (1, 1), ["max_lifetime"]),
    ("sweep idle and outlived", Sweep(1000), known(outlived=[ACTIVE], due=[ACTIVE]), (1, 1), ["max_lifetime"]),
    ("sweep who left the file", Sweep(1000), Facts(due=[session(operator="gone")]), (0, 1), []),
    ("probe", Probe(), known(), None, []),
]


@pytest.mark.parametrize(
    ("operation", "facts", "expected", "ends"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_each_operation_by_what_is_known(
    operation: Operation[Any], facts: Facts, expected: object, ends: list[str]
) -> None:
    changes = decide([operation], facts, WORLD)
    (answer,) = changes.answers
    assert comparable(answer) == expected
    assert [one.reason for one in changes.ends] == ends


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([Touching("acme", ["s"]), opening()], [(0, ["s"], []), "created"]),
        ([opening(), Touching("acme", ["s"])], ["created", (1, [], [])]),
        ([opening(), opening()], ["created", "open"]),
        ([opening(), Closing("acme", "s"), opening()], ["created", "closed", "ended"]),
        ([opening(), recording(), recording()], ["created", "ended", "repeated"]),
        ([recording(accept_unknown=False), recording(), recording()], ["unknown_session", "ended", "repeated"]),
        ([recording(), Touching("acme", ["s", "s"])], ["ended", (0, [], ["s"])]),
    ],
)
def test_operations_of_one_batch_see_those_before_them(batch: list[Operation[Any]], expected: list[object]) -> None:
    changes = decide(batch, known(), WORLD)
    assert [comparable(answer) for answer in changes.answers] == expected
    assert [row[0] for row in changes.sessions] == [8]
    assert changes.touched == {}


def test_a_touch_in_the_batch_of_its_sweep_saves_the_session() -> None:
    changes = decide([Touching("acme", ["s"]), Sweep(5000)], Facts(due=[ACTIVE]), WORLD)
    assert [comparable(answer) for answer in changes.answers] == [(1, [], []), (0, 1)]
    assert changes.moved_due == [(1, 5001 + IDLE_MS)]
    assert changes.touched == {"acme": {"s": None}}


def test_a_touch_after_its_sweep_meets_the_end() -> None:
    changes = decide([Sweep(5000), Touching("acme", ["s"])], Facts(due=[ACTIVE]), WORLD)
    assert [comparable(answer) for answer in changes.answers] == [(1, 1), (0, [], ["s"])]
    assert changes.touched == {}


@pytest.mark.parametrize(
    "batch",
    [
        [Closing("acme", "s")],
        [RetryOne("msg_1_x")],
        [recording(accept_unknown=False)],
        [recording(compare_token=True)],
        [Touching("acme", ["s"]), opening()],
        [Touching("acme", ["a", "s"]), recording()],
    ],
)
def test_what_depends_on_the_tables_is_not_decided_without_facts(batch: list[Operation[Any]]) -> None:
    with pytest.raises(FactsNeeded):
        decide(batch, None, WORLD)


def test_some_kinds_are_looked_up_in_any_case() -> None:
    kinds = (Closing, Sweep, RetryDead, RetryOne, Pruning)
    assert all(must_look_up([Touching, kind]) for kind in kinds)
    assert not must_look_up([Touching, Opening, Recording, Settlement, GateChange, Probe])


def test_without_facts_additions_are_assumed_to_be_new() -> None:
    changes = decide([opening("a"), recording("b"), Touching("acme", ["c"])], None, WORLD)
    assert [row[:3] for row in changes.sessions] == [(8, "acme", "a"), (9, "acme", "b")]
    assert (changes.last_session, changes.touched) == (9, {"acme": {"c": None}})
    assert changes.figures == {"acme": Figures(live=1)}


def delivery(number: int = 3, state: Any = "pending") -> Delivery:
    return Delivery(
        id=number,
        nonce="00" * 10,
        session=1,
        operator="acme",
        session_id="s",
        token="t",
        sink="http",
        state=state,
        created_at=0,
        due_at=0,
        settled_at=None,
        attempts=0,
        step=0,
        aged_from_at=0,
        held_base_ms=0,
        last_status=None,
        last_code=None,
        last_error=None,
        body_digest=None,
        discarded=None,
        history="[]",
        body=b"{}",
    )


def test_of_two_results_the_second_finds_the_delivery_settled() -> None:
    fail = counted(failed=True)
    results = [Settlement(delivery(), state, 0, 1, {"error": "x"}, gate=fail) for state in ("dead", "delivered")]
    for facts in (None, Facts(pending=frozenset({3}))):
        changes = decide(results, facts, WORLD)
        assert [row[1] for row in changes.results.values()] == ["dead"]
        assert changes.figures == {"acme": Figures(pending=-1, dead=1)}
        assert changes.gates["acme"].failures == 2


def test_a_result_of_a_settled_delivery_stores_nothing_but_its_gate() -> None:
    late = Settlement(delivery(), "delivered", 0, 1, {"status": 200}, gate=counted(failed=True))
    changes = decide([late], Facts(pending=frozenset()), WORLD)
    assert (changes.results, changes.digests, changes.figures, changes.due) == ({}, [], {}, {})
    assert changes.gates["acme"].failures == 1


def test_gates_go_back_with_the_wall_clock_before_anything_else() -> None:
    gate = Gate(not_before_at=WORLD.wall_at + 7_000_000, probe_at=WORLD.wall_at - 1, paced_until_at=WORLD.wall_at + 5)
    world = WORLD._replace(gates={"acme": gate}, set_back_ms=3_600_000)
    changes = decide([GateChange("acme", lambda gate: dataclasses.replace(gate, failures=1))], None, world)
    expected = {"not_before_at": WORLD.wall_at + 3_400_000, "paced_until_at": WORLD.wall_at, "failures": 1}
    assert changes.gates == {"acme": dataclasses.replace(gate, **expected)}


def test_a_token_that_nothing_will_send_becomes_a_digest() -> None:
    world = WORLD._replace(sinks_of=lambda session: [NewDelivery("http", b"", "no player")])
    changes = decide([recording()], None, world, lambda size, count: ["5a" * size] * count)
    token = changes.sessions[0][Session._fields.index("token")]
    assert token.startswith("\x1f" + "5a" * 8)
    assert changes.figures == {"acme": Figures(dead=1)}


PAUSING = WORLD._replace(
    service_ms=100_000,
    pausing=frozenset({"acme"}),
    grace_ms=60_000,
    touched_ms={"acme": 10_000},
    figures={"acme": Figures(live=silence.MANY_SESSIONS)},
)


def swept(world: World, *before: Touching) -> Changes:
    """Decides a sweep at 100 s. One session is due: it was last touched at 5 s, and its idle time is 1 s."""
    facts = Facts(due=[session(seen_ms=5000)])
    return decide([*before, Sweep(100_000)], facts, world)


class TestAnOperatorWhoseTouchesHaveStopped:
    def test_an_idle_session_waits_and_the_pause_begins(self) -> None:
        changes = swept(PAUSING)
        assert changes.answers == [(0, 1)]
        # One idle time later: the earliest moment at which the session could end if it were touched now
        assert changes.moved_due == [(1, 101_000)]
        assert changes.pauses == {"acme": silence.Pause(100_000, 500)}
        assert changes.ends == []

    @pytest.mark.parametrize(
        "changed",
        [
            {"pausing": frozenset({"other"})},
            {"touched_ms": {}},
            {"touched_ms": {"acme": 99_501}},
            {"figures": {"acme": Figures(live=silence.MANY_SESSIONS - 1)}},
            {"pauses": {"acme": silence.Pause(100_000 - silence.PAUSE_MAX_MS, 500)}},
            {"pauses": {"acme": silence.Pause(90_000, 500, released=True)}},
        ],
        ids=["told only", "never touched", "just touched", "few", "too long", "released"],
    )
    def test_it_ends_otherwise(self, changed: dict[str, object]) -> None:
        changes = swept(PAUSING._replace(**changed))
        assert [one.reason for one in changes.ends] == ["inactivity"]
        assert changes.pauses == {}

    def test_a_touch_of_another_session_in_the_same_batch_counts(self) -> None:
        assert len(swept(PAUSING, Touching("acme", ["another"])).ends) == 1

    def test_a_maximum_lifetime_does_not_wait(self) -> None:
        facts = Facts(outlived=[session(lifetime_at=1)])
        assert [one.reason for one in decide([Sweep(100_000)], facts, PAUSING).ends] == ["max_lifetime"]
