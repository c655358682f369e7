"""The next deadlines of the operators that this daemon sweeps. Each may be later than known here, never earlier."""

from collections.abc import Set

from lmdaemon.store.postgres.batch import OPERATORS_AT_ONCE, Due
from lmdaemon.store.rules import least

_NONE = (None, None)


class Deadlines:
    """For each operator: the next deadline for inactivity (service ms), and the next one for age (wall ms)."""

    def __init__(self) -> None:
        self._next: dict[str, tuple[int | None, int | None]] = {}

    def keep(self, operators: list[str]) -> list[str]:
        """Keeps these operators and forgets all others. Returns those of which no deadline is known yet."""
        new = [operator for operator in operators if operator not in self._next]
        self._next = {operator: self._next.get(operator, _NONE) for operator in operators}
        return new

    def set(self, operator: str, due_ms: int | None, lifetime_at: int | None) -> None:
        """Takes over the next deadlines of an operator from the table."""
        if operator in self._next:
            self._next[operator] = (due_ms, lifetime_at)

    def nearer(self, operator: str, due_ms: int | None, lifetime_at: int | None) -> bool:
        """Adds deadlines of new sessions. Returns whether one of them is the operator's next one."""
        known = self._next.get(operator)
        if known is None:
            return False
        self._next[operator] = found = (least(known[0], due_ms), least(known[1], lifetime_at))
        return found != known

    @property
    def operators(self) -> Set[str]:
        """The operators that this daemon sweeps."""
        return self._next.keys()

    @property
    def earliest(self) -> tuple[int | None, int | None]:
        """The next deadline for inactivity (service ms) and the next one for age (wall ms), of all these operators."""
        due = [due_ms for due_ms, _ in self._next.values() if due_ms is not None]
        aged = [lifetime_at for _, lifetime_at in self._next.values() if lifetime_at is not None]
        return min(due, default=None), min(aged, default=None)

    def due(self, as_of_ms: int | None, now_at: int) -> Due:
        """The operators that have something due at these times, those with the earliest deadlines first;
        OPERATORS_AT_ONCE at most for inactivity, and as many for age.
        """
        idle = [(due_ms, name) for name, (due_ms, _) in self._next.items() if due_ms is not None]
        now = sorted((due_ms, name) for due_ms, name in idle if as_of_ms is not None and due_ms <= as_of_ms)
        aged = sorted((at, name) for name, (_, at) in self._next.items() if at is not None and at <= now_at)
        asked = Due([name for _, name in now[:OPERATORS_AT_ONCE]], [name for _, name in aged[:OPERATORS_AT_ONCE]], None)
        read = set(asked.operators)
        return asked._replace(rest_due_ms=min((due_ms for due_ms, name in idle if name not in read), default=None))
