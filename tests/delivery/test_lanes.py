"""When rows are read for a lane."""

from pathlib import Path

import pytest
from support import LISTEN, load, operator_table

from lmdaemon.delivery.lanes import Lane
from lmdaemon.model import HTTP_SINK, Delivery

ROW = Delivery(**dict.fromkeys(Delivery._fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("concurrency", "ahead", "is_short"),
    [
        (4, 4, False),
        (4, 3, False),
        (4, 2, True),
        (4, 0, True),
        (1, 1, False),
        (1, 0, True),
        (3, 2, False),
        (3, 1, True),
    ],
)
def test_rows_are_read_when_half_of_those_ahead_are_gone(
    tmp_path: Path, concurrency: int, ahead: int, is_short: bool
) -> None:
    """All slots are taken, so none of those ahead can begin. A read for each row would cost as much as the row."""
    settings = load(
        tmp_path / "config.toml", LISTEN + operator_table("acme", "http://127.0.0.1:9/", concurrency=concurrency)
    )
    operator = settings.operators["acme"]
    lane = Lane(operator, HTTP_SINK, operator.policy, None)
    lane.in_flight = set(range(concurrency))
    lane.ahead.extend([ROW] * ahead)
    assert lane.is_short is is_short
