"""Secrets are masked in whatever notation a server sends them back, and no part of a secret remains."""

import html
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import load, operator_table

from lmdaemon import masks
from lmdaemon.dialects import hash_of
from lmdaemon.masks import MASK, Mask
from lmdaemon.model import id_problem

PLAIN = re.compile("[A-Za-z0-9._-]")
NOTATIONS: dict[str, Callable[[str], str]] = {
    "json": lambda text: json.dumps(text)[1:-1],
    "json in utf-8": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "json of PHP": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "json of .NET": lambda text: "".join(
        one if PLAIN.fullmatch(one) else json.dumps(one)[1:-1] if ord(one) > 127 else f"\\u{ord(one):04X}"
        for one in text
    ),
    "url": quote,
    "url's part": lambda text: quote(text, safe=""),
    "url in small letters": lambda text: quote(text, safe="").lower() if text.islower() else quote(text),
    "form": quote_plus,
    "html": html.escape,
    "html of PHP": lambda text: html.escape(text).replace("&#x27;", "&#039;"),
    "html of Go": lambda text: html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    "html in numbers": lambda text: "".join(one if PLAIN.fullmatch(one) else f"&#{ord(one)};" for one in text),
}
SECRETS = st.text(min_size=1, max_size=40).filter(lambda text: not id_problem(text, 4096))
AWKWARD = ["tök/en+1==", 'a"b\\c', "\\", "\\\\\\n", "&amp;x", "%41", "a b", "😀 x", "***", "-", "é" * 20, "ΑΣ"]


@pytest.mark.parametrize("notation", NOTATIONS)
def test_an_awkward_secret_is_hidden_in_each_notation(notation: str) -> None:
    for secret in AWKWARD:
        spelt = NOTATIONS[notation](secret)
        assert Mask([secret])(f"\n{spelt}\n") == f"\n{MASK}\n", secret


@given(SECRETS, st.sampled_from(list(NOTATIONS)), st.sampled_from(list(NOTATIONS)))
def test_a_secret_is_hidden_in_a_notation_within_another(secret: str, inner: str, outer: str) -> None:
    """Left out are nestings that no software writes: HTML inside a URL, and numeric escapes inside numeric escapes."""
    assume(not (outer.startswith(("url", "form", "html in numbers", "json of .NET")) and inner.startswith("html")))
    assume(not (outer.startswith(("html in numbers", "json of .NET")) and inner != outer))
    spelt = NOTATIONS[outer](NOTATIONS[inner](secret))
    mask = Mask([secret])
    assert mask(f"\n{spelt}\n") == f"\n{MASK}\n"
    assert len(spelt) <= mask.longest


@given(SECRETS, st.integers(0, 60))
def test_of_a_secret_that_was_cut_off_nothing_is_left(secret: str, cut: int) -> None:
    cut_off = ("." * 20 + secret)[: 20 + cut]
    shown = Mask([secret]).text_of(cut_off.encode(), complete=False)
    assert set(shown) <= {".", "*"}


TOKEN = "fSYFZMScpZ01FhR26r59GexREh1xHgEY"


@pytest.mark.parametrize(
    ("answered", "shown"),
    [
        (f"Unexpected end of JSON: {TOKEN[:20]}", "Unexpected end of JSON: ***"),
        (f"Unexpected end of JSON: {TOKEN[:20]}...", "Unexpected end of JSON: ***..."),
        (f"near '...{TOKEN[-9:]}\"}}'", "near '...***\"}'"),
        (f"at {TOKEN[4:12]} and {TOKEN[:8].lower()}", "at *** and ***"),
        (f"{TOKEN[:16]}\r\n{TOKEN[16:]}", "***\r\n***"),
        (f"{TOKEN[:-8]}=\n{TOKEN[-8:]}", "***=\n***"),
        (f"{TOKEN[8:]}{TOKEN[:8]}", "***"),
        (f"no session {TOKEN[:7]}", f"no session {TOKEN[:7]}"),
    ],
)
def test_of_a_secret_no_eight_characters_in_a_row_are_left(answered: str, shown: str) -> None:
    assert Mask([TOKEN, "short"])(answered) == shown


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig"])
def test_an_answer_is_decoded_before_secrets_are_looked_for(encoding: str) -> None:
    answered = f'{{"error":7,"description":"no {TOKEN}, Zürich 😀"}}'
    for body in (answered, f"<html>{TOKEN}</html>"):
        assert Mask([TOKEN]).beginning_of(body.encode(encoding), complete=True) == body.replace(TOKEN, MASK)


def test_other_text_stays_as_it_is() -> None:
    text = json.dumps({"error": 7, "description": 'no such "player" – ç\\ %41 &amp; \n'})
    assert Mask(["tok-3n", "secret/+="])(text) == text
    assert Mask([])(text) == Mask(["", None])(text) == text
    assert Mask([]).text_of(b"\xef\xbb\xbfa\xff", complete=True) == "a\ufffd"


def test_text_made_to_be_slow_is_not(tmp_path: Path) -> None:
    """Masking takes time in proportion to the text, whatever the text. Compared are two sizes, not a time on this
    machine: sixteen times the text may not take a hundred times as long.
    """

    def took(size: int) -> float:
        best = 1.0
        for _ in range(3):
            began = time.process_time()
            for unit in ("\\", "&amp;", "%25", "0", "&#0"):
                for secret in ('"a', "\\a", '\\\\\\"""a', "&&a", "%%a", "0a", " a"):
                    Mask([secret])("a" + unit * size)
            best = min(best, time.process_time() - began)
        return best

    took(100)
    assert took(16_000) < 100 * took(1000)


