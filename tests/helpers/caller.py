"""A client that calls the private API in the tests, and a list of every call that the API has."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict
from support import Serving, until
from yarl import URL

from lmdaemon.web.problems import KINDS
from lmdaemon.web.routes import CALLS, Call

SECRET = "the-player's-token"
OPENING = {"playerId": "p1", "token": SECRET}
ACME = "/v1/operators/acme"

CONFIG = """
[sessions]
restart_grace = "0s"
idle_timeout = "10m"
[operators.acme]
provider_id = "luckymonaco"
notify = true
url = "{url}?key=in-the-query"
allow_private_network = true
concurrency = 1
[operators.bravo]
provider_id = "bravo"
dialect = "v4.01"
accept = ["v4.01"]
"""


@dataclass
class Caller:
    """Calls the private API. Each error must be a problem document, and no answer may contain a player token."""

    daemon: Serving
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, method: str, path: str, expected: int | None = None, **options: Any) -> Any:
        _, body = await self.answer(method, path, expected, **options)
        return body

    async def answer(
        self, method: str, path: str, expected: int | None = None, **options: Any
    ) -> tuple[aiohttp.ClientResponse, Any]:
        url = URL(self.daemon.api + path, encoded=True)
        headers = CIMultiDict(options.pop("headers", {}))
        headers.extend({name: value for name, value in self.headers.items() if name not in headers})
        async with self.daemon.client.request(method, url, headers=headers, **options) as response:
            endless = response.content_type == "text/event-stream"
            text = "" if endless else await response.text()
        assert expected in (None, response.status), f"{method} {path}: {response.status} {text}"
        assert SECRET not in text + str(response.headers)
        if response.status >= 400 and path != "/health":
            self.check_problem(response, json.loads(text))
        return response, json.loads(text) if text and "json" in response.content_type else text

    @staticmethod
    def check_problem(response: aiohttp.ClientResponse, problem: dict[str, Any]) -> None:
        assert response.headers["Content-Type"] == "application/problem+json"
        assert problem["status"] == response.status
        assert problem.keys() - {"session"} == {"type", "title", "status", "detail", "code"}
        assert problem["detail"]
        assert problem["type"] == f"urn:lmdaemon:problem:{problem['code']}"
        assert problem["code"] in KINDS

    async def open(self, session_id: str = "s1", operator: str = "acme", **fields: Any) -> Any:
        path = f"/v1/operators/{operator}/sessions/{quote(session_id, safe='')}"
        return await self("PUT", path, 201, json=OPENING | fields)

    async def session(self, session_id: str = "s1", operator: str = "acme") -> Any:
        return await self("GET", f"/v1/operators/{operator}/sessions/{quote(session_id, safe='')}", 200)

    async def close(self, session_id: str = "s1", operator: str = "acme") -> Any:
        return await self("POST", f"/v1/operators/{operator}/sessions/{session_id}/close", 200)

    async def operator(self, name: str = "acme") -> Any:
        return next(shown for shown in (await self("GET", "/v1/operators", 200))["items"] if shown["operator"] == name)

    async def settled(self, name: str = "acme") -> None:
        """Waits until no delivery of the operator is pending."""

        async def none_pending() -> bool:
            return (await self.operator(name))["pending"] == 0

        await until(none_pending)

    async def delivery_of(self, session_id: str = "s1") -> Any:
        (delivery,) = (await self.session(session_id))["deliveries"]
        return delivery

    async def walk(self, path: str, limit: int, **query: str | None) -> list[Any]:
        """Every item of all pages, read by following the cursors. Only the last page may have fewer items than the
        limit.
        """
        given = {name: value for name, value in query.items() if value is not None}
        items: list[Any] = []
        after: dict[str, str] = {}
        while True:
            page = await self("GET", path, 200, params=given | {"limit": str(limit)} | after)
            assert page.keys() == {"items", "next"}
            items += page["items"]
            if page["next"] is None:
                assert len(page["items"]) <= limit
                return items
            assert len(page["items"]) == limit
            after = {"after": page["next"]}


def path_of(call: Call, operator: str = "acme", session: str = "s1", delivery: str = "msg_1_x") -> str:
    return call.path.format(operator=operator, sessionId=session, id=delivery)


# Method and path of every call, the one that opens s1 first, and of what is none
OPEN = next((call.method, path_of(call)) for call in CALLS if call.name == "openSession")
EVERY_CALL = sorted(((call.method, path_of(call)) for call in CALLS), key=lambda one: one != OPEN)
NO_CALLS = [("GET", "/nothing"), ("DELETE", "/v1/operators"), ("POST", "/health")]
