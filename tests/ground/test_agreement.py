"""The comparison of the daemons on one database: whose settings differ, and whose clock is slowest."""

from lmdaemon.agreement import disagreement, slowest
from lmdaemon.model import Member


def member(name: str, *, digest: str = "d", version: str = "1", lag_ms: int = 0, is_self: bool = False) -> Member:
    return Member(name, version, "127.0.0.1:8081", 0, 0, lag_ms, (), digest, is_self)


def test_daemons_with_other_settings_are_named() -> None:
    own = member("a:1", is_self=True)
    assert disagreement([own, member("b:2"), member("c:3")]) is None
    found = disagreement([member("c:3", digest="e"), own, member("b:2", digest="f")])
    assert found == "the settings of operators differ: a:1 has others than b:2, c:3"


def test_daemons_of_another_version_are_not_compared() -> None:
    assert disagreement([member("a:1", is_self=True), member("b:2", digest="e", version="2")]) is None


def test_the_slowest_clock_is_told_where_there_are_several() -> None:
    own = member("a:1", is_self=True)
    assert slowest([own]) is None
    assert slowest([own, member("b:2", lag_ms=7)]) == member("b:2", lag_ms=7)
