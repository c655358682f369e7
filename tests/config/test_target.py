"""An operator's URL is either sent exactly as it is written, as a raw socket sees it, or refused when the file is
read.
"""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from clocks import HandClock
from faults import look_up_by
from hypothesis import given
from hypothesis import strategies as st
from support import load, operator_table

from lmdaemon.config import target
from lmdaemon.config.findings import ConfigError
from lmdaemon.delivery.sender import Sender
from lmdaemon.log import NOT_A_URL, safe_url

AS_WRITTEN = [
    "/x?sp=%2Ftriggers%2Frun&sig=a%2Bb%2Fc%3D",
    "/%3A%40%2C%7E%41%c3%C3%a9",
    "/[]|{}^`?[]|{}^`",
    "/x/../y/./z/..",
    "/..",
    "//x//y/",
    "/x?",
    "/x?&",
    "/x?&&a=&=b&a",
    "/x?a?b=/c/../d",
    "/x?+*'$();:,!~-_.",
    "/+*'$();:,!~-_.=&",
    "/100%&%zz%?%",
    "/a;b=c/d,e",
    "/X/V4/SessionExpired",
    "/",
]


@contextlib.asynccontextmanager
async def raw_operator(received: list[bytes]) -> AsyncIterator[int]:
    """An operator that keeps the head of each request unchanged. Yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 11\r\n\r\n{"error":0}')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def head_of(tmp_path: Path, path: str, *, user_info: str = "", host: str = "127.0.0.1") -> list[str]:
    """The lines of a request's head, sent by the daemon's own sender to an operator with this URL."""
    received: list[bytes] = []
    async with raw_operator(received) as port:
        toml = operator_table("acme", f"http://{user_info}{host}:{port}{path}")
        sender = Sender(HandClock())
        try:
            await sender.post(load(tmp_path / "config.toml", toml).operators["acme"], "msg_1", b"{}")
        finally:
            await sender.close()
    (head,) = received
    return head.decode("latin-1").split("\r\n")


@pytest.mark.parametrize("written", AS_WRITTEN)
async def test_path_and_query_arrive_byte_for_byte(tmp_path: Path, written: str) -> None:
    assert (await head_of(tmp_path, written))[0] == f"POST {written} HTTP/1.1"


@pytest.mark.parametrize(("written", "sent"), [("", "/"), ("?", "/?"), ("?a=%2F", "/?a=%2F")])
async def test_a_path_that_is_not_written_is_a_slash(tmp_path: Path, written: str, sent: str) -> None:
    assert (await head_of(tmp_path, written))[0] == f"POST {sent} HTTP/1.1"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='#@\\"<>'), max_size=60))
def test_whatever_is_written_is_what_aiohttp_is_given(written: str) -> None:
    assert target.read("https://h/" + written).url.raw_path_qs == "/" + written


@pytest.mark.parametrize("host", ["wallet.example", "op_1.bücher.example", "203.0.113.7", "[2606:4700::1111]"])
@pytest.mark.parametrize("written", ["/cb/@acme?q=secret@x", "/@a/@b", "/cb?mail=ops@acme.example&to=@", "/cb@"])
def test_an_at_behind_what_is_certainly_the_host_is_as_written(host: str, written: str) -> None:
    found = target.read(f"https://{host}{written}")
    assert (found.url.raw_path_qs, found.authorization) == (written, None)
    assert safe_url(f"https://{host}{written}") == f"https://{host}{written.partition('?')[0]}"


@pytest.mark.parametrize(
    "text",
    [
        "https://h/@x",  # a user name without a dot
        "https://user/s3cret@op.example/",
        "https://user/s3cret?x@op",
        "https://user?s3cret@op.example/",
        "https://user:12/s3cret@op/x",
        "https://user.name:12/s3cret@op/x",
        "https://user.name?s3cret@op/x",
        "https://user.name/s3cret@op.example/x",
        "https://user.name/s3cret@op:8443/x",
        "https://user.name/s3cret@[2606:4700::1111]/x",
        "https://corp.example/user:s3cret@op/x",
        "https://corp.example/user?:s3cret@op/x",
        "https://user:pass.word/s3cret@op/x",
        "https://user:p@ss.word/s3cret@op/x",
        "https://user.2/s3cret@op/x",
        "https://user.name/x#s3cret@op/x",
    ],
)
def test_an_at_that_may_end_user_info_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must have %2F"):
        target.read(text)
    assert safe_url(text) == NOT_A_URL


@pytest.mark.parametrize(
    ("user_info", "credentials"),
    [
        ("u:p", "u:p"),
        ("u:p%E2%82%AC", "u:p€"),
        ("caf%C3%A9:x", "café:x"),
        ("café:€", "café:€"),
        ("user%40casino:a%3Ab%2Fc%25", "user@casino:a:b/c%"),
        ("a+b:c+d", "a+b:c+d"),
        ("key", "key:"),
        (":secret", ":secret"),
        ("u:p:q", "u:p:q"),
    ],
)
async def test_user_info_is_sent_as_utf_8(tmp_path: Path, user_info: str, credentials: str) -> None:
    """As in RFC 7617, section 2.1, and as curl and browsers do."""
    value = base64.b64encode(credentials.encode()).decode()
    assert f"Authorization: Basic {value}" in await head_of(tmp_path, "/", user_info=user_info + "@")


@pytest.mark.parametrize("user_info", ["", "@", ":@"])
async def test_without_user_and_password_nothing_is_sent_for_them(tmp_path: Path, user_info: str) -> None:
    assert not [line for line in await head_of(tmp_path, "/", user_info=user_info) if "Authorization" in line]


@pytest.mark.parametrize(
    ("host", "asked_for"),
    [
        ("Wallet.Example", "wallet.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("हिन्दी.example", "xn--j2bd4cyah0f.example"),
        ("op_1.example", "op_1.example"),
        ("wallet.example.", "wallet.example."),
        ("[2606:4700:0:0::1111]", "2606:4700::1111"),
    ],
)
def test_an_international_name_is_asked_for_as_it_stands_in_dns(host: str, asked_for: str) -> None:
    assert target.read(f"https://{host}/x").url.raw_host == asked_for


async def test_the_host_is_sent_as_it_stands_in_dns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    real = socket.getaddrinfo
    asked = []

    def getaddrinfo(host: str, *rest: object, **named: object) -> object:
        asked.append(host)
        return real("127.0.0.1", *rest, **named)  # type: ignore[arg-type]

    look_up_by(monkeypatch, getaddrinfo)
    head = await head_of(tmp_path, "/", host="bücher.example")
    (named,) = (line for line in head if line.startswith("Host: "))
    assert named.startswith("Host: xn--bcher-kva.example:")
    assert asked == ["xn--bcher-kva.example"]


REFUSED = [
    ("https://h/a b", target.CHARACTERS_RULE),
    ("https://h/a\tb", target.CHARACTERS_RULE),
    ("https://h/a\r\nX: y", target.CHARACTERS_RULE),
    ("https://h/a\x7fb", target.CHARACTERS_RULE),
    ("https://h/a\u00a0b", target.CHARACTERS_RULE),
    *((f"https://h/a{character}b", target.CHARACTERS_RULE) for character in '\\"<>'),
    (" https://h/", target.CHARACTERS_RULE),
    ("https://h/ä", target.ASCII_RULE),
    ("https://h/x?q=€", target.ASCII_RULE),
    ("https://h/x#", target.FRAGMENT_RULE),
    ("https://h/x?a#b", target.FRAGMENT_RULE),
    ("https://h#b", target.FRAGMENT_RULE),
    ("https://h/@x", target.USER_INFO_RULE),
    ("https://u:12/3@h/", target.USER_INFO_RULE),
    ("https://u:a[b]@h/", target.USER_INFO_RULE),
    ("https://u\u2100:p@h/", target.USER_INFO_RULE),
    ("", target.SHAPE_RULE),
    ("h/x", target.SHAPE_RULE),
    ("ftp://h/x", target.SHAPE_RULE),
    ("https:/h/x", target.SHAPE_RULE),
    ("https:///x", target.SHAPE_RULE),
    ("https://?x", target.SHAPE_RULE),
    ("https://u@/x", target.HOST_RULE),
    ("https://:443/x", target.HOST_RULE),
    ("https://h:0/", target.HOST_RULE),
    ("https://h:65536/", target.HOST_RULE),
    ("https://h:x/", target.HOST_RULE),
    ("https://[::1/", target.HOST_RULE),
    ("https://[::1]x/", target.HOST_RULE),
    ("https://::1/", target.HOST_RULE),
    ("https://[1.2.3.4]/", target.HOST_RULE),
    ("https://[fe80::1%25eth0]/", target.HOST_RULE),
    ("https://[v1.x]/", target.HOST_RULE),
    ("https://op%2Fx/", target.HOST_RULE),
    ("https://op{x}/", target.HOST_RULE),
    ("https://op\u2100.example/", target.HOST_RULE),
    ("https://a..b/", target.HOST_RULE),
    ("https://.a/", target.HOST_RULE),
    (f"https://{'a' * 64}.example/", target.HOST_RULE),
    (f"https://{'ü' * 64}.example/", target.HOST_RULE),
    (f"https://{'a.' * 128}example/", target.HOST_RULE),
    ("https://caf%E9:x@h/", target.CREDENTIALS_RULE),
    ("https://u:%ff@h/", target.CREDENTIALS_RULE),
    ("https://u%3Av:p@h/", target.CREDENTIALS_RULE),
    ("https://u:p%0A@h/", target.CREDENTIALS_RULE),
    ("https://u:p%C2%85@h/", target.CREDENTIALS_RULE),
]


@pytest.mark.parametrize(("text", "rule"), REFUSED, ids=[repr(text)[1:30] for text, _ in REFUSED])
def test_what_cannot_be_sent_so_is_an_error_that_names_the_rule(text: str, rule: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole
        target.read(text)
    assert str(caught.value) == rule


@given(st.text(max_size=40) | st.text("[]@:/?#%\u2100ab", max_size=8))
def test_what_is_taken_can_be_shown_and_nothing_breaks_it_otherwise(text: str) -> None:
    for url in (text, "https://" + text, f"https://{text}@h/", f"https://u:{text}@h/{text}?{text}"):
        with contextlib.suppress(ValueError):
            target.read(url)
            assert safe_url(url) != NOT_A_URL


def test_an_address_inside_is_known_by_what_is_connected_to() -> None:
    for host in ("127.0.0.1", "[::1]", "localhost", "127.1", "１２７.0.0.1", "①②⑦.1", "[::ffff:10.0.0.1]"):
        assert target.read(f"https://{host}/").private, host
    assert not target.read("https://wallet.example/").private


def test_it_shows_no_secret() -> None:
    assert "hush" not in repr(target.read("https://u:hush@h/x?hush"))


def test_a_file_is_told_the_rule_and_no_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "config.toml", operator_table("acme", "https://u:hush@h/ä?hush"))
    (finding,) = caught.value.findings
    assert finding.endswith(f"operators.acme.url: {target.ASCII_RULE} (got 'https://h/ä')")
