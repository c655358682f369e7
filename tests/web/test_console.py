"""The console: its files over HTTP, and the page in a real browser (Debian's chromium) with a real daemon."""

import contextlib
import gzip
import importlib.resources
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer
from browsing import ATTACK, READ_TOKEN, TOKEN, bearer, browser, down, end, expect, in_chromium, sign_in, with_tokens
from documented import complaints
from endpoints import Endpoint, served
from support import LISTEN, operator_table, scripted_operator, serving, until

from lmdaemon.commands.cli import parser
from lmdaemon.dialects import SHIPPED
from lmdaemon.web.console import POLICY

if TYPE_CHECKING:
    from playwright.async_api import Page

FILES = Path(str(importlib.resources.files("lmdaemon.web").joinpath("console_files")))
BYTES_MAX = 60 * 1024
VIEWS = ("overview", "operator/acme", "sessions?id=s", "deliveries", "events", "runbook", "runbook/health%3A%20store")


# -- the files


async def test_the_files_need_no_token_and_are_served_with_the_policy(tmp_path: Path) -> None:
    async with serving(tmp_path, with_tokens(tmp_path)) as d:
        for name in ("", *(one.name.removesuffix(".gz") for one in FILES.iterdir())):
            async with d.client.get(f"{d.api}/console/{name}") as answer:
                assert answer.status == 200, name
                assert answer.headers["Content-Security-Policy"] == POLICY
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"
                assert answer.headers["Cache-Control"] == "no-cache"
        async with d.client.get(d.api + "/v1/operators") as answer:
            assert answer.status == 401
        for path in ("/console/..%2fapi.py", "/console/nothing.js", "/console/console.py"):
            async with d.client.get(d.api + path) as answer:
                assert answer.status == 404, path
        async with d.client.post(d.api + "/console/") as answer:
            assert answer.status == 401


async def test_without_the_setting_there_is_no_console(tmp_path: Path) -> None:
    async with serving(tmp_path, LISTEN + "console = false\n") as d:
        for path in ("/console", "/console/", "/console/app.js"):
            async with d.client.get(d.api + path) as answer:
                assert answer.status == 404, path
                assert (await answer.json())["code"] == "unknown-path"


async def test_a_foreign_host_gets_no_console_where_no_token_is_needed(tmp_path: Path) -> None:
    async with serving(tmp_path) as d:
        async with d.client.get(d.api + "/console/", headers={"Host": "evil.example"}) as answer:
            assert answer.status == 421
        async with d.client.get(d.api + "/console", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (308, "console/")


async def test_a_client_can_ask_what_its_token_may_do(tmp_path: Path) -> None:
    async with serving(tmp_path, with_tokens(tmp_path)) as d:
        for token, rights in (
            (TOKEN, {"name": "anna", "mayChange": True}),
            (READ_TOKEN, {"name": "grafana", "mayChange": False}),
        ):
            async with d.client.get(d.api + "/v1/token", headers=bearer(token)) as answer:
                assert await answer.json() == rights
                assert complaints("TokenRights", rights) == []


def test_the_files_are_small_and_come_from_nowhere_else() -> None:
    bodies = {one.name: one.read_bytes() for one in FILES.iterdir()}
    assert sum(map(len, bodies.values())) < BYTES_MAX
    texts = {name: (gzip.decompress(body) if name.endswith(".gz") else body).decode() for name, body in bodies.items()}
    for name, text in texts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text), name
        if name not in ("dom.js", "icon.svg"):  # these two files contain names of XML namespaces, which look like URLs
            assert not re.search(r"https?://", text), name
        assert not re.search(r'(?:href|src|fetch\(|from )\s*=?\s*"/', text), f"{name}: an absolute path"


# -- the page


