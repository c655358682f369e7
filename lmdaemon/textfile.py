"""Decodes files and environment variables that are read as text: UTF-8, with or without a byte-order mark.

The content may be a secret, so no error may quote any of it.
"""

import codecs
import re

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # tried before UTF-16, because this mark begins with the one of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode(content: bytes) -> str:
    """The text without a byte-order mark. Raises ValueError, whose text says which encoding it has instead of UTF-8."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise ValueError(f"is {encoding}; save it as UTF-8")
    if zeros := content.count(0):
        # Of the bytes of ASCII letters, a half are zero in UTF-16, three quarters in UTF-32
        share = zeros / len(content)
        if share < 0.4:
            raise ValueError(f"must not have a zero byte (line {_line(content, content.index(0))})")
        raise ValueError(f"is {'UTF-16' if share < 0.6 else 'UTF-32'}; save it as UTF-8")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        where = _line(content, error.start)
        raise ValueError(f"is Latin-1 or another encoding that is not UTF-8 (line {where}); save it as UTF-8") from None


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def entries(text: str) -> list[tuple[int, str]]:
    """The lines with their numbers, stripped of surrounding spaces, without blank lines and comments (`#`)."""
    lines = ((number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
