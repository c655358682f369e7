"""The examples of a game server, with a daemon that restarts, is restored from a backup, refuses requests and goes
away.
"""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest
from generators import node_modules
from processes import FORKED, Process, process, wait_for
from support import load

from lmdaemon.web import openapi

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HELPERS = Path(__file__).parents[1] / "helpers"
OPERATOR = '[operators.acme]\nprovider_id = "p"\nendpoint = ""\n'
API_TOKEN = "api-token-of-the-tests"


class Refused(Exception):  # noqa: N818 - as the examples tell it
    """The daemon refused a call of the example, with this problem code."""


class Played:
    """A game server of the examples that does not really wait. `meanwhile` holds what happens during its waits, by
    their numbers.
    """

    longest_wait_s: float

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.waits: list[float] = []
        self.meanwhile: dict[int, Callable[[], Any]] = {}

    def call(self, name: str, *words: str) -> None:
        """Calls a method of the example. Raises Refused."""
        raise NotImplementedError

    @property
    def playing(self) -> list[str]:
        raise NotImplementedError

    def open(self, session_id: str, player_id: str = "p", token: str = "t") -> None:
        self.call("open", session_id, player_id, token)

    def close(self, session_id: str) -> None:
        self.call("close", session_id)

    def heartbeat(self) -> None:
        self.call("heartbeat")

    def run(self) -> None:
        self.call("run")

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 1000, "it never came back"
        self.meanwhile.get(len(self.waits), lambda: None)()


class InPython(Played):
    def __init__(self, example: Any, base: str, operator: str, idle_s: int, api_token: str) -> None:
        super().__init__()
        self._example = example
        options = {"api_token": api_token, "idle_s": idle_s, "sleep": self.wait}
        self._sessions = example.Sessions(base, operator, self.ended.append, **options)
        self.longest_wait_s = example.LONGEST_WAIT_S

    def call(self, name: str, *words: str) -> None:
        try:
            getattr(self._sessions, name)(*words)
        except self._example.RefusedError as refused:
            raise Refused(refused.code) from None

    @property
    def playing(self) -> list[str]:
        return list(self._sessions.playing)


