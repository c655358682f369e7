"""Events that wake the loops for looks, beats and hints."""

import asyncio


class Signals:
    """What is to be done at once, by kind. Any part that finds a reason sets the event; the loop that does the work
    clears it.
    """

    def __init__(self) -> None:
        self.look = asyncio.Event()  # look at what the other daemons have done
        self.beat = asyncio.Event()  # work out anew when the next beat is due
        self.hint = asyncio.Event()  # send the other daemons a hint, so that they look
