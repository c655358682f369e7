"""How far long work has come: a line on stderr while that is a terminal, nothing otherwise."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

if sys.stderr.isatty():  # nobody else needs it, and a timer's backup begins sooner without it
    # Now, for a command may give up root's rights later, and the package may be where only root can read
    from tqdm import tqdm

Tell = Callable[[int], None]


@contextmanager
def progress(what: str, unit: str, total: int | None = None, *, shown: bool = True) -> Iterator[Tell]:
    """Gives a function that is told how much is done by now, in `unit`. The line is gone at the end."""
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    tqdm.monitor_interval = 0  # no thread that looks after the line
    with tqdm(
        desc=what, unit=unit, total=total, unit_scale=True, leave=False, file=sys.stderr, dynamic_ncols=True
    ) as line:

        def tell(done: int) -> None:
            line.update(done - line.n)

        yield tell
