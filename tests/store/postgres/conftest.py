"""A store that connects to its server through a proxy, which can lose data."""

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from engines import Engine, PostgresEngine
from proxy import Proxy


@pytest.fixture
def engine(postgres_engine: PostgresEngine) -> Engine:
    return postgres_engine


@pytest.fixture
def proxied(postgres_engine: PostgresEngine) -> Iterator[tuple[PostgresEngine, Proxy]]:
    """An engine whose stores connect through a proxy to the test's database, and the proxy."""
    found = psycopg.conninfo.conninfo_to_dict(postgres_engine.url)
    with Proxy(int(found["port"] or 5432)) as proxy:
        url = psycopg.conninfo.make_conninfo(postgres_engine.url, host="127.0.0.1", port=proxy.port)
        with closing(PostgresEngine(url, postgres_engine.url)) as engine:
            yield engine, proxy
