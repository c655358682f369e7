"""One booted machine ("rig") of each Debian release for all tests of the service. Where none can run, the tests are
skipped with the reason.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from installed import Service
from rig import Rig, Unavailable

# Debian 12 (systemd 252, Python 3.11) and 13 (257, 3.13); the variable SUITE names others, or one of them
SUITES = (os.environ.get("SUITE") or "bookworm trixie").split()


@pytest.fixture(scope="session", autouse=True)
def _ends_in_order() -> None:
    """Turns SIGTERM, as from timeout(1), into an orderly end, so that a rig leaves no directories and control groups
    behind.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def booted_rig(suite: str) -> Iterator[Rig]:
    """A freshly booted systemd. What a test changes in it stays for the tests that follow."""
    with contextlib.ExitStack() as stack:
        try:
            rig = stack.enter_context(Rig(suite))
        except Unavailable as reason:
            pytest.skip(f"{suite}: {reason}")
        yield rig


@pytest.fixture(scope="session")
def booted(suite: str) -> Iterator[Rig]:
    with booted_rig(suite) as rig:
        yield rig


@pytest.fixture(scope="module")
def bare(suite: str) -> Iterator[Rig]:
    """A rig for one module, in which no other test has installed anything."""
    with booted_rig(suite) as rig:
        yield rig


@pytest.fixture(scope="session")
def installed(booted: Rig) -> Service:
    """lmdaemon installed as an administrator installs it, enabled and started."""
    service = Service(booted)
    service.install()
    return service


@pytest.fixture
def service(installed: Service) -> Service:
    """The service, running as it was installed, whatever the test before has done to it."""
    installed.restore()
    return installed
