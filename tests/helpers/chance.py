"""How long the tests with random inputs run, and the seed of their random numbers."""

import os
import random

FULL = os.environ.get("FAULTS") == "full"  # `make faults`: the same tests with more repetitions
# CI's one complete run: more examples for each property, more clients at once
DEEP = FULL or bool(os.environ.get("DEEP"))


def examples(deep: int) -> int:
    """How many examples to try for a property: `deep` in CI, a quarter of that otherwise."""
    return deep if DEEP else deep // 4


SEED = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
os.environ["FAULTS_SEED"] = str(SEED)  # all workers of one run (pytest-xdist) inherit it and use the same seed
