"""The console over TLS and while its daemon restarts, on both event loops."""

from pathlib import Path

from browsing import TOKEN, browser, end, expect, in_chromium, sign_in, with_tokens
from certificates import make
from processes import free_ports
from support import LISTEN, operator_table, scripted_operator, serving


@in_chromium
async def test_over_https_the_page_works_and_leaves_no_cookie(tmp_path: Path) -> None:
    """The token is kept in the tab alone, where no page of another site can make the browser send it."""
    make(tmp_path, "own", make(tmp_path, "ca", authority=True))
    toml = with_tokens(tmp_path, 'tls_cert_file = "own.crt"\ntls_key_file = "own.key"\n')
    async with scripted_operator() as wallet, serving(tmp_path, toml + operator_table("acme", wallet.url)) as d:
        url = d.api.replace("http:", "https:") + "/console/"
        async with browser(ignore_https_errors=True) as page:
            await sign_in(page, url)
            await page.get_by_role("link", name="acme").click()
            await page.get_by_role("button", name="Hold").click()
            await page.get_by_role("dialog").get_by_role("button", name="Hold").click()
            await expect(page.get_by_role("status")).to_contain_text("acme is held since")
            assert await page.context.cookies() == []
            assert await page.evaluate("window.isSecureContext")
            assert TOKEN not in page.url
            other = await page.context.new_page()
            await other.goto(url)
            await expect(other.get_by_label("Token")).to_be_visible()  # another tab has not got the token
            await page.get_by_role("button", name="Forget token").click()
            await expect(page.get_by_label("Token")).to_be_visible()
            assert await page.evaluate("sessionStorage.length") == 0


@in_chromium
async def test_an_open_page_outlives_a_restart_of_the_daemon(tmp_path: Path) -> None:
    """The page says since when the daemon has been unreachable, keeps what it showed, and then shows what has happened
    in the meantime.
    """
    ports = free_ports(2)
    listen = LISTEN.replace("127.0.0.1:0", f"127.0.0.1:{ports[0]}", 1).replace("127.0.0.1:0", f"127.0.0.1:{ports[1]}")
    async with scripted_operator() as wallet, browser() as page:
        toml = listen + operator_table("acme", wallet.url)
        async with serving(tmp_path, toml) as d:
            await end(d, "before")
            await page.goto(d.api + "/console/#/operator/acme")
            await expect(page.get_by_role("link", name="before")).to_be_visible()
            async with d.client.post(d.api + "/v1/operators/acme/hold", json={"note": "from elsewhere"}) as answer:
                assert answer.status == 200
            await expect(page.locator("dd").get_by_text("from elsewhere")).to_be_visible()
        gone = page.get_by_text("The daemon has not answered since")
        await expect(gone).to_be_visible(timeout=60_000)
        await expect(page.get_by_role("link", name="before")).to_be_visible()
        async with serving(tmp_path, toml) as d:
            await expect(page.get_by_text("The daemon answers again.")).to_be_visible(timeout=60_000)
            await expect(gone).to_have_count(0)
            await end(d, "after")
            await expect(page.get_by_role("link", name="after")).to_be_visible(timeout=30_000)
            async with d.client.post(d.api + "/v1/operators/acme/release") as answer:
                assert answer.status == 200
            await expect(page.get_by_text("Nothing keeps it back.")).to_be_visible(timeout=30_000)
            await page.close()
