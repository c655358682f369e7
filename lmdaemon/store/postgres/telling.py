"""When the observers are told of the ends of a crowd: while the server writes the sweep that follows."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from lmdaemon.store.rules import Changes


class Telling:
    """Puts off what observers do with the ends of a sweep. After a sweep of a crowd the next one begins at once; if the
    event loop told the observers before, the server would wait for it, and then the event loop for the server.

    `tell` is called with the changes of one batch after the other, in their order, on the event loop; `latest_s`
    seconds after the commit if no other batch follows.
    """

    def __init__(self, tell: Callable[[Changes], None], latest_s: float) -> None:
        self._tell = tell
        self._latest_s = latest_s
        self._untold: Changes | None = None
        self._latest: asyncio.TimerHandle | None = None

    def put_off(self, changes: Changes) -> None:
        """Has the observers told of these changes when the next batch was sent, or after `latest_s`."""
        self.now()
        self._untold = changes
        self._latest = asyncio.get_running_loop().call_later(self._latest_s, self.now)

    def now(self) -> None:
        """Tells the observers what was put off."""
        changes, self._untold = self._untold, None
        if self._latest is not None:
            self._latest.cancel()
            self._latest = None
        if changes is not None:
            self._tell(changes)

    def when_sent(self) -> Callable[[], None] | None:
        """What the connection's thread has to call when it has sent the next batch; None: nothing was put off."""
        if self._untold is None:
            return None
        loop = asyncio.get_running_loop()

        def sent() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self.now)

        return sent
