"""Limits how often something happens in a minute. Pure: the time is an argument."""

WINDOW_S = 60


class PerMinute:
    """Allows `limit` events in any sixty seconds. It counts by the second, so it keeps sixty-one numbers at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[int, int] = {}

    def take(self, now_s: float) -> bool:
        """Whether one more event is allowed now; if so, it is counted. `now_s` is monotonic time."""
        second = int(now_s)
        # `>=`, because parts of the oldest second may be less than sixty seconds ago
        self._taken = {at: count for at, count in self._taken.items() if at >= second - WINDOW_S}
        if sum(self._taken.values()) >= self.limit:
            return False
        self._taken[second] = self._taken.get(second, 0) + 1
        return True
