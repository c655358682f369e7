"""Which daemon owns which operator: the table `owner` has a row for each operator. And what this daemon knows of these
rows.

One of the daemons that are there comes first for an operator (`first_for`). It takes the operator if the operator is
free. If not, it asks the owner, which hands the operator over when none of its deliveries is under way any more. Nobody
takes an operator from a daemon that is there: an owner gives its operators up itself, or it is expelled. A daemon that
expels it also deletes its row of `member`, without which it can commit nothing. So the row of `member` is the fence,
and a transaction need not look at the rows of `owner`.
"""

from collections.abc import Collection, Iterable
from hashlib import blake2b
from typing import NamedTuple

FREE_S = 2.0  # a free operator that has not been taken for this long is taken by any daemon that has it in its settings
HANDOVER_S = 60.0  # an operator is handed over at the latest after this, whatever is under way

# Every operator that has ever been owned.
OWNERS = "SELECT operator, member, wanted_by, epoch FROM lmdaemon.owner"
# Takes operators that are free, and returns their names.
CLAIM = """
WITH here AS MATERIALIZED (SELECT id FROM lmdaemon.member WHERE id = %s FOR KEY SHARE)
INSERT INTO lmdaemon.owner (operator, member)
SELECT name, here.id FROM unnest(%s::text[]) AS name, here ORDER BY name
ON CONFLICT (operator) DO UPDATE SET member = excluded.member, wanted_by = NULL, epoch = owner.epoch + 1
WHERE owner.member = 0 RETURNING operator"""
# Asks for operators that others own.
WANT = """
WITH here AS MATERIALIZED (SELECT id FROM lmdaemon.member WHERE id = %s FOR KEY SHARE),
locked AS MATERIALIZED (
    SELECT operator FROM lmdaemon.owner WHERE operator = ANY (%s) AND member <> 0 ORDER BY operator FOR UPDATE)
UPDATE lmdaemon.owner SET wanted_by = here.id, epoch = epoch + 1 FROM here, locked
WHERE owner.operator = locked.operator AND owner.member <> here.id AND owner.wanted_by IS DISTINCT FROM here.id"""
# Hands operators over to the daemons that have asked for them; frees them if those daemons are gone.
HAND_OVER = """
WITH locked AS MATERIALIZED (
    SELECT operator FROM lmdaemon.owner WHERE operator = ANY (%s) AND member = %s ORDER BY operator FOR UPDATE)
UPDATE lmdaemon.owner
SET member = coalesce((SELECT id FROM lmdaemon.member WHERE id = wanted_by), 0), wanted_by = NULL, epoch = epoch + 1
FROM locked WHERE owner.operator = locked.operator"""
# Frees the operators of a daemon that goes, and withdraws what it has asked for.
FREE = """
WITH locked AS MATERIALIZED (
    SELECT operator FROM lmdaemon.owner WHERE member = %s OR wanted_by = %s ORDER BY operator FOR UPDATE)
UPDATE lmdaemon.owner SET member = CASE WHEN member = %s THEN 0 ELSE member END, wanted_by = NULL, epoch = epoch + 1
FROM locked WHERE owner.operator = locked.operator"""

# Tells the others until when ends of this daemon's operators wait for touches.
TELL_WAITS = """
WITH told (operator, until_ms) AS MATERIALIZED (
    SELECT * FROM unnest(%s::text[], %s::bigint[])),
locked AS MATERIALIZED (
    SELECT operator FROM lmdaemon.owner JOIN told USING (operator)
    WHERE member = %s ORDER BY operator FOR UPDATE OF owner)
UPDATE lmdaemon.owner SET waits_until_ms = told.until_ms
FROM told JOIN locked USING (operator) WHERE owner.operator = told.operator"""
# Until when (service ms) the ends of operators wait, as their owners have told, as JSON.
WAITS = """(SELECT json_object_agg(operator, waits_until_ms)::text
    FROM lmdaemon.owner WHERE waits_until_ms IS NOT NULL)"""


