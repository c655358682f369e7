"""The documents as a site: it builds without a warning, loads nothing from other sites, and a broken link stops the
build.

`make docs-test` runs these tests. The generator is installed once, as for `make docs`. If it cannot be installed, the
tests are skipped with the reason.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.site, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "docs"
INSTALL_S = 300
BUILD_S = 120
SOURCES = ("README.md", "CHANGELOG.md", "pyproject.toml", "docs", "benchmarks/RESULTS.md")
LOADING = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


@pytest.fixture(scope="module")
def generator() -> Path:
    """`sphinx-build`, as `make docs` installs it for this Python."""
    venv = BUILT / f"venv-{sys.version_info.major}.{sys.version_info.minor}"
    ready = f"{venv.relative_to(ROOT)}/.ready"
    command = ["make", "--silent", ready, f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode:
        pytest.skip(f"Sphinx cannot be installed: {done.stderr.strip()[-200:]}")
    return venv / "bin" / "sphinx-build"


def build(generator: Path, source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Builds a site from a source tree as `make docs` does."""
    command = [
        generator,
        "-q",
        "-W",
        "--keep-going",
        "-c",
        source / "docs" / "site",
        "-d",
        f"{site}.cache",
        source,
        site,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)


@pytest.fixture(scope="module")
def site(generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site made of these documents."""
    site = tmp_path_factory.mktemp("built") / "site"
    done = build(generator, ROOT, site)
    assert done.returncode == 0, done.stderr
    return site


class Loaded(HTMLParser):
    """Collects the URLs that a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if (tag, name) in LOADING and value]


def test_every_document_is_a_page_of_the_site(site: Path) -> None:
    pages = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert {path.relative_to(ROOT).with_suffix("") for path in documents} <= pages
    assert (site / "index.html").exists()


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are part of the site. So reading it needs no network and is visible to no
    other site.
    """
    loaded = 0
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text())
        loaded += len(parser.urls)
        assert [url for url in parser.urls if re.match(r"(\w+:)?//", url)] == [], page
    assert loaded
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:\w+:)?//[^)'\"]*", style.read_text()) == [], style


def test_links_that_lead_nowhere_stop_the_build(generator: Path, tmp_path: Path) -> None:
    """A page, an anchor of another page, an anchor of the same page, a file and a picture that do not exist are each
    named.
    """
    source = tmp_path / "source"
    for name in SOURCES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    page = source / "docs" / "security.md"
    links = "[x](no-page.md) [x](limits.md#no-anchor) [x](#none-here) [x](examples/no-file.py) ![x](no-picture.svg)"
    page.write_text(f"{page.read_text()}\n{links}\n")
    done = build(generator, source, tmp_path / "site")
    assert done.returncode == 1
    for target in ("no-page", "no-anchor", "none-here", "no-file", "no-picture"):
        assert re.search(rf"security\.md:.*{target}", done.stderr), target
