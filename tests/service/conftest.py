"""One booted rig for all tests of the service; where none can run, they are skipped with the reason."""

import contextlib
from collections.abc import Iterator

import pytest
from installed import Service
from rig import Rig, Unavailable


@pytest.fixture(scope="session")
def booted() -> Iterator[Rig]:
    """A freshly booted systemd; what is done to it stays for the tests that follow."""
    with contextlib.ExitStack() as stack:
        try:
            rig = stack.enter_context(Rig())
        except Unavailable as reason:
            pytest.skip(str(reason))
        yield rig


@pytest.fixture(scope="session")
def installed(booted: Rig) -> Service:
    """lmdaemon installed as an administrator does it, enabled and started."""
    service = Service(booted)
    service.install()
    return service


@pytest.fixture
def service(installed: Service) -> Service:
    """It serves, as it was shipped and configured, whatever the test before has done to it."""
    installed.restore()
    return installed
