"""The whole daemon: its main task from end to end, reload, stopping, crashes, signals, socket activation, sd_notify."""

import asyncio
import contextlib
import http.client
import json
import logging
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from certificates import make
from clocks import HandClock
from processes import FORKED, free_ports, process, wait_for
from support import LISTEN, hear, scripted_operator, serving, until

from lmdaemon import pruner, tls
from lmdaemon.commands.serve import GARBAGE, SWITCH_S

OPERATOR = """
[operators.acme]
provider_id = "luckymonaco"
notify = true
url = "{url}"
allow_private_network = true
"""
NO_GRACE = '[sessions]\nrestart_grace = "0s"\n'
SESSION = {"playerId": "p", "token": "tok-3n", "idleTimeoutSeconds": 1}
NOTICE = {"providerId": "luckymonaco", "sessionId": "told", "externalPlayerId": "p", "token": "tok-3n"}


async def test_a_session_ends_by_itself_and_its_operator_is_told_once(tmp_path: Path) -> None:
    async with scripted_operator() as operator, serving(tmp_path, NO_GRACE + OPERATOR.format(url=operator.url)) as d:
        session = f"{d.api}/v1/operators/acme/sessions/s-1"
        async with d.client.put(session, json=SESSION) as opened:
            assert opened.status == 201
        await operator.wait_for(1)

        async def settled() -> dict[str, Any] | None:
            async with d.client.get(session) as answer:
                found: dict[str, Any] = await answer.json()
            return found if found["deliveries"] and found["deliveries"][0]["state"] == "delivered" else None

        found = await until(settled)
        assert (found["state"], found["reason"]) == ("ended", "inactivity")
        assert len(operator.received) == 1


async def test_spans_of_the_file_are_kept_to_the_millisecond(tmp_path: Path) -> None:
    """As a float, 4.007 s times 1000 is a little less than 4007: if it were cut, sessions would end 1 ms early."""
    toml = OPERATOR.format(url="http://127.0.0.1:1/") + 'max_lifetime = "4007ms"\n'
    graces = 'restart_grace = "4007ms"\ndaemon_grace = "4007ms"\n'
    async with serving(tmp_path, f'[sessions]\nidle_timeout = "4007ms"\n{graces}{toml}', HandClock()) as d:
        found = {}
        sessions = f"{d.api}/v1/operators/acme/sessions"
        async with d.client.put(f"{sessions}/opened", json={"playerId": "p", "token": "tok-3n"}):
            pass
        async with d.client.post(f"{d.server}/V4/SessionExpired", json=NOTICE):
            pass
        for name in ("opened", "told"):
            async with d.client.get(f"{sessions}/{name}") as answer:
                found[name] = await answer.json()
        assert [one["idleTimeoutSeconds"] for one in found.values()] == [4.007, 4.007]
        opened_at, expires_at = (datetime.fromisoformat(found["opened"][name]) for name in ("openedAt", "expiresAt"))
        assert expires_at - opened_at == timedelta(milliseconds=4007)
        assert (d.store.grace_ms, d.store.daemon_grace_ms) == (4007, 4007)


async def test_a_touch_keeps_it_alive_and_a_close_ends_it_at_once(tmp_path: Path, clock: HandClock) -> None:
    async with serving(tmp_path, NO_GRACE + OPERATOR.format(url="http://127.0.0.1:1/"), clock) as d:
        session = f"{d.api}/v1/operators/acme/sessions/s-1"
        async with d.client.put(session, json=SESSION | {"idleTimeoutSeconds": 10}):
            pass
        for _ in range(3):
            for _ in range(9):
                clock.advance(1)
                d.store.service_clock.now_ms()
            async with d.client.post(session + "/touch") as touched:
                assert touched.status == 204
        async with d.client.post(session + "/close") as closed:
            assert (await closed.json())["reason"] == "closed"


