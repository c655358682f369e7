"""The life of the service on a real systemd: enabled, called, reloaded, killed, stuck, restarted, stopped."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from installed import CONFIG, PRIVATE, PUBLIC, UNIT, WITHIN_S, Service
from processes import wait_for


def test_enable_now_starts_the_service_and_its_socket_for_good(service: Service) -> None:
    assert service.systemctl("is-enabled", "lmdaemon.service", "lmdaemon.socket").split() == ["enabled", "enabled"]
    assert service.active
    assert service.call("GET", f"{PUBLIC}/health") == (200, {"status": "pass"})
    assert service.call("GET", f"{PRIVATE}/health")[1]["status"] == "pass"


def test_a_session_that_idles_ends_and_its_operator_hears_of_it(service: Service) -> None:
    service.open("idle", idle_s=1)
    assert service.delivered("idle")["attempts"] == 1
    assert len(service.received("idle")) == 1
    assert service.session("idle")["reason"] == "inactivity"


def test_systemctl_status_reads_like_a_sentence(service: Service) -> None:
    service.open("seen-in-status")
    live = service.call("GET", f"{PRIVATE}/v1/operators")[1]["items"]
    live = sum(operator["live"] for operator in live)
    sessions = f"{live} session{'s' * (live != 1)} live"
    wait_for(lambda: sessions in service.show("StatusText"), WITHIN_S)
    assert f'Status: "Serving. {sessions}, 0 deliveries pending, 0 dead."' in service.systemctl("status", UNIT)


# -- reload


def test_a_reload_takes_the_file_over_and_names_what_changed(service: Service) -> None:
    before = service.pid
    service.configure('endpoint = "/hooked"', 'endpoint = "/elsewhere"')
    service.systemctl("reload", UNIT)
    assert service.event("config.reloaded")["changed"] == "operators.hooked.endpoint"
    assert service.pid == before


def test_a_reload_of_a_broken_file_fails_and_the_daemon_serves_on(service: Service) -> None:
    """The daemon goes on with the old settings."""
    before = service.pid
    service.configure('restart_grace = "0s"', "restart_grace = 5")
    failed = service.rig.run("systemctl", "reload", UNIT, check=False)
    assert failed.returncode != 0
    assert (service.pid, service.active, service.serves) == (before, True, True)
    finding = wait_for(lambda: [e for e in service.journal() if "sessions.restart_grace" in e["MESSAGE"]], WITHIN_S)[0]
    assert finding["MESSAGE"].startswith(f"{CONFIG}: sessions.restart_grace: must be a duration")
    assert finding["PRIORITY"] == "3"
    # `check-config` has failed before the daemon was asked to reload
    assert service.events("config.reload_failed") == []
    service.configure("restart_grace = 5", 'restart_grace = "0s"')
    service.systemctl("reload", UNIT)
    assert service.event("config.reloaded")["changed"] == "nothing"


def test_a_reload_does_no_harm_to_deliveries_in_flight(service: Service) -> None:
    service.wallet(slow=True)
    service.open("in-flight")
    service.close("in-flight")
    wait_for(lambda: service.received("in-flight"), WITHIN_S)
    service.configure('endpoint = "/hooked"', 'endpoint = "/elsewhere"')
    service.systemctl("reload", UNIT)
    service.event("config.reloaded")
    assert service.session("in-flight")["deliveries"][0]["state"] == "pending"
    service.wallet()
    assert service.delivered("in-flight")["attempts"] == 1
    assert len(service.received("in-flight")) == 1


def test_what_the_daemon_logs_has_its_priority_in_the_journal(service: Service) -> None:
    service.configure("[sessions]", "[database]\nmigrate = false\n[sessions]")
    service.systemctl("reload", UNIT)
    assert service.event("config.needs_restart")["PRIORITY"] == "4"
    assert service.event("config.reloaded")["PRIORITY"] == "6"


# -- killed and stuck


def test_killed_it_is_back_and_nothing_is_lost(service: Service) -> None:
    service.wallet(down=True)
    service.open("killed-live")
    service.open("killed-ended")
    assert service.call("POST", f"{PRIVATE}/v1/operators/acme/sessions/killed-live/touch")[0] == 204
    touched = service.session("killed-live")["lastSeenAt"]
    service.close("killed-ended")
    wait_for(lambda: service.received("killed-ended"), WITHIN_S)
    with service.restarts_by_itself():
        service.rig.run("kill", "-KILL", str(service.pid))
    live = service.session("killed-live")
    assert (live["state"], live["lastSeenAt"]) == ("active", touched)
    assert service.session("killed-ended")["deliveries"][0]["state"] == "pending"
    service.wallet()
    delivery = service.delivered("killed-ended")
    assert {notice["id"] for notice in service.received("killed-ended")} == {delivery["id"]}


def test_a_stopped_process_is_restarted_by_the_watchdog(service: Service) -> None:
    watched(service)
    with service.restarts_by_itself():
        service.rig.run("kill", "-STOP", str(service.pid))
    service.says("Watchdog timeout")


def test_a_blocked_loop_is_restarted_with_its_stack_in_the_journal(service: Service) -> None:
    """Nothing acknowledged is lost."""
    watched(service)
    service.rig.path("/run/lmdaemon/block").touch()
    service.open("blocked", "hooked")
    with service.restarts_by_itself():
        service.close("blocked", "hooked")
    service.says("Fatal Python error: Aborted")
    service.says("in blocks_the_loop")
    assert service.delivered("blocked", "hooked")["attempts"] >= 1


def test_a_write_that_hangs_gets_the_daemon_restarted(service: Service) -> None:
    watched(service)
    service.open("before-the-hang")
    hang = "inject=fsync,fdatasync:delay_enter=600s"
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", hang]
    with service.restarts_by_itself():
        service.systemctl("reset-failed", "hang", check=False)
        service.rig.run("systemd-run", "--quiet", "--unit=hang", *strace, "-p", str(service.pid))
        # The request is not answered any more, so the client gives up; the commit goes on hanging
        url = f"{PRIVATE}/v1/operators/acme/sessions/never-acknowledged"
        wait_for(lambda: service.call("PUT", url, {"playerId": "p", "token": "t"}, "-m", "1")[0] == 0, WITHIN_S)
        service.says("Watchdog timeout")
        service.systemctl("kill", "--signal=KILL", "hang")  # a tracer keeps the ended process as a zombie
    assert "writer" in service.event("watchdog.withheld")["stuck"].split(",")
    assert service.session("before-the-hang")["state"] == "active"


def watched(service: Service) -> None:
    """Gives the watchdog a short time-out, but one that a busy machine can still keep."""
    service.drop_in("[Service]\nWatchdogSec=4\nTimeoutAbortSec=4\n")
    service.restart()


# -- stopped and started


def test_stopped_it_ends_well_and_stays_so(service: Service) -> None:
    service.systemctl("stop", "lmdaemon.socket")
    assert service.show("Result") == "success"
    assert (service.show("ExecMainCode"), service.show("ExecMainStatus")) == ("1", "0")  # 1: exited
    assert service.event("daemon.stopped")
    assert service.call("GET", f"{PUBLIC}/health")[0] == 0


def test_a_broken_file_at_the_start_is_waited_for_and_so_are_clients(service: Service) -> None:
    service.configure('restart_grace = "0s"', "restart_grace = 5")
    service.rig.run("systemctl", "restart", UNIT, check=False)
    wait_for(lambda: int(service.show("NRestarts")) >= 6, WITHIN_S)  # systemd's default limit is 5 starts
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.call, "GET", f"{PUBLIC}/health")
        wait_for(lambda: int(service.show("NRestarts")) >= 7, WITHIN_S)
        assert not waiting.done()
        service.configure("restart_grace = 5", 'restart_grace = "0s"')
        assert waiting.result() == (200, {"status": "pass"})
    service.wait_until_serving()


def test_restarts_under_load_refuse_nobody_and_lose_nothing_acknowledged(service: Service) -> None:
    def live() -> int:
        return sum(operator["live"] for operator in service.call("GET", f"{PRIVATE}/v1/operators")[1]["items"])

    rig = service.rig
    rig.write("/run/load.py", Path(__file__).with_name("load.py").read_text())
    rig.path("/run/load-on").touch()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(rig.run, "python3", "/run/load.py", PRIVATE, "/run/load-on", timeout=900)
        for _ in range(4):
            before = live()
            wait_for(lambda seen=before: live() > seen + 50, WITHIN_S)
            service.restart()
        rig.path("/run/load-on").unlink()
        done = json.loads(load.result().stdout)
    assert done["failed"] == []
    assert len(done["opened"]) > 200
    touched = service.call("POST", f"{PRIVATE}/v1/operators/acme/sessions/touch", {"sessionIds": done["opened"]})
    assert touched == (200, {"touched": len(done["opened"]), "unknown": [], "ended": []})


def test_a_start_and_a_stop_that_take_long_with_reason_get_the_time(service: Service) -> None:
    # On a busy machine, starting the interpreter alone takes seconds, and only after that can the daemon ask for more
    # time
    service.drop_in("[Service]\nTimeoutStartSec=10\nTimeoutStopSec=4\n")
    service.rig.write("/run/lmdaemon/slow-start", "12")
    service.restart()
    service.rig.path("/run/lmdaemon/slow-start").unlink()
    service.wallet(slow=True)
    service.open("stopped-in-flight")
    service.close("stopped-in-flight")
    wait_for(lambda: service.received("stopped-in-flight"), WITHIN_S)
    service.systemctl("stop", "--no-block", "lmdaemon.socket")
    service.event("daemon.stopping")
    time.sleep(7)  # longer than the unit allows; a slow machine only makes this wait longer, which does no harm
    service.wallet()
    wait_for(lambda: service.show("ActiveState") != "deactivating", WITHIN_S)
    assert (service.show("ActiveState"), service.show("Result")) == ("inactive", "success")
    service.restore()
    assert service.delivered("stopped-in-flight")["attempts"] == 1
