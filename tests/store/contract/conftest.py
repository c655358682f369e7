"""The engines that the contract suite is run with."""

import pytest
from engines import Engine

ENGINES = ("sqlite", "postgres", "pair")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An empty database of each engine: every test in this directory is run once for each name in ENGINES
    (one daemon alone on PostgreSQL with DEEP=1).

    To add an engine, implement the methods of `engines.Engine` (open, kill, outage, archive, rows), write a fixture
    `NAME_engine` that gives one to each test, beside `sqlite_engine` in the directory above, and put NAME into ENGINES.
    That fixture may depend on others of a wider scope, such as a server that is started once, and may skip, with its
    reason, where there is none. Tests here call the verbs of `lmdaemon.store.contract.Store` and these methods, and
    nothing else: whatever a single engine promises beyond the contract is tested in a directory of its own.
    """
    found: Engine = request.getfixturevalue(f"{request.param}_engine")
    return found
