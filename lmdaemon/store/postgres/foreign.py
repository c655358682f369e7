"""What other daemons have changed or told: figures, gates, and which ends wait. It does no I/O."""

from collections.abc import Sequence
from typing import Any

from lmdaemon.model import Gate
from lmdaemon.store.contract import Figures
from lmdaemon.store.postgres.batch import Batch
from lmdaemon.store.postgres.tables import NO_PART, Found, Part
from lmdaemon.store.projection import Projection


class Foreign:
    """Brings the others' part of the figures and their changes of gates into the projection."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._parts: dict[str, Part] = {}
        self.versions: dict[str, int] = {}  # numbers of the last changes of the gates in memory
        # Operators of which others have opened sessions whose deadlines were not read yet
        self.opened: set[str] = set()
        self.made: set[str] = set()  # operators of which others have made deliveries whose due times were not read yet
        self.waits: dict[str, int] = {}  # until when (service ms) ends of operators wait, as their owners have told

    def load(self, found: Found) -> None:
        """Begins with what was read from the tables. The projection has the totals already."""
        self.versions, self._parts = found.versions, found.parts

    def take_parts(self, parts: dict[str, Part]) -> None:
        """Takes over the others' part of the figures, and notes for which operators deadlines or due times must be
        read.
        """
        projection = self._projection
        before, self._parts = self._parts, parts
        for operator in before.keys() | parts.keys():
            old, new = before.get(operator, NO_PART), parts.get(operator, NO_PART)
            if old[:3] != new[:3]:
                total = projection.figures.setdefault(operator, Figures())
                total.live += new.live - old.live
                total.pending += new.pending - old.pending
                total.dead += new.dead - old.dead
                projection.live += new.live - old.live
            if new.touched_ms > old.touched_ms:
                projection.note_touch(operator, new.touched_ms)
            if new.opened > old.opened:
                self.opened.add(operator)
            if new.made > old.made:
                self.made.add(operator)

    def has_all_gates(self, versions: int) -> bool:
        """Whether every change of a gate is known here. `versions` is the sum of the numbers of the last changes in the
        table.
        """
        return versions == sum(self.versions.values())

    def take_gates(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Takes over the gates that are newer in the table, from rows of `tables.gates`."""
        projection = self._projection
        newer = {name: (version, Gate(*gate)) for name, version, *gate in rows if version > self.versions.get(name, 0)}
        self.versions = {**self.versions, **{name: version for name, (version, _) in newer.items()}}
        projection.gates = {**projection.gates, **{name: gate for name, (_, gate) in newer.items()}}
        for name in newer:
            for observer in projection.observers:
                observer.gate_changed(name)

    def committed(self, work: Batch) -> None:
        """Gives each gate that a batch has changed its new number. A gate that another daemon has changed since is
        taken out of the changes.
        """
        for name in list(work.changes.gates):
            version = work.versions.get(name, 0) + 1
            if self.versions.get(name, 0) > version:
                del work.changes.gates[name]
            else:
                self.versions = {**self.versions, name: version}
