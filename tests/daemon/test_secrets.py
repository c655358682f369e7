"""Promise 8: secrets stay inside. The whole daemon runs with recognisable secrets through successes, failures, crashes,
debug logging and broken files. Then all its output is searched for them.
"""

import base64
import contextlib
import html
import json
import os
import socket
import stat
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forked
import pytest
from processes import Process, free_ports, wait_for

MARK = "s3cr3t"
PLAYER, WRONG, PARTNER = f"{MARK}-player", f"{MARK}-wrong", f"{MARK}-partner"
API, OLD_API, HASH_KEY, QUERY, PASSWORD = (
    f"{MARK}-{name}" for name in ("api", "old-api", "hash-key", "query", "password")
)
SIGNING = base64.b64encode(f"{MARK}-signing-key-of-32-bytes-or-so".encode()).decode()
MARKS = (MARK.encode(), SIGNING.encode(), base64.b64encode(MARK.encode()).rstrip(b"="))

TOML = """
[server]
listen = "127.0.0.1:{server}"
[api]
listen = "127.0.0.1:{api}"
token_file = "api.tokens"
[sessions]
restart_grace = "0s"
[delivery]
schedule = ["50ms", "50ms"]
timeout = "2s"
[log]
level = "debug"
[operators.acme]
provider_id = "acme"
endpoint = "/acme"
token_check = "session"
notify = true
url = "http://user:{password}@{wallet}/wallet?key={query}"
allow_private_network = true
signing_secret_file = "signing"
[operators.partner]
provider_id = "partner"
endpoint = "/partner"
token_check = "partner"
partner_token_env = "PARTNER_TOKEN"
notify = true
url = "http://{nobody}/?key={query}"
allow_private_network = true
[operators.old]
provider_id = "old"
accept = ["pragmatic"]
endpoint = "/old"
hash_key_file = "hash.key"
[plugins.leaky]
use = "leaky:Leaky"
operators = ["acme"]
"""
LEAKY = """
class Leaky:
    def __init__(self, options):
        self.times = 0

    async def session_ended(self, event):
        assert "s3cr3t" not in repr(event)
        self.times += 1
        if self.times % 2:
            raise RuntimeError(event.token)

    async def check(self, notice):
        assert "s3cr3t" not in repr(notice)
        if notice.session_id == "checked":
            raise ValueError(notice.token)
"""


@contextlib.contextmanager
def echoing_wallet() -> Iterator[str]:
    """An operator that sends back everything it gets, in every place that could be shown, and with another verdict each
    time.
    """

    class Handler(BaseHTTPRequestHandler):
        answers = 0

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            echo = json.dumps({"path": self.path, "body": body, "headers": dict(self.headers)})
            Handler.answers += 1
            status, error = ((200, 100), (302, 0), (500, 7), (429, 1), (200, 0))[Handler.answers % 5]
            # Each answer uses another notation and another length, so that the part of it that is kept ends within each
            # secret
            written = (str, html.escape, urllib.parse.quote, lambda text: text * 40)[Handler.answers % 4]
            description = written("." * (Handler.answers * 7 % 256) + echo)
            answer = json.dumps({"error": error, "description": description}).encode()
            self.send_response(status, "Answer")
            self.send_header("Location", f"http://wallet.example/?{QUERY}")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Spy:
    """Sends requests to the daemon and keeps every byte of every answer. The requests are full of secrets."""

    def __init__(self, daemon: Process) -> None:
        self.daemon = daemon
        self.answers: list[bytes] = []

    def ask(self, method: str, url: str, body: Any = None, token: str = API, content: str = "application/json") -> int:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": content, "Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers, method=method), timeout=20
            ) as answer:
                return self._keep(answer)
        except urllib.error.HTTPError as error:
            return self._keep(error)

    def _keep(self, answer: Any) -> int:
        self.answers += [str(answer.headers).encode(), answer.read()]
        return int(answer.status)

    def raw(self, url: str, sent: bytes) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as peer:
            peer.sendall(sent)
            peer.shutdown(socket.SHUT_WR)
            while part := peer.recv(65536):
                self.answers.append(part)

    def run(self, *words: str) -> int:
        command = ["--config", str(self.daemon.config), *words]
        environment = os.environ | self.daemon.environment
        done = forked.run(command, self.daemon.directory, environment, within_s=60)
        self.answers += [done.stdout.encode(), done.stderr.encode()]
        return done.returncode


def clean(data: bytes) -> bool:
    return not any(mark in data for mark in MARKS)


def spots(data: bytes) -> list[bytes]:
    """Each place where a secret was found, with the text around it."""
    return [data[max(0, at - 60) : at + 60] for mark in MARKS if (at := data.find(mark)) >= 0]


