"""Sets up the two listeners: their sockets, bound here or handed over by systemd, and the settings they serve with."""

import asyncio
import resource
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web

from lmdaemon import log, systemd
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Settings
from lmdaemon.config.values import Listen
from lmdaemon.web import api, endpoint
from lmdaemon.web.api import Api
from lmdaemon.web.connection import Connection
from lmdaemon.web.endpoint import Endpoint
from lmdaemon.web.listener import Site, connections_max, private_request, public_request
from lmdaemon.web.memory import Bounds
from lmdaemon.web.sockets import Acceptor, Hearing, address_of, bind, turn_away

CUT_S = 0.5  # how long handlers may go on after a stop has cut their connections; aiohttp waits this long two times

events = log.Log("daemon")


class Listeners:
    """Both listeners, by the names that they have in the configuration: "server" and "api".

    `addresses` says where each listens, as `socket.getsockname` does.
    """

    def __init__(self, endpoint: Endpoint, api: Api, hearing: Hearing, bounds: Bounds) -> None:
        self.sites: dict[str, Site] = {}
        self.addresses: dict[str, Any] = {}
        self._endpoint = endpoint
        self._api = api
        self._hearing = hearing
        self._bounds = bounds
        self._runners: list[web.BaseRunner] = []

    async def start(
        self,
        stack: AsyncExitStack,
        handed_over: list[tuple[str, socket.socket]],
        settings: Settings,
        attempts_max: int,
        drain_s: float,
    ) -> None:
        """Begins to serve on sockets that systemd has handed over, or else on new ones. The other arguments are as for
        `configure`.

        Raises ConfigError or OSError.
        """
        wanted = {"server": settings.server.listen, "api": settings.api.listen}
        assigned, unused = systemd.assign(
            handed_over, {name: address_of(listen) for name, listen in wanted.items()} if handed_over else {}
        )
        _check_reach(assigned, wanted)
        for needless in unused:
            _turn_away(stack, needless)
        public = web.Server(self._endpoint.handle, request_factory=public_request)
        runners: dict[str, web.BaseRunner] = {
            "server": web.ServerRunner(public, shutdown_timeout=CUT_S),
            "api": web.AppRunner(self._api.application(), shutdown_timeout=CUT_S),
        }
        answers = {
            "server": (endpoint.malformed, endpoint.unavailable),
            "api": (api.malformed, api.unavailable),
        }
        connection = _connection_type()
        for name, runner in runners.items():
            listening = assigned.get(name) or bind(wanted[name])
            stack.callback(listening.close)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            if name == "api" and runner.server is not None:
                runner.server.request_handler = self._api.shortcut(runner.server.request_handler)
                runner.server.request_factory = private_request(runner.server.request_factory)
            site = Site(runner, listening, *answers[name], name, self._hearing, self._bounds, connection=connection)
            part = self._api if name == "api" else self._endpoint
            site.begin, site.submit = part.begin, part.submit
            self.sites[name] = site
            self._configure(site, settings, attempts_max, drain_s)
            await site.start()
            self.addresses[name] = listening.getsockname()
            self._runners.append(runner)

    def configure(self, settings: Settings, attempts_max: int, drain_s: float) -> None:
        """Gives the listeners new settings; each uses them from its next step on.

        `attempts_max` is how many attempts to deliver there may be at once, which need files too; `drain_s` is how long
        a stop waits for them, and for answers.
        """
        for site in self.sites.values():
            self._configure(site, settings, attempts_max, drain_s)

    def _configure(self, site: Site, settings: Settings, attempts_max: int, drain_s: float) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        site.most = connections_max(files, attempts_max, self._bounds.limits.connections_max)
        site.trusted_proxies = settings.server.trusted_proxies
        spoken = settings.tls.get(site.listener)
        site.tls = None if spoken is None else spoken.context  # for new connections; open ones keep their context
        site.stop_within_s = drain_s - 2 * CUT_S
        if site.listener == "api":
            site.knows = self._api.knows
        else:
            site.keepalive_s = settings.server.keepalive

    async def close(self) -> None:
        """Stops accepting, lets requests that have arrived be answered within `drain_s`, and closes the connections."""
        await asyncio.gather(*(runner.cleanup() for runner in self._runners))


def _connection_type() -> type[Connection]:
    """The class that serves connections: the fast one of `web.hot`, if that module exists."""
    try:
        from lmdaemon.web import hot
    except ImportError:  # without `web.hot` everything works as well, only slower
        return Connection
    return hot.connection_type()


def _turn_away(stack: AsyncExitStack, needless: socket.socket) -> None:
    """Refuses the clients of a socket that no listener uses.

    Closing it would not do that: systemd keeps it open, and clients would wait in it for ever.
    """
    events.warning(
        "socket.unused",
        address=address_text(systemd.address_of(needless)),
        note="systemd hands it over, but no listener of the configuration has this address: clients there get 503. "
        "Make them agree (systemctl edit lmdaemon.socket), then: systemctl restart lmdaemon.socket",
    )
    answer = endpoint.unavailable("nothing is served at this address now")
    acceptor = Acceptor(needless, lambda accepted, _: turn_away(accepted, answer))
    acceptor.start()
    stack.callback(acceptor.close)


def _check_reach(assigned: Mapping[str, socket.socket], wanted: Mapping[str, Listen]) -> None:
    """Raises ConfigError if a handed-over socket is reachable by other machines though `listen` is a loopback address.

    For such a `listen` the configuration was not checked by the rules for addresses that other machines can reach.
    """
    for name, handed_over in assigned.items():
        at = systemd.address_of(handed_over)
        if isinstance(at, tuple) and wanted[name].loopback and not Listen("", *at).loopback:
            reach = f"systemd hands over {address_text(at)}, which other machines can reach"
            rule = f"{reach}: write that address here, so that the rules for such addresses are checked"
            raise ConfigError([f"{name}.listen: {rule} (got {wanted[name].text!r})"])


def address_text(address: systemd.Address) -> str:
    """An address in the form of the setting `listen`."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
