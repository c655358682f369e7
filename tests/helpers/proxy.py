"""A TCP proxy in front of a server, which can lose what passes through it."""

import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Literal

Mode = Literal["pass", "cut requests", "cut answers", "swallow", "swallow answers"]


class Proxy:
    """Listens on `port` and passes data on to the server, `delay_s` later.

    `mode` chooses what happens to data that arrive from now on: they are passed on; the connection is cut before a
    request is passed on, or instead of its answer; or everything is swallowed without a word, new connections included,
    as if the server's machine were gone; or, from the next answer on, everything is.
    """

    def __init__(self, server_port: int) -> None:
        self._server = ("127.0.0.1", server_port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.mode: Mode = "pass"
        self.delay_s = 0.0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(OSError):  # if either side is gone, the other connection is closed, too
            while self.mode == "swallow":
                time.sleep(0.02)
            with socket.create_connection(self._server) as server, selectors.DefaultSelector() as ready:
                ready.register(client, selectors.EVENT_READ, server)
                ready.register(server, selectors.EVENT_READ, client)
                self._carry_between(client, ready)

    def _carry_between(self, client: socket.socket, ready: selectors.BaseSelector) -> None:
        while True:
            for key, _ in ready.select():
                if not self._pass_on(key.fileobj, key.data, from_client=key.fileobj is client):  # type: ignore[arg-type]
                    return

    def _pass_on(self, source: socket.socket, target: socket.socket, *, from_client: bool) -> bool:
        data = source.recv(65536)
        if not data:
            return False
        if self.mode == ("cut requests" if from_client else "cut answers"):
            self.cuts += 1
            self.mode = "pass"
            return False
        if self.mode == "swallow answers" and not from_client:
            self.mode = "swallow"
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.mode != "swallow":
            target.sendall(data)
        return True
