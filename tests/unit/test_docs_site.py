"""The documentation as a site: it builds, no link or anchor is dead, and its examples are the files that are run."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Optional
from urllib.parse import unquote, urldefrag

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
EXAMPLES = REPOSITORY / "examples"
LEAST_EXAMPLES = 10


class Page(HTMLParser):
    """A page's links and anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            if value and name in ("id", "name"):
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in site.glob("*.html")}


def test_no_link_is_dead(site: Path) -> None:
    """Every link, picture and style sheet of the built pages that is no other site's, with its anchor."""
    pages = {path: Page(path.read_text()) for path in sorted(site.glob("*.html"))}
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of the server's root
            continue
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, anchor = urldefrag(link)
            file = (path.parent / unquote(target)).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path.name}: {link}"
            if anchor and file in pages:
                assert unquote(anchor) in pages[file].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 100


def test_examples_are_the_files_that_are_run() -> None:
    """A block of the page that is a script stands in `examples/` to the letter; `test_documented_commands` runs it."""
    text = (DOCS / "examples.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    scripts = {path.read_text() for path in EXAMPLES.glob("*.sh")}
    assert blocks and all(block in scripts for block in blocks)
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) >= LEAST_EXAMPLES
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert all("```console\n$ " in section for section in sections)
