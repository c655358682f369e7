"""The example of a game server, against a daemon that restarts, is restored, refuses and goes away."""

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import Process, process

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
OPERATOR = '[operators.acme]\nprovider_id = "p"\nendpoint = ""\n'


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    import game_server

    yield game_server
    sys.modules.pop("game_server", None)


class Played:
    """A game server whose waits are not waited; what is to happen in one of them is given by its number."""

    def __init__(self, example: Any, base: str, operator: str = "acme", **options: Any) -> None:
        self.ended: list[str] = []
        self.waits: list[float] = []
        self.meanwhile: dict[int, Callable[[], Any]] = {}
        self.sessions = example.Sessions(base, operator, self.ended.append, sleep=self._sleep, **options)

    def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 1000, "it never came back"
        self.meanwhile.get(len(self.waits), lambda: None)()


def states(daemon: Process, *session_ids: str) -> list[str]:
    path = f"{daemon.api}/v1/operators/acme/sessions"
    return [daemon.call("GET", f"{path}/{one}")[1].get("state", "unknown") for one in session_ids]


def test_a_restart_is_outlived_and_nothing_is_lost(tmp_path: Path, example: Any) -> None:
    with process(tmp_path, OPERATOR) as daemon:
        played = Played(example, daemon.api)
        played.sessions.open("s/1", "p", "t")
        assert daemon.stop() == 0
        played.meanwhile[3] = daemon.start
        played.sessions.open("s2", "p", "t")  # asks until it is back
        played.sessions.heartbeat()
        assert states(daemon, "s%2F1", "s2") == ["active", "active"]
        assert len(played.waits) == 3
        assert max(played.waits) <= example.LONGEST_WAIT_S
        assert played.ended == []


def test_what_a_restore_has_lost_is_opened_again(tmp_path: Path, example: Any) -> None:
    with process(tmp_path, OPERATOR) as daemon:
        played = Played(example, daemon.api, idle_s=90)
        for number in range(3):
            played.sessions.open(f"s{number}", "p", "t")
        daemon.stop()
        for file in tmp_path.glob("lmdaemon.sqlite3*"):  # as a backup from before they were opened
            file.unlink()
        daemon.start()
        assert states(daemon, "s0", "s1", "s2") == ["unknown"] * 3
        played.sessions.heartbeat()
        assert states(daemon, "s0", "s1", "s2") == ["active"] * 3
        _, shown = daemon.call("GET", f"{daemon.api}/v1/operators/acme/sessions/s0")
        assert shown["idleTimeoutSeconds"] == 90


def test_what_has_ended_is_told_once_and_played_no_more(tmp_path: Path, example: Any) -> None:
    with process(tmp_path, OPERATOR) as daemon:
        played = Played(example, daemon.api)
        for number in range(3):
            played.sessions.open(f"s{number}", "p", "t")
        daemon.call("POST", f"{daemon.api}/v1/operators/acme/sessions/s1/close")
        played.sessions.close("s2")
        played.sessions.heartbeat()
        played.sessions.heartbeat()
        assert played.ended == ["s1"]
        assert list(played.sessions.playing) == ["s0"]
        with pytest.raises(example.RefusedError) as refused:
            played.sessions.open("s1", "p", "t")
        assert refused.value.code == "ended"
        played.sessions.close("never-opened")  # gone is gone


def test_an_operator_that_is_misspelled_is_no_reason_to_try_again(tmp_path: Path, example: Any) -> None:
    with process(tmp_path, OPERATOR) as daemon:
        played = Played(example, daemon.api, operator="acne")
        with pytest.raises(example.RefusedError) as refused:
            played.sessions.open("s", "p", "t")
        assert refused.value.code == "unknown-operator"
        assert played.waits == []


class Busy(BaseHTTPRequestHandler):
    """Refuses what it is asked with these answers, then takes it."""

    script: list[tuple[int, dict[str, str]]]

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers = self.script.pop(0) if self.script else (200, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_retry_after_is_waited_for_and_a_proxy_that_has_nobody_too(example: Any) -> None:
    Busy.script = [(503, {"Retry-After": "7"}), (502, {}), (408, {})]
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        played = Played(example, f"http://127.0.0.1:{server.server_port}")
        played.sessions.open("s", "p", "t")
        server.shutdown()
    assert played.waits[0] == 7
    assert len(played.waits) == 3


def test_the_heartbeat_comes_every_third_of_the_idle_time_at_most(example: Any) -> None:
    played = Played(example, "http://127.0.0.1:1", idle_s=900)

    def stop() -> None:
        raise KeyboardInterrupt

    played.meanwhile[50] = stop
    with pytest.raises(KeyboardInterrupt):
        played.sessions.run()
    assert all(240 <= wait_s <= 300 for wait_s in played.waits)
    assert len(set(played.waits)) > 1
