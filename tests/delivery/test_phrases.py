"""The description of an answer's body in words. No body that a server can send makes it fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdaemon.delivery import phrases
from lmdaemon.dialects import SHIPPED

V4 = SHIPPED["v4"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": 0}', "`error` is 0"),
        (b'{"error": 7, "description": "no"}', '`error` is 7, bad parameters ("no")'),
        (b'{"error": ' + b"9" * 400 + b"}", "`error` is a number beyond every code"),
        (b'{"error": "' + b"9" * 400 + b'"}', "`error` is inf"),
        (b'{"error": 1e400}', "`error` is inf"),
        (b'{"error": ' + b"9" * 5000 + b"}", "the body is malformed JSON"),
        (b'{"error": NaN}', "`error` is nan"),
        (b"[" * 100_000, "the body is malformed JSON"),
        (b"\xff", "not UTF-8"),
        (b"", "the body is empty"),
    ],
)
def test_each_shape_of_answer_has_its_words(body: bytes, words: str) -> None:
    assert words in phrases.of_body(body, V4)


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400)


@given(body=st.binary() | st.builds(lambda value: f'{{"error": {value}}}'.encode(errors="replace"), _VALUES))
def test_any_body_has_words(body: bytes) -> None:
    assert phrases.of_body(body, V4)
