"""Shows the progress of long work as a line on stderr, if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

if sys.stderr.isatty():  # otherwise tqdm is not needed, and its import takes time
    # Imported now, because a command may give up root's rights later, and the package may be readable only by root
    from tqdm import tqdm

Tell = Callable[[int], None]


@contextmanager
def progress(what: str, unit: str, total: int | None = None, *, shown: bool = True) -> Iterator[Tell]:
    """A context with a function that is to be called with the amount done so far, in `unit`. At the end the line is
    removed.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    tqdm.monitor_interval = 0  # tqdm starts no monitor thread
    with tqdm(
        desc=what, unit=unit, total=total, unit_scale=True, leave=False, file=sys.stderr, dynamic_ncols=True
    ) as line:

        def tell(done: int) -> None:
            line.update(done - line.n)

        yield tell
