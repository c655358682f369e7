"""The engines on which the contract tests run."""

import pytest
from engines import Engine

ENGINES = ("sqlite", "postgres", "pair")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An empty database of each engine: every test in this directory runs once for each name in ENGINES (with one
    daemon alone on PostgreSQL only with DEEP=1).

    To add an engine, implement the methods of `engines.Engine` (open, kill, outage, archive, rows), write a fixture
    `NAME_engine` beside `sqlite_engine` in the directory above, and put NAME into ENGINES. That fixture may use
    fixtures of a wider scope, such as a server that is started once, and may skip the test with a reason where the
    engine is missing.

    Tests here use only the verbs of `lmdaemon.store.contract.Store` and those methods. What one engine promises beyond
    them is tested in a directory of that engine.
    """
    found: Engine = request.getfixturevalue(f"{request.param}_engine")
    return found
