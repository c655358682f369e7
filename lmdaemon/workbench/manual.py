"""Makes docs/check.md from the checks, so that it always agrees with them."""

from collections.abc import Iterator
from itertools import groupby

from lmdaemon.delivery.phrases import MEANINGS
from lmdaemon.dialects import SHIPPED, Dialect
from lmdaemon.workbench.checks import BY_HAND, CHECKS
from lmdaemon.workbench.wire import PER_SECOND, REQUESTS_MAX, SILENT_MAX

_FIELDS = {
    "provider": "the provider's id",
    "session": "the session",
    "player": "the player",
    "token": "the player's token",
    "request": "the id of the request",
    "hash": "the hash",
}
_HEAD = f"""\
# The checks

Written by `make manual` from the checks themselves. How to run them: [workbench.md](workbench.md).

`lmdaemon check` sends at most {REQUESTS_MAX} requests, {PER_SECOND} in any second unless `--burst`, with
ids that begin with `lmcheck-`. After {SILENT_MAX} requests in a row without an answer it sends nothing more.
`--only` and `--skip` take the ids and groups below. `answer.valid` is always tried, also where `--skip`
names its group, because the others need its result.
"""


def check_page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD, *_dialects()]
    for group, checks in groupby(CHECKS, lambda check: check.group):
        parts.append(f"\n## {group}\n")
        parts += [
            f"\n**`{check.id}`** {check.title}<br>\nWhy: {check.why}<br>\nWhat to do: {check.hint}\n"
            for check in checks
        ]
    parts.append("\n## Only people can check\n\n")
    parts += [f"- {one}\n" for one in BY_HAND]
    return "".join(parts)


def _dialects() -> Iterator[str]:
    """The table of fields and codes of each dialect. The provider's page that an integrator has may not list them."""
    yield "\n## Fields and codes\n\n"
    yield f"| | {' | '.join(f'`{name}`' for name in SHIPPED)} |\n|---|{'---|' * len(SHIPPED)}\n"
    bodies = ("JSON" if one.content == "json" else "a form" for one in SHIPPED.values())
    yield f"| body | {' | '.join(bodies)} |\n"
    for meaning, said in _FIELDS.items():
        names = (_field(one, meaning) for one in SHIPPED.values())
        yield f"| {said} | {' | '.join(names)} |\n"
    yield f"| `error`: success | {' | '.join('0' for _ in SHIPPED)} |\n"
    for meaning, said in MEANINGS.items():
        codes = (str(one.codes.of(meaning)) for one in SHIPPED.values())
        yield f"| `error`: {said} | {' | '.join(codes)} |\n"


def _field(dialect: Dialect, meaning: str) -> str:
    if meaning not in dialect.fields:
        return "–"
    optional = "" if meaning in dialect.required else " (may be absent)"
    return f"`{dialect.fields[meaning]}`{optional}"
