"""The two ways in which a plain request can be served: "hot" (past most of aiohttp) and "ordinary" (by aiohttp)."""

import contextlib
import sys
from collections.abc import Iterator

import pytest

import lmdaemon.web
from lmdaemon.web import hot

WAYS = ("hot", "ordinary")


@contextlib.contextmanager
def on_the(way: str) -> Iterator[None]:
    """Makes daemons that are built in this context serve plain requests in this way."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "hot":
            patch.setattr(lmdaemon.web, "hot", hot, raising=False)
        else:
            patch.delattr(lmdaemon.web, "hot", raising=False)
        patch.setitem(sys.modules, "lmdaemon.web.hot", hot if way == "hot" else None)
        yield
