"""The socket unit: what happens when an administrator changes an address, and two ways to do it right."""

import time
from concurrent.futures import ThreadPoolExecutor

from installed import PRIVATE, PUBLIC, UNIT, WITHIN_S, Service
from processes import wait_for

MOVED = "http://127.0.0.1:8090"


def test_a_client_that_comes_before_the_daemon_is_answered_by_it(service: Service) -> None:
    service.systemctl("stop", UNIT)
    assert service.call("GET", f"{PUBLIC}/health") == (200, {"status": "pass"})  # the request has started the daemon


def test_restarts_in_a_row_never_close_its_addresses_for_good(service: Service) -> None:
    for _ in range(7):  # systemd's default limit is 5 in 10 seconds
        service.systemctl("restart", "lmdaemon.socket")
    service.wait_until_serving()


def test_an_address_changed_in_one_place_is_told_and_nobody_hangs(service: Service) -> None:
    """The address stands in the configuration and in the socket unit, and only one of them is changed."""
    moved(service)
    service.systemctl("restart", UNIT)
    wait_for(lambda: service.call("GET", f"{MOVED}/health")[0] == 200, WITHIN_S)
    warning = service.event("socket.unused")
    assert (warning["address"], warning["PRIORITY"]) == ("127.0.0.1:8080", "4")
    assert "systemctl restart lmdaemon.socket" in warning["note"]
    began = time.monotonic()
    assert service.call("GET", f"{PUBLIC}/health", None, "--max-time", "30")[0] == 503
    assert time.monotonic() - began < 30
    # What the warning advises
    service.drop_in(
        "[Socket]\nListenStream=\nListenStream=127.0.0.1:8090\nListenStream=127.0.0.1:8081\n", "lmdaemon.socket"
    )
    service.systemctl("restart", "lmdaemon.socket")
    wait_for(lambda: service.call("GET", f"{MOVED}/health")[0] == 200, WITHIN_S)
    assert service.active
    assert service.call("GET", f"{PUBLIC}/health")[0] == 0
    assert len(service.events("socket.unused")) == 1
    service.systemctl("stop", UNIT)
    assert service.call("GET", f"{MOVED}/health")[0] == 200  # systemd keeps the socket open


def test_without_the_socket_the_daemon_opens_its_addresses_itself(service: Service) -> None:
    service.systemctl("mask", "--now", "lmdaemon.socket")
    try:
        assert service.show("ActiveState") == "inactive"
        moved(service)
        service.systemctl("start", UNIT)
        assert [service.call("GET", f"{side}/health")[0] for side in (MOVED, PRIVATE, PUBLIC)] == [200, 200, 0]
        service.systemctl("restart", UNIT)
        assert service.call("GET", f"{MOVED}/health")[0] == 200
    finally:
        service.systemctl("stop", UNIT)
        service.systemctl("unmask", "lmdaemon.socket")


def test_ready_means_that_both_sides_serve(service: Service) -> None:
    """The socket unit is off, so that only the daemon can answer."""
    service.systemctl("mask", "--now", "lmdaemon.socket")
    try:
        service.rig.write("/run/lmdaemon/slow-start", "5")

        def starting() -> str | None:
            """The unit's state while its status text says that it starts, both read at the same moment."""
            shown = service.systemctl("show", "--property=ActiveState,StatusText", UNIT)
            return shown if "StatusText=Starting." in shown else None

        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(service.systemctl, "start", UNIT)
            assert "ActiveState=activating" in wait_for(starting, WITHIN_S)
            started.result()
        assert [service.call("GET", f"{side}/health")[0] for side in (PUBLIC, PRIVATE)] == [200, 200]
    finally:
        service.systemctl("stop", UNIT)
        service.systemctl("unmask", "lmdaemon.socket")


def moved(service: Service) -> None:
    service.configure("[sessions]", '[server]\nlisten = "127.0.0.1:8090"\n[sessions]')
