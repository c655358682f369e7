"""Runs test notices and checks of operators' endpoints that the private side asks for, with the workbench.

Each trial runs on a thread with an event loop of its own, because reading and masking what a hostile operator answers
takes time that the daemon's event loop must not lose. It uses the operator's settings in force, egress rules included.
It must never touch the store, a gate or a lane: a trial changes nothing of what the daemon has to deliver.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from lmdaemon.config.settings import Operator
from lmdaemon.delivery.sinks import compose

AT_ONCE_MAX = 4  # trials of all operators together

_Found = TypeVar("_Found")


class Trials:
    """Runs trials: one at a time for each operator, and AT_ONCE_MAX at a time of all."""

    def __init__(self) -> None:
        self._running: dict[str, Trial] = {}
        self._stopped = False

    def obstacle(self, operator: Operator) -> str:
        """Why no trial of the operator can begin now, in words; empty if one can."""
        if self._stopped:
            return "the daemon is stopping"
        if operator.name in self._running:
            return "another test notice or check is under way for this operator"
        if len(self._running) >= AT_ONCE_MAX:
            return f"{AT_ONCE_MAX} test notices and checks are under way"
        return ""

    async def send(self, operator: Operator, session_id: str | None, player_id: str | None) -> Mapping[str, Any]:
        """Sends one notice and returns its request and its answer, masked. There must be no `obstacle`, and the
        operator needs a URL. Raises CannotEncode.
        """

        async def work() -> Mapping[str, Any]:
            from lmdaemon.workbench import trial

            session = trial.made_up(operator, session_id, player_id)
            return trial.as_shown(operator, session, await trial.send(operator, compose(operator, session)))

        return await self._begin(operator, work)

    async def check(self, operator: Operator, on_progress: Callable[[Any], None]) -> Mapping[str, Any]:
        """Runs all checks and returns the report. `on_progress` is called in the daemon's event loop. There must be no
        `obstacle`. When the caller is cancelled, or the daemon stops, the run ends early. Raises ValueError if the
        operator cannot be checked.
        """
        loop = asyncio.get_running_loop()

        async def work() -> Mapping[str, Any]:
            from lmdaemon.workbench.runner import Progress, check_operator

            def tell(progress: Progress) -> None:
                loop.call_soon_threadsafe(on_progress, progress)

            return await check_operator(operator, on_progress=tell)

        return await self._begin(operator, work, may_end_early=True)

    async def _begin(
        self, operator: Operator, work: Callable[[], Coroutine[Any, Any, _Found]], *, may_end_early: bool = False
    ) -> _Found:
        trial = Trial(work, may_end_early=may_end_early)
        self._running[operator.name] = trial
        trial.ended.add_done_callback(lambda _: self._running.pop(operator.name))
        trial.start(f"trial {operator.name}")
        try:
            return await asyncio.shield(trial.ended)
        except asyncio.CancelledError:
            trial.end_early()
            raise

    async def stop(self) -> None:
        """Lets no trial begin, ends checks early, and waits until no trial runs: for an operator's time-out at most."""
        self._stopped = True
        for trial in self._running.values():
            trial.end_early()
        await asyncio.gather(*(trial.ended for trial in self._running.values()), return_exceptions=True)


class Trial:
    """Work on a thread of its own. `ended` is its result, a future of the daemon's event loop."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, Any]], *, may_end_early: bool) -> None:
        self._work = work
        self._may_end_early = may_end_early
        self._daemon = asyncio.get_running_loop()
        self.ended: asyncio.Future[Any] = self._daemon.create_future()
        self._own: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_unwanted = False

    def start(self, name: str) -> None:
        """Begins the work, on a thread of this name."""
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def end_early(self) -> None:
        """Cancels the work if it may end early; the work then returns what it has found so far."""
        self._is_unwanted = self._may_end_early
        if self._is_unwanted and self._own is not None:
            with suppress(RuntimeError):  # the trial has ended meanwhile
                self._own.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        task, self._task = self._task, None  # once at most: a second one would interrupt the task's cleaning up
        if task is not None:
            task.cancel()

    def _run(self) -> None:
        result, error = None, None
        try:
            result = asyncio.run(self._whole())
        except Exception as one:  # the error is passed on to the caller, as a result would be
            error = one
        # Replaced by an error that is passed on: the future would never be done otherwise, and the daemon's stop would
        # wait for ever
        except asyncio.CancelledError:
            error = RuntimeError("interrupted without a result")
        with suppress(RuntimeError):  # the daemon's loop is closed: nobody waits
            self._daemon.call_soon_threadsafe(self._tell, result, error)

    async def _whole(self) -> Any:
        task = self._task = asyncio.create_task(self._work())
        self._own = asyncio.get_running_loop()  # from here on `end_early` can cancel the task
        if self._is_unwanted:
            self._own.call_soon(self._cancel)
        return await task

    def _tell(self, result: Any, error: Exception | None) -> None:
        if error is None:
            self.ended.set_result(result)
        else:
            self.ended.set_exception(error)
            self.ended.exception()  # marks the exception as retrieved, because the caller may have been cancelled
