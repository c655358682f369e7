"""One booted rig for all tests of the service; where none can run, they are skipped with the reason."""

import contextlib
from collections.abc import Iterator

import pytest
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
