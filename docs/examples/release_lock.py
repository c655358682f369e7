"""Releases a player's game lock in your lobby when lmdaemon learns that the session has ended. Copy it and adapt it.

    [plugins.release_lock]
    use = "release_lock:ReleaseLock"
    options = { url = "https://lobby.internal/api/locks/release", timeout = 5 }

The end of a session says nothing about money: late results, cancels and refunds for it stay valid. Release locks and
seats here, but settle, cancel or refuse no bet because of it.
"""

from typing import Any

import aiohttp

from lmdaemon import SessionEnded


class ReleaseLock:
    """Posts each end to `url`, which must answer 2xx within `timeout` seconds, or the daemon tries again later."""

    def __init__(self, options: dict[str, Any]) -> None:
        # A missing url (KeyError) stops the start of the daemon, with a message that names the option
        self._url: str = options["url"]
        self._timeout = aiohttp.ClientTimeout(total=options.get("timeout", 5))
        self._client: aiohttp.ClientSession

    async def start(self) -> None:
        self._client = aiohttp.ClientSession(timeout=self._timeout)

    async def stop(self) -> None:
        await self._client.close()

    async def session_ended(self, event: SessionEnded) -> None:
        # The same event may be delivered again, also after a restart. The lobby must recognise it by this key.
        headers = {"Idempotency-Key": event.id}
        lock = {
            "playerId": event.player_id,
            "sessionId": event.session_id,
            "reason": event.reason,
            "endedAt": event.ended_at.isoformat(),
        }
        async with self._client.post(self._url, json=lock, headers=headers, allow_redirects=False) as response:
            if not 200 <= response.status < 300:
                # Any exception makes the daemon try again later
                raise RuntimeError(f"the lobby answered {response.status}")
