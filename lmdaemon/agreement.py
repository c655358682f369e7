"""Compares what the daemons on one database tell of themselves: whose settings differ, and whose clock is slowest.

No I/O. Daemons of another version may know other settings, so only those of one version are compared.
"""

from collections.abc import Sequence

from lmdaemon.model import Member

# A service clock so far behind has missed two beats, and all ends wait for it; at 1500 the other clocks stop, too
SLOW_MS = 1400


def disagreement(members: Sequence[Member]) -> str | None:
    """Names the daemons whose settings of operators differ from this daemon's; None if all agree."""
    own = next((one for one in members if one.is_self), None)
    if own is None:
        return None
    others = [one.name for one in members if one.version == own.version and one.digest != own.digest]
    if not others:
        return None
    return f"the settings of operators differ: {own.name} has others than {', '.join(sorted(others))}"


def slowest(members: Sequence[Member]) -> Member | None:
    """The daemon whose service clock is furthest behind: no session ends for inactivity before that clock is past the
    session's deadline. None where only one daemon is there.
    """
    return max(members, key=lambda one: one.lag_ms) if len(members) > 1 else None
