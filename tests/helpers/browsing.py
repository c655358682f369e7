"""The console in a real browser (Debian's chromium), and daemons whose state the console can show.

Playwright is imported inside the functions, because the import takes half a second.
"""

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import pytest
from aiohttp import web
from support import LISTEN, Serving, operator_table, scripted_operator, serving, until

if TYPE_CHECKING:
    from playwright.async_api import Page

TOKEN, READ_TOKEN = "a-token-that-may-change", "a-token-that-may-read"
# chromium-headless-shell takes half the time
CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
Function = TypeVar("Function", bound=Callable[..., Any])
ATTACK = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def with_tokens(directory: Path, more: str = "") -> str:
    """The configuration with a token that may change things, and one that may only read."""
    (directory / "tokens").write_text("anna:" + TOKEN)
    (directory / "read").write_text("grafana:" + READ_TOKEN)
    return LISTEN + 'token_file = "tokens"\nread_token_file = "read"\n' + more


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def expect(shown: Any) -> Any:
    """Playwright's `expect`: checks what a part of the page shows, and waits until it does."""
    from playwright.async_api import expect as expected

    return expected(shown)


@contextlib.asynccontextmanager
async def browser(**options: Any) -> AsyncIterator["Page"]:
    """A browser page. The test fails if the page violates its content security policy or if a script fails."""
    from playwright.async_api import async_playwright

    wrong: list[str] = []
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = await chromium.new_context(**options)
        page = await context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Security Policy" in line.text else None)
        yield page
        await chromium.close()
    assert wrong == []


async def sign_in(page: "Page", url: str, token: str = TOKEN) -> None:
    await page.goto(url)
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Go on").click()
    await expect(page.get_by_role("heading", name="Overview")).to_be_visible()


async def end(d: Serving, session: str, player: str = "p", operator: str = "acme") -> None:
    url = f"{d.api}/v1/operators/{operator}/sessions/{quote(session, safe='')}"
    async with d.client.put(
        url, json={"playerId": player, "token": "of-the-player-x7"}, headers=bearer(TOKEN)
    ) as answer:
        assert answer.status == 201
    async with d.client.post(url + "/close", headers=bearer(TOKEN)) as answer:
        assert answer.status == 200


@contextlib.asynccontextmanager
async def down(tmp_path: Path) -> AsyncIterator[Serving]:
    """A daemon whose operator acme answers every notice with 500 and markup, until its breaker is open."""

    async def answer(_: object) -> web.Response:
        return web.Response(status=500, text=ATTACK, content_type="text/html")

    async with scripted_operator(*[answer] * 1000) as wallet:
        toml = with_tokens(tmp_path, operator_table("acme", wallet.url, schedule=["250ms", "1h"]))
        async with serving(tmp_path, toml) as d:
            for session in ("s", ATTACK, "../x?y#z%", *map(str, range(12))):
                await end(d, session, ATTACK)
            await until(lambda: d.store.gate("acme").opened_at is not None, 30)
            yield d


_needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium-headless-shell)")


def in_chromium(test: Function) -> Function:
    """Marks a test of `make console-test`. It is skipped where there is no chromium."""
    marked: Function = pytest.mark.browser(_needs_chromium(test))
    return marked