def test_a_secret_made_to_be_slow_is_not() -> None:
    """An operator may choose both a token and an answer so that masking is slow. Compared are two secrets, not a time
    on this machine: a secret whose characters are written differently in each notation may not take twenty times as
    long as a secret of letters.
    """
    text = "aa" + "a\\" * 1000 + "%25252f" * 500 + "&amp;amp;" * 500 + "\\u005c" * 500

    def took(secret: str) -> float:
        best = 1.0
        for _ in range(3):
            began = time.process_time()
            Mask([secret]).text_of(text.encode(), complete=False)
            best = min(best, time.process_time() - began)
        return best

    letters = took("ab" * 2048)
    for secret in (
        "+/" * 2047 + "aa",
        "/" * 4096,
        "\\" * 4094 + "aa",
        "é" * 4096,
        "%2f" * 1365,
        "".join(map(chr, range(0x4E00, 0x5E00))),
    ):
        assert took(secret) < 20 * letters, secret[:10]


def test_of_a_long_answer_its_beginning_is_kept_with_nothing_of_a_secret() -> None:
    mask = Mask(["tok/en"])
    answer = "." * (masks.SHOWN_MAX - 4) + "tok\\/en" + "." * 20_000
    assert mask.beginning_of(answer.encode(), complete=True) == ("." * (masks.SHOWN_MAX - 4) + MASK + ".")
    assert mask.beginning_of(b"tok/en, refused", complete=True) == f"{MASK}, refused"


@pytest.mark.parametrize("secret", ["+/" * 60, "é" * 4096, TOKEN * 100, '"' * 9, "\\" * 50 + "a"])
def test_a_long_answer_without_a_secret_is_kept(secret: str) -> None:
    for encoding in ("utf-8", "utf-16", "utf-32"):
        answered = ("x" * 9000).encode(encoding)
        assert Mask([secret]).beginning_of(answered, complete=True) == "x" * masks.SHOWN_MAX


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("secret", [TOKEN, "+/" * 60, 'tök/en"\\<1==' * 3, "-/-", "😀é" * 10])
def test_of_a_long_secret_that_was_cut_off_anywhere_nothing_is_left(secret: str, notation: str) -> None:
    spelt = NOTATIONS[notation](secret)
    mask = Mask([secret])
    for cut in range(len(spelt) + 1):
        shown = mask.text_of(("." * 2000 + spelt[:cut]).encode(), complete=False)
        assert set(shown) <= {".", "*"}, spelt[:cut]
        assert shown.startswith("." * 1000)


@pytest.mark.parametrize(("before", "after"), [("v4", "pragmatic"), ("pragmatic", "v4")])
def test_a_notice_of_a_dialect_no_longer_in_force_hides_its_secrets(tmp_path: Path, before: str, after: str) -> None:
    """The hash stands in a field that the dialect in force does not have."""
    (tmp_path / "hash.key").write_text("the-hash-key")
    toml = operator_table("acme", "http://wallet.example/", dialect=after, accept=[after], hash_key_file="hash.key")
    operator = load(tmp_path / "config.toml", toml).operators["acme"]
    bodies = {
        "v4": b'{"hash":"the-hash-value","token":"the-token"}',
        "pragmatic": b"hash=the-hash-value&token=the-token",
    }
    assert masks.of_notice(operator, None, bodies[before])("the-hash-value the-token") == f"{MASK} {MASK}"


def test_what_a_notice_holds_and_was_made_with_is_hidden(tmp_path: Path) -> None:
    for name, text in (("hash.key", "the-hash-key"), ("signing", "whsec_" + "A" * 44)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    toml = operator_table(
        "acme",
        "http://user:p%40ss@wallet.example/path?key=in-the%2Fquery&alone",
        dialect="pragmatic",
        accept=["pragmatic"],
        hash_key_file="hash.key",
        signing_secret_file="signing",
    )
    operator = load(tmp_path / "config.toml", toml).operators["acme"]
    fields = {"providerId": "acme", "sessionId": "s", "playerId": "p", "token": "the/token"}
    hashed = hash_of(fields.items(), "hash", "the-hash-key")
    body = f"hash={hashed}&providerId=acme&sessionId=s&playerId=p&token=the%2Ftoken".encode()
    mask = masks.of_notice(operator, None, body)
    secrets = ["the/token", hashed, hashed.upper(), "the-hash-key", "A" * 44, "user", "p@ss", "p%40ss"]
    secrets += ["in-the/query", "in-the%2Fquery", "alone", "dXNlcjpwQHNz"]
    assert [secret for secret in secrets if mask(f"({secret})") != f"({MASK})"] == []
    signature = "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4="
    for spelt in (signature, quote(signature, safe=""), json.dumps(signature).replace("/", "\\/")[1:-1]):
        comma = spelt[2:].partition("K5")[0]
        assert mask(f"signature: {spelt} {spelt}.") == f"signature: v1{comma}{MASK} v1{comma}{MASK}."
    assert mask("sessionId=s&playerId=p&providerId=acme") == "sessionId=s&playerId=p&providerId=acme"
