"""The console's pages in docs/console.md: an evening with several faults, and what a first-time reader can learn from
the page.

With PICTURES=DIRECTORY, the pictures are kept (`make screenshots` renews those of the documents).
"""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browsing import TOKEN, bearer, browser, end, expect, in_chromium, sign_in, with_tokens
from chance import DEEP
from support import Serving, operator_table, scripted_operator, serving, until

from lmdaemon import retry
from lmdaemon.clock import Clock

if TYPE_CHECKING:
    from playwright.async_api import Page

AGO_MS = 42 * 60_000
DOCUMENTS = Path(__file__).parents[2] / "docs"
LONGEST = 860  # the height of the pictures, in pixels

# Colour scheme and width. All show the same texts, so one is enough on a developer's machine
SHOWN = [("light", 800), ("dark", 800), ("light", 400)][: None if DEEP or "PICTURES" in os.environ else 1]


class Behind(Clock):
    """A wall clock that is behind until the test sets `behind_ms` to 0, so that events seem to have happened a while
    ago.
    """

    behind_ms = AGO_MS

    def wall_ms(self) -> int:
        return super().wall_ms() - self.behind_ms


class Wallet:
    """An operator that answers every request alike until the test changes the answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def __call__(self, _: Any) -> Any:
        return self.answer()


@asynccontextmanager
async def evening(directory: Path) -> AsyncIterator[Serving]:
    """A daemon with four operators: acme is down and has a backlog, bravo is held by anna, charlie has refused three
    notices, delta works.
    """
    from aiohttp import web

    def moved() -> web.Response:
        return web.json_response({"error": 100, "description": "database is being moved"}, status=503)

    clock = Behind()
    async with (
        scripted_operator(*[Wallet(moved)] * 1000) as acme,
        scripted_operator() as well,
        scripted_operator(*[{"error": 120, "description": "player is unknown here"}] * 3) as charlie,
    ):
        toml = with_tokens(directory) + '[sessions]\nrestart_grace = "0s"\n'
        for name, wallet in {"acme": acme, "bravo": well, "charlie": charlie, "delta": well}.items():
            toml += operator_table(name, wallet.url, provider_id=f"luckymonaco-{name}", schedule=["5s", "30s", "2m"])
        async with serving(directory, toml, clock) as d:
            held = {"note": "they move their database until 22:00", "forSeconds": 7200}
            async with d.client.post(f"{d.api}/v1/operators/bravo/hold", json=held, headers=bearer(TOKEN)) as answer:
                assert answer.status == 200
            for name, many in {"acme": 40, "bravo": 12, "charlie": 12, "delta": 30}.items():
                for number in range(many):
                    await end(d, f"game-{name}-{number}", f"player-{number % 7}", name)
            await until(lambda: d.store.gate("acme").opened_at is not None, 30)
            await until(lambda: d.store.figures_of("charlie").pending == d.store.figures_of("delta").pending == 0, 30)
            clock.behind_ms = 0
            # The breaker's pause is over by now, and its next probe fails
            await until(lambda: retry.breaker(d.store.gate("acme"), clock.wall_ms()) == "open", 30)
            yield d


async def picture(page: "Page", name: str, *, whole: bool = True) -> None:
    """Keeps a picture of the page: the whole page down to LONGEST, or what is visible in the window."""
    directory = os.environ.get("PICTURES")
    if directory:
        width, height = await page.evaluate("[innerWidth, document.body.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, LONGEST)}
        await page.screenshot(path=f"{directory}/{name}.png", full_page=whole, **({"clip": clip} if whole else {}))


@in_chromium
@pytest.mark.parametrize(("scheme", "width"), SHOWN)
async def test_who_has_never_seen_the_page_can_tell_what_is_wrong(tmp_path: Path, scheme: str, width: int) -> None:
    """What is wrong, since when, what happens by itself and what can be done stands on the first page or one link from
    it.
    """
    size = {"width": width, "height": LONGEST}
    async with evening(tmp_path) as d, browser(color_scheme=scheme, viewport=size) as page:
        suffix = ("" if scheme == "light" else "-dark") + ("" if width == 800 else f"-{width}")
        await sign_in(page, d.api + "/console/")
        kept_back = page.locator('[data-part="back"]')
        await expect(kept_back).to_contain_text("breaker open since")
        await expect(kept_back).to_contain_text("status_503 (`error` is 100")
        await expect(kept_back).to_contain_text("(42 min")
        await expect(kept_back).to_contain_text("By itself: tried again at")
        await expect(kept_back).to_contain_text("held since")
        await expect(kept_back).to_contain_text("they move their database")
        await expect(kept_back).to_contain_text("40 pending, 0 dead, the oldest 42 min")
        await picture(page, "overview" + suffix)
        await page.get_by_role("link", name="acme").first.click()
        gate = page.locator('[data-part="gate"]')
        await expect(gate).to_contain_text("(42 min")
        await expect(gate).to_contain_text("You could: tell the operator what is answered")
        await expect(gate.get_by_role("link", name="More in the runbook")).to_be_visible()
        await expect(page.get_by_text("database is being moved").first).to_be_visible()
        await expect(page.get_by_text(re.compile("Last results of the latest 40:"))).to_be_visible()
        await picture(page, "operator" + suffix)
        await page.get_by_role("button", name="Hold").click()
        await page.get_by_label("Why").fill("they move their database")
        await page.get_by_label("How long").select_option("2h")
        await picture(page, "dialog" + suffix, whole=False)
        await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Send test notice").click()
        await page.get_by_role("dialog").get_by_role("button", name="Send test notice").click()
        await expect(page.get_by_role("heading", name="Test notice")).to_be_visible()
        await page.get_by_role("button", name="Dismiss").click()
        await picture(page, "test-notice" + suffix)
        await page.get_by_role("link", name="Deliveries").click()
        await page.goto(d.api + "/console/#/deliveries?operator=charlie&state=dead")
        await expect(page.get_by_role("checkbox")).to_have_count(3)
        await page.get_by_role("checkbox").first.check()
        await picture(page, "deliveries" + suffix)
        await page.goto(d.api + "/console/#/operator/charlie")
        await expect(page.get_by_text("3 were given up (dead). Retry them when the reason is mended")).to_be_visible()
        await page.go_back()
        await page.locator("td a").first.click()
        await expect(page.get_by_role("heading", name="Request")).to_be_visible()
        await expect(page.get_by_text("player is unknown here").first).to_be_visible()
        await picture(page, "delivery" + suffix)


def test_the_pictures_of_the_documents_are_there_and_small() -> None:
    """`make screenshots` makes the pictures."""
    text = (DOCUMENTS / "console.md").read_text()
    shown = {path.name for path in (DOCUMENTS / "console").glob("*.png")}
    assert shown
    for name in shown:
        assert f"(console/{name})" in text, f"{name} is shown nowhere"
        assert (DOCUMENTS / "console" / name).stat().st_size < 150_000, name
