"""Limits of the listeners and of event streams that are no settings: numbers, bytes, and spans in seconds."""

from typing import NamedTuple


class Limits(NamedTuple):
    """What one daemon is built with; tests give it others."""

    # A listener's connections
    connections_max: int = 2000  # of one listener, where the limit of open files allows it
    head_s: float = 10.0  # from the connect, or from the first byte of a later head, to the end of the head
    write_s: float = 30.0  # how long a client may leave its answers unread
    patrol_s: float = 2.0  # how often connections are checked for these two
    # At a stop: how long a request that has not arrived whole has to do so, and what every client has at least to ask
    # something, because it cannot know that the daemon stops
    heard_within_s: float = 1.0
    heard_s: float = 0.05
    strangers_max: int = 6 * 1024**2  # bytes that have arrived on both listeners and are not authenticated yet
    known_max: int = 32 * 1024**2  # bytes that have arrived and are authenticated, and of answers not taken yet

    # Event streams
    listeners_max: int = 32
    waiting_max: int = 2000  # events that wait for one listener
    gather_s: float = 0.1  # for which events are gathered, to be sent together
    gathered_max: int = 500  # events that are sent without waiting for more
    figures_every_s: float = 1.0


LIMITS = Limits()