def write_secrets(directory: Path) -> None:
    files = {"api.tokens": f"{OLD_API}\n{API}\n", "hash.key": HASH_KEY, "signing": f"whsec_{SIGNING}\n"}
    for name, text in files.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Process]:
    write_secrets(tmp_path)
    (tmp_path / "leaky.py").write_text(LEAKY)
    with echoing_wallet() as wallet:
        nobody = f"127.0.0.1:{free_ports(1)[0]}"
        made = Process(tmp_path, "", {"PARTNER_TOKEN": PARTNER, "PYTHONPATH": str(tmp_path)})
        server, api = (url.rpartition(":")[2] for url in (made.server, made.api))
        made.config.write_text(
            TOML.format(server=server, api=api, wallet=wallet, nobody=nobody, query=QUERY, password=PASSWORD)
        )
        made.spawn()
        try:
            wait_for(lambda: made.events("daemon.serving"))
            yield made
        finally:
            made.kill()


def live(spy: Spy) -> None:
    """Does everything that a peer can do, right and wrong, with secrets in every possible place."""
    daemon = spy.daemon
    acme = f"{daemon.api}/v1/operators/acme/sessions"
    for name in ("closed", "checked", "told", "open"):
        assert spy.ask("PUT", f"{acme}/{name}", {"playerId": "p", "token": PLAYER}) in (200, 201, 409)
    spy.ask("PUT", f"{acme}/open", {"playerId": "p", "token": WRONG})
    spy.ask("PUT", f"{acme}/bad", {"playerId": "p", "token": [PLAYER]})
    spy.ask("PUT", f"{acme}/bad", {"playerId": "p", "token": PLAYER + "\0"})
    spy.ask("PUT", f"{acme}/bad", f'{{"playerId": "p" "token": "{PLAYER}"}}'.encode())
    spy.ask("POST", f"{acme}/closed/close")
    spy.ask("POST", f"{acme}/closed/touch")
    for token in (API, OLD_API, WRONG, ""):
        for path in ("/v1/operators", "/v1/deliveries", "/metrics", "/health", "/openapi.json", "/nothing"):
            spy.ask("GET", daemon.api + path, token=token)
    notice = {"providerId": "acme", "sessionId": "told", "externalPlayerId": "p", "token": PLAYER}
    variants: list[Any] = [
        notice | {"token": WRONG},
        notice | {"sessionId": "checked"},
        notice | {"token": {"a": PLAYER}},
        notice | {"extra": PLAYER},
        notice | {"providerId": PLAYER},
        f'{{"token": "{PLAYER}" "sessionId"'.encode(),
        json.dumps(notice).encode() + PLAYER.encode() * 2000,
        f'{{"token": "{PLAYER}", "token": "{WRONG}"}}'.encode(),
    ]
    for variant in variants:
        spy.ask("POST", daemon.server + "/acme", variant)
    spy.ask("POST", daemon.server + "/partner", notice | {"providerId": "partner", "token": PARTNER})
    spy.ask("POST", daemon.server + "/partner", notice | {"providerId": "partner", "token": WRONG})
    form = f"hash={WRONG}&providerId=old&sessionId=s&playerId=p&token={PLAYER}".encode()
    spy.ask("POST", daemon.server + "/old", form, content="application/x-www-form-urlencoded")
    spy.ask("POST", daemon.server + f"/{PLAYER}", notice)
    for url in (daemon.server, daemon.api):
        spy.raw(url, f"{PLAYER}\r\n\r\n".encode())
        spy.raw(url, f"GET / HTTP/1.1\r\n{PLAYER}\r\nAuthorization: Bearer {API}\r\n\r\n".encode())
        spy.raw(url, f"GET /?token={PLAYER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def look(spy: Spy) -> None:
    """Reads everything that an administrator can look at."""
    acme = f"{spy.daemon.api}/v1/operators/acme/sessions"
    for name in ("closed", "told", "open"):
        spy.ask("GET", f"{acme}/{name}")
    spy.ask("GET", f"{acme}?limit=10")
    for number in (1, 2, 3):
        for (webhook_id,) in spy.daemon.rows("SELECT 'msg_' || id || '_' || nonce FROM delivery WHERE id = ?", number):
            spy.ask("GET", f"{spy.daemon.api}/v1/deliveries/{webhook_id}")
            spy.run("deliveries", "show", webhook_id)
    for words in (
        ["check-config"],
        ["check-config", "--json"],
        ["status"],
        ["sessions", "list", "acme", "--json"],
        ["sessions", "show", "acme", "closed"],
        ["deliveries", "list", "--json"],
        ["send", "acme", "--session", "x", "--player", "p", "--token-env", "PARTNER_TOKEN"],
    ):
        spy.run(*words)


def settled(daemon: Process) -> bool:
    return not daemon.rows("SELECT 1 FROM delivery WHERE state = 'pending'")


@pytest.mark.slow
def test_no_secret_leaves_the_daemon_whatever_happens(daemon: Process) -> None:
    spy = Spy(daemon)
    live(spy)
    wait_for(lambda: settled(daemon))
    look(spy)
    cmdline = Path(f"/proc/{daemon.popen.pid}/cmdline").read_bytes()
    daemon.kill()
    daemon.spawn()
    wait_for(lambda: len(daemon.events("daemon.serving")) == 2)
    live(spy)
    spy.run("backup", str(daemon.directory / "backup.sqlite3"))
    kept = [json.loads(history) for (history,) in daemon.rows("SELECT history FROM delivery WHERE sink = 'http'")]
    assert len([attempt for history in kept for attempt in history if "***" in (attempt.get("answer") or "")]) > 2
    assert clean(json.dumps(kept).encode())
    assert daemon.stop() == 0
    # The daemon shows why it cannot use a damaged file, and one that another process uses
    daemon.path.write_bytes(b"SQLite format 3\0" + PLAYER.encode() * 1000)
    daemon.spawn()
    assert daemon.popen.wait(20) == 1
    log = daemon.log.read_bytes()
    assert len(daemon.events("delivery.retry")) > 2  # all of it has really happened
    assert daemon.events("notice.refused")
    assert len(spy.answers) > 100
    assert clean(cmdline)
    assert clean(log), [line for line in log.splitlines() if not clean(line)]
    assert [found for answer in spy.answers for found in spots(answer)] == []


def test_every_file_it_makes_is_its_owners_alone(daemon: Process) -> None:
    spy = Spy(daemon)
    given = {"config.toml", "log", "leaky.py", "api.tokens", "hash.key", "signing", "__pycache__"}
    live(spy)
    assert spy.run("backup", str(daemon.directory / "backup.sqlite3")) == 0
    made = [file for file in daemon.directory.iterdir() if file.name not in given]
    names = {file.name.removeprefix("lmdaemon.sqlite3") for file in made}
    assert names == {"", "-wal", "-shm", "-attempts", ".lock", "backup.sqlite3"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {0o600}


@pytest.mark.slow
def test_a_players_token_leaves_the_file_when_nothing_can_need_it(daemon: Process) -> None:
    """Neither its rows nor any page of the file nor the write-ahead log still holds it. The unused middle of a page is
    left out: where SQLite moves rows between pages, it may leave a piece there (docs/security.md).
    """
    spy = Spy(daemon)
    acme = f"{daemon.api}/v1/operators/acme/sessions"
    for number in range(50):
        spy.ask("PUT", f"{acme}/s{number}", {"playerId": "p", "token": f"{PLAYER}-{number}"})
    assert PLAYER.encode() in daemon.path.with_name(daemon.path.name + "-wal").read_bytes()
    for number in range(50):
        spy.ask("POST", f"{acme}/s{number}/close")

    def delivered() -> bool:
        spy.ask("POST", f"{daemon.api}/v1/operators/acme/release")
        spy.ask("POST", f"{daemon.api}/v1/operators/acme/deliveries/retry", {})
        return not daemon.rows("SELECT 1 FROM delivery WHERE state <> 'delivered'")

    wait_for(delivered, 60)
    assert daemon.stop() == 0
    assert not daemon.path.with_name(daemon.path.name + "-wal").exists()
    assert PLAYER.encode() not in b"".join(used_parts(daemon.path.read_bytes()))


def used_parts(database: bytes) -> Iterator[bytes]:
    """Every page of an SQLite file, a b-tree page without its unused middle (sqlite.org/fileformat.html, 1.6)."""
    size = int.from_bytes(database[16:18], "big")
    for at in range(0, len(database), size):
        page = database[at : at + size]
        header = 100 if at == 0 else 0  # of the whole file, in the first page
        kind, cells, content = page[header], page[header + 3 : header + 5], page[header + 5 : header + 7]
        if kind in (2, 5, 10, 13):
            pointers = header + (8 if kind in (10, 13) else 12)
            yield page[: pointers + 2 * int.from_bytes(cells, "big")]
            yield page[int.from_bytes(content, "big") :]
        else:
            yield page


@pytest.mark.parametrize(
    "broken",
    [
        'token = "{mark}"',
        '[operators.x]\nprovider_id = "x"\nnotify = true\nurl = "http://user:{mark}@wallet.example/?{mark}"',
        '[operators.x]\nprovider_id = "x"\nnotify = true\nurl = "ftp://user:{mark}@wallet.example/?{mark}"',
        '[operators.x]\nprovider_id = "x"\nnotify = true\nurl = "https://user:{mark}/x@wallet.example/"',
        '[operators.x]\nprovider_id = "x"\nhash_key = "{mark}"',
        '[operators.x]\nprovider_id = "x"\nsigning_secret_file = "bad.signing"',
    ],
)
def test_a_broken_file_is_explained_without_its_secrets(tmp_path: Path, broken: str) -> None:
    (tmp_path / "bad.signing").write_text(f"whsec_{MARK}!\n")
    (tmp_path / "config.toml").write_text(broken.format(mark=MARK))
    for words in (["check-config"], ["check-config", "--json"], ["serve"]):
        command = ["--config", str(tmp_path / "config.toml"), *words]
        done = forked.run(command, tmp_path, os.environ, within_s=60)
        assert done.returncode == 2, done.stderr
        assert clean((done.stdout + done.stderr).encode()), done.stderr
