"""Operators that hang, flood, lie and break off connections, with the daemon as a process. None of them delays
another.
"""

import contextlib
import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from chance import FULL
from operators import (
    CLOSE,
    HANG,
    RESET,
    SUCCESS,
    Door,
    Operator,
    Operators,
    Step,
    Steps,
    answer,
    dripping,
    endless,
    make_certificates,
)
from processes import Process, process, wait_for

TWINS = 32 if FULL else 6  # deliveries that hang while the good operator is served
GOOD = 50 if FULL else 8
MEMORY_KIB = 64 * 1024
GIB = 2**30
BLOCK = bytes(64 * 1024)
NO_GRACE = '[sessions]\nrestart_grace = "0s"\n'


@dataclass(frozen=True)
class Row:
    """One hostile operator, and what the daemon must make of it. `error` and `status` are those of every attempt."""

    name: str
    steps: Steps
    error: str | None
    status: int | None = None
    state: str = "dead"
    attempts: int = 2  # the schedule of these operators has one wait
    door: Door = "plain"
    waits_s: float | None = None  # how long Retry-After makes the whole operator wait

    @property
    def hangs(self) -> bool:
        return self.error == "timeout"


def hangs(name: str, steps: Steps = (), door: Door = "plain") -> Row:
    return Row(name, steps, "timeout", door=door)


def delivered(name: str, steps: Steps) -> Row:
    return Row(name, steps, None, 200, "delivered", attempts=1)


def says(error: str) -> bytes:
    return answer(f'{{"error": {error}, "description": ""}}')


def chunked(*chunks: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(c), c) for c in chunks
    )


def gzip_bomb() -> bytes:
    """An answer of 10 MiB of zeros, compressed to 10 KiB. If it were unpacked, the limit on what is read would not hide
    that.
    """
    return answer(gzip.compress(bytes(10 * 2**20)), "200 OK", "Content-Encoding: gzip")


def too_many(retry_after: str | Callable[[], str], waits_s: float | None) -> Row:
    attempts, state = (2, "dead") if waits_s is None else (1, "pending")
    name = "in-half-an-hour" if callable(retry_after) else retry_after[:12]

    def steps() -> Iterable[Step]:
        value = retry_after() if callable(retry_after) else retry_after
        return (answer("", "429 Too Many Requests", f"Retry-After: {value}"),)

    return Row(f"429-retry-after-{name}", steps, "status_429", 429, state, attempts, waits_s=waits_s)


def in_half_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=1800), usegmt=True)


# Replaced by the address of the trap, a server that stands for 169.254.169.254
INSIDE = "http://inside/latest/meta-data/iam/"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
HALF = OK % 100 + b'{"error": 0'
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

