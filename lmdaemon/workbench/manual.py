"""docs/check.md, made of the checks themselves, so that it cannot differ from them."""

from itertools import groupby

from lmdaemon.workbench.checks import BY_HAND, CHECKS
from lmdaemon.workbench.wire import PER_SECOND, REQUESTS_MAX, SILENT_MAX

_HEAD = f"""\
# The checks

Written by `make manual` from the checks themselves. How to run them: [workbench.md](workbench.md).

`lmdaemon check` sends at most {REQUESTS_MAX} requests, {PER_SECOND:g} a second on average unless `--burst`, with
ids that begin with `lmcheck-`. After {SILENT_MAX} requests in a row without an answer it sends nothing more.
`--only` and `--skip` take the ids and groups below. `answer.valid` is always tried, for the others stand on it.
"""


def check_page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for group, checks in groupby(CHECKS, lambda check: check.group):
        parts.append(f"\n## {group}\n")
        parts += [
            f"\n**`{check.id}`** {check.title}<br>\nWhy: {check.why}<br>\nWhat to do: {check.hint}\n"
            for check in checks
        ]
    parts.append("\n## Only people can check\n\n")
    parts += [f"- {one}\n" for one in BY_HAND]
    return "".join(parts)
