"""The text of `lmdaemon status` about health and operators: what is wrong, since when, why, what happens by itself and
what can be done by hand. Pure. docs/operating.md says more about each check, under the name of the check.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lmdaemon.commands.shared import cell, line
from lmdaemon.model import in_bytes, in_time

_ASIDE = ("status", "time", "output", "observedUnit")  # members of a check that are not printed as figures
_INDENT = " " * 22
TOLD_MAX = 3  # a check prints a line with a command for at most so many operators
# What can be done about a check that does not pass, by its name. `_by_hand` adds what depends on the check's members
_BY_HAND = {
    "store": "make room on its disk, or mend it: within a second after that writes go on by themselves, and clients "
    "ask again",
    "sweeper": "LmdaemonLoopStuck in docs/operating.md",
    "dispatcher": "LmdaemonLoopStuck in docs/operating.md",
    "daemons": "the table of daemons shows which one it is; if their files differ, make them alike and reload",
    "disk": "make room, or lower database.keep_ended and reload; lmdaemon size tells how much room it takes",
    "listeners": "LmdaemonCannotAccept in docs/operating.md",
    "config": "lmdaemon check-config; mend the file and reload",
    "certificates": "renew it, put it in its place and reload",
}


def of_health(health: Mapping[str, Any], *, is_each_told: bool = True) -> Iterator[str]:
    """A line for each check with its figures; below a check that does not pass, what is wrong and what can be done.

    `is_each_told` says that the caller prints `of_operator` for each operator as well; then the text of the check
    `operators` is left out, except about operators that are not in the file.
    """
    checks = [(name, check) for name, found in health.get("checks", {}).items() for check in found]
    width = max((len(name) for name, _ in checks), default=0)
    for name, check in checks:
        figures = " ".join(_figures(check))
        yield f"  {line(name).ljust(width)}  {cell(check['status']):4}  {figures}".rstrip()
        if check["status"] == "pass":
            continue
        texts = [one for said in str(check.get("output", "")).splitlines() for one in said.split("; ")]
        if name == "operators" and is_each_told:
            texts = [one for one in texts if " is not in the file" in one]  # as `gates.not_configured` says it
        yield from (_INDENT[: width + 10] + line(one) for one in texts)
        for by_hand in _by_hand(name, check):
            yield f"{_INDENT[: width + 10]}by hand: {by_hand}"


def _by_hand(name: str, check: Mapping[str, Any]) -> Iterator[str]:
    """What can be done about a check that does not pass."""
    if name in _BY_HAND:
        yield _BY_HAND[name]
    if name == "expiry":
        operators = [*check.get("massExpired", ()), *check.get("touchesStopped", ())]
        for operator in dict.fromkeys(operators[:TOLD_MAX]):
            listed = f"lmdaemon sessions list {cell(operator)} --state ended --since '1h ago'"
            yield f"{listed}; do its game servers reach the daemon?"
    if name == "operators" and _not_configured(check):
        yield "put them back under these names until nothing waits: an operator is known by its name"
    if name == "deliveries" and "falls behind" in str(check.get("output")):
        yield "raise the concurrency of the operator that falls behind, if it agrees, and reload"


def rows_of(health: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table for operators that are not in the file, though sessions or deliveries of them remain."""
    checks = health.get("checks", {}).get("operators", ())
    gone = [one for check in checks for one in _not_configured(check)]
    return [{**one, "operator": f"{one.get('operator')} (not in the file)"} for one in gone]


def _not_configured(check: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return check.get("notConfigured") or []


def row_of(operator: Mapping[str, Any]) -> dict[str, Any]:
    """An operator as a row of the table, in which the age of its oldest delivery is rounded."""
    oldest_s = operator.get("oldestPendingSeconds")
    return {**operator, "oldestPendingSeconds": None if oldest_s is None else in_time(oldest_s)}


def of_operator(operator: Mapping[str, Any]) -> Iterator[str]:
    """Lines about why nothing is sent to an operator now (a hold, the breaker, Retry-After), and about its dead
    deliveries. No lines if neither applies.
    """
    name = cell(operator["operator"])
    kept_back, dead = operator.get("keptBack"), operator.get("dead")
    if kept_back:
        yield f"{name}: {cell(kept_back)}"
        yield f"  by itself: {cell(operator.get('outlook'))}"
        price = "" if operator.get("breaker", "closed") == "closed" else "; if it fails, the breaker's pause doubles"
        yield f"  by hand:   lmdaemon probe {name} (its next notice, now{price})"
        yield f"             lmdaemon release {name} (sends at once what was not tried yet, the rest on its schedule)"
    if dead:
        yield f"{name}: {dead} dead, which are sent again only by hand"
        chosen = f"--operator {name}"
        yield f"  which:     lmdaemon deliveries list {chosen} --state dead"
        yield f"  why:       lmdaemon deliveries retry {chosen} --dry-run (changes nothing)"
        again, never = f"lmdaemon deliveries retry {chosen}", f"lmdaemon deliveries discard {chosen} --note WHY"
        yield f"  by hand:   {again}; {never}"


def _figures(check: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a check that are known, rounded: `freeBytes=74.4 GB`."""
    for name, value in check.items():
        if name in _ASIDE or value is None or value == []:
            continue
        if name == "observedValue":
            yield f"{value:g} {cell(check.get('observedUnit'))}"
        elif isinstance(value, list):
            yield f"{name}={','.join(cell(one['operator'] if isinstance(one, dict) else one) for one in value)}"
        elif "Bytes" in name:
            yield f"{name}={in_bytes(value)}"
        elif name.endswith("Seconds"):
            yield f"{name}={in_time(value)}"
        else:
            yield f"{name}={cell(value)}"
