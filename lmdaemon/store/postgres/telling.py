"""Tells the observers of the ends of one sweep while the server writes the next one, if many sweeps follow each
other.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from lmdaemon.store.rules import Changes


class Telling:
    """Puts off the calls of the observers after a sweep when the next sweep follows at once (see `Sweep.crowd`). If the
    event loop called the observers first, the server would wait for the event loop, and then the event loop for the
    server.

    `tell` calls the observers for the changes of one batch. It is called on the event loop, for one batch after the
    other in their order: when the next batch was sent, or `latest_s` seconds after the commit if there is none.
    """

    def __init__(self, tell: Callable[[Changes], None], latest_s: float) -> None:
        self._tell = tell
        self._latest_s = latest_s
        self._untold: Changes | None = None
        self._latest: asyncio.TimerHandle | None = None

    def put_off(self, changes: Changes) -> None:
        """Has the observers called for these changes when the next batch was sent, or after `latest_s`."""
        self.now()
        self._untold = changes
        self._latest = asyncio.get_running_loop().call_later(self._latest_s, self.now)

    def now(self) -> None:
        """Calls the observers now, if that was put off."""
        changes, self._untold = self._untold, None
        if self._latest is not None:
            self._latest.cancel()
            self._latest = None
        if changes is not None:
            self._tell(changes)

    def when_sent(self) -> Callable[[], None] | None:
        """Returns a function that the connection's thread must call when it has sent the next batch; None if nothing
        was put off.
        """
        if self._untold is None:
            return None
        loop = asyncio.get_running_loop()

        def sent() -> None:
            with suppress(RuntimeError):  # the event loop is closed: no observer is left
                loop.call_soon_threadsafe(self.now)

        return sent
