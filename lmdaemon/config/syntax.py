"""Says what is wrong with a file that is not valid TOML. A line of the file is never quoted: it may hold a secret."""

import re

UNQUOTED = ": text needs quotation marks"
UNCLOSED = ": a quotation mark is missing in this line"

_PLACE = re.compile(r"\(at line ([0-9]+), column ([0-9]+)\)$")
_OF_A_VALUE = ("Invalid value", "Expected newline or end of document", "Unclosed array", "Unclosed inline table")
_BEFORE = re.compile(r"(^|[=\[,])\s*[\w.:+-]*$")  # from the beginning of a value on, no quotation mark
_AFTER = re.compile(r"(?!(true|false)\b)[^\s\"'#,=\[\]{}]", re.IGNORECASE)


def complaint(text: str, error: ValueError | RecursionError) -> str:
    """The parser's error for this text, with a hint if it is one of the usual slips with quotation marks."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    message = str(error)
    if message.startswith(("Unterminated string", 'Expected "\'"')):
        return f"{message}: a quotation mark is missing"
    place = _PLACE.search(message)
    return message if place is None else message + _hint(message, text.split("\n")[int(place[1]) - 1], int(place[2]))


def _hint(message: str, line: str, column: int) -> str:
    before, after = line[: column - 1], line[column - 1 :]
    if "character '\\n'" in message:
        return UNCLOSED
    if not message.startswith(_OF_A_VALUE):
        return ""
    if _BEFORE.search(before) and _AFTER.match(after):
        return UNQUOTED
    return UNCLOSED if line.count('"') % 2 else ""
