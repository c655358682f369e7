"""How long the tests that depend on chance run, and where their chance comes from."""

import os
import random

FULL = os.environ.get("FAULTS") == "full"  # `make faults`: more runs of the same tests
DEEP = FULL or bool(os.environ.get("DEEP"))  # CI, once: more examples of what is true of all, larger crowds


def examples(deep: int) -> int:
    """How many examples a property is tried with: so many once in CI, and a quarter of them otherwise."""
    return deep if DEEP else deep // 4


SEED = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
os.environ["FAULTS_SEED"] = str(SEED)  # the workers of one run (pytest-xdist) inherit it
