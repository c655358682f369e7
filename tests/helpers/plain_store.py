"""The rules of the store written with plain dictionaries, to compare the real store with. It carries out one operation
after the other, without batches.
"""

from collections import Counter
from typing import Any

from lmdaemon.model import Gate
from lmdaemon.store.contract import (
    SWEEP_ROWS,
    Closing,
    GateChange,
    NewDelivery,
    Opening,
    Operation,
    Probe,
    Recording,
    RetryOne,
    Settlement,
    SinksOf,
    Sweep,
    Touching,
)

REVISIT_MS = 3_600_000
PACE_MS = 100


class PlainStore:
    """Session rows by (operator, session id), and delivery rows by (operator, session id, sink)."""

    def __init__(self, configured: set[str], sinks_of: SinksOf) -> None:
        self.configured = configured
        self.sinks_of = sinks_of
        self.sessions: dict[tuple[str, str], dict[str, Any]] = {}
        self.deliveries: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.gates: dict[str, Gate] = {}
        self.now_ms = self.now_at = 0

    def do(self, operation: Operation[Any]) -> Any:
        """Carries out one operation at service time `now_ms` and wall time `now_at`, and returns its answer in a
        comparable form.
        """
        match operation:
            case Opening():
                return self.open(operation)
            case Touching():
                return self.touch(operation)
            case Closing():
                return self.close(operation)
            case Recording():
                return self.record(operation)
            case Sweep():
                return self.sweep(operation)
            case Settlement():
                return self.settle(operation)
            case GateChange():
                self.gates[operation.operator] = operation.alter(self.gates.get(operation.operator, Gate()))
                return self.gates[operation.operator]
            case RetryOne():
                return self.retry(operation)
            case Probe():
                return None
        raise AssertionError(operation)

    def open(self, new: Opening) -> str:
        session = self.sessions.get((new.operator, new.session_id))
        if session is None:
            self.sessions[new.operator, new.session_id] = {
                "player_id": new.player_id,
                "token": new.token,
                "extra": None,
                "seen_ms": self.now_ms + 1,
                "due_ms": self.now_ms + 1 + new.idle_ms,
                "idle_ms": new.idle_ms,
                "lifetime_at": self.now_at + new.lifetime_ms if new.lifetime_ms else None,
                "ended_at": None,
                "reason": None,
            }
            return "created"
        if session["reason"] is not None:
            return "ended"
        if (session["player_id"], session["token"]) != (new.player_id, new.token):
            return "differs"
        session["seen_ms"] = self.now_ms + 1
        return "open"

    def touch(self, touching: Touching) -> tuple[int, list[str], list[str]]:
        touched, unknown, ended = 0, [], []
        for session_id in dict.fromkeys(touching.session_ids):
            session = self.sessions.get((touching.operator, session_id))
            if session is None:
                unknown.append(session_id)
            elif session["reason"] is not None:
                ended.append(session_id)
            else:
                session["seen_ms"] = self.now_ms + 1
                touched += 1
        return touched, unknown, ended

    def close(self, closing: Closing) -> str | None:
        session = self.sessions.get((closing.operator, closing.session_id))
        if session is None:
            return None
        if session["reason"] is None:
            self.end(closing.operator, closing.session_id, "closed")
        return str(session["reason"])

    def record(self, new: Recording) -> str:
        key = (new.operator, new.session_id)
        session = self.sessions.get(key)
        if session is None:
            if new.compare_token or not new.accept_unknown:
                return "bad_token" if new.compare_token else "unknown_session"
            self.sessions[key] = {
                "player_id": new.player_id,
                "token": new.token,
                "extra": new.extra,
                "seen_ms": self.now_ms + 1,
                "due_ms": self.now_ms + 1 + new.idle_ms,
                "idle_ms": new.idle_ms,
                "lifetime_at": None,
                "ended_at": None,
                "reason": None,
            }
            self.end(*key, "reported")
            return "ended"
        if new.compare_token and session["token"] != new.token:
            return "bad_token"
        if session["player_id"] != new.player_id:
            return "player_mismatch"
        if session["reason"] is not None:
            return "repeated"
        session["token"] = session["token"] or new.token
        session["extra"] = new.extra or session["extra"]
        self.end(*key, "reported")
        return "ended"

    def end(self, operator: str, session_id: str, reason: str) -> None:
        session = self.sessions[operator, session_id]
        session |= {"reason": reason, "ended_at": self.now_at}
        for one in self.sinks_of(_named(operator, session_id, session["token"])):
            dead = one.impossible is not None
            self.deliveries[operator, session_id, one.sink] = {
                "state": "dead" if dead else "pending",
                "due_at": self.now_at,
                "settled_at": self.now_at if dead else None,
                "attempts": 0,
                "step": 0,
                "last_error": one.impossible,
                "body": one.body,
            }

    def sweep(self, sweep: Sweep) -> int:
        ended = 0
        live = [(key, session) for key, session in self.sessions.items() if session["reason"] is None]
        assert len(live) < SWEEP_ROWS, "the model has no limit to a sweep"
        for (operator, session_id), session in live:
            if session["lifetime_at"] is None or session["lifetime_at"] > self.now_at:
                continue
            if operator in self.configured:
                self.end(operator, session_id, "max_lifetime")
                ended += 1
            else:
                session["lifetime_at"] = self.now_at + REVISIT_MS
        for (operator, session_id), session in live:
            if sweep.as_of_ms is None or session["reason"] is not None or session["due_ms"] > sweep.as_of_ms:
                continue
            if session["seen_ms"] + session["idle_ms"] > sweep.as_of_ms:
                session["due_ms"] = session["seen_ms"] + session["idle_ms"]
            elif operator in self.configured:
                self.end(operator, session_id, "inactivity")
                ended += 1
            else:
                session["due_ms"] = sweep.as_of_ms + REVISIT_MS
        return ended

    def settle(self, one: Settlement) -> tuple[Gate, Gate]:
        delivery = self.deliveries[one.delivery.operator, one.delivery.session_id, one.delivery.sink]
        if delivery["state"] == "pending":
            delivery |= {
                "state": one.state,
                "due_at": self.now_at + one.wait_ms,
                "settled_at": None if one.state == "pending" else self.now_at,
                "attempts": one.delivery.attempts + 1,
                "step": one.step,
                "last_error": (one.attempt or {}).get("error"),
                "body": b"" if one.state == "delivered" else delivery["body"],
            }
        before = self.gates.get(one.delivery.operator, Gate())
        if one.gate is not None:
            self.gates[one.delivery.operator] = one.gate(before, self.now_at)
        return before, self.gates.get(one.delivery.operator, Gate())

    def retry(self, one: RetryOne) -> str | None:
        found = [key for key, row in self.deliveries.items() if row.get("webhook_id") == one.webhook_id]
        if not found:
            return None
        (key,) = found
        delivery = self.deliveries[key]
        before = str(delivery["state"])
        if before == "dead" and (delivery["body"] or key[2] != "http"):
            gate = self.gates.get(key[0], Gate())
            due_at = max(self.now_at, gate.paced_until_at)
            delivery |= {"state": "pending", "due_at": due_at, "settled_at": None, "step": 0}
            self.gates[key[0]] = _paced(gate, due_at + PACE_MS)
        return before

    @property
    def figures(self) -> dict[str, tuple[int, int, int]]:
        """The counts of live sessions and of pending and dead deliveries for each operator, counted anew."""
        live = Counter(key[0] for key, row in self.sessions.items() if row["reason"] is None)
        pending = Counter(key[0] for key, row in self.deliveries.items() if row["state"] == "pending")
        dead = Counter(key[0] for key, row in self.deliveries.items() if row["state"] == "dead")
        return {name: (live[name], pending[name], dead[name]) for name in {*live, *pending, *dead}}


def _named(operator: str, session_id: str, token: str | None) -> Any:
    """A session with only the members that the tests' `sinks_of` reads."""

    class Named:
        pass

    named = Named()
    vars(named).update(operator=operator, session_id=session_id, token=token)
    return named


def _paced(gate: Gate, until_at: int) -> Gate:
    from dataclasses import replace

    return replace(gate, paced_until_at=until_at)


def sinks_of_two(session: Any) -> list[NewDelivery]:
    """The deliveries of a session's end: none for the operator "other", else one or two by the length of the session
    id. Without a token, the first cannot be sent.
    """
    if session.operator == "other":
        return []
    why = "no token" if session.token is None else None
    body = b"" if why else b'{"a":1}'
    return [NewDelivery("http", body, why), NewDelivery("plugin:x", b"")][: len(session.session_id)]
