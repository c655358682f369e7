"""Threads for the daemon's own work that would keep the event loop busy for too long.

The threads of `asyncio.to_thread` are not used for it: plug-ins share them, and one that hangs can occupy them all.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

NAME = "lmdaemon"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_pool = ThreadPoolExecutor(thread_name_prefix=NAME)


def of_others() -> list[threading.Thread]:
    """The threads that keep the process from exiting, without the main thread and those of this module."""
    main = threading.main_thread()
    keeping = (thread for thread in threading.enumerate() if not thread.daemon and thread is not main)
    return [thread for thread in keeping if not thread.name.startswith(NAME)]


async def on_a_thread(
    function: Callable[_Arguments, _Result], /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs
) -> _Result:
    """Runs a function on a thread of the daemon's own. The function must end by itself: the pool is small."""
    return await asyncio.get_running_loop().run_in_executor(_pool, lambda: function(*arguments, **keywords))
