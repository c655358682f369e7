"""The next deadlines of the operators that this daemon sweeps. Each may be later than known here, never earlier."""

from collections.abc import Set

from lmdaemon.store.postgres.batch import OPERATORS_AT_ONCE, Due
from lmdaemon.store.rules import least

_NONE = (None, None)


class Deadlines:
    """By operator: the service time of the next one for inactivity, and the wall time of the next one for age."""

    def __init__(self) -> None:
        self._next: dict[str, tuple[int | None, int | None]] = {}

    def keep(self, operators: list[str]) -> list[str]:
        """Forgets all others. Returns those of which nothing is known yet."""
        new = [operator for operator in operators if operator not in self._next]
        self._next = {operator: self._next.get(operator, _NONE) for operator in operators}
        return new

    def set(self, operator: str, due_ms: int | None, lifetime_at: int | None) -> None:
        """What the table says."""
        if operator in self._next:
            self._next[operator] = (due_ms, lifetime_at)

    def nearer(self, operator: str, due_ms: int | None, lifetime_at: int | None) -> bool:
        """There are these besides. Returns whether one of them is nearer than those known."""
        known = self._next.get(operator)
        if known is None:
            return False
        self._next[operator] = found = (least(known[0], due_ms), least(known[1], lifetime_at))
        return found != known

    @property
    def operators(self) -> Set[str]:
        """Those that this daemon sweeps."""
        return self._next.keys()

    @property
    def earliest(self) -> tuple[int | None, int | None]:
        """Of all operators."""
        due = [due_ms for due_ms, _ in self._next.values() if due_ms is not None]
        aged = [lifetime_at for _, lifetime_at in self._next.values() if lifetime_at is not None]
        return min(due, default=None), min(aged, default=None)

    def due(self, as_of_ms: int | None, now_at: int) -> Due:
        """Of which operators something is due at these times: some of them, if there are many, the earliest first."""
        idle = [(due_ms, name) for name, (due_ms, _) in self._next.items() if due_ms is not None]
        now = sorted((due_ms, name) for due_ms, name in idle if as_of_ms is not None and due_ms <= as_of_ms)
        aged = sorted((at, name) for name, (_, at) in self._next.items() if at is not None and at <= now_at)
        asked = Due([name for _, name in now[:OPERATORS_AT_ONCE]], [name for _, name in aged[:OPERATORS_AT_ONCE]], None)
        read = set(asked.operators)
        return asked._replace(rest_due_ms=min((due_ms for due_ms, name in idle if name not in read), default=None))