async def test_the_demo_that_talks_to_itself_settles_after_one_turn(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    toml = f'[server]\nlisten = "127.0.0.1:{port}"\n[api]\nlisten = "127.0.0.1:0"\n'
    url = f"http://127.0.0.1:{port}/V4/SessionExpired"
    async with serving(tmp_path, toml + OPERATOR.format(url=url)) as d:
        async with d.client.post(url, json=NOTICE) as answer:
            assert await answer.json() == {"error": 0, "description": "Success"}
        await until(lambda: d.store.figures["acme"].pending == 0)
        deliveries = await d.store.deliveries(operator=None, sink=None, state=None, limit=9, after=None)
        assert [(one.state, one.attempts) for one in deliveries.rows] == [("delivered", 1)]


@pytest.mark.parametrize(("kept_s", "every_s"), [(0.001, 1), (60, 6), (36_000, 3600), (90 * 86_400, 3600)])
def test_pruning_comes_every_tenth_of_what_is_kept_but_hourly_and_no_spin(kept_s: float, every_s: float) -> None:
    assert pruner.every_s(kept_s) == every_s


class TestReload:
    async def test_a_valid_file_is_taken_over_whole(self, tmp_path: Path) -> None:
        async with serving(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/")) as d:
            text = (tmp_path / "config.toml").read_text()
            (tmp_path / "config.toml").write_text(
                text.replace("operators.acme", "operators.other").replace("notify = true", "notify = false")
            )
            await d.daemon.reload_once()
            async with d.client.get(f"{d.api}/v1/operators") as answer:
                (shown,) = (await answer.json())["items"]
            assert (shown["operator"], shown["notify"]) == ("other", False)

    async def test_an_invalid_file_changes_nothing_and_is_reported(self, tmp_path: Path) -> None:
        async with serving(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/")) as d:
            before = d.daemon.settings
            text = (tmp_path / "config.toml").read_text()
            (tmp_path / "config.toml").write_text(text + "nonsense = 1\n")
            await d.daemon.reload_once()
            assert d.daemon.settings is before
            async with d.client.get(f"{d.api}/health") as answer:
                report = await answer.json()
            assert (report["status"], report["checks"]["config"][0]["status"]) == ("warn", "warn")
            assert "operators.acme.nonsense" in report["checks"]["config"][0]["output"]
            async with d.client.get(f"{d.api}/metrics") as answer:
                assert "lmdaemon_config_last_reload_successful 0.0" in await answer.text()
            (tmp_path / "config.toml").write_text(text)
            await d.daemon.reload_once()
            async with d.client.get(f"{d.api}/health") as answer:
                assert (await answer.json())["status"] == "pass"

    async def test_what_needs_a_restart_is_said_and_no_secret_is_logged(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "tokens").write_text("first-secret")
        (tmp_path / "tokens").chmod(0o600)
        toml = LISTEN.replace("[api]", '[api]\ntoken_file = "tokens"') + OPERATOR.format(url="http://127.0.0.1:1/")
        async with serving(tmp_path, toml) as d:
            logging.getLogger("lmdaemon").propagate = True
            (tmp_path / "tokens").write_text("second-secret")
            changed = toml.replace('listen = "127.0.0.1:0"\n[api]', 'listen = "127.0.0.1:1"\n[api]')
            (tmp_path / "config.toml").write_text(changed)
            await d.daemon.reload_once()
            facts = [record.__dict__.get("facts", {}) for record in caplog.records]
            assert {"key": "server.listen"} in facts
            assert not [one for one in facts if "secret" in str(one)]

    async def test_what_needs_a_restart_is_said_at_every_reload(self, tmp_path: Path) -> None:
        """Each reload says so until the file is again as it was at the start."""
        toml = LISTEN + OPERATOR.format(url="http://127.0.0.1:1/")
        async with serving(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/")) as d:
            named = []
            for path in ("other", "other", None):
                text = toml if path is None else toml + f'[database]\npath = "{path}"\n'
                (tmp_path / "config.toml").write_text(text)
                with hear("lmdaemon.daemon") as events:
                    await d.daemon.reload_once()
                named.append([event.facts["key"] for event in events if event.name == "config.needs_restart"])
            assert named == [["database.path"], ["database.path"], []]

    async def test_a_reload_warns_of_what_a_start_warns_of(self, tmp_path: Path) -> None:
        (tmp_path / "tokens").write_text("s3cret-of-a-partner")
        (tmp_path / "tokens").chmod(0o600)
        toml = OPERATOR.format(url="http://127.0.0.1:1/")
        toml += 'token_check = "partner"\npartner_token_file = "tokens"\n'
        async with serving(tmp_path, toml) as d:
            (tmp_path / "tokens").chmod(0o644)
            session = f"{d.api}/v1/operators/acme/sessions/s-1"
            async with d.client.put(session, json=SESSION | {"idleTimeoutSeconds": 60}) as opened:
                assert opened.status == 201
            with hear("lmdaemon.daemon") as events:
                await d.daemon.reload_once()
                (tmp_path / "config.toml").write_text(LISTEN)
                await d.daemon.reload_once()
            readable, nobody = [event.facts["finding"] for event in events if event.name == "config.warned"]
            assert readable.startswith("operators.acme.partner_token_file: others can read this secret (mode 644)")
            assert nobody == "no operator is configured: nothing can be opened or received"
            assert [event.facts["operator"] for event in events if event.name == "operator.not_configured"] == ["acme"]

    async def test_a_reload_says_which_secrets_are_still_those_of_the_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
        (tmp_path / "credentials").mkdir()
        for secret in (tmp_path / "credentials" / "partner", tmp_path / "signing"):
            secret.write_text("whsec_" + "A" * 32)
            secret.chmod(0o600)
        toml = OPERATOR.format(url="http://127.0.0.1:1/")
        toml += 'token_check = "partner"\npartner_token_file = "partner"\nsigning_secret_file = "signing"\n'
        async with serving(tmp_path, toml) as d:
            with hear("lmdaemon.daemon") as events:
                await d.daemon.reload_once()
            (facts,) = [event.facts for event in events if event.name == "config.reloaded"]
            assert facts["note"] == "as systemd handed them over at the start: operators.acme.partner_token_file"

    async def test_a_plugin_that_a_reload_cannot_load_is_named_with_the_file(self, tmp_path: Path) -> None:
        async with serving(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/")) as d:
            text = (tmp_path / "config.toml").read_text()
            (tmp_path / "config.toml").write_text(text + '[plugins.p]\nuse = "no_such_module_at_all:Hook"\n')
            with hear("lmdaemon.daemon") as events:
                await d.daemon.reload_once()
            (facts,) = [event.facts for event in events if event.name == "config.reload_failed"]
            assert facts["finding"].startswith(f"{tmp_path}/config.toml: plugins.p.use: cannot be imported: ")

    async def test_deliveries_of_an_operator_that_left_the_file_wait_for_its_return(self, tmp_path: Path) -> None:
        async with scripted_operator() as operator:
            toml = OPERATOR.format(url=operator.url)
            async with serving(tmp_path, toml) as d:
                await d.store.set_gate("acme", lambda gate: gate)
                (tmp_path / "config.toml").write_text(
                    LISTEN + toml.replace("notify = true", "notify = true\ntimeout='9s'")
                )
                store = d.store
                session = f"{d.api}/v1/operators/acme/sessions/s-1"
                async with d.client.post(f"{d.api}/v1/operators/acme/hold"):
                    pass
                async with d.client.put(session, json=SESSION | {"idleTimeoutSeconds": 60}):
                    pass
                async with d.client.post(session + "/close"):
                    pass
                (tmp_path / "config.toml").write_text(LISTEN)
                await d.daemon.reload_once()
                assert store.figures["acme"].pending == 1
                (tmp_path / "config.toml").write_text(LISTEN + toml)
                await d.daemon.reload_once()
                async with d.client.post(f"{d.api}/v1/operators/acme/release"):
                    pass
                await until(lambda: store.figures["acme"].pending == 0)
                assert len(operator.received) == 1


class TestPruning:
    async def test_what_ended_long_ago_is_gone_after_a_start(self, tmp_path: Path, clock: HandClock) -> None:
        toml = OPERATOR.format(url="http://127.0.0.1:1/").replace("notify = true", "notify = false")
        async with serving(tmp_path, toml, clock) as d:
            async with d.client.post(f"{d.server}/V4/SessionExpired", json=NOTICE) as answer:
                assert (await answer.json())["error"] == 0
        clock.advance(91 * 86400)
        async with serving(tmp_path, toml, clock) as d:

            async def gone() -> bool:
                async with d.client.get(f"{d.api}/v1/operators/acme/sessions/told") as answer:
                    return answer.status == 404

            await until(gone)


async def test_a_loop_that_dies_ends_the_daemon_loudly(tmp_path: Path) -> None:
    async def broken() -> float:
        raise RuntimeError("a bug")

    async def run() -> None:
        async with serving(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/")) as d:
            d.sweeper.once = broken  # type: ignore[method-assign, assignment]
            d.sweeper.wake()
            await asyncio.wait({d.running}, timeout=10)  # `serving` raises the exception that the daemon ended with

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        await run()


# -- real processes


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    with process(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/"), command=FORKED) as daemon:
        sessions = f"{daemon.api}/v1/operators/acme/sessions"
        for number in range(20):
            assert daemon.call("PUT", f"{sessions}/{number}", SESSION | {"idleTimeoutSeconds": 600})[0] == 201
        assert daemon.call("POST", f"{sessions}/3/close")[0] == 200
        assert daemon.call("POST", f"{daemon.server}/V4/SessionExpired", NOTICE)[1]["error"] == 0
        daemon.stop(signal.SIGKILL)
    with process(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/"), command=FORKED) as daemon:
        sessions = f"{daemon.api}/v1/operators/acme/sessions"
        states = [daemon.call("GET", f"{sessions}/{number}")[1]["state"] for number in range(20)]
        assert states == ["active"] * 3 + ["ended"] + ["active"] * 16
        assert daemon.call("GET", f"{sessions}/told")[1]["reason"] == "reported"
        assert daemon.call("POST", f"{daemon.server}/V4/SessionExpired", NOTICE)[1]["error"] == 0
        assert len(daemon.call("GET", f"{sessions}/told")[1]["deliveries"]) == 1


def test_time_spent_stopped_is_no_idleness(tmp_path: Path) -> None:
    """The daemon is stopped (SIGSTOP) for longer than the idle time. The session lives on and can be touched
    afterwards.
    """
    with process(tmp_path, NO_GRACE + OPERATOR.format(url="http://127.0.0.1:1/"), command=FORKED) as daemon:
        session = f"{daemon.api}/v1/operators/acme/sessions/s"
        daemon.call("PUT", session, SESSION | {"idleTimeoutSeconds": 3})
        daemon.popen.send_signal(signal.SIGSTOP)
        time.sleep(4)  # this wait is the fault to be tested, not a wait for a state
        daemon.popen.send_signal(signal.SIGCONT)
        assert daemon.call("POST", session + "/touch")[0] == 204


def test_sigterm_finishes_what_is_in_flight_and_exits_0(tmp_path: Path) -> None:
    async def run() -> None:
        release, arrived = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            arrived.set()
            await release.wait()
            return web.json_response({"error": 0})

        async with scripted_operator(slow) as operator:
            with process(tmp_path, OPERATOR.format(url=operator.url), command=FORKED) as daemon:
                url = f"{daemon.server}/V4/SessionExpired"
                assert (await asyncio.to_thread(daemon.call, "POST", url, NOTICE))[1]["error"] == 0
                await arrived.wait()
                daemon.popen.send_signal(signal.SIGTERM)
                await until(lambda: "daemon.stopping" in daemon.log.read_text())
                release.set()
                assert await asyncio.to_thread(daemon.popen.wait, 20) == 0
                assert "delivery.delivered" in daemon.log.read_text()

    asyncio.run(run())
    with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3")) as sql:
        assert sql.execute("SELECT state, attempts FROM delivery").fetchall() == [("delivered", 1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_is_quick_when_nothing_is_in_flight(tmp_path: Path, number: int) -> None:
    """Idle connections of clients do not delay the stop."""
    with process(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/"), command=FORKED) as daemon:
        with socket.create_connection(("127.0.0.1", int(daemon.api.rpartition(":")[2]))) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(64).startswith(b"HTTP/1.1 200")
            assert daemon.stop(number, within_s=20) == 0


def test_sighup_reloads(tmp_path: Path) -> None:
    with process(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/"), command=FORKED) as daemon:
        text = (tmp_path / "config.toml").read_text()
        (tmp_path / "config.toml").write_text(text.replace("operators.acme", "operators.renamed"))
        daemon.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: daemon.events("config.reloaded"))
        assert daemon.call("GET", daemon.api + "/v1/operators")[1]["items"][0]["operator"] == "renamed"
        assert daemon.stop() == 0


def test_the_service_manager_is_told_ready_status_reloading_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        told: list[dict[str, str]] = []

        def hear(key: str) -> dict[str, str]:
            while True:
                message = dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())
                told.append(message)
                if key in message:
                    return message

        with process(tmp_path, OPERATOR.format(url="http://127.0.0.1:1/"), environment) as daemon:
            assert hear("READY")["STATUS"] == "Serving. 0 sessions live, 0 deliveries pending, 0 dead."
            hear("WATCHDOG")
            hear("WATCHDOG")
            daemon.popen.send_signal(signal.SIGHUP)
            assert int(hear("RELOADING")["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            hear("READY")
            daemon.popen.send_signal(signal.SIGTERM)
            assert hear("STOPPING")["STATUS"] == "Stopping. 0 deliveries in flight."
            assert daemon.popen.wait(20) == 0


def test_sockets_handed_over_serve_and_what_waits_in_them_is_answered(tmp_path: Path) -> None:
    """Socket activation: a client that connected before the daemon ran is served once it runs."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        early = stack.enter_context(socket.create_connection(sockets[0].getsockname()))
        early.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        (tmp_path / "config.toml").write_text(OPERATOR.format(url="http://127.0.0.1:1/"))
        popen = handing_over(tmp_path, {"server": sockets[0], "api": sockets[1]})
        try:
            early.settimeout(20)
            assert early.recv(64).startswith(b"HTTP/1.1 200")
            api = f"http://127.0.0.1:{sockets[1].getsockname()[1]}"
            with urllib.request.urlopen(api + "/v1/operators", timeout=10) as answer:
                assert answer.status == 200
        finally:
            popen.terminate()
            assert popen.wait(20) == 0


def test_a_socket_handed_over_speaks_tls_also_with_who_waits_in_it(tmp_path: Path) -> None:
    own = make(tmp_path, "own")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        waiting = stack.enter_context(socket.create_connection(sockets[0].getsockname(), timeout=20))
        spoken = LISTEN.replace("[api]", 'tls_cert_file = "own.crt"\ntls_key_file = "own.key"\n[api]')
        (tmp_path / "config.toml").write_text(spoken + OPERATOR.format(url="http://127.0.0.1:1/"))
        popen = handing_over(tmp_path, {"server": sockets[0], "api": sockets[1]})
        try:
            context = tls.client_context(own.cert, None, None)
            with context.wrap_socket(waiting, server_hostname="127.0.0.1") as early:
                early.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert early.recv(64).startswith(b"HTTP/1.1 200")
        finally:
            popen.terminate()
            assert popen.wait(20) == 0


def handing_over(directory: Path, sockets: dict[str, socket.socket]) -> "subprocess.Popen[bytes]":
    """Starts the daemon as systemd does for socket activation."""
    # LISTEN_PID must be the daemon's own process id. So the started process sets it and then becomes the daemon.
    wrapper = (
        "import fcntl, os, sys\n"
        "fds = [int(fd) for fd in sys.argv[1].split(',')]\n"
        "kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in fds]\n"
        "for place, fd in enumerate(kept): os.dup2(fd, 3 + place, inheritable=True)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[3])\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'lmdaemon', '--config', sys.argv[2], 'serve'])\n"
    )
    fds = [one.fileno() for one in sockets.values()]
    names = ":".join(sockets)
    command = [sys.executable, "-c", wrapper, ",".join(map(str, fds)), str(directory / "config.toml"), names]
    with (directory / "log").open("w") as stderr:
        return subprocess.Popen(command, stderr=stderr, pass_fds=fds)


def test_clients_of_a_handed_over_socket_without_a_use_are_told(tmp_path: Path) -> None:
    """systemd keeps such a socket open, and so does this test. If the daemon only closed its copy, clients would wait
    for ever.
    """
    with socket.create_server(("127.0.0.1", 0)) as needless, socket.create_server(("127.0.0.1", 0)) as api:
        (tmp_path / "config.toml").write_text(LISTEN + OPERATOR.format(url="http://127.0.0.1:1/"))
        popen = handing_over(tmp_path, {"lmdaemon.socket": needless, "api": api})
        try:
            with socket.create_connection(needless.getsockname()) as client:
                client.settimeout(20)
                answer = http.client.HTTPResponse(client)
                answer.begin()
                assert answer.status == 503
                assert json.loads(answer.read())["error"] == 100
            with urllib.request.urlopen("http://{}:{}/health".format(*api.getsockname()), timeout=20) as answer:
                assert answer.status == 200
        finally:
            popen.terminate()
            assert popen.wait(20) == 0
        (warning,) = [line for line in (tmp_path / "log").read_text().splitlines() if "socket.unused" in line]
        assert "{}:{}".format(*needless.getsockname()) in warning
        assert "systemctl restart lmdaemon.socket" in warning


def test_a_socket_that_reaches_further_than_its_address_is_refused(tmp_path: Path) -> None:
    """The configured address is loopback and was accepted as such; the socket is open to all networks."""
    with socket.create_server(("0.0.0.0", 0)) as wide:
        (tmp_path / "config.toml").write_text(LISTEN + OPERATOR.format(url="http://127.0.0.1:1/"))
        popen = handing_over(tmp_path, {"api": wide})
        assert popen.wait(20) == 2
    finding = (tmp_path / "log").read_text()
    assert "config.toml: api.listen: systemd hands over 0.0.0.0:" in finding
    assert "(got '127.0.0.1:0')" in finding


def test_a_second_sigterm_does_not_cut_the_closing_short(tmp_path: Path) -> None:
    """The second signal comes while a plug-in is being stopped: listeners and loops have ended, the store is still
    open.
    """
    (tmp_path / "slow_stop.py").write_text(
        "import asyncio, pathlib\n"
        "class Hook:\n"
        "    def __init__(self, options): self.home = pathlib.Path(options['home'])\n"
        "    async def session_ended(self, event): pass\n"
        "    async def stop(self):\n"
        "        (self.home / 'stopping').touch()\n"
        "        while not (self.home / 'go on').exists(): await asyncio.sleep(0.01)\n"
        "        (self.home / 'stopped').touch()\n"
    )
    toml = OPERATOR.format(url="http://127.0.0.1:1/")
    toml += f'[plugins.slow]\nuse = "slow_stop:Hook"\noptions = {{ home = "{tmp_path}" }}\n'
    with process(tmp_path, toml, {"PYTHONPATH": str(tmp_path)}) as daemon:
        daemon.popen.send_signal(signal.SIGTERM)
        wait_for((tmp_path / "stopping").exists)
        daemon.popen.send_signal(signal.SIGTERM)
        (tmp_path / "go on").touch()
        assert daemon.popen.wait(20) == 0
        assert (tmp_path / "stopped").exists()


def test_collector_and_thread_switches_are_set_while_it_serves(tmp_path: Path) -> None:
    """The garbage collector runs seldom, and the writer's thread waits only briefly for the interpreter's lock."""
    (tmp_path / "looks.py").write_text(
        "import gc, pathlib, sys\n"
        "class Hook:\n"
        "    def __init__(self, options): self.home = pathlib.Path(options['home'])\n"
        "    async def session_ended(self, event): pass\n"
        "    async def stop(self):\n"
        "        seen = gc.isenabled(), gc.get_threshold()[0], gc.get_freeze_count(), len(gc.get_objects())\n"
        "        seen += (sys.getswitchinterval(),)\n"
        "        (self.home / 'seen').write_text(' '.join(map(str, seen)))\n"
    )
    toml = OPERATOR.format(url="http://127.0.0.1:1/")
    toml += f'[plugins.looks]\nuse = "looks:Hook"\noptions = {{ home = "{tmp_path}" }}\n'
    with process(tmp_path, toml, {"PYTHONPATH": str(tmp_path)}) as daemon:
        daemon.popen.send_signal(signal.SIGTERM)
        assert daemon.popen.wait(20) == 0
    enabled, threshold, kept, looked_through, switch_s = (tmp_path / "seen").read_text().split()
    assert (enabled, int(threshold)) == ("True", GARBAGE)
    assert int(kept) > 10 * int(looked_through)
    assert float(switch_s) == pytest.approx(SWITCH_S)