@in_chromium
async def test_the_page_shows_a_broken_operator_holds_and_releases_it(tmp_path: Path) -> None:
    """A second tab is updated, too."""
    async with down(tmp_path) as d, browser() as page:
        await sign_in(page, d.api + "/console/")
        other = await page.context.new_page()
        await sign_in(other, d.api + "/console/")
        await page.bring_to_front()
        await expect(page.get_by_text("breaker open since").first).to_be_visible()
        await page.get_by_role("link", name="acme").first.click()
        await expect(page.get_by_role("heading", name="acme")).to_be_visible()
        await expect(page.get_by_text("Last failure")).to_be_visible()
        await page.get_by_role("button", name="Hold").press("Enter")
        await expect(page.get_by_label("Why")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Hold")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.get_by_label("Why").fill("they mend it's database")
        await page.get_by_label("How long").select_option("2h")
        command = "lmdaemon hold acme --note 'they mend it'\\''s database' --for 2h"
        await expect(page.get_by_role("dialog").locator("pre")).to_have_text(command)
        await page.get_by_role("dialog").get_by_role("button", name="Hold").click()
        await expect(page.get_by_role("status")).to_contain_text("acme is held since")
        await expect(page.locator("dd").get_by_text("they mend it's database")).to_be_visible()
        await expect(other.get_by_text("held since").first).to_be_visible()
        gate = d.store.gate("acme")
        assert (gate.held_by, gate.held_note) == ("anna", "they mend it's database")
        await page.get_by_role("button", name="Release").click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        assert d.store.gate("acme").held_at is not None
        await page.get_by_role("button", name="Release").click()
        await page.get_by_role("dialog").get_by_role("button", name="Release").click()
        await expect(page.get_by_role("status")).to_contain_text("acme is released")
        assert d.store.gate("acme").held_at is None


@in_chromium
async def test_commands_shown_mean_what_they_say_for_every_id(tmp_path: Path) -> None:
    """The command line reads them as they are meant also where an id or a note begins with "-"."""
    async with down(tmp_path) as d, browser() as page:
        await sign_in(page, d.api + "/console/")
        shown: list[str] = await page.evaluate(
            """async () => {
                const { command } = await import("/console/dom.js");
                return [
                    command("sessions", "close", "beta", "s-1"),
                    command("sessions", "close", "beta", "-x"),
                    command("sessions", "show", "beta", "--json"),
                    command("find", "-it's"),
                    command("hold", "beta", ["--note", "mended"], ["--for", "2h"]),
                    command("hold", "beta", ["--note", "-x y"], ["--for", "2h"]),
                    command("send", "beta", ["--yes"], ["--session", "--x"]),
                ];
            }"""
        )
        assert shown[0] == "lmdaemon sessions close beta s-1"
        assert shown[4] == "lmdaemon hold beta --note mended --for 2h"
        read = [vars(parser().parse_args(shlex.split(text)[1:])) for text in shown]
        assert [one["session"] for one in read[:3]] == ["s-1", "-x", "--json"]
        assert read[3]["id"] == "-it's"
        assert [(one["operator"], one["note"], one["seconds"]) for one in read[4:6]] == [
            *(("beta", "mended", 7200), ("beta", "-x y", 7200)),
        ]
        assert (read[6]["session"], read[6]["yes"]) == ("--x", True)


@in_chromium
async def test_dead_deliveries_are_retried_selected_and_all(tmp_path: Path) -> None:
    """The dialog says how many, and shows the same as a command."""
    async with scripted_operator(*[{"error": 999, "description": "never"}] * 6) as wallet:
        async with serving(tmp_path, with_tokens(tmp_path, operator_table("acme", wallet.url))) as d, browser() as page:
            for session in range(6):
                await end(d, f"s{session}")
            await until(lambda: d.store.figures_of("acme").dead == 6)
            await sign_in(page, d.api + "/console/")
            await page.goto(d.api + "/console/#/deliveries?state=dead")
            await expect(page.get_by_role("checkbox")).to_have_count(6)
            for at in range(2):
                await page.get_by_role("checkbox").nth(at).check()
            await page.get_by_role("button", name="Retry selected").click()
            await expect(page.get_by_role("dialog").locator("pre")).to_contain_text("lmdaemon deliveries retry msg_")
            await page.get_by_role("dialog").get_by_role("button", name="Retry 2").click()
            await expect(page.get_by_role("status")).to_contain_text("2 deliveries are due again")
            await until(lambda: d.store.figures_of("acme").dead == 4)
            await page.goto(d.api + "/console/#/operator/acme")
            await page.get_by_role("button", name="Retry all dead").click()
            await expect(page.get_by_role("dialog")).to_contain_text("There are 4, of which 4 can be sent: 4 code_999")
            command = "lmdaemon deliveries retry --operator acme"
            await expect(page.get_by_role("dialog").locator("pre")).to_have_text(command)
            await page.get_by_label("Which").select_option("code_999")
            await expect(page.get_by_role("dialog").locator("pre")).to_have_text(command + " --reason code_999")
            await page.get_by_role("dialog").get_by_role("button", name="Retry").click()
            await expect(page.get_by_role("status")).to_contain_text("4 deliveries of acme are due again")
            await until(lambda: d.store.figures_of("acme").dead == 0)


@in_chromium
async def test_dead_deliveries_are_discarded_selected_and_all(tmp_path: Path) -> None:
    """A selection lasts over several pages, the dialog asks for a note, and discarded deliveries no longer count as
    dead.
    """
    async with scripted_operator(*[{"error": 999, "description": "never"}] * 60) as wallet:
        async with serving(tmp_path, with_tokens(tmp_path, operator_table("acme", wallet.url))) as d, browser() as page:
            for session in range(60):
                await end(d, f"s{session}")
            await until(lambda: d.store.figures_of("acme").dead == 60, 30)
            await sign_in(page, d.api + "/console/")
            await page.goto(d.api + "/console/#/deliveries?operator=acme&state=dead")
            await page.get_by_role("checkbox").first.check()
            await page.get_by_role("link", name="Next page").click()
            await expect(page.get_by_role("checkbox")).to_have_count(10)
            await page.get_by_role("button", name="Select all on this page").click()
            await expect(page.get_by_text("11 selected, on all pages")).to_be_visible()
            await page.get_by_role("button", name="Discard selected").click()
            await page.get_by_role("dialog").get_by_role("button", name="Discard 11").click()
            assert d.store.figures_of("acme").dead == 60  # the field for the note is empty, and it is required
            await page.get_by_label("Why").fill("a test's")
            await expect(page.get_by_role("dialog").locator("pre")).to_contain_text("--note 'a test'\\''s'")
            await page.get_by_role("dialog").get_by_role("button", name="Discard 11").click()
            await expect(page.get_by_role("status")).to_contain_text("11 deliveries are discarded")
            assert d.store.figures_of("acme").dead == 49
            await page.goto(d.api + "/console/#/operator/acme")
            await expect(page.get_by_text("Last results of the latest 60: 60 code_999")).to_be_visible()
            await page.get_by_role("button", name="Discard all dead").click()
            await expect(page.get_by_role("dialog")).to_contain_text("There are 49: 49 code_999")
            await page.get_by_label("Why").fill("a test's")
            await page.get_by_label("Why").press("Enter")
            await expect(page.get_by_role("status")).to_contain_text("49 deliveries of acme are discarded")
            assert d.store.figures_of("acme").dead == 0
            page_of_dead = await d.store.deliveries(operator="acme", sink=None, state="dead", limit=1, after=None)
            assert '"anna"' in str(page_of_dead.rows[0].discarded)


@in_chromium
async def test_an_operator_is_tried_by_a_notice_and_by_the_checks(tmp_path: Path) -> None:
    """Trying works while the operator is held, because it is no delivery. The results stay while the user looks at
    other views.
    """
    async with served(Endpoint("HTML at malformed JSON", SHIPPED["v4.01"])) as endpoint:
        url = {"provider_id": "luckymonaco", "dialect": "v4.01", "accept": ["v4.01"]}
        toml = with_tokens(tmp_path, operator_table("acme", endpoint.url, **url))
        async with serving(tmp_path, toml) as d, browser() as page:
            await sign_in(page, d.api + "/console/")
            async with d.client.post(d.api + "/v1/operators/acme/hold", headers=bearer(TOKEN)) as answer:
                assert answer.status == 200
            await page.goto(d.api + "/console/#/operator/acme")
            await page.get_by_role("button", name="Send test notice").click()
            await page.get_by_label("Session").fill("it's mine")
            command = "lmdaemon send acme --yes --session 'it'\\''s mine'"
            await expect(page.get_by_role("dialog").locator("pre")).to_have_text(command)
            await page.get_by_role("dialog").get_by_role("button", name="Send test notice").click()
            await expect(page.get_by_role("status")).to_contain_text("Test notice to acme: delivered.")
            await expect(page.locator("pre").first).to_contain_text("it's mine")
            await expect(page.locator("pre").nth(1)).to_contain_text("HTTP 200")
            await page.get_by_role("button", name="Check endpoint").click()
            await expect(page.get_by_role("dialog").locator("pre")).to_have_text("lmdaemon check acme")
            await page.get_by_role("dialog").get_by_role("button", name="Check").click()
            await expect(page.get_by_role("status")).to_contain_text("acme is being checked")
            await page.get_by_role("link", name="Events").click()
            await expect(page.get_by_role("heading", name="Events")).to_be_visible()
            await page.go_back()
            await expect(page.get_by_text(re.compile(r"\d+ of \d+: "))).to_be_visible()
            failed = page.locator("details", has_text="strictness.malformed")
            await failed.locator("summary").click(timeout=120_000)
            await expect(failed).to_contain_text("What to do:")
            await expect(failed).to_contain_text("<h1>Server Error</h1>")
            assert await violations(page) == []
            await page.get_by_role("button", name="Stop").click()
            await expect(page.get_by_text("Stopped.")).to_be_visible()
            assert d.store.figures_of("acme").pending == 0


@in_chromium
async def test_of_a_thousand_operators_fifty_are_shown_those_in_trouble_first(tmp_path: Path) -> None:
    toml = "".join(f'[operators.op{one:04}]\nprovider_id = "p{one}"\nendpoint = ""\n' for one in range(1000))
    async with serving(tmp_path, toml) as d, browser() as page:
        async with d.client.post(d.api + "/v1/operators/op0777/hold") as answer:
            assert answer.status == 200
        await page.goto(d.api + "/console/")
        rows = page.get_by_role("region", name="Operators").locator("tbody tr")
        await expect(rows).to_have_count(50)
        await expect(rows.first).to_contain_text("op0777")
        await page.get_by_role("button", name="Next").click()
        await expect(page.get_by_text("51 to 100 of 1,000")).to_be_visible()
        await expect(page.get_by_role("button", name="Next")).to_be_focused()
        await page.get_by_label("Name has").fill("op0999")
        await expect(rows).to_have_count(1)


@in_chromium
async def test_markup_in_ids_and_answers_stays_text_in_every_view(tmp_path: Path) -> None:
    async with down(tmp_path) as d, browser() as page:
        await sign_in(page, d.api + "/console/")
        await page.goto(f"{d.api}/console/#/sessions?id={quote(ATTACK)}")
        await expect(page.get_by_role("link", name=ATTACK)).to_be_visible()
        await page.get_by_role("link", name=ATTACK).click()
        await expect(page.get_by_role("heading", name=ATTACK)).to_be_visible()
        await page.get_by_role("link", name="http", exact=True).first.click()
        await expect(page.get_by_role("heading", name="msg_")).to_be_visible()
        await expect(page.get_by_role("table")).to_contain_text("<img src=x onerror=")
        await expect(page.locator("pre")).to_contain_text("curl http://127.0.0.1:")
        await expect(page.locator("pre")).to_contain_text('"token":"***"')
        await page.goto(f"{d.api}/console/#/events")
        await end(d, ATTACK + "2", ATTACK)
        await expect(page.get_by_role("table")).to_contain_text("<img src=x onerror=")
        odd = quote("../x?y#z%", safe="")
        await page.goto(f"{d.api}/console/#/session/acme/{odd}")
        await expect(page.get_by_role("heading", name="../x?y#z%")).to_be_visible()
        await expect(page.get_by_text("Ended:")).to_be_visible()
        assert await page.locator("img, main script").count() == 0
        assert await page.title() != "1"


@in_chromium
async def test_a_token_that_may_only_read_sees_why_nothing_can_be_changed(tmp_path: Path) -> None:
    async with down(tmp_path) as d, browser() as page:
        await page.goto(d.api + "/console/")
        await page.get_by_label("Token").fill("wrong")
        await page.get_by_role("button", name="Go on").click()
        await expect(page.get_by_role("alert")).to_contain_text("does not know this token")
        await sign_in(page, d.api + "/console/", READ_TOKEN)
        await page.goto(d.api + "/console/#/operator/acme")
        await expect(page.get_by_text("This token may only read")).to_be_visible()
        for name in ("Hold", "Release", "Probe", "Send test", "Check endpoint", "Retry all dead", "Discard all dead"):
            await expect(page.get_by_role("button", name=name)).to_be_disabled()


@in_chromium
async def test_the_page_behind_a_prefix_tells_that_the_daemon_has_gone(tmp_path: Path) -> None:
    async with serving(tmp_path, operator_table("acme", "http://127.0.0.1:1/")) as d, browser() as page:
        is_there = True

        async def forward(request: web.Request) -> web.StreamResponse:
            if not is_there:
                request.transport.abort()  # type: ignore[union-attr]
                return web.Response()
            url = d.api + request.raw_path.removeprefix("/ops")
            async with d.client.request(request.method, url, data=await request.read()) as answer:
                response = web.StreamResponse(status=answer.status)
                for name in ("Content-Type", "Content-Security-Policy"):
                    if name in answer.headers:
                        response.headers[name] = answer.headers[name]
                await response.prepare(request)
                with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                    async for chunk in answer.content.iter_any():
                        if not is_there:
                            request.transport.abort()  # type: ignore[union-attr]
                        await response.write(chunk)
                return response

        app = web.Application()
        app.router.add_route("*", "/ops/{tail:.*}", forward)
        async with TestServer(app) as proxy:
            await page.goto(str(proxy.make_url("/ops/console/")))
            await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
            await expect(page.get_by_role("link", name="acme")).to_be_visible()
            is_there = False
            await expect(page.get_by_text("The daemon has not answered since")).to_be_visible(timeout=30_000)
            is_there = True
            await expect(page.get_by_text("The daemon answers again")).to_be_visible(timeout=30_000)
            await page.close()


async def violations(page: "Page", **wanted: Any) -> list[tuple[str, list[str]]]:
    """What axe-core finds wrong, by the rules of WCAG A and AA unless others are wanted: each rule with its
    elements.
    """
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text())
    options = wanted or {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = await page.evaluate("options => axe.run(document, options)", options)
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]


