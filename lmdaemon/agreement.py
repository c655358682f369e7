"""What the daemons on one database say of themselves, compared: whose settings differ, and whose clock is slowest.

No I/O. Daemons of another version may know other settings, so only those of one version are compared.
"""

from collections.abc import Sequence

from lmdaemon.model import Member

SLOW_MS = 1400  # so far behind, a clock lacks two beats and all ends wait for it; at 1500 the others stand still


def disagreement(members: Sequence[Member]) -> str | None:
    """Which daemons have other settings of operators than the one that asks; None where all agree."""
    own = next((one for one in members if one.is_self), None)
    if own is None:
        return None
    others = [one.name for one in members if one.version == own.version and one.digest != own.digest]
    if not others:
        return None
    return f"the settings of operators differ: {own.name} has others than {', '.join(sorted(others))}"


def slowest(members: Sequence[Member]) -> Member | None:
    """The daemon whose service clock is furthest behind: no session ends for inactivity before its clock is past the
    deadline. None where only one daemon is there.
    """
    return max(members, key=lambda one: one.lag_ms) if len(members) > 1 else None
