"""The console in difficult situations: pages of other sites, very many rows, small and enlarged windows."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from browsing import ATTACK, TOKEN, bearer, browser, down, expect, in_chromium, sign_in, with_tokens
from caller import EVERY_CALL
from chance import DEEP
from support import LISTEN, operator_table, serving, until

from lmdaemon.web.routes import CALLS

if TYPE_CHECKING:
    from playwright.async_api import Page, Request

MANY = 100_000 if DEEP else 20_000
AT_ONCE = 10_000  # sessions opened by one call
DRAWN_MAX = 3000  # HTML elements of a page, however many rows the daemon has


@contextlib.asynccontextmanager
async def evil_site(target: str) -> AsyncIterator[str]:
    """Serves a page of another site that makes the browser call `target`, once by script and once by a form."""
    page = f"""<!doctype html><title>evil</title>
<form id=f method=post action="{target}" enctype="text/plain" target=frame><input name='{{"note":"' value='"}}'></form>
<iframe name=frame></iframe>
<script>fetch({json.dumps(target)}, {{method: "POST", mode: "no-cors", credentials: "include"}})
  .catch(() => 0).then(() => {{ document.getElementById("f").submit(); document.title = "done"; }});</script>"""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    app = web.Application()
    app.router.add_get("/", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


@in_chromium
@pytest.mark.parametrize("tokens", [False, True])
async def test_a_page_of_another_site_changes_nothing(tmp_path: Path, *, tokens: bool) -> None:
    """The page is open beside the console, in the same browser. With a token, and without one on a loopback address."""
    toml = with_tokens(tmp_path) if tokens else LISTEN
    async with serving(tmp_path, toml + operator_table("acme", "http://127.0.0.1:1/")) as d, browser() as page:
        if tokens:
            await sign_in(page, d.api + "/console/")
        else:
            await page.goto(d.api + "/console/")
        async with evil_site(d.api + "/v1/operators/acme/hold") as url:
            other = await page.context.new_page()
            statuses: list[int] = []
            other.on("response", lambda one: statuses.append(one.status) if one.request.method == "POST" else None)
            await other.goto(url)
            await until(lambda: len(statuses) == 2)
        assert set(statuses) == {401 if tokens else 403}
        assert d.store.gate("acme").held_at is None


async def test_the_console_cannot_be_framed_nor_reached_by_another_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as d:
        async with d.client.get(d.api + "/console/") as answer:
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        for path in ("/console/", "/v1/operators", "/v1/events"):
            async with d.client.get(d.api + path, headers={"Host": "rebound.example"}) as answer:
                assert answer.status == 421, path


async def test_no_get_changes_anything(tmp_path: Path) -> None:
    """After every GET of the API, the tables of sessions, deliveries and operators are unchanged."""

    def tables() -> dict[str, list[tuple[object, ...]]]:
        with contextlib.closing(sqlite3.connect(tmp_path / "lmdaemon.sqlite3")) as sql:
            return {
                name: sql.execute(f"SELECT * FROM {name}").fetchall() for name in ("session", "delivery", "operator")
            }

    async with down(tmp_path) as d:
        async with d.client.post(d.api + "/v1/operators/acme/hold", headers=bearer(TOKEN)) as answer:
            assert answer.status == 200
        await until(lambda: d.dispatcher.in_flight == 0)
        before = tables()
        got = [path for method, path in EVERY_CALL if method == "GET"]
        assert len(got) == sum(call.method == "GET" for call in CALLS)
        for path in got:
            async with d.client.get(d.api + path, headers=bearer(TOKEN)) as answer:
                assert answer.status in (200, 400, 404), path
        for changing in ("hold", "release", "probe", "send", "check", "deliveries/retry", "deliveries/discard"):
            async with d.client.get(f"{d.api}/v1/operators/acme/{changing}", headers=bearer(TOKEN)) as answer:
                assert answer.status == 405, changing
        assert tables() == before


@in_chromium
@pytest.mark.timeout(900)
async def test_a_thousand_operators_and_many_deliveries_stay_light(tmp_path: Path) -> None:
    """However many there are, the page draws and requests a limited amount. While sessions end, it refreshes at most
    once a second.
    """
    operators = "".join(f'[operators.op{one:04}]\nprovider_id = "p{one}"\nendpoint = ""\n' for one in range(999))
    toml = LISTEN + '[sessions]\nrestart_grace = "0s"\n' + operator_table("acme", "http://127.0.0.1:1/") + operators
    async with serving(tmp_path, toml) as d, browser() as page:
        async with d.client.post(d.api + "/v1/operators/acme/hold") as answer:
            assert answer.status == 200
        asked: list[str] = []
        page.on("request", lambda request: asked.append(path_of(request)))
        await page.goto(d.api + "/console/#/operator/acme")
        await expect(page.get_by_role("heading", name="acme")).to_be_visible()
        began, asked_before = asyncio.get_running_loop().time(), len(asked)
        for block in range(0, MANY, AT_ONCE):
            sessions = [
                {"sessionId": f"s{one}", "playerId": "p", "token": "t", "idleTimeoutSeconds": 1}
                for one in range(block, block + AT_ONCE)
            ]
            async with d.client.post(d.api + "/v1/operators/acme/sessions", json={"sessions": sessions}) as answer:
                assert answer.status == 200
        await until(lambda: d.store.figures_of("acme").pending == MANY, 120)
        took_s = asyncio.get_running_loop().time() - began
        refreshes = asked[asked_before:].count("/v1/operators")
        assert refreshes <= took_s + 2  # one refresh a second, and one under way at the beginning and at the end
        await expect(page.locator("header").get_by_text(f"{MANY:,} pending")).to_be_visible(timeout=60_000)
        # The page never took the daemon for unreachable
        await expect(page.get_by_text("The daemon answers again.")).to_have_count(0)
        for view, rows in (("overview", 50), ("operator/acme", 10), ("deliveries?operator=acme", 50), ("events", 100)):
            await page.evaluate("hash => { location.hash = hash }", "#/" + view)
            await expect(page.get_by_text("Loading …")).to_have_count(0, timeout=60_000)
            await expect(page.locator("h1")).to_be_visible()
            table = page.locator("table").last if view != "overview" else page.locator("table").first
            assert await table.locator("tbody tr").count() <= rows, view
            assert await page.evaluate("document.querySelectorAll('*').length") < DRAWN_MAX, view


def path_of(request: "Request") -> str:
    return "/" + request.url.split("/", 3)[3].partition("?")[0]


# CSS pixels: a window of 1280 at 200 % has 640; at 320 (400 %), WCAG 1.4.10 asks for no sideways scrolling
WIDTHS = (640, 400, 320)


@in_chromium
async def test_no_view_has_to_be_scrolled_sideways_when_it_is_small(tmp_path: Path) -> None:
    async with down(tmp_path) as d, browser() as page:
        await sign_in(page, d.api + "/console/")
        async with d.client.get(d.api + "/v1/deliveries", headers=bearer(TOKEN)) as answer:
            delivery = (await answer.json())["items"][-1]["id"]
        views = ["overview", "operator/acme", f"sessions?id={ATTACK}", "deliveries", f"delivery/{delivery}", "events"]
        for view in (*views, "session/acme/s", "runbook", "runbook/LmdaemonOperatorDown"):
            await page.evaluate("hash => { location.hash = hash }", "#/" + view)
            await expect(page.get_by_text("Loading …")).to_have_count(0)
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 700})
                assert await fits(page), (view, width)
        await page.evaluate("location.hash = '#/operator/acme'")
        for name in ("Hold", "Send test notice", "Check endpoint"):
            await page.get_by_role("button", name=name).click()
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 700})
                assert await fits(page), (name, width)
                box = await page.get_by_role("dialog").bounding_box()
                assert box is not None
                assert box["x"] >= 0, (name, width)
                assert box["x"] + box["width"] <= width, (name, width)
            await page.keyboard.press("Escape")


async def fits(page: "Page") -> bool:
    return bool(await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))
