"""Errors that all calls of the private API have in common: no permission, no such object, an unreadable request."""

import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from caller import ACME, CONFIG, EVERY_CALL, NO_CALLS, OPENING, Caller, path_of
from support import LISTEN, serving

from lmdaemon.web.routes import CALLS

WRONG_AUTHORIZATIONS = [
    *("", "Bearer", "Bearer ", "Bearer wrong", "Bearer token-one2", "Bearer token-on", "bearer TOKEN-ONE", "token-one"),
    *("Basic token-one", "Bearer token-one, Bearer token-one", "Bearer token-one token-one", "Bearer \u00ff"),
]
UNKNOWN = {
    "operator": ["nobody", "ACME", "%FF", "a" * 300],
    "session": ["nobody"],
    "delivery": ["msg_1_0123456789abcdef0123", "msg_999", "msg_", "1", "%FF", "msg_1_x", "s1"],
}
NO_PATHS = [
    "/",
    "/v1",
    "/v1/",
    "/v1/operators/",
    ACME,
    ACME + "/sessions/",
    "/V1/operators",
    "/health//",
]
NO_JSON = ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""]
NO_CODINGS = ["gzip", "deflate", "br", "zstd", "x-gzip", "unknown"]
WITH_BODY = [call for call in CALLS if call.has_body]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Caller]:
    """A daemon with one session that has ended, and its delivery."""
    async with serving(tmp_path, LISTEN + CONFIG.format(url="http://127.0.0.1:1/")) as daemon:
        caller = Caller(daemon)
        await caller.open()
        await caller.close()
        yield caller


async def test_without_a_valid_token_every_call_answers_401(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("token-one\n")
    toml = LISTEN + 'token_file = "tokens"\n' + CONFIG.format(url="http://127.0.0.1:1/")
    async with serving(tmp_path, toml) as daemon:
        api = Caller(daemon)
        for authorization in WRONG_AUTHORIZATIONS:
            headers = {"Authorization": authorization} if authorization else {}
            for method, path in [*EVERY_CALL, *NO_CALLS]:
                if (method, path) == ("GET", "/health"):
                    continue  # /health without a token answers as on the public side
                response, _ = await api.answer(method, path, 401, headers=headers)
                assert response.headers["WWW-Authenticate"] == "Bearer", (method, path, authorization)


@pytest.mark.parametrize("what", UNKNOWN)
async def test_what_is_not_there_answers_404(api: Caller, what: str) -> None:
    """Tried is every call with an operator, a session or a delivery in its path. Left out is openSession, which makes
    the session.
    """
    placeholder = {"operator": "{operator}", "session": "{sessionId}", "delivery": "{id}"}[what]
    asked = [call for call in CALLS if placeholder in call.path and (what, call.name) != ("session", "openSession")]
    assert asked
    for call in asked:
        body = {"json": {"note": "nobody wants it"}} if what == "delivery" and call.has_body else {}
        for name in UNKNOWN[what]:
            problem = await api(call.method, path_of(call, **{what: name}), 404, **body)
            assert problem["code"] == f"unknown-{what}", (call.name, name)


async def test_an_unknown_path_answers_404(api: Caller) -> None:
    for path in NO_PATHS:
        assert (await api("GET", path, 404))["code"] == "unknown-path", path


async def test_another_method_answers_405_with_those_that_are_allowed(api: Caller) -> None:
    allowed = defaultdict(set)
    for call in CALLS:
        allowed[path_of(call)] |= {call.method} | ({"HEAD"} if call.method == "GET" else set())
    # A session may have the id "touch", whose calls share this path
    allowed[ACME + "/sessions/touch"] |= allowed[ACME + "/sessions/s1"]
    for path, methods in allowed.items():
        for method in {"GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"} - methods:
            response, _ = await api.answer(method, path, 405)
            assert response.headers["Allow"] == ", ".join(sorted(methods)), (method, path)


async def test_a_body_that_is_no_json_answers_415_and_says_what_was_seen(api: Caller) -> None:
    body = json.dumps(OPENING).encode()
    assert WITH_BODY
    for call in WITH_BODY:
        for kind in NO_JSON:
            options = {"headers": {"Content-Type": kind} if kind else {}, "skip_auto_headers": ["Content-Type"]}
            problem = await api(call.method, path_of(call), 415, data=body, **options)
            assert repr(kind) in problem["detail"], call.name


async def test_a_compressed_body_answers_415_unread(api: Caller) -> None:
    for call in WITH_BODY:
        for coding in NO_CODINGS:
            headers = {"Content-Type": "application/json", "Content-Encoding": coding}
            problem = await api(call.method, path_of(call), 415, data=b"not compressed at all", headers=headers)
            assert coding in problem["detail"], call.name
