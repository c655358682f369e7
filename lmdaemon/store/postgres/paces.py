"""How often a daemon tells the others on its database of itself, and looks at what they have done, in seconds."""

from typing import NamedTuple


class Paces(NamedTuple):
    """A beat is a transaction that tells how far this daemon has heard; a look reads what the others have done."""

    beat_s: float = 0.5  # between two transactions, while a session is live or a delivery pending
    idle_beat_s: float = 2.5  # between two transactions, while no session is live and no delivery pending
    look_s: float = 0.2  # between two looks


PACES = Paces()
