"""How many bytes the connections of both listeners may hold, and what each of them holds."""

from typing import Protocol

from lmdaemon.limits import LIMITS, Limits

HELD_MIN = 2048  # a connection that holds fewer bytes is not cut for lack of memory


class Holder(Protocol):
    """A connection that can be cut to free what it holds."""

    def holds(self, memory: "Memory") -> int:
        """The bytes of `memory` that would be free if the connection were cut."""

    def cut(self, reason: str) -> None:
        """Ends the connection and frees its bytes."""


class Memory:
    """The bytes that connections hold, at most `most` altogether.

    Beyond that, the connections that hold the most are cut, until a quarter is free. Connections that hold no more than
    a usual request are spared; their number is bounded.
    """

    def __init__(self, most: int, holders: "set[Holder]") -> None:
        self.most = most
        self.used = 0
        self._holders = holders

    def take(self, size: int) -> None:
        """Adds bytes that are held from now on."""
        self.used += size
        if self.used > self.most:
            self.make_room()

    def make_room(self) -> None:
        """Cuts connections, the largest holders first, until a quarter is free."""
        sizes = [(size, one) for one in self._holders if (size := one.holds(self)) >= HELD_MIN]
        for _, one in sorted(sizes, key=lambda found: found[0], reverse=True):
            if self.used <= self.most * 3 // 4:
                break
            one.cut("memory")


class Bounds:
    """The limits of connections, and the memory that both listeners share.

    `strangers` counts the bytes of requests that are not authenticated (yet). `known` counts those of authenticated
    requests, and the bytes of answers that clients have not taken yet.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.open: set[Holder] = set()  # the connections of both listeners
        self.strangers = Memory(limits.strangers_max, self.open)
        self.known = Memory(limits.known_max, self.open)


class Account:
    """The bytes that one connection holds, each counted in one of the two memories.

    What has arrived is counted with the strangers' bytes until its request is authenticated. Answers that wait in the
    transport are always counted with the known clients'.
    """

    __slots__ = ("_bounds", "_memory", "_unsent", "held")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._memory = bounds.strangers  # in which `held` is counted
        self._unsent = 0  # bytes of answers that wait in the transport
        self.held = 0  # bytes received and not answered yet

    def take(self, size: int) -> None:
        """Counts bytes that have arrived. This may cut connections, including the one whose account this is."""
        self.held += size
        memory = self._memory
        memory.used += size
        if memory.used > memory.most:
            memory.make_room()

    def free(self, size: int) -> None:
        """Counts bytes as no longer held: their request was answered, or its connection was cut or lost."""
        self._memory.used -= size
        self.held -= size
        if not self.held:
            self._memory = self._bounds.strangers

    def trust(self) -> None:
        """Counts the bytes held as a known client's, because its request is authenticated."""
        known = self._bounds.known
        if self._memory is not known:
            self._memory.used -= self.held
            self._memory = known
            known.take(self.held)

    def set_unsent(self, size: int) -> None:
        """Sets how many bytes of answers wait in the transport."""
        known = self._bounds.known
        known.used -= self._unsent
        self._unsent = size
        known.take(size)

    def of(self, memory: Memory, received: int) -> int:
        """How many bytes this connection has in `memory`, if it holds `received` bytes of requests."""
        counted = received if memory is self._memory else 0
        return counted + self._unsent if memory is self._bounds.known else counted
