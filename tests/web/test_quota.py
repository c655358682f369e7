"""A quota of N a minute: never more than N in any sixty seconds, and over a longer time no fewer than N a minute."""

from hypothesis import given
from hypothesis import strategies as st

from lmdaemon.web.quota import PerMinute


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=80))
def test_no_sixty_seconds_have_more_than_the_limit(limit: int, waits: list[float]) -> None:
    quota, now, taken = PerMinute(limit), 1000.0, []
    for wait in waits:
        now += wait
        if quota.take(now):
            taken.append(now)
        assert len(quota._taken) <= 61
    for first in taken:
        assert len([one for one in taken if first <= one < first + 60]) <= limit


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=80))
def test_what_is_refused_had_the_limit_within_little_more_than_a_minute(limit: int, waits: list[float]) -> None:
    quota, now, taken = PerMinute(limit), 1000.0, []
    for wait in waits:
        now += wait
        if quota.take(now):
            taken.append(now)
        else:
            assert len([one for one in taken if one > now - 61]) >= limit


def test_a_lower_limit_counts_what_was_before() -> None:
    quota = PerMinute(3)
    assert [quota.take(0.5) for _ in range(2)] == [True, True]
    quota.limit = 2
    assert not quota.take(1.5)
    assert quota.take(61.5)
