"""Frequent calls of the private API in two halves: what a call stores, and the answer to the store's result.

Between the halves, such a call waits for nothing but the store, so `hot` needs no coroutine for it. The handlers in
`sessions` consist of the same halves; they serve the calls that are not begun here.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, NoReturn

from aiohttp.http import RawRequestMessage

from lmdaemon import shapes
from lmdaemon.store.contract import Operation
from lmdaemon.web import bodies
from lmdaemon.web.calls import Asked, Context, check_codings, decoded_id, read_given
from lmdaemon.web.problems import Problem
from lmdaemon.web.requests import Ready, Reply
from lmdaemon.web.sessions import Sessions


class _Halves(NamedTuple):
    """Both halves of a call. `takes` is the type of its body."""

    takes: type[shapes.Request] | None
    of_session: bool  # whether the path has the id of a session
    change: Callable[[Asked[Any]], Operation[Any]]  # what is stored; raises Problem
    ready: Callable[[Asked[Any], Any], Ready | None]  # the answer; None for an unusual result
    refuse: Callable[[Asked[Any], Any], Awaitable[NoReturn]]  # raises the Problem of an unusual result


class Frequent:
    """Begins the frequent calls. `answered(head, call, reply)` returns the awaited reply of the call of this name, or
    the answer to its error.
    """

    def __init__(
        self,
        sessions: Sessions,
        context: Context,
        answered: Callable[[RawRequestMessage, str, Awaitable[Reply]], Coroutine[Any, Any, Reply]],
    ) -> None:
        self._context = context
        self.answered = answered
        self._calls = {
            "openSession": _Halves(shapes.Opening, True, sessions.opening, sessions.opened, sessions.refuse_opening),
            "touchSession": _Halves(None, True, sessions.touching, sessions.touched, sessions.refuse_touch),
            # No result is unusual: the answer names the sessions that could not be touched
            "touchSessions": _Halves(
                shapes.BulkTouch, False, sessions.touching_many, sessions.touched_many, sessions.refuse_touch
            ),
        }

    def begin(self, call: str, operator: str, session: str, head: RawRequestMessage, body: bytes) -> "_Begun | None":
        """Begins a call whose token was checked; None if the call is refused. `call` is its name in `routes`, `session`
        the segment of its path that has the session id.
        """
        halves = self._calls[call]
        asked: Asked[Any] = Asked(head)
        try:
            asked.operator = self._context.configured(operator)
            if halves.of_session:
                asked.session_id = decoded_id(session)
            if halves.takes is not None:
                check_codings(head)
                if len(body) > bodies.longest(halves.takes):
                    return None
                asked.given = read_given(head, halves.takes, body)
            return _Begun(self, call, halves, asked, halves.change(asked))
        except Problem:
            return None


class _Begun:
    """A call that was begun (`connection.Begun`)."""

    __slots__ = ("_asked", "_call", "_frequent", "_halves", "change")

    def __init__(
        self, frequent: Frequent, call: str, halves: _Halves, asked: Asked[Any], change: Operation[Any]
    ) -> None:
        self._frequent = frequent
        self._call = call
        self._halves = halves
        self._asked = asked
        self.change = change

    def ready(self, result: Any) -> Ready | None:
        return None if isinstance(result, Exception) else self._halves.ready(self._asked, result)

    def answer_unusual(self, result: Any) -> Coroutine[Any, Any, Reply]:
        return self._frequent.answered(self._asked.request, self._call, self._refuse(result))

    async def _refuse(self, result: Any) -> Reply:
        if isinstance(result, Exception):
            raise result
        return await self._halves.refuse(self._asked, result)
