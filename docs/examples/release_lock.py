"""Releases a player's game lock in your lobby when lmdaemon learns that the session has ended. Copy it and adapt it.

    [plugins.release_lock]
    use = "release_lock:ReleaseLock"
    options = { url = "https://lobby.internal/api/locks/release", timeout = 5 }

The end of a session never ends money: late results, cancels and refunds for it stay valid. Release locks and seats
here, and settle, cancel or refuse no bet because of it.
"""

from typing import Any

import aiohttp

from lmdaemon import SessionEnded


class ReleaseLock:
    """Posts each end to `url`, which must answer 2xx within `timeout` seconds, or the daemon tries again later."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._url: str = options["url"]  # a KeyError here stops the start and names the option
        self._timeout = aiohttp.ClientTimeout(total=options.get("timeout", 5))
        self._client: aiohttp.ClientSession

    async def start(self) -> None:
        self._client = aiohttp.ClientSession(timeout=self._timeout)

    async def stop(self) -> None:
        await self._client.close()

    async def session_ended(self, event: SessionEnded) -> None:
        # At least once: the same event.id may come again, after a restart too, so the lobby must know it by its key.
        headers = {"Idempotency-Key": event.id}
        lock = {
            "playerId": event.player_id,
            "sessionId": event.session_id,
            "reason": event.reason,
            "endedAt": event.ended_at.isoformat(),
        }
        async with self._client.post(self._url, json=lock, headers=headers, allow_redirects=False) as response:
            if not 200 <= response.status < 300:
                raise RuntimeError(f"the lobby answered {response.status}")  # any exception means: try again later
