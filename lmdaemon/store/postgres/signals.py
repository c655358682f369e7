"""Events that wake the loops for looks, beats and hints."""

import asyncio


class Signals:
    """What is to be done at once. Whoever finds a reason sets the event, and the loop that does it clears it."""

    def __init__(self) -> None:
        self.look = asyncio.Event()  # look at what the others have done
        self.beat = asyncio.Event()  # work out anew when the next beat is due
        self.hint = asyncio.Event()  # let the others look
