"""How long the tests that depend on chance run, and where their chance comes from."""

import os
import random

FULL = os.environ.get("FAULTS") == "full"  # `make faults`: more runs of the same tests
SEED = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
os.environ["FAULTS_SEED"] = str(SEED)  # the workers of one run (pytest-xdist) inherit it
