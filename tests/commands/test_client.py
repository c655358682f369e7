"""The commands' client: which listener it sends a token to, and what it accepts as an answer of the daemon."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
from aiohttp import web
from commands import API_TOKEN, configure, run
from support import scripted_operator

from lmdaemon.commands import client, peer
from lmdaemon.commands.client import ANY, fits

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


FAMILIES = [
    "127.0.0.1",
    "0.0.0.0",
    *(pytest.param(one, marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")) for one in ("::1", "::")),
    "unix",
]


@contextlib.contextmanager
def listening(where: str, directory: Path, user: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket on which this user listens, and its address as it stands in the configuration. Waiting for a client ends
    after 60 s.
    """
    os.seteuid(user)  # the kernel notes which user opens the socket and listens
    try:
        if where == "unix":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(directory / "socket"))
            address = f"unix:{directory}/socket"
        else:
            listener = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
            listener.bind((where, 0))
            port = listener.getsockname()[1]
            address = f"[{where}]:{port}" if ":" in where else f"{where}:{port}"
        listener.listen()
    finally:
        os.seteuid(os.getuid())
    with listener:
        listener.settimeout(60)
        yield listener, address


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for a unix socket, which every user can enter and write to."""
    directory = Path(os.path.realpath(tmp_path_factory.mktemp("d")))
    for one in (directory, *directory.parents[:-2]):
        one.chmod(one.stat().st_mode | 0o011)
    directory.chmod(0o777)
    return directory


def received(listener: socket.socket) -> bytes:
    """What the first client sends at once. No second client is accepted."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(60)
        found = connection.recv(65536)
        listener.close()
        return found


WORDS = ["status", "sessions open acme s-1 --player p1 --token-file player-token"]


@as_root
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("where", FAMILIES)
async def test_a_stranger_in_the_daemons_place_gets_no_byte(
    tmp_path: Path, short: Path, where: str, words: str
) -> None:
    with listening(where, short, STRANGER) as (listener, address):
        configure(tmp_path, api=address)
        getting = asyncio.create_task(asyncio.to_thread(received, listener))
        done = await asyncio.to_thread(run, *words.split(), cwd=tmp_path)
        assert await getting == b""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"lmdaemon: what listens at {address} belongs to user {STRANGER}, and nothing was sent to it"
    )


@as_root
@pytest.mark.parametrize("where", FAMILIES)
async def test_the_owner_of_the_databases_directory_is_asked(tmp_path: Path, short: Path, where: str) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", STRANGER, STRANGER)
    with listening(where, short, STRANGER) as (listener, address):
        configure(tmp_path, "[database]\npath = 'state/db'\n", api=address)
        getting = asyncio.create_task(asyncio.to_thread(received, listener))
        done = await asyncio.to_thread(run, "status", cwd=tmp_path)
        assert f"Bearer {API_TOKEN}".encode() in await getting
    assert done.returncode == 1


@pytest.mark.parametrize("where", FAMILIES)
def test_the_listener_at_the_other_end_is_known(short: Path, where: str) -> None:
    with listening(where, short, os.geteuid()) as (listener, _):
        with socket.socket(listener.family) as connection:
            connection.connect(listener.getsockname())
            assert peer.listener(connection) == os.geteuid()
            if where != "unix":
                accepted, _ = listener.accept()
                listener.close()
                with pytest.raises(peer.NobodyError):
                    peer.listener(connection)
                accepted.close()


