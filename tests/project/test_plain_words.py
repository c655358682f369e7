"""Comments and docstrings avoid turns of phrase that readers of earlier versions had to guess at."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

# What is hard to read, an example of it, and what to write instead
HARD = (
    (
        r", for (they|there|(it|this|that) (is|was|has|costs|would|may|can|must)) ",
        "first, for it costs little",
        "because",
    ),
    (r"^\S+ is one\.?$", "ssl.SSLError is one", "the noun: ssl.SSLError is an OSError"),
    (r"\b(there|it|that|which) being\b", "there being nothing to end", "because"),
    (r"\bwhich is why\b", "the file is small, which is why it is read at once", "two sentences, the reason first"),
    (r"\bof these calls\.$", "Handlers of these calls.", "the noun: which calls"),
    (r"^(It|They|Its|Their) ", "It is asked again.", "the noun first: the operator is asked again"),
    (r"^Otherwise ", "Otherwise hooks would keep the loop running", "the case: hooks that are never released would"),
)
ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for part in ("lmdaemon", "tests", "benchmarks", "docs/examples") for file in (ROOT / part).rglob("*.py")
)


def texts(source: str) -> Iterator[str]:
    """The docstrings and comments of a module, each on one line; a comment of several lines is one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())
    comment, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            goes_on = token.start[0] == last + 1 and token.line.lstrip().startswith("#")
            if not goes_on:
                yield comment
                comment = ""
            comment, last = f"{comment} {text}".strip(), token.start[0]
    yield comment


@pytest.mark.parametrize(("pattern", "example"), [one[:2] for one in HARD])
def test_each_rule_finds_what_it_is_for(pattern: str, example: str) -> None:
    assert any(re.search(pattern, text) for text in texts(f"x = 1  # {example}\n"))
    assert any(re.search(pattern, text) for text in texts(f'"""{example}"""\n'))


def test_a_comment_of_several_lines_is_read_as_one() -> None:
    assert "first, for it costs little" in list(texts("# first, for\n# it costs little\n"))


def test_no_comment_is_written_in_these_ways() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {text!r}; write {instead}"
        for file in FILES
        for text in texts(file.read_text())
        for pattern, _, instead in HARD
        if re.search(pattern, text)
    ]
    assert found == []
