"""Reports for other programs and for tickets: valid, complete, and harmless whatever the endpoint answered."""

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from aiohttp import web
from endpoints import PROVIDER, QUICK, TOKEN, Endpoint, served, to

from lmdaemon.workbench import reports
from lmdaemon.workbench.checks import CHECKS
from lmdaemon.workbench.manual import check_page
from lmdaemon.workbench.runner import Report, Runner

NASTY = "</pre><script>alert(1)</script>]]>&\x00\x1b[2J\ud800"


class Nasty(Endpoint):
    """Answers a GET with a page that would run in an HTML report, and puts control characters into a body."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.Response(status=500, body=NASTY.encode("utf-8", "surrogatepass"), content_type="text/html")
        return await super().handle(request)


async def report_of(endpoint: Endpoint) -> Report:
    async with served(endpoint):
        return await Runner(to(endpoint.url, provider_id=PROVIDER), token=TOKEN, limits=QUICK).run()


async def test_the_junit_file_is_valid_and_counts_every_check_once() -> None:
    import xmlschema  # imported here, because it takes a second and no other test needs it

    report = await report_of(Nasty())
    text = reports.junit(report)
    xmlschema.XMLSchema(Path(__file__).parent / "junit-10.xsd").validate(text)
    suites = ElementTree.fromstring(text)
    cases = [case.get("name") for case in suites.iter("testcase")]
    assert cases == [check.id for check in CHECKS]
    assert [failure.get("type") for failure in suites.iter("failure")] == ["strictness.method"]
    assert sum(int(suite.get("failures", "")) for suite in suites) == report.counts["fail"] == 1
    assert sum(int(suite.get("skipped", "")) for suite in suites) == report.counts["skipped"]


async def test_the_html_page_needs_nothing_else_and_runs_nothing() -> None:
    report = await report_of(Nasty())
    page = reports.html(report)
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    Reader().feed(page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in seen}
    assert not [attrs for _, attrs in seen if {"src", "onclick"} & attrs.keys()]
    links = [str(attrs["href"]) for _, attrs in seen if "href" in attrs]
    assert "#strictness.method" in links
    assert {link[1:] for link in links} <= {attrs.get("id") for _, attrs in seen}
    assert "&lt;script&gt;alert(1)" in page
    for check in CHECKS:
        assert f"<code>{check.id}</code>" in page


def test_the_page_of_checks_is_what_the_checks_say() -> None:
    assert (Path(__file__).parents[2] / "docs" / "check.md").read_text() == check_page()