def test_a_listener_elsewhere_or_on_an_unknown_system_is_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The listener is on another machine, or the system cannot tell which user it belongs to."""

    class Elsewhere:
        family = socket.AF_INET

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.1", 8081

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.2", 50_000

    assert peer.listener(Elsewhere()) is None
    with listening("127.0.0.1", tmp_path, os.geteuid()) as (listener, _):
        with socket.create_connection(listener.getsockname()) as connection:
            monkeypatch.setattr(peer, "_TABLES", (tmp_path / "none",))
            assert peer.listener(connection) is None
            monkeypatch.setattr("sys.platform", "darwin")
            assert peer.listener(connection) is None


def test_a_daemon_that_hangs_is_told_before_monitoring_gives_up(tmp_path: Path) -> None:
    """The kernel accepts the connection, as for a daemon that is stopped (SIGSTOP), and nobody ever answers."""
    assert client.READ_WITHIN_S <= 8  # monitoring usually ends a check after 10 s, the start of the command included
    with listening("127.0.0.1", tmp_path, os.geteuid()) as (_, address):
        configure(tmp_path, api=address)
        sooner = partial(forked.put, "lmdaemon.commands.client", "READ_WITHIN_S", 0.2)
        for words in ("status --check", "sessions show acme s-1"):
            done = run(*words.split(), cwd=tmp_path, first=sooner)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == (
                f"lmdaemon: daemon does not answer at {address} (waited 0.2 s): it hangs; keep the last lines of its "
                "log, such as journalctl -u lmdaemon -n 20, and restart it\n"
            )


# -- what counts as an answer

COMMANDS = [
    *WORDS,
    "status --json",
    "sessions list acme",
    "sessions list acme --json --all",
    "sessions show acme s-1",
    "sessions touch acme s-1",
    "sessions close acme s-1 --json",
    "deliveries list",
    "deliveries show msg_1",
    "deliveries retry msg_1",
    "deliveries retry --operator acme",
    "deliveries retry --operator acme --dry-run",
    "deliveries retry --operator acme --follow",
    "deliveries discard msg_1 --note x",
    "deliveries discard --operator acme --note x",
    "hold acme",
    "release acme",
]
ANSWERS = {
    "{}": web.Response(text="{}", content_type="application/json"),
    "[]": web.Response(text="[]", content_type="application/json"),
    "null": web.Response(text="null", content_type="application/json"),
    "problem": web.Response(text="[]", status=500, content_type="application/problem+json"),
    "another's problem": web.Response(text="{}", status=404, content_type="application/problem+json"),
    "error": web.Response(text='{"error": "no such thing"}', status=404, content_type="application/json"),
    "HTML": web.Response(text="<h1>It works!</h1>", content_type="text/html"),
    "nested": web.Response(text="[" * 100_000, content_type="application/json"),
    "not UTF-8": web.Response(body=b'{"status": "\xff"}', content_type="application/json"),
    "lists": web.Response(
        text='{"status": [], "items": [1], "next": 5, "sessionId": {}, "deliveries": [[]], "touched": "1"}',
        content_type="application/json",
    ),
    "checks": web.Response(
        text='{"status": "pass", "checks": {"x": [5]}, "items": {}, "unknown": 5}', content_type="application/json"
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_of_another_program_is_one_clear_line(tmp_path: Path, answer: str) -> None:
    async def answered(request: web.Request) -> web.Response:
        given = ANSWERS[answer]
        return web.Response(body=given.body, status=given.status, content_type=given.content_type)

    async with scripted_operator(*[answered] * len(COMMANDS)) as somebody:
        address = somebody.url.split("/")[2]
        configure(tmp_path, api=address)
        given = ANSWERS[answer]
        for words in COMMANDS if answer == "{}" else ["sessions list acme" if answer == "lists" else "status"]:
            done = await asyncio.to_thread(run, *words.split(), cwd=tmp_path)
            assert (done.returncode, done.stdout.strip("[\n")) == (1, ""), words
            assert done.stderr == (
                f"lmdaemon: what answers at {address} is no lmdaemon (status {given.status}, {given.content_type})\n"
            )
    assert somebody.received


@pytest.mark.parametrize(
    ("value", "shape", "fitting"),
    [
        ({"a": 1}, {}, True),
        ([], {}, False),
        ({"a": 1}, {"a": int}, True),
        ({"a": "1"}, {"a": int}, False),
        ({"b": 1}, {"a": int}, False),
        ({"b": 1}, {"a?": int}, True),
        ({"a": None}, {"a?": int}, False),
        ({"a": None}, {"a": (str, type(None))}, True),
        ({"a": [1, 2]}, {"a": [int]}, True),
        ({"a": [1, "2"]}, {"a": [int]}, False),
        ({"a": {}}, {"a": [int]}, False),
        ({"x": [{"s": "t"}], "y": []}, {ANY: [{"s": str}]}, True),
        ({"x": [{"s": "t"}], "y": [{}]}, {ANY: [{"s": str}]}, False),
    ],
)
def test_an_answer_has_a_shape_or_not(value: object, shape: Any, fitting: bool) -> None:
    assert fits(value, shape) is fitting
