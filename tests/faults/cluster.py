"""Several daemon processes on one PostgreSQL database, used as clients use them: any daemon that runs may be asked."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import psycopg
from postgres import OwnServer
from processes import Process, wait_for
from proxy import Proxy

TOML = """
[database]
url = "postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
[sessions]
restart_grace = "0s"
daemon_grace = "1s"
[delivery]
schedule = ["100ms", "200ms", "300ms"{more}]
[log]
level = "debug"  # every line: an end that is told twice would show
format = "json"
"""


class Cluster:
    """Named daemons, each of which reaches the database through a proxy of its own, and knows the database's standby if
    there is one. The properties `api` and `server` name another daemon at each use.
    """

    def __init__(
        self,
        database: OwnServer,
        directory: Path,
        operators: str,
        names: str,
        environment: Mapping[str, str],
        standby: OwnServer | None,
    ) -> None:
        self.database = database
        self.daemons: dict[str, Process] = {}
        self.proxies: dict[str, Proxy] = {}
        self._operators = operators.count("[operators.")
        self._random = Random(1)
        for name in names:
            self.proxies[name] = proxy = Proxy(database.port)
            (directory / name).mkdir()
            hosts = ",".join(f"127.0.0.1:{one.port}" for one in (proxy, standby) if one is not None)
            toml = TOML.format(hosts=hosts, more=', "500ms"' * 40) + operators
            self.daemons[name] = Process(directory / name, toml, environment)

    def start(self, *names: str) -> None:
        """Starts these daemons, or all of them, and waits until they serve."""
        for name in names or self.daemons:
            self.daemons[name].spawn()
        for name in names or self.daemons:
            self.daemons[name].wait_until_serving()

    def close(self) -> None:
        for name, daemon in self.daemons.items():
            if hasattr(daemon, "popen"):
                daemon.kill()
            self.proxies[name].__exit__()

    # -- used by a client

    def any(self) -> Process:
        return self._random.choice(list(self.daemons.values()))

    @property
    def api(self) -> str:
        return self.any().api

    @property
    def server(self) -> str:
        return self.any().server

    def call(self, method: str, url: str, body: object = None) -> tuple[int, Any]:
        return self.any().call(method, url, body)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of all daemons' logs with this event."""
        return [line for daemon in self.daemons.values() for line in daemon.events(name)]

    # -- rows in the database, and what the daemons say of each other

    def rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        if statement.startswith("PRAGMA"):  # SQLite's check of its file, which has no meaning here
            return [("ok",)]
        with psycopg.connect(self.database.url, autocommit=True, options="-c search_path=lmdaemon") as sql:
            return sql.execute(statement, arguments).fetchall()  # type: ignore[arg-type]

    def members(self, asked: str) -> dict[str, dict[str, Any]]:
        """The list of daemons that one of them returns, by their names in this test. A daemon that is not in the test
        has the name that it has itself.
        """
        status, found = self.daemons[asked].call("GET", f"{self.daemons[asked].api}/v1/daemons")
        names = {daemon.api.removeprefix("http://"): name for name, daemon in self.daemons.items()}
        return {names.get(one["address"], one["name"]): one for one in found["items"]} if status == 200 else {}

    def owner(self, operator: str, asked: str) -> str:
        """The name of the daemon that owns an operator, as asked of one daemon."""
        return next(name for name, one in self.members(asked).items() if operator in one["operators"])

    def wait_for(self, *names: str, within_s: float = 60.0) -> None:
        """Waits until each of these daemons sees these daemons and no other, and each operator is owned by one of
        them.
        """

        def agreed() -> bool:
            seen = [self.members(asked) for asked in names]
            owned = [sum(len(one["operators"]) for one in members.values()) for members in seen]
            return all(members.keys() == set(names) for members in seen) and owned == [self._operators] * len(names)

        wait_for(agreed, within_s, lambda: json.dumps({name: self.members(name) for name in names}, indent=1))


@contextlib.contextmanager
def cluster(
    database: OwnServer,
    directory: Path,
    operators: str,
    names: str = "abc",
    environment: Mapping[str, str] = MappingProxyType({}),
    standby: OwnServer | None = None,
) -> Iterator[Cluster]:
    """Starts daemons and waits until they serve and see each other."""
    made = Cluster(database, directory, operators, names, environment, standby)
    try:
        made.start()
        made.wait_for(*names)
        yield made
    finally:
        made.close()