class Owner(NamedTuple):
    """The daemon that owns an operator (0: nobody), and the one that has asked for it."""

    member: int
    wanted_by: int | None = None


def first_for(operator: str, members: Collection[int]) -> int | None:
    """The daemon that comes first for an operator, by rendezvous hashing: if a daemon comes or goes, only few operators
    change.
    """
    return max(
        members, key=lambda member: blake2b(f"{member}/{operator}".encode(), digest_size=8).digest(), default=None
    )


class Wishes(NamedTuple):
    """Operators that this daemon should take because they are free, ask their owners for, and hand over."""

    claim: list[str]
    want: list[str]
    hand_over: list[str]


class Owners:
    """What this daemon knows of the owners of operators. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.me = 0
        self.all: dict[str, Owner] = {}
        self._leaving: dict[str, float] = {}  # operators that this daemon is handing over, and since when
        self._ended: set[str] = set()  # of these, the operators for which nothing is under way any more
        self._free_since: dict[str, float] = {}
        self.is_settled = False  # whether nothing is to be done until a row, the settings or the daemons change

    def load(self, me: int, found: Iterable[tuple[str, int, int | None]]) -> None:
        """Takes over what the table says; `me` is this daemon's row of `member`."""
        if me != self.me:
            self._leaving.clear()
            self._ended.clear()
        self.me, self.is_settled = me, False
        self.all = {operator: Owner(member, wanted_by) for operator, member, wanted_by in found}

    def has(self, operator: str) -> bool:
        """Whether the operator's row names this daemon. Then this daemon ends the operator's idle sessions, also while
        it hands the operator over.
        """
        owner = self.all.get(operator)
        return owner is not None and owner.member == self.me != 0

    def owns(self, operator: str) -> bool:
        """Whether this daemon begins deliveries for the operator: its row names this daemon, which is not handing it
        over.
        """
        return self.has(operator) and operator not in self._leaving

    def is_elsewhere(self, operator: str) -> bool:
        """Whether another daemon owns the operator."""
        owner = self.all.get(operator)
        return owner is not None and owner.member not in (0, self.me)

    @property
    def elsewhere(self) -> list[str]:
        """The operators that other daemons own."""
        return [operator for operator, owner in self.all.items() if owner.member not in (0, self.me)]

    @property
    def mine(self) -> list[str]:
        """The operators whose idle sessions this daemon ends."""
        return [operator for operator, owner in self.all.items() if owner.member == self.me != 0]

    @property
    def delivers_for(self) -> frozenset[str]:
        """The operators for which this daemon begins to deliver."""
        return frozenset(operator for operator in self.mine if operator not in self._leaving)

    def let_go(self, operator: str) -> None:
        """Notes that nothing is under way any more for an operator, so that it can be handed over."""
        if operator in self._leaving:
            self._ended.add(operator)
            self.is_settled = False

    def wishes(self, configured: Collection[str], members: Collection[int], now_s: float) -> Wishes:
        """What this daemon has to change now in the rows of `owner`. `configured` are the operators of the settings,
        `members` the daemons that are there.
        """
        found = Wishes([], [], [])
        free: dict[str, float] = {}
        for operator in configured:
            owner = self.all.get(operator, Owner(0))
            is_first = first_for(operator, members) == self.me
            if owner.member == 0:
                free[operator] = self._free_since.get(operator, now_s)
                if is_first or now_s - free[operator] >= FREE_S:
                    found.claim.append(operator)
            elif owner.member != self.me and is_first and owner.wanted_by != self.me:
                found.want.append(operator)
        self._free_since = free
        for operator, owner in self.all.items():
            if owner.member == self.me and (owner.wanted_by in members or operator not in configured):
                since_s = self._leaving.setdefault(operator, now_s)
                if operator in self._ended or now_s - since_s >= HANDOVER_S:
                    found.hand_over.append(operator)
            elif operator in self._leaving:
                del self._leaving[operator]
                self._ended.discard(operator)
        self.is_settled = not free and not self._leaving and not found.want
        return found
