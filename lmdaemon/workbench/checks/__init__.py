"""All checks in the order of the report, and the list of what only people can check."""

from lmdaemon.workbench.bench import Check
from lmdaemon.workbench.checks import answer, authenticity, behaviour, connection, idempotence, strictness

CHECKS: tuple[Check, ...] = (
    *connection.CHECKS,
    *answer.CHECKS,
    *idempotence.CHECKS,
    *strictness.CHECKS,
    *authenticity.CHECKS,
    *behaviour.CHECKS,
)
GROUPS = tuple(dict.fromkeys(check.group for check in CHECKS))

BY_HAND = (
    "A late result, cancel or refund for the session is still accepted after its end: it never ends money.",
    "Only this session is ended, not the player's other ones, and not their login.",
    "A session that had already ended in another way (logout, a time-out of your own) is answered with success.",
    'An internal fault of yours (database down, a bug) is answered with "please retry", never with "do not retry".',
    "Only addresses of the provider may call the endpoint, if addresses are what proves the sender.",
    "No token is in your log, nor in the log of the proxy before the endpoint.",
    "The person on call knows what to do when the provider reports that the endpoint fails.",
)
