"""How Sphinx makes a site of the README, the changelog and these pages (`make docs`).

The pages are plain Markdown that is complete without the site. The site's navigation is the README's table of
documents, so that a new page is listed in one place. A link or an anchor that leads nowhere is a warning, and any
warning makes `make docs` fail.
"""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "docs/vectors/*.md", "benchmarks/RESULTS.md"]
exclude_patterns = [".*", "build", "dist"]
nitpicky = True

myst_heading_anchors = 4  # headings down to this level can be linked to, by the anchors that GitHub gives them

html_theme = "furo"  # furo uses the system's own fonts, so the site loads nothing from other sites
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]  # contains index.html, which leads to the README
html_title = project
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "default"
pygments_dark_style = "github-dark"


def _add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Appends a list of pages to the README, for Sphinx's sidebar: the pages that its table links to, in their
    order.
    """
    if docname == root_doc:
        pages = re.findall(r"^\| \[[^]]+\]\(([\w/.-]+)\.md\)", source[0], re.MULTILINE)
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", *pages, "benchmarks/RESULTS", "```", ""])


def setup(app: Sphinx) -> None:
    """Sphinx calls this when it reads this file."""
    app.connect("source-read", _add_navigation)