HANGING = [
    hangs("hang-before-accept", door="full"),
    hangs("hang-in-tls-handshake", door="mute"),
    hangs("hang-in-headers", (b"HTTP/1.1 200 OK\r\nContent-", HANG)),
    hangs("hang-before-headers", (HANG,)),
    hangs("hang-in-body", (HALF, HANG)),
    hangs("hang-in-body-over-tls", (HALF, HANG), "tls"),
    hangs("hang-in-chunk", (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{", HANG)),
    hangs("byte-a-second-in-headers", dripping(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 1000)),
    hangs("byte-a-second-in-body", dripping(OK % 1000, b" " * 1000)),
    hangs("interim-then-hang", (b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" * 3, HANG)),
]
ANSWERING = [
    Row("tls-untrusted", (SUCCESS,), "tls", door="tls-untrusted"),
    Row("tls-other-name", (SUCCESS,), "tls", door="tls-other-name"),
    Row("endless-header-line", endless(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096), "headers_too_large"),
    Row("endless-headers", endless(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n" * 100), "headers_too_large"),
    Row("endless-status-line", endless(b"HTTP/1.1 200 ", b"x" * 4096), "headers_too_large"),
    Row("gib-with-length", endless(OK % GIB, BLOCK), "answer_too_long", 200),
    Row("gib-with-length-over-tls", endless(OK % GIB, BLOCK), "answer_too_long", 200, door="tls"),
    Row("gib-chunked", endless(chunked(BLOCK), b"10000\r\n" + BLOCK + b"\r\n"), "answer_too_long", 200),
    Row("gib-in-chunks-of-one-byte", endless(chunked(b" "), b"1\r\n \r\n" * 10_000), "answer_too_long", 200),
    Row("endless-without-length", endless(b"HTTP/1.1 200 OK\r\n\r\n", BLOCK), "answer_too_long", 200),
    Row("gzip-bomb", (gzip_bomb(),), "bad_answer", 200),
    Row("gzip-that-is-none", (answer('{"error":0}', "200 OK", "Content-Encoding: gzip"),), None, 200, "delivered", 1),
    Row("answers-nobody-asked-for", endless(SUCCESS * 100), None, 200, "delivered", 1),
    Row("redirect-to-itself", (answer("", "307 Moved", "Location: /row"),), "redirect", 307),
    *[
        Row(f"redirect-{status}-inside", (answer("", f"{status} Moved", f"Location: {INSIDE}"),), "redirect", status)
        for status in (301, 302, 303, 307, 308)
    ],
    Row("html", (answer("<html><body>Welcome!</body></html>"),), "bad_answer", 200),
    *[delivered(f"error-{error}", (says(error),)) for error in ("0", '"0"', "0.0", '"0.0"', "-0", "0e9")],
    Row("error-string-7", (says('"7"'),), "code_7", 200),
    Row("error-nan", (says("NaN"),), "bad_answer", 200),
    Row("error-absent", (answer("{}"),), "bad_answer", 200),
    *[
        Row(f"error-{error}", (says(error),), "bad_answer", 200)
        for error in ("[0]", '{"0":0}', "true", "false", "null", '""', '"zero"', '"٠"')
    ],
    Row("error-huge-integer", (says("9" * 400),), "bad_answer", 200),
    Row("error-huge", (says("1e308"),), "code_1e+308", 200),
    Row("error-beyond-int64", (says(str(2**64)),), "code_1.8446744073709552e+19", 200),
    Row("error-final", (says("120"),), "code_120", 200, attempts=1),
    Row("error-twice-bad-last", (answer('{"error": 0, "error": 7}'),), "code_7", 200),
    Row("array-for-object", (answer("[0]"),), "bad_answer", 200),
    Row("nested-deeply", (answer('{"error":' + "[" * 8000),), "bad_answer", 200),
    Row("invalid-utf8", (answer(b'{"error": 0, "description": "\xff\xfe"}'),), "bad_answer", 200),
    Row("nothing", (answer(""),), "bad_answer", 200),
    Row("no-content", (b"HTTP/1.1 204 No Content\r\n\r\n",), "status_204", 204),
    Row(
        "switching-protocols",
        endless(b"HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", BLOCK),
        "status_101",
        101,
    ),
    Row("reset-at-once", (RESET,), "connection_lost"),
    Row("reset-in-body", (HALF, 0.05, RESET), "incomplete_answer"),
    Row("close-at-once", (CLOSE,), "connection_lost"),
    Row("close-in-headers", (b"HTTP/1.1 200 OK\r\nContent", CLOSE), "connection_lost"),
    Row("close-after-headers", (OK % 100, CLOSE), "incomplete_answer"),
    Row("close-in-body", (HALF, CLOSE), "incomplete_answer"),
    Row(
        "close-in-chunk", (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{", CLOSE), "incomplete_answer"
    ),
    Row("close-in-tls-body", (HALF, CLOSE), "incomplete_answer", door="tls"),
    Row("hang-after-broken-chunk", (chunked(b"{"), 0.05, b"zz\r\n}\r\n", HANG), "bad_chunks"),
    Row("not-http", (b"220 mail.example ESMTP\r\n", HANG), "bad_http"),
    Row("status-is-none", (b"HTTP/1.1 OK\r\n\r\n", HANG), "bad_http"),
    Row("header-without-colon", (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", HANG), "bad_http"),
    Row("two-lengths", (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", HANG), "bad_http"),
    Row("length-is-negative", (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", HANG), "bad_http"),
    Row("nul-in-header", (b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n", HANG), "bad_http"),
    Row(
        "bytes-in-headers",
        (answer('{"error": 7}', "200 OK", "X: \xff", "Set-Cookie: \xff=;;", "Location: \xff"),),
        "code_7",
        200,
    ),
    Row("410", (answer("", "410 Gone"),), "gone", 410, "pending", 0),
    too_many("1000", 1000),
    too_many(in_half_an_hour, 1700),
    too_many("9" * 4000, 3600),
    too_many("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
    too_many("soon", None),
    too_many("-5", None),
    too_many("1e9", None),
    too_many("Mon, 01 Jan 0001 00:00:00 GMT", None),
    too_many("\xb2\xb2", None),
]
ROWS = HANGING + ANSWERING


def operator_toml(name: str, url: str, **options: object) -> str:
    lines = [f"[operators.{name}]", f'provider_id = "{name}"', "notify = true", f'url = "{url}"']
    lines += ["allow_private_network = true", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    return "\n".join(lines) + "\n"


def notify(daemon: Process, operator: str, sessions: Iterable[object]) -> None:
    """Ends these sessions by notices. Each end is one delivery to the operator's URL."""
    for session in sessions:
        notice = {"providerId": operator, "sessionId": f"{session}", "externalPlayerId": "p", "token": "t"}
        assert daemon.call("POST", f"{daemon.server}/V4/SessionExpired", notice)[1]["error"] == 0


def deliveries(daemon: Process, operator: str, state: str = "") -> list[dict[str, Any]]:
    url = f"{daemon.api}/v1/deliveries?operator={operator}&limit=1000" + (f"&state={state}" if state else "")
    items: list[dict[str, Any]] = daemon.call("GET", url)[1]["items"]
    return items


def all_delivered(daemon: Process, operator: str) -> Callable[[], bool]:
    return lambda: not deliveries(daemon, operator, "pending") and bool(deliveries(daemon, operator, "delivered"))


def forget_peak(daemon: Process) -> int:
    """Resets the peak of resident memory. Returns the present value in KiB; `peak` is the highest since."""
    Path(f"/proc/{daemon.popen.pid}/clear_refs").write_text("5")
    return daemon.memory_kib


def peak(daemon: Process) -> int:
    return int(Path(f"/proc/{daemon.popen.pid}/status").read_text().partition("VmHWM:")[2].split()[0])


def open_files(daemon: Process) -> int:
    return len(list(Path(f"/proc/{daemon.popen.pid}/fd").iterdir()))


@dataclass
class Field:
    """One daemon with each hostile operator of the table, twice, and with a good one."""

    daemon: Process
    operators: Operators
    hostile: dict[str, Operator]
    good: Operator
    trap: Operator


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make certificates")
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


def open_hostile(operators: Operators, row: Row, trap: Operator) -> Operator:
    if callable(row.steps):
        return operators.open(row.steps, row.door)
    inside = trap.url.encode() + b"/latest"
    steps = [step.replace(INSIDE.encode(), inside) if isinstance(step, bytes) else step for step in row.steps]
    return operators.open(steps, row.door)


def tls_options(row: Row, certificates: Path) -> dict[str, str]:
    trusted = row.door in ("tls", "tls-other-name")
    return {"ca_file": str(certificates / f"{row.door}.pem.crt")} if trusted else {}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Field]:
    with Operators(certificates) as operators:
        trap, good = operators.open([SUCCESS]), operators.open([SUCCESS])
        hostile = {row.name: open_hostile(operators, row, trap) for row in ROWS}
        toml = operator_toml("good", good.url, timeout="60s")
        for number, row in enumerate(ROWS):
            options = tls_options(row, certificates)
            url = hostile[row.name].url
            # If an answer is expected, a busy machine gets all the time it needs. If none ever comes, the time-out is
            # short.
            timeout = "250ms" if row.hangs else "30s"
            toml += operator_toml(f"row{number}", url + "/row", timeout=timeout, schedule=["25ms"], **options)
            options |= {"timeout": "60s", "schedule": ["1h"]}
            toml += operator_toml(f"twin{number}", url + "/twin", concurrency=TWINS, **options)
        with process(tmp_path_factory.mktemp("daemon"), NO_GRACE + toml) as daemon:
            notify(daemon, "good", ["warm"])
            wait_for(all_delivered(daemon, "good"))
            yield Field(daemon, operators, hostile, good, trap)


@pytest.fixture
def arena(shared: Field) -> Field:
    """The daemon with its operators. If a test has brought it down, it is started again, so that the next test does not
    fail, too.
    """
    if shared.daemon.popen.poll() is not None:
        shared.daemon.start()
    return shared


def one_delivery(daemon: Process, operator: str) -> dict[str, Any]:
    [item] = deliveries(daemon, operator)
    found: dict[str, Any] = daemon.call("GET", f"{daemon.api}/v1/deliveries/{item['id']}")[1]
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: quote(row.name))
def test_a_hostile_operator_harms_its_own_delivery_alone(row: Row, arena: Field, measured: Callable[..., None]) -> None:
    """The hostile operator's own delivery ends as the table says. Meanwhile the good operator gets all its deliveries,
    and memory does not grow.
    """
    daemon, hostile, number = arena.daemon, arena.hostile[row.name], ROWS.index(row)
    memory = forget_peak(daemon)
    twin, mine = f"twin{number}", f"row{number}"
    notify(daemon, twin, range(TWINS))
    if row.hangs and row.door != "full":
        wait_for(lambda: hostile.connections >= TWINS)
    notify(daemon, mine, ["s"])
    notify(daemon, "good", [f"{number}-{session}" for session in range(GOOD)])

    wait_for(all_delivered(daemon, "good"))
    if row.hangs:  # the good operator's deliveries did not wait for these
        assert {(one["state"], one["attempts"]) for one in deliveries(daemon, twin)} == {("pending", 0)}
    assert daemon.call("GET", daemon.server + "/health")[1]["status"] in ("pass", "warn")

    def settled() -> bool:
        found = deliveries(daemon, mine)[0]
        return (found["state"], found["attempts"], found["lastStatus"]) == (row.state, row.attempts, row.status)

    wait_for(settled, otherwise=lambda: f"{one_delivery(daemon, mine)}\n{daemon.log.read_text()[-3000:]}")
    found = one_delivery(daemon, mine)
    assert found["lastError"] == row.error
    assert {(attempt["error"], attempt["status"]) for attempt in found["history"]} <= {(row.error, row.status)}
    assert {one.webhook_id for one in hostile.at("/row")} <= {found["id"]}
    assert len({one.body for one in hostile.at("/row")}) <= 1
    if not row.hangs and row.door in ("plain", "tls"):
        assert len(hostile.at("/row")) == max(row.attempts, 1)
    check_gate(daemon, mine, row, found)
    assert arena.trap.connections == 0
    grown = peak(daemon) - memory
    measured(peak_grown_kib=grown)
    assert grown < MEMORY_KIB
    arena.operators.close(hostile)  # ends what still hangs at this operator


def check_gate(daemon: Process, operator: str, row: Row, found: dict[str, Any]) -> None:
    [gate] = [
        one for one in daemon.call("GET", daemon.api + "/v1/operators")[1]["items"] if one["operator"] == operator
    ]
    assert gate["held"] is (row.error == "gone")
    if row.waits_s is None:
        assert gate["notBefore"] is None
        return
    asked_at = datetime.fromisoformat(found["history"][-1]["at"])
    waits_s = (datetime.fromisoformat(gate["notBefore"]) - asked_at).total_seconds()
    # Jitter only lengthens the wait; 30 s are for a busy machine
    assert row.waits_s <= waits_s <= min(row.waits_s * 1.3, 3600) + 30


def test_a_flood_of_interim_answers_delays_nobody_else(tmp_path: Path, measured: Callable[..., None]) -> None:
    """HTTP allows any number of 1xx answers. Fifty deliveries one after the other take less than the time-out of a
    hanging one.
    """
    with Operators() as operators:
        good, still, flood = (operators.open(steps) for steps in ([SUCCESS], [HANG], endless(CONTINUE * 1000)))
        toml = operator_toml("good", good.url, timeout="60s")
        for name, operator in (("still", still), ("flood", flood)):
            toml += operator_toml(name, operator.url, timeout="60s", schedule=["1h"])
        with process(tmp_path, NO_GRACE + toml) as daemon:
            memory = forget_peak(daemon)
            notify(daemon, "still", ["s"])
            notify(daemon, "flood", range(4))
            wait_for(lambda: flood.connections and still.connections)
            began = time.monotonic()
            for session in range(50):
                notify(daemon, "good", [session])
                wait_for(lambda done=session + 1: good.played == done)
                assert deliveries(daemon, "still")[0]["attempts"] == 0, f"only {session} of 50 meanwhile"
            grown = peak(daemon) - memory
            measured(seconds_for_50=round(time.monotonic() - began, 2), peak_grown_kib=grown)
            assert grown < MEMORY_KIB


def scripted(*answers: Steps) -> Callable[[], Iterable[Step]]:
    """The first list of steps is for the first request, and so on. The last list is for all further requests."""
    left = list(answers)

    def steps() -> Iterable[Step]:
        found = left.pop(0) if len(left) > 1 else left[0]
        return found() if callable(found) else found

    return steps


@contextlib.contextmanager
def one_operator(directory: Path, *answers: Steps) -> Iterator[tuple[Process, Operator]]:
    with Operators() as operators:
        operator = operators.open(scripted(*answers))
        toml = operator_toml("acme", operator.url, timeout="30s", schedule=["25ms"])
        with process(directory, NO_GRACE + toml) as daemon:
            yield daemon, operator


def settled(daemon: Process, session: str) -> dict[str, Any]:
    """Waits until the delivery of this session is settled, and returns it."""
    url = f"{daemon.api}/v1/operators/acme/sessions/{session}"

    def delivery() -> dict[str, Any] | None:
        found: dict[str, Any] = daemon.call("GET", url)[1]["deliveries"][0]
        return None if found["state"] == "pending" else found

    result: dict[str, Any] = wait_for(delivery)
    return result


@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_a_kept_connection_that_dies_at_its_next_use_costs_one_attempt(tmp_path: Path, end: str) -> None:
    with one_operator(tmp_path, [SUCCESS], [end], [SUCCESS]) as (daemon, operator):
        notify(daemon, "acme", ["one"])
        assert settled(daemon, "one")["attempts"] == 1
        notify(daemon, "acme", ["two"])
        found = settled(daemon, "two")
        assert (found["state"], found["attempts"]) == ("delivered", 2)
        _, *tries = operator.received
        assert [one.webhook_id for one in tries] == [found["id"]] * 2
        assert tries[0].body == tries[1].body


def test_a_kept_connection_that_the_operator_closes_is_not_used_again(tmp_path: Path) -> None:
    with one_operator(tmp_path, [SUCCESS, CLOSE], [SUCCESS]) as (daemon, operator):
        notify(daemon, "acme", ["one"])
        settled(daemon, "one")
        wait_for(lambda: not operator.open)
        notify(daemon, "acme", ["two"])
        assert settled(daemon, "two")["attempts"] == 1
        assert operator.connections == 2


def test_an_answer_that_came_before_its_request_settles_nothing(tmp_path: Path) -> None:
    """As from a proxy that answers twice: the second answer waits on the kept connection when the next request is
    sent.
    """
    with one_operator(tmp_path, [SUCCESS, 0.2, SUCCESS], [says("7")]) as (daemon, operator):
        notify(daemon, "acme", ["one"])
        assert settled(daemon, "one")["state"] == "delivered"
        wait_for(lambda: operator.played or not operator.open)
        notify(daemon, "acme", ["two"])
        found = settled(daemon, "two")
        assert (found["state"], found["lastError"]) == ("dead", "code_7")


def test_twenty_hostile_operators_at_once_harm_no_other(
    tmp_path: Path, certificates: Path, rng: Random, measured: Callable[..., None]
) -> None:
    """The daemon also stops in time at SIGTERM."""
    good_ones, each = [f"good{number}" for number in range(5)], 200 if FULL else 50
    rows = HANGING + rng.sample(ANSWERING, 20 - len(HANGING))
    with Operators(certificates) as operators:
        trap, good, late = (operators.open(steps) for steps in ([SUCCESS], [SUCCESS], [HANG]))
        # The good operator's thread also serves the bad ones and all that they send. So on a busy machine, it may need
        # several attempts
        toml = operator_toml("late", late.url, timeout="5s")
        for name in good_ones:
            toml += operator_toml(name, f"{good.url}/{name}", timeout="5s", schedule=["1s"] * 50)
        for number, row in enumerate(rows):
            options: dict[str, Any] = tls_options(row, certificates) | {"timeout": "1s", "schedule": ["100ms"] * 9}
            toml += operator_toml(f"bad{number}", open_hostile(operators, row, trap).url, **options)
        with process(tmp_path, NO_GRACE + toml) as daemon:
            memory = forget_peak(daemon)
            for number in range(20):
                notify(daemon, f"bad{number}", range(8))
            for session in range(each):
                for name in good_ones:
                    notify(daemon, name, [session])
            for name in good_ones:
                wait_for(all_delivered(daemon, name))
                assert len({one.webhook_id for one in good.at(f"/{name}")}) == each
            assert daemon.call("GET", daemon.server + "/health")[1]["status"] in ("pass", "warn")
            grown = peak(daemon) - memory
            assert grown < MEMORY_KIB
            notify(daemon, "late", ["s"])
            wait_for(lambda: late.open)
            began = time.monotonic()
            assert daemon.stop(within_s=5 + 5 + 10) == 0  # the longest time-out, 5 s, and 10 s for a busy machine
            [stopping] = daemon.events("daemon.stopping")
            assert stopping["in_flight"] >= 1
            measured(peak_grown_kib=grown, seconds_to_stop=round(time.monotonic() - began, 2))
            kept = dict(daemon.rows("SELECT operator, count(*) FROM delivery GROUP BY operator"))
            assert kept == {f"bad{number}": 8 for number in range(20)} | dict.fromkeys(good_ones, each) | {"late": 1}
            assert not daemon.rows("SELECT id FROM delivery WHERE operator GLOB 'good*' AND state != 'delivered'")


def test_two_hundred_hostile_attempts_leave_no_open_files(
    tmp_path: Path, certificates: Path, rng: Random, measured: Callable[..., None]
) -> None:
    rows = HANGING + rng.sample([row for row in ANSWERING if row.attempts], 20 - len(HANGING))
    names = [f"bad{number}" for number in range(20)]
    with Operators(certificates) as operators:
        trap = operators.open([SUCCESS])
        toml = ""
        for name, row in zip(names, rows, strict=True):
            options: dict[str, Any] = tls_options(row, certificates) | {"timeout": "2s", "schedule": ["1h"]}
            toml += operator_toml(name, open_hostile(operators, row, trap).url, concurrency=10, **options)
        with process(tmp_path, NO_GRACE + toml) as daemon:
            before = open_files(daemon)
            most = 0

            def tried() -> bool:
                nonlocal most
                most = max(most, open_files(daemon))
                return not daemon.rows("SELECT id FROM delivery WHERE attempts = 0 LIMIT 1")

            for number in range(3 if FULL else 1):
                for name in names:
                    daemon.call("POST", f"{daemon.api}/v1/operators/{name}/hold")
                    notify(daemon, name, [f"{number}-{session}" for session in range(10)])
                for name in names:  # releases all ten at once, before the first failure opens the breaker
                    daemon.call("POST", f"{daemon.api}/v1/operators/{name}/release")
                    most = max(most, open_files(daemon))
                wait_for(tried)
                wait_for(
                    lambda: open_files(daemon) <= before + 4, otherwise=lambda: f"{open_files(daemon)} of {before}"
                )
            measured(before=before, most=most, after=open_files(daemon))
            assert most > before + 20  # the connections were counted while they were open
