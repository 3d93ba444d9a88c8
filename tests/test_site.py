"""The documentation as a site: it builds without a warning, reads as on GitHub, and asks no other host for anything."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from pages import DOCS, PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_navigation_and_the_first_page_lead_to_every_page():
    def leaves(tree: object) -> set[str]:
        if isinstance(tree, str):
            return {tree}
        return set().union(*(leaves(part) for part in (tree.values() if isinstance(tree, dict) else tree)))

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    written = {page.relative_to(DOCS).as_posix() for page in PAGES if page.name != "README.md"}
    assert leaves(nav) == written
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == written - {"index.md"}


def test_links_in_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_pages_read_on_the_site_as_on_github(site):
    """Lists, tables and headings are the same to CommonMark (GitHub) and to the site's Markdown."""
    github = MarkdownIt("commonmark").enable("table")
    for page in PAGES:
        if page.name in ("README.md", "api.md"):
            continue
        plain = github.render(page.read_text())
        html = (site / f"{page.stem}.html").read_text()
        built = re.search(r"<article.*?>(.*)</article>", html, re.S)
        assert built is not None
        for tag in ("li", "table", "tr", "h2", "h3", "strong", "em", "img"):
            both = [len(re.findall(f"<{tag}[ >]", text)) for text in (plain, built[1])]
            assert both[0] == both[1], f"{page.name}: {tag}, {both[0]} on GitHub and {both[1]} on the site"


def test_the_site_is_whole_and_asks_no_other_host(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"https?:", text), page
        assert not re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect|icon)\"[^>]+href=\"https?:", text), page
    python = (site / "api.html").read_text()
    for name in ("generate", "max_new_tokens", "tokens_per_forward", "configurations"):
        assert name in python
    assert not list(site.rglob("*.py"))


def test_the_reference_is_made_from_the_code():
    """The words of commands and keys, as they are now: an outdated page fails."""
    make = runpy.run_path(str(DOCS / "make_reference.py"))
    for name, written in (("cli", make["cli_page"]()), ("config", make["config_page"]())):
        assert (DOCS / f"{name}.md").read_text() == written, f"docs/{name}.md: run python docs/make_reference.py"
