"""The calls that try an operator's endpoint: a test notice, and the checks of the workbench.

Neither is a delivery: nothing is stored, and they neither depend on the operator's gate nor change it.
"""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from lmdaemon import shapes
from lmdaemon.config.settings import Operator
from lmdaemon.dialects import CannotEncode
from lmdaemon.log import Log
from lmdaemon.web.calls import STREAM_HEADERS, Asked, Context
from lmdaemon.web.connection import until_client_leaves
from lmdaemon.web.events import event
from lmdaemon.web.problems import NO_URL, Problem

log = Log("api")


class Trying:
    """The handlers of the calls that try an endpoint."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._trials = context.trials

    async def send(self, asked: Asked[shapes.TestNotice]) -> shapes.TestResult:
        """POST /v1/operators/{operator}/send."""
        operator, given = asked.operator, asked.given
        self._check(operator)
        by, asking = self._context.asker(asked.request)
        try:
            found = await self._trials.send(operator, given.session_id or None, given.player_id or None)
        except CannotEncode as error:
            raise Problem("cannot-be-sent", str(error)) from None
        log.info("operator.tested", operator=operator.name, verdict=found["verdict"], by=by, request_id=asking)
        return msgspec.convert(found, shapes.TestResult)

    async def check(self, asked: Asked[None]) -> web.StreamResponse:
        """POST /v1/operators/{operator}/check."""
        operator, request = asked.operator, asked.request
        self._check(operator)
        by, asking = self._context.asker(request)
        log.info("operator.check_began", operator=operator.name, by=by, request_id=asking)
        waiting: asyncio.Queue[bytes] = asyncio.Queue()

        def progressed(progress: Any) -> None:
            document = shapes.CheckProgress(
                done=progress.done,
                total=progress.total,
                check=progress.check or None,
                result=progress.result and msgspec.convert(progress.result, shapes.CheckResult),
            )
            waiting.put_nowait(event("check.progress", document))

        run = asyncio.ensure_future(self._trials.check(operator, progressed))
        run.add_done_callback(lambda _: waiting.put_nowait(b""))
        response = web.StreamResponse(headers=STREAM_HEADERS)
        try:
            with until_client_leaves(request):
                await response.prepare(request)
                while chunk := await waiting.get():
                    await response.write(chunk)
                report = msgspec.convert(run.result(), shapes.CheckReport)
                await response.write(event("check.report", report))
        except ConnectionError:
            pass  # the client has gone
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            self._log_checked(operator, run, by, asking)
        return response

    def _log_checked(self, operator: Operator, run: "asyncio.Future[Any]", by: str | None, asking: str | None) -> None:
        left: dict[str, Any] = {"stopped": "the client left", "counts": {}}
        report = left if run.cancelled() else run.result()
        counts = report["counts"]
        log.info(
            "operator.checked",
            operator=operator.name,
            passed=counts.get("pass"),
            warned=counts.get("warn"),
            failed=counts.get("fail"),
            skipped=counts.get("skipped"),
            stopped=report["stopped"],
            by=by,
            request_id=asking,
        )

    def _check(self, operator: Operator) -> None:
        """Raises Problem if no trial of this operator can begin now."""
        if operator.target is None:
            raise Problem("no-url", NO_URL)
        if "hash" in operator.sends.required and operator.hash_key is None:
            raise Problem("cannot-be-sent", f"dialect {operator.sends.name} needs a hash key, and none is configured")
        obstacle = self._trials.obstacle(operator)
        if obstacle:
            raise Problem("busy", obstacle)
