"""How often something may happen in a minute. Pure: the time is handed in."""

WINDOW_S = 60


class PerMinute:
    """At most `limit` in any sixty seconds. Counted by the second: sixty-one numbers, whatever the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[int, int] = {}

    def take(self, now_s: float) -> bool:
        """Whether it may happen once more now; then it counts."""
        second = int(now_s)
        # The second sixty before this one may have begun less than sixty seconds ago
        self._taken = {at: count for at, count in self._taken.items() if at >= second - WINDOW_S}
        if sum(self._taken.values()) >= self.limit:
            return False
        self._taken[second] = self._taken.get(second, 0) + 1
        return True
