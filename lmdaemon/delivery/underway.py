"""Notes which attempts are under way, in a file that survives a kill of the daemon. The next run adds those that have
no result to the histories of their deliveries.

A commit before each attempt would cost as much as the attempt. So an attempt is noted in a mapped file: what was
written there survives a kill of the process, though not always a crash of the machine. The file has a fixed number of
places; attempts beyond that number are made, but not noted. The space is taken when the file is made, because writing
to a page for which the disk has no room would end the process.
"""

import json
import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

from lmdaemon.log import Log
from lmdaemon.model import Delivery
from lmdaemon.store.contract import Settlement, Store

PLACES = 8192  # most attempts that can be noted at the same time: 320 KiB
_PLACE = struct.Struct("<qq20s4x")  # the delivery's number (0: free), when the attempt began (wall ms), its nonce
_HEAD = struct.Struct("<8sq16x")  # what marks the file as lmdaemon's, and 1 while a daemon uses it
_MAGIC = b"lmdattmp"
INTERRUPTED = "the daemon ended before it had the answer; the operator may have received this"

log = Log("delivery")


class Attempt(NamedTuple):
    """An attempt that was begun: the number and the public id of its delivery, and its start (wall ms)."""

    delivery: int
    webhook_id: str
    began_at: int


class Underway:
    """The attempts under way: in memory and, if there is a path, in a file. Raises OSError when the file cannot be
    made or used.
    """

    def __init__(self, path: Path | None) -> None:
        self.crashed = False  # whether the previous run did not end in order
        # Attempts of earlier runs that have no result, until they are added to the histories
        self.lost: list[Attempt] = []
        self._map: mmap.mmap | None = None
        self._places: dict[int, int] = {}  # the delivery's place in the file
        self._free: list[int] = []
        self.since: dict[int, int] = {}  # when attempts under way began (wall ms), by delivery
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        size = _HEAD.size + PLACES * _PLACE.size
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("is not a regular file")
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        magic, in_use = _HEAD.unpack_from(self._map)
        if magic == _MAGIC:
            self.crashed = in_use == 1
            self._read(self._map)
        else:
            self._map[:] = bytes(size)
            self._free = list(range(PLACES))
        _HEAD.pack_into(self._map, 0, _MAGIC, 1)

    def _read(self, noted: mmap.mmap) -> None:
        for place in range(PLACES):
            delivery, began_at, nonce = _PLACE.unpack_from(noted, _HEAD.size + place * _PLACE.size)
            if delivery:
                known = f"msg_{delivery}_{nonce.decode('ascii', 'replace')}"
                self.lost.append(Attempt(delivery, known, began_at))
                self._places[delivery] = place
            else:
                self._free.append(place)

    def begin(self, delivery: Delivery, at: int) -> None:
        """Notes that an attempt begins at the wall time `at` (ms)."""
        self.since[delivery.id] = at
        if self._free and self._map is not None and delivery.id not in self._places:
            place = self._places[delivery.id] = self._free.pop()
            offset = _HEAD.size + place * _PLACE.size
            _PLACE.pack_into(self._map, offset, delivery.id, at, delivery.nonce.encode())

    def end(self, delivery: int) -> None:
        """Notes that the attempt's result is stored, or that nothing was sent."""
        self.since.pop(delivery, None)
        self.forget(delivery)

    def forget(self, delivery: int) -> None:
        """Frees the place of a delivery whose attempt need not be noted any longer."""
        place = self._places.pop(delivery, None)
        if place is not None and self._map is not None:
            _PLACE.pack_into(self._map, _HEAD.size + place * _PLACE.size, 0, 0, b"")
            self._free.append(place)

    def close(self) -> None:
        """Notes that the run ends in order. Attempts that are still noted are left for the next run."""
        if self._map is not None:
            _HEAD.pack_into(self._map, 0, _MAGIC, 0)
            self._map.close()
            self._map = None


async def tell_interrupted(store: Store, underway: Underway) -> None:
    """Adds the attempts of an earlier run that have no result to the histories of their deliveries. Raises
    StoreError.
    """
    told = 0
    for one in underway.lost[:]:
        found = await store.delivery(one.webhook_id)
        known = [] if found is None else json.loads(found.history)
        if found is not None and found.state == "pending" and one.began_at not in [it["at"] for it in known]:
            attempt: dict[str, Any] = {"at": one.began_at, "durationMs": None, "status": None, "code": None}
            attempt |= {"error": "interrupted", "detail": INTERRUPTED, "answer": None}
            await store.settle(Settlement(found, "pending", 0, found.step, attempt))
            told += 1
        underway.lost.remove(one)
        underway.forget(one.delivery)
    if told:
        log.warning("delivery.interrupted", count=told, note=INTERRUPTED)