class InTypeScript(Played):
    """A node process that runs the example in TypeScript. It reads each call as a line (tests/helpers/played.mjs)."""

    def __init__(self, compiled: Path, base: str, operator: str, idle_s: int, api_token: str) -> None:
        super().__init__()
        command = ["node", "played.mjs", base, operator, str(idle_s), api_token]
        pipe = subprocess.PIPE
        self.node = subprocess.Popen(command, cwd=compiled, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        self.longest_wait_s = self._heard()["longestWait"]
        self._playing: list[str] = []

    def _say(self, what: object) -> None:
        assert self.node.stdin
        self.node.stdin.write(json.dumps(what) + "\n")

    def _heard(self) -> dict[str, Any]:
        assert self.node.stdout
        line = self.node.stdout.readline()
        assert line, "node has ended"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def call(self, name: str, *words: str) -> None:
        self._say([name, *words])
        while "wait" in (heard := self._heard()):
            self.wait(heard["wait"])
            self._say("go on")
        self.ended, self._playing = heard["ended"], heard["playing"]
        if heard["refused"] is not None:
            raise Refused(heard["refused"])

    @property
    def playing(self) -> list[str]:
        return self._playing

    def end(self) -> None:
        self.node.kill()
        self.node.communicate()


class Example(Protocol):
    def __call__(self, base: str, operator: str = "acme", idle_s: int = 900, api_token: str = "") -> Played: ...


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TypeScript example, compiled in strict mode with a client that was generated from the daemon's OpenAPI
    document.
    """
    directory, modules = tmp_path_factory.mktemp("typescript"), node_modules()
    (directory / "node_modules").symlink_to(modules)
    (directory / "package.json").write_text('{"type": "module"}')
    document = openapi.document(load(directory / "config.toml", OPERATOR))
    (directory / "openapi.json").write_text(json.dumps(document))
    shutil.copy(EXAMPLES / "game_server.ts", directory)
    shutil.copy(HELPERS / "played.mjs", directory)
    strictly = ("--strict", "--noUnusedLocals", "--target", "es2022", "--module", "nodenext")
    for command in (
        ("openapi-typescript", "openapi.json", "-o", "lmdaemon.d.ts"),
        ("tsc", *strictly, "game_server.ts"),
    ):
        program = modules / ".bin" / command[0]
        done = subprocess.run([program, *command[1:]], cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(params=["python", pytest.param("typescript", marks=pytest.mark.clients)])
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Example]:
    """Returns a function that starts a game server, in each language that has an example."""
    if request.param == "python":
        monkeypatch.syspath_prepend(EXAMPLES)
        import game_server

        yield lambda base, operator="acme", idle_s=900, api_token="": InPython(
            game_server, base, operator, idle_s, api_token
        )
        sys.modules.pop("game_server", None)
        return
    compiled = request.getfixturevalue("compiled")
    with ExitStack() as ends:

        def begin(base: str, operator: str = "acme", idle_s: int = 900, api_token: str = "") -> Played:
            played = InTypeScript(compiled, base, operator, idle_s, api_token)
            ends.callback(played.end)
            return played

        yield begin


def states(daemon: Process, *session_ids: str) -> list[str]:
    path = f"{daemon.api}/v1/operators/acme/sessions"
    return [daemon.call("GET", f"{path}/{one}")[1].get("state", "unknown") for one in session_ids]


def test_a_restart_is_outlived_and_nothing_is_lost(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api)
        played.open("s/1")
        assert daemon.stop() == 0
        played.meanwhile[3] = daemon.start
        played.open("s2")  # repeats the call until the daemon is back
        played.heartbeat()
        assert states(daemon, "s%2F1", "s2") == ["active", "active"]
        assert len(played.waits) == 3
        assert max(played.waits) <= played.longest_wait_s
        assert played.ended == []


def test_what_a_restore_has_lost_is_opened_again(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api, idle_s=90)
        for number in range(3):
            played.open(f"s{number}")
        daemon.stop()
        for file in tmp_path.glob("lmdaemon.sqlite3*"):  # as after restoring a backup that is older than the sessions
            file.unlink()
        daemon.start()
        assert states(daemon, "s0", "s1", "s2") == ["unknown"] * 3
        played.heartbeat()
        assert states(daemon, "s0", "s1", "s2") == ["active"] * 3
        _, shown = daemon.call("GET", f"{daemon.api}/v1/operators/acme/sessions/s0")
        assert shown["idleTimeoutSeconds"] == 90


def test_what_has_ended_is_told_once_and_played_no_more(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api)
        for number in range(3):
            played.open(f"s{number}")
        daemon.call("POST", f"{daemon.api}/v1/operators/acme/sessions/s1/close")
        played.close("s2")
        played.heartbeat()
        played.heartbeat()
        assert played.ended == ["s1"]
        assert played.playing == ["s0"]
        with pytest.raises(Refused, match=r"^ended$"):
            played.open("s1")
        played.close("never-opened")  # closing an unknown session counts as done


def test_an_id_of_another_player_is_refused_and_not_played(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        example(daemon.api).open("s", "somebody", "t")
        played = example(daemon.api)
        with pytest.raises(Refused, match=r"^differs$"):
            played.open("s", "somebody-else", "t")
        assert played.playing == []
        assert played.waits == []


def test_the_api_token_is_shown_with_every_call(tmp_path: Path, example: Example) -> None:
    (tmp_path / "token").write_text(API_TOKEN)
    with process(tmp_path, 'token_file = "token"\n' + OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api, api_token=API_TOKEN)
        played.open("s1")
        played.open("s2")
        played.heartbeat()
        played.close("s1")
        assert played.playing == ["s2"]
        with pytest.raises(Refused):
            example(daemon.api, api_token="another").open("s3")


def test_an_operator_that_is_misspelled_is_no_reason_to_try_again(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api, operator="acne")
        with pytest.raises(Refused, match=r"^unknown-operator$"):
            played.open("s")
        assert played.waits == []


def reload(daemon: Process, old: str, new: str) -> None:
    """Changes the configuration, and waits until the daemon has read it."""
    daemon.config.write_text(daemon.config.read_text().replace(old, new))
    before = len(daemon.events("config.reloaded"))
    daemon.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: len(daemon.events("config.reloaded")) > before)


def test_a_heartbeat_outlives_an_operator_taken_out_by_mistake(tmp_path: Path, example: Example) -> None:
    with process(tmp_path, OPERATOR, command=FORKED) as daemon:
        played = example(daemon.api, idle_s=90)
        for number in range(3):
            played.open(f"s{number}")
        reload(daemon, "operators.acme", "operators.acne")

        def stop() -> None:
            raise KeyboardInterrupt

        played.meanwhile[3] = lambda: reload(daemon, "operators.acne", "operators.acme")
        played.meanwhile[4] = stop
        with pytest.raises(KeyboardInterrupt):
            played.run()
        assert states(daemon, "s0", "s1", "s2") == ["active"] * 3
        shown = [daemon.call("GET", f"{daemon.api}/v1/operators/acme/sessions/s{number}")[1] for number in range(3)]
        assert all(one["lastSeenAt"] > one["openedAt"] for one in shown)
    # After a refusal it comes again soon, and then every third of the idle time as before
    assert max(played.waits[1:3]) <= played.longest_wait_s
    assert min(played.waits[0], played.waits[3]) >= 24


@pytest.mark.parametrize("status", [401, 403, 421])
def test_a_refused_heartbeat_raises_nothing_and_forgets_nothing(example: Example, status: int) -> None:
    Busy.script = [(200, {}), (status, {}), (status, {})]  # node's fetch repeats a 421 once, as its standard says
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        played = example(f"http://127.0.0.1:{server.server_port}")
        played.open("s")
        played.heartbeat()
        server.shutdown()
    assert (played.playing, played.ended, played.waits) == (["s"], [], [])


class Busy(BaseHTTPRequestHandler):
    """Answers the first requests with the errors of `script`, and then accepts them."""

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

    def do_POST(self) -> None:
        self.do_PUT()

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def test_retry_after_is_waited_for_and_a_proxy_that_has_nobody_too(example: Example) -> None:
    Busy.script = [(503, {"Retry-After": "7"}), (502, {}), (408, {})]
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        played = example(f"http://127.0.0.1:{server.server_port}")
        played.open("s")
        server.shutdown()
    assert played.waits[0] == 7
    assert len(played.waits) == 3


def test_the_heartbeat_comes_every_third_of_the_idle_time_at_most(example: Example) -> None:
    played = example("http://127.0.0.1:1", idle_s=900)

    def stop() -> None:
        raise KeyboardInterrupt

    played.meanwhile[50] = stop
    with pytest.raises(KeyboardInterrupt):
        played.run()
    assert all(240 <= wait_s <= 300 for wait_s in played.waits)
    assert len(set(played.waits)) > 1
