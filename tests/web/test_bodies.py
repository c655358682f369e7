"""The body of a bulk touch: what is accepted, what is refused and why, and that no body blocks the event loop for
long.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from chance import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from support import raw_connection, serving

from lmdaemon.model import id_problem
from lmdaemon.shapes import BULK_BODY_MAX, BULK_IDS_MAX
from lmdaemon.web.bodies import session_ids


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"sessionIds":[]}', []),
        (b' { "sessionIds" : [ "a" , "b" , "a" ] } ', ["a", "b", "a"]),
        (b'\xef\xbb\xbf{"sessionIds":["a"]}', ["a"]),
        (b'{"session\\u0049ds":["a"]}', ["a"]),
        (b'{"sessionIds":["a"],"sessionIds":["a"]}', ["a"]),
        (b'{"sessionIds":["a:b",":","\\"","\\\\","\\":"]}', ["a:b", ":", '"', "\\", '":']),
        (b'{"sessionIds":[".","..","\\u00e9","\xc3\xa9"]}', [".", "..", "é", "é"]),
    ],
)
def test_ids_are_read(body: bytes, ids: list[str]) -> None:
    assert session_ids(body) == ids


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "malformed JSON: Input data was truncated"),
        (b'{"sessionIds":["a" "b"]}', "malformed JSON: expected ',' or ']' (byte 19)"),
        (b'{"sessionIds":["\\ud800abc"]}', "malformed JSON: unexpected end of escaped utf-16 surrogate pair (byte 22)"),
        (b'{"sessionIds":["\xff"]}', "body: must be UTF-8"),
        (b"[]", "body: Expected `object`, got `array`"),
        (b"{}", "body: Object missing required field `sessionIds`"),
        (b'{"sessionIds":[],"more":1}', "body: Object contains unknown field `more`"),
        (b'{"sessionIds":null}', "sessionIds: Expected `array`, got `null`"),
        (b'{"sessionIds":["a",5]}', "sessionIds[1]: Expected `str`, got `int`"),
        (b'{"sessionIds":["a",""]}', "sessionIds[1]: must not be empty"),
        (b'{"sessionIds":["a\\u0000"]}', "sessionIds[0]: must not contain control characters"),
        (b'{"sessionIds":["a"],"sessionIds":["b"]}', "field 'sessionIds' stands twice with different values"),
        (b'{"sessionIds":["a"],"session\\u0049ds":[]}', "field 'sessionIds' stands twice with different values"),
    ],
)
def test_what_is_no_list_of_ids_is_refused_with_its_place(body: bytes, problem: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the text is compared
        session_ids(body)
    assert str(refusal.value) == problem


@pytest.mark.parametrize("id_text", ['"a"', r'"\""', r'"\\"', r'"a\\\""'])
def test_ten_thousand_ids_are_read_and_one_more_is_not(id_text: str) -> None:
    """The limit is the same in whatever way the ids are escaped."""

    def body(count: int) -> bytes:
        return f'{{"sessionIds":[{",".join([id_text] * count)}]}}'.encode()

    assert session_ids(body(BULK_IDS_MAX)) == [json.loads(id_text)] * BULK_IDS_MAX
    with pytest.raises(ValueError, match=f"at most {BULK_IDS_MAX} ids"):
        session_ids(body(BULK_IDS_MAX + 1))
    with pytest.raises(ValueError, match=f"at most {BULK_IDS_MAX} ids"):
        session_ids(body(3 * BULK_IDS_MAX))


def test_the_name_of_an_unknown_field_is_not_repeated_whole() -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the text is compared
        session_ids(b'{"' + b"k" * 100_000 + b'":1}')
    assert len(str(refusal.value)) < 300


KEYS = st.sampled_from(["sessionIds", "sessionIds", "sessionids", ""])
IDS = st.lists(
    st.text(max_size=4) | st.sampled_from([":", '"', "\\", '":', "a"]) | st.none() | st.integers(), max_size=3
)


@settings(max_examples=examples(500))
@given(st.lists(st.tuples(KEYS, IDS | st.none()), max_size=3), st.booleans())
def test_a_body_is_read_as_a_plain_reader_would(pairs: list[tuple[str, Any]], ascii_only: bool) -> None:
    written = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=ascii_only)}" for key, value in pairs]
    values = [value for _, value in pairs]
    good = (
        bool(pairs)
        and all(key == "sessionIds" for key, _ in pairs)
        and all(isinstance(value, list) and value == values[0] for value in values)
        and all(isinstance(one, str) and id_problem(one) is None for one in values[0])
    )
    try:
        found: Any = session_ids(("{" + ", ".join(written) + "}").encode())
    except ValueError:
        found = None
    assert found == (values[0] if good else None)


def filled(before: bytes, piece: bytes, after: bytes) -> bytes:
    """A body of 4 MiB, filled with copies of `piece`."""
    return before + piece * ((BULK_BODY_MAX - len(before) - len(after)) // len(piece)) + after


def listed(text: str) -> bytes:
    return json.dumps({"sessionIds": [f"{n:06}{text}" for n in range(BULK_IDS_MAX)]}, ensure_ascii=False).encode()


HONEST = listed("世" * 120)
LARGE = {
    "honest": (HONEST, 200),
    "honest, with colons": (listed("é:" * 115), 200),
    "honest, not printable": (listed("\u00a0" * 190), 200),
    "objects": (filled(b"[", b"{},", b"{}]"), 400),
    "objects with a key": (filled(b'{"sessionIds":[', b'{"a":1},', b"{}]}"), 400),
    "objects under another key": (filled(b'{"sessionIds":[],"x":[', b"{},", b"{}]}"), 400),
    "a key again and again": (filled(b"{", b'"a":{},', b'"a":{}}'), 400),
    "the key again and again": (filled(b"{", b'"sessionIds":[],', b'"sessionIds":[]}'), 400),
    "long lists under one key": (b"{" + b",".join([b'"a":[' + b"1," * 20_000 + b"1]"] * 100) + b"}", 400),
    "too many ids": (filled(b'{"sessionIds":[', b'"a",', b'"a"]}'), 400),
    "too many empty ids": (filled(b'{"sessionIds":[', b'"",', b'""]}'), 400),
    "a long id": (filled(b'{"sessionIds":["', "\u2028".encode(), b'"]}'), 400),
    "a long id of quotes": (filled(b'{"sessionIds":[":', b'\\"', b'"]}'), 400),
    "a long key": (filled(b'{"', b"k", b'":1}'), 400),
}


@pytest.fixture
def longest_step(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest time for which one step has occupied the event loop so far, in seconds of CPU time. Other processes
    on a busy machine do not count.
    """
    longest = [0.0]
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        before = time.thread_time()
        run(handle)
        longest[0] = max(longest[0], time.thread_time() - before)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    return longest


def reading_s() -> float:
    """The CPU time of the fastest parser for 4 MiB of ordinary ids on this machine, in seconds: about 0.006."""
    took = []
    for _ in range(3):
        before = time.thread_time()
        orjson.loads(HONEST)
        took.append(time.thread_time() - before)
    return min(took)


async def test_no_large_body_holds_the_event_loop(tmp_path: Path, longest_step: list[float]) -> None:
    """A body may take 20 ms where parsing takes 6. Turning every value into Python objects took 13 to 120 times as long
    as parsing.
    """
    async with serving(tmp_path, '[operators.acme]\nprovider_id = "p"\n') as daemon:
        held: dict[str, float] = {}
        for name, (body, status) in LARGE.items():
            head = (
                "POST /v1/operators/acme/sessions/touch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            )
            request = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            async with raw_connection(daemon.api) as peer:
                longest_step[0] = 0.0
                await peer.send(request)
                assert (await peer.answer()).status == status, name
            held[name] = longest_step[0]
    limit_s = 10 * reading_s()
    assert {name: seconds for name, seconds in held.items() if seconds > limit_s} == {}, limit_s