@in_chromium
async def test_axe_finds_nothing_in_any_view(tmp_path: Path) -> None:
    """Checked are the rules of WCAG A and AA. The dark scheme differs only in colours, so it is checked for contrast
    only.

    With SCREENSHOTS=DIRECTORY, a picture of each view is kept, light and dark, wide and narrow.
    """
    pictures = os.environ.get("SCREENSHOTS")
    async with down(tmp_path) as d, browser(color_scheme="light") as page:
        await sign_in(page, d.api + "/console/")
        async with d.client.get(d.api + "/v1/deliveries", headers=bearer(TOKEN)) as answer:
            delivery = (await answer.json())["items"][-1]
        for view in (*VIEWS, f"delivery/{delivery['id']}", "session/acme/s"):
            await page.evaluate("hash => { location.hash = hash }", "#/" + view)
            await expect(page.locator("h1")).to_be_visible()
            await expect(page.get_by_text("Loading …")).to_have_count(0)
            assert await violations(page) == [], view
            await page.emulate_media(color_scheme="dark")
            assert await violations(page, runOnly=["color-contrast"]) == [], view
            assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == DARK
            await page.emulate_media(color_scheme="light")
            for width in (1280, 400):
                await page.set_viewport_size({"width": width, "height": 800})
                assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (view, width)
                if pictures:
                    await kept(page, f"{pictures}/{{}}-{re.sub(r'[^a-z]+', '-', view.partition('?')[0])[:20]}-{width}")
            await page.set_viewport_size({"width": 1280, "height": 720})
            if pictures and view == "operator/acme":
                await page.get_by_role("button", name="Hold").click()
                await kept(page, f"{pictures}/{{}}-dialog")
                await page.get_by_role("button", name="Cancel").click()


DARK = "rgb(20, 23, 26)"  # the background in style.css


async def kept(page: "Page", path: str) -> None:
    """Keeps pictures of the page. `{}` in the path stands for the colour scheme."""
    for scheme in ("dark", "light"):
        await page.emulate_media(color_scheme=scheme)
        await page.screenshot(path=path.format(scheme) + ".png", full_page=True)
