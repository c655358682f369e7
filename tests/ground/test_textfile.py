"""textfile: reads text in whatever encoding editors save it."""

import codecs
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdaemon import textfile

TEXT = "[api]\ntoken_file = 'tokens'  # ü\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_is_read_with_and_without_a_byte_order_mark(encoding: str) -> None:
    assert textfile.decode(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32"),
        ("utf-32-be", "UTF-32"),
        ("latin-1", "Latin-1 or another encoding that is not UTF-8 (line 2)"),
        ("cp1252", "Latin-1 or another encoding that is not UTF-8 (line 2)"),
    ],
)
def test_another_encoding_is_named(encoding: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"save it as UTF-8$") as refused:
        textfile.decode(TEXT.encode(encoding))
    assert str(refused.value) == f"is {name}; save it as UTF-8"


def test_a_zero_byte_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"^must not have a zero byte \(line 2\)$"):
        textfile.decode(b"a long enough first line\nb\0")


@given(st.binary())
def test_any_bytes_are_text_or_a_rule_that_repeats_none_of_them(content: bytes) -> None:
    try:
        assert textfile.decode(content).encode() == content.removeprefix(codecs.BOM_UTF8)
    except ValueError as error:
        rule, causes = str(error), (error.__cause__, error.__suppress_context__)
    else:
        return
    assert re.fullmatch(r"(is|must not have) [\w ,-]+( \(line \d+\))?(; save it as UTF-8)?", rule)
    assert causes in ((None, True), (None, False))


def test_entries_are_lines_that_say_something() -> None:
    assert textfile.entries("# a comment\r\n\n one \rtwo # three\n  # four\n") == [(3, "one"), (4, "two # three")]
