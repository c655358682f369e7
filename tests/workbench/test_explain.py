"""What was answered, in an integrator's words. And the daemon does not import the workbench."""

import subprocess
import sys

import pytest
from aiohttp import web
from commands import environment
from endpoints import PROVIDER, TOKEN, Endpoint, served, to
from multidict import CIMultiDict

from lmdaemon.dialects import SHIPPED
from lmdaemon.workbench import advice, explain
from lmdaemon.workbench.exchanges import Answer, Asked, Exchange
from lmdaemon.workbench.runner import Runner, chosen


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b'{"error":0,"description":"Success"}', "200, `error` is 0"),
        (200, b'{"error":"0"}', "200, `error` is 0"),
        (200, b"", "200, but the body is empty"),
        (200, b"<!DOCTYPE html><html>", "200, but the body is HTML"),
        (200, b"<?xml version='1.0'?>", "200, but the body is XML"),
        (200, b"OK", "200, but the body is text, not JSON"),
        (200, b'{"error":0', "200, but the body is malformed JSON"),
        (200, b"[" * 15000, "200, but the body is malformed JSON"),
        (200, b"[0]", "200, but the body is a list, where a JSON object is expected"),
        (200, b"0", "200, but the body is a number, where a JSON object is expected"),
        (200, b"{}", "200, but the object is empty"),
        (200, b'{"Error":0}', '200, but there is "Error", but no "error"'),
        (200, b'{"ERROR ":0}', '200, but there is "ERROR", but no "error"'),
        (200, b'{"errorCode":0}', '200, but there is "errorCode", but no "error"'),
        (200, b'{"message":"ok"}', '200, but there is no "error"'),
        (200, b'{"error":false}', "200, but `error` is false, where a number is expected"),
        (200, b'{"error":null}', "200, but `error` is null, where a number is expected"),
        (200, b'{"error":"no"}', '200, but `error` is the text "no", where a number is expected'),
        (200, b'{"error":{"code":0}}', "200, but `error` is an object, where a number is expected"),
        (200, b'{"error":7,"description":"no"}', '200, but `error` is 7, bad parameters ("no")'),
        (200, b'{"error":100}', "200, but `error` is 100, internal error, please retry"),
        (200, b'{"error":1}', "200, but `error` is 1"),
        (200, b"\x1f\x8b\x08", "200, but the body is compressed with gzip, which nobody asked for"),
        (200, '{"error":0}'.encode("utf-16"), "200, but the body is UTF-16, not UTF-8"),
        (200, b"\xff\xfe\xfd", "200, but the body is UTF-16, not UTF-8"),
        (200, b"caf\xe9", "200, but the body is not UTF-8"),
        (201, b'{"error":0}', "HTTP 201, and `error` is 0"),
        (302, b"", "HTTP 302, a redirect, which no sender follows"),
        (410, b"", "HTTP 410, which stops all sending to this operator"),
        (500, b"<html>", "HTTP 500, and the body is HTML"),
    ],
)
def test_an_answer_in_words(status: int, body: bytes, words: str) -> None:
    assert explain.answer(Answer(status, CIMultiDict(), body, True), SHIPPED["v4"]) == words


def test_an_answer_that_is_too_long_and_one_that_never_came() -> None:
    long = Answer(200, CIMultiDict(), b"{", False)
    assert explain.answer(long, SHIPPED["v4"]) == "200, but the body is longer than 16 KiB"
    assert explain.no_answer("timeout") == "no whole answer came in time"
    assert explain.no_answer("dns", "Name or service not known").endswith("(Name or service not known)")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"OK", 'Answer {"error": 0'),
        (204, b"", 'Answer {"error": 0'),
        (200, b'{"error":7}', "--player, --token-file"),
        (200, b'{"error":5}', "'playerId=p 1&sessionId=s' followed by the key"),
        (200, b'{"error":100}', "the server's log"),
        (401, b"", "https://USER:PASSWORD@"),
        (403, b"", "a firewall"),
        (404, b"<html>", "trailing slash"),
        (405, b"", "no POST at this path"),
        (415, b"", "application/x-www-form-urlencoded"),
        (502, b"<html>", "the proxy before it"),
    ],
)
def test_a_valid_notice_that_is_not_taken_has_a_next_step(status: int, body: bytes, words: str) -> None:
    asked = Asked("POST", "http://h/x", {}, b"hash=f00&sessionId=s&playerId=p+1")
    operator = to("http://h/x", sends=SHIPPED["pragmatic"])
    assert words in advice.of_valid(Exchange(asked, Answer(status, CIMultiDict(), body, True)), operator)


@pytest.mark.parametrize(
    ("cause", "detail", "words"),
    [
        ("connect", "", "Start the server"),
        ("dns", "", "host name"),
        ("timeout", "", "--timeout"),
        ("private_address", "", "allow_private_network"),
        ("connection_lost", "", "its log"),
        ("bad_http", "", "http://"),
        ("tls", "[SSL: WRONG_VERSION_NUMBER] wrong version number", "speaks no TLS"),
        ("tls", "certificate verify failed", "ca_file"),
    ],
)
def test_a_notice_that_got_no_answer_has_a_next_step(cause: str, detail: str, words: str) -> None:
    asked = Asked("POST", "http://h/x", {}, b"")
    assert words in advice.of_valid(Exchange(asked, None, cause, detail), to("http://h/x"))


async def test_an_endpoint_that_closes_each_connection_is_warned_about() -> None:
    class Closing(Endpoint):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            response = await super().handle(request)
            response.force_close()
            return response

    async with served(Closing()) as endpoint:
        checks = chosen(["connection.keepalive", "connection.idle"], [])
        report = await Runner(to(endpoint.url, provider_id=PROVIDER), checks=checks, token=TOKEN).run()
    assert {result.check.id: result.verdict for result in report.results} == {
        "connection.keepalive": "warn",
        "connection.idle": "pass",
        "answer.valid": "pass",
    }


def test_the_daemon_imports_nothing_of_the_workbench() -> None:
    script = (
        "import sys, lmdaemon.daemon, lmdaemon.commands.cli, lmdaemon.commands.serve\n"
        "print([name for name in sys.modules if 'workbench' in name or name in ('trustme', 'hdrh')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
