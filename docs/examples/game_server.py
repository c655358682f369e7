"""A game server's side of the session API: it opens sessions, keeps them alive and closes them, whatever happens to the
daemon.

It needs only Python. Copy it, or write the same in your language. `_call` is the part that survives a restart, a full
disk and a cut network; `heartbeat` is the part that survives a restore and a mistake in the daemon's configuration.
"""

import http.client
import json
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

MANY = 10_000  # sessions in one call
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
ANSWER_WITHIN_S = 30.0
_DICE = random.SystemRandom()
_LOG = logging.getLogger(__name__)
# Nothing was stored, or it is not known whether. Every call can be repeated.
TRY_AGAIN = {408, 500, 502, 503, 504}


class RefusedError(Exception):
    """The daemon refuses the call, and would refuse it again at once. `code` says why."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail", ""))
        self.code = problem.get("code", "")


class Sessions:
    """The sessions that are being played at one operator.

    `ended(session_id)` is called for a session that has ended by itself. Stop its game then; a player who goes on
    playing needs a session with a new id.
    """

    def __init__(
        self,
        base: str,
        operator: str,
        ended: Callable[[str], None],
        *,
        api_token: str = "",
        idle_s: int = 900,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = f"{base}/v1/operators/{quote(operator, safe='')}/sessions"
        self._ended = ended
        self._headers = {"Content-Type": "application/json"}
        if api_token:
            self._headers["Authorization"] = f"Bearer {api_token}"
        self._idle_s = idle_s
        self._sleep = sleep
        # What each session was opened with, to open it again after a restore
        self.playing: dict[str, dict[str, Any]] = {}

    def open(self, session_id: str, player_id: str, token: str) -> None:
        """Opens a session. Raises RefusedError: with the codes `ended` and `differs`, choose a new id; any other code
        is an error in your program.
        """
        opening = {"playerId": player_id, "token": token, "idleTimeoutSeconds": self._idle_s}
        self._call("PUT", f"{self._path}/{quote(session_id, safe='')}", opening)
        self.playing[session_id] = opening

    def close(self, session_id: str) -> None:
        """Closes a session whose game was closed. Raises RefusedError, but not for a session that is unknown."""
        try:
            self._call("POST", f"{self._path}/{quote(session_id, safe='')}/close")
        except RefusedError as refused:
            if refused.code != "unknown-session":
                raise
        self.playing.pop(session_id, None)

    def run(self) -> None:
        """Keeps the sessions alive: a heartbeat every third of the idle time or a little sooner, so that two in a row
        may be lost; sooner after one that was refused.
        """
        wait_s = third_s = self._idle_s / 3
        while True:
            self._sleep(wait_s * _DICE.uniform(0.8, 1.0))
            wait_s = third_s if self.heartbeat() else min(third_s, LONGEST_WAIT_S)

    def heartbeat(self) -> bool:
        """Touches all sessions, 10,000 in a call. Returns False if a call was refused. That is logged and ends nothing:
        an operator taken out of the daemon's file by mistake, or a changed token, may soon be right again.
        """
        is_accepted = True
        for some in _chunks(list(self.playing)):
            try:
                self._touch(some)
            except RefusedError as refused:
                _LOG.error("the heartbeat of %d sessions was refused: %s", len(some), refused)  # tell somebody
                is_accepted = False
        return is_accepted

    def _touch(self, some: list[str]) -> None:
        """Touches sessions in one call. Those that the daemon does not know, because it was restored, are opened again.
        Raises RefusedError.
        """
        answer = self._call("POST", f"{self._path}/touch", {"sessionIds": some})
        gone = answer["ended"]
        lost = [{"sessionId": one, **self.playing[one]} for one in answer["unknown"] if one in self.playing]
        if lost:
            again = self._call("POST", self._path, {"sessions": lost})
            gone += again["ended"] + again["differs"]
        for session_id in gone:
            if self.playing.pop(session_id, None) is not None:
                self._ended(session_id)

    def _call(self, method: str, url: str, body: object = None) -> Any:
        """Repeats a call until it is answered. While the daemon is away, no session gets older. Raises RefusedError."""
        content = None if body is None else json.dumps(body).encode()
        wait_s = FIRST_WAIT_S
        while True:
            request = urllib.request.Request(url, content, self._headers, method=method)  # noqa: S310 - our own base
            try:
                with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as answer:  # noqa: S310
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code not in TRY_AGAIN:
                    raise RefusedError(_problem(error)) from None
                told_s = error.headers.get("Retry-After", "")
                self._sleep(float(told_s) if told_s.isdigit() else wait_s * _DICE.uniform(0.5, 1.0))
            except (
                OSError,
                http.client.HTTPException,
            ):  # the daemon restarts, or the network is cut
                self._sleep(wait_s * _DICE.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)


def _problem(error: urllib.error.HTTPError) -> dict[str, Any]:
    """The daemon's problem document (RFC 9457). A proxy between may answer with something else."""
    try:
        found = json.loads(error.read())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"detail": f"status {error.code}"}


def _chunks(ids: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(ids), MANY):
        yield ids[first : first + MANY]
