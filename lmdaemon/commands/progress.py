"""Shows the progress of long work as a line on stderr, if that is a terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

if sys.stderr.isatty():  # otherwise tqdm is not needed, and its import takes time
    # Imported now, because a command may give up root's rights later, and the package may be readable only by root
    from tqdm import tqdm

COLUMNS = 80  # the width of a terminal that does not tell its own, as under `script`


class Tell(Protocol):
    """Says how much is done so far and, where it became known only during the work, how much there is to do."""

    def __call__(self, done: int, of: int | None = None, /) -> None: ...  # noqa: D102


@contextmanager
def progress(
    what: str, unit: str, total: int | None = None, *, shown: bool = True, scale: bool = True
) -> Iterator[Tell]:
    """A context with a function that is to be called with the amount done so far, in `unit`. At the end the line is
    removed. With `scale`, large amounts are abbreviated (12.3k).
    """
    if not shown or not sys.stderr.isatty():
        yield lambda done, of=None, /: None
        return
    tqdm.monitor_interval = 0  # tqdm starts no monitor thread
    # tqdm takes a width of 0 literally, and would show nothing
    width = {"dynamic_ncols": True} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": COLUMNS}
    with tqdm(desc=what, unit=unit, total=total, unit_scale=scale, leave=False, file=sys.stderr, **width) as line:

        def tell(done: int, of: int | None = None, /) -> None:
            if of is not None and of != line.total:
                line.total = of
                line.refresh()
            line.update(done - line.n)

        yield tell
