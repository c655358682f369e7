"""Limits of the daemon's parts that are no settings: numbers, bytes, and spans in seconds."""

from typing import NamedTuple

from lmdaemon.clock import STALL_S


class StoreLimits(NamedTuple):
    """The limits with which a store is opened; tests open stores with others."""

    # The writer's queue
    queue_max: int = 20_000  # most operations that wait; more are refused with a StoreError
    queue_rows: int = 200_000  # most rows that waiting operations name in all; bounds the memory of the queue
    # A transaction that takes longer stops the service clock, because no touch can be acknowledged meanwhile
    hung_s: float = STALL_S

    # Reads
    reads_max: int = 1000  # most reads by the daemon itself that may wait for their turn
    looks_max: int = 100  # most reads for people that may wait for their turn
    look_s: float = 2.0  # the longest time that a read for people may take, its wait included

    # Dead deliveries that are counted, discarded or made due again
    dead_max: int = 100_000  # most that one call counts, discards or makes due
    dead_rows: int = 500  # most that one operation discards or makes due

    # The SQLite file
    busy_timeout_s: float = 2.0  # how long a statement waits for a lock of another program, such as a shell
    # Between two copies of commits from the WAL into the file, which a connection of its own makes
    checkpoint_s: float = 1.0
    wal_max: int = 64 * 1024 * 1024  # bytes; beyond this the writer itself empties the WAL between two batches
    idle_s: float = 5.0  # time without a change after which the WAL is emptied; it may take twice as long

    # The PostgreSQL database

    # How long a transaction may take, and how long it may take besides to find out what became of it. The callers get
    # their error when the next attempt has failed as well, which is within 10 s.
    write_s: float = 2.5
    # A daemon without a transaction for this long counts as gone, by the clock of the daemon that watches it. It is the
    # same for all daemons on a database.
    lease_s: float = 5.0
    watch_s: float = 0.25  # between two looks at the other daemons' rows, at a start
    statement_s: float = 5.0  # after which the server ends a statement
    lock_s: float = 1.0  # after which the server ends a wait for a lock; a batch waits twice at most, within `write_s`
    upgrade_again_s: float = 0.5  # before an upgrade of the schema that found something locked is tried again
    # Most sessions past their idle time, and as many past their lifetime, that a sweep looks at when many are due. A
    # touch waits for such a sweep, about 15 ms; smaller ones would each need a commit of their own.
    crowd_rows: int = 200
    told_s: float = 0.02  # the latest time after a sweep's commit at which its ends are counted and delivered

    @property
    def large_wal(self) -> int:
        """A size (bytes): a WAL that is larger than this is kept from starting over by a long read transaction."""
        return 2 * self.wal_max


class Limits(NamedTuple):
    """The limits with which a daemon is made; tests make daemons with others."""

    # A listener's connections
    connections_max: int = 2000  # most connections of one listener, if the limit of open files allows so many
    # The longest time for a request's head: from the connect, or from its first byte if it is a later request
    head_s: float = 10.0
    write_s: float = 30.0  # how long a client may leave its answers unread
    patrol_s: float = 2.0  # between two checks of `head_s` and `write_s`
    body_s: float = 10.0  # the longest time from the end of the head to the end of the body
    handshake_s: float = 10.0  # the longest time for a TLS handshake
    # At a stop, `heard_within_s` is how long a request that has arrived in part may take to arrive whole. `heard_s` is
    # how long every client may at least still ask something, because it cannot know that the daemon stops.
    heard_within_s: float = 1.0
    heard_s: float = 0.05
    strangers_max: int = 6 * 1024**2  # most bytes of requests that are not authenticated yet, on both listeners
    # Most bytes of authenticated requests, and of answers that clients have not taken yet
    known_max: int = 32 * 1024**2

    # Event streams
    listeners_max: int = 32  # most clients that listen to events
    waiting_max: int = 2000  # most events that wait for one client
    gather_s: float = 0.1  # events are gathered for this long, and sent together
    gathered_max: int = 500  # when so many events are gathered, they are sent at once
    figures_every_s: float = 1.0  # between two `figures` events

    # Figures of the last hour
    charted_max: int = 100  # most operators that have figures of their own; the figures of all together are always kept

    # Health
    answer_within_s: float = 2.0  # how long the store may take to answer
    low_share: float = 0.15  # a smaller share of free space on the disk is a warning

    store: StoreLimits = StoreLimits()


LIMITS = Limits()
