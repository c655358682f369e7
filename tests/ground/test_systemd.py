"""sd_notify and handed-over sockets, tested without systemd: what it is told, and which socket serves which
listener.
"""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from lmdaemon import systemd
from lmdaemon.systemd import Address, Notifier, assign, listening_sockets


@pytest.mark.parametrize("abstract", [False, True])
def test_state_arrives_as_one_datagram(tmp_path: Path, abstract: bool) -> None:
    name = f"@lmdaemon-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        notifier.send(READY="1", STATUS="3 sessions live")
        assert manager.recv(100) == b"READY=1\nSTATUS=3 sessions live"
        notifier.close()


def test_its_variables_are_taken_out_of_the_environment() -> None:
    environment = {"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid()), "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    assert Notifier(environment).watchdog_s == 5
    assert listening_sockets(environment) == []
    assert environment == {}


def test_a_watchdog_meant_for_another_process_is_not_fed() -> None:
    assert Notifier({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}).watchdog_s is None


def test_without_a_manager_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier({})
    notifier.send(READY="1")
    notifier.reloading()
    assert not notifier.listening
    notifier.close()


def test_a_manager_that_went_away_is_no_reason_to_stop(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    notifier.send(WATCHDOG="1")
    notifier.close()


def test_a_manager_that_cannot_be_told_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"NOTIFY_SOCKET: .*/none: No such file") as raised:
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")})
    assert raised.value.strerror == f"NOTIFY_SOCKET: {tmp_path}/none: No such file or directory"
    with pytest.raises(OSError, match=f"NOTIFY_SOCKET: {'/long' * 30}: AF_UNIX path too long"):
        Notifier({"NOTIFY_SOCKET": "/long" * 30})


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("file", "Socket operation on non-socket"),
        ("datagrams", "is no stream socket, which ListenStream= makes"),
        ("connection", "is a connection, which Accept=yes makes"),
        ("closed", "Bad file descriptor"),
    ],
)
@pytest.mark.parametrize("name", ["server", ""])
def test_a_handed_over_socket_of_a_wrong_kind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, problem: str, name: str
) -> None:
    with (
        (tmp_path / "file").open("wb") as file,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        contextlib.ExitStack() as stack,
    ):
        connection, _ = (stack.enter_context(one) for one in socket.socketpair())
        descriptor = {"file": file, "datagrams": datagrams, "connection": connection}.get(kind, file).fileno()
        number = os.dup(descriptor) if kind != "closed" else 9999
        monkeypatch.setattr(systemd, "FIRST_FD", number)
        environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
        with pytest.raises(OSError, match="LISTEN_FDS") as raised:
            listening_sockets(environment)
        named = f"file descriptor {number}" + (f" ({name})" if name else "")
        assert raised.value.strerror == f"LISTEN_FDS: {named}: {problem}"


def test_time_is_asked_for_where_a_start_or_a_stop_may_take_longer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        notifier.starting(90.5, "Starting.")
        assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=90500000\nSTATUS=Starting."
        notifier.stopping(25, "Stopping.")
        assert manager.recv(100) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=25000000\nSTATUS=Stopping."
        notifier.close()


def test_handed_over_sockets_are_matched_by_name_and_else_by_address(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as named,
        socket.create_server(("127.0.0.1", 0)) as unnamed,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(tmp_path / "api"))
        host, port = unnamed.getsockname()
        wanted: dict[str, Address] = {"server": (host, port), "api": str(tmp_path / "api")}
        assert assign([("", unnamed), ("", unix)], wanted) == ({"server": unnamed, "api": unix}, [])
        assert assign([("", unnamed), ("api", named)], wanted) == ({"api": named, "server": unnamed}, [])
        # A socket that serves no listener is returned, too
        assert assign([("other", named)], wanted) == ({}, [named])
        assert assign([("server", named), ("", unnamed)], wanted) == ({"server": named}, [unnamed])
        assert assign([("api", named), ("api", unix)], wanted) == ({"api": named}, [unix])
