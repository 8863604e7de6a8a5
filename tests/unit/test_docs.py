"""The documentation: links lead somewhere, generated parts are current, what it names exists."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import vmgr
from vmgr.errors import Code
from vmgr.fields import Items
from vmgr.request import KEYS
from vmgr.schema import SCHEMA

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
README_LINES = 70

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_DOTTED = re.compile(r"[a-z_]+(?:\[\])?(?:\.[a-z_]+(?:\[\])?)+")
_FILES = (".md", ".py", ".env", ".yaml", ".json", ".sock", ".log", ".conf", ".service")


def page_id(page: Path) -> str:
    return page.name


pages = pytest.mark.parametrize("page", PAGES, ids=page_id)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    return _SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dotted(section: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Every key and section of the configuration by its dotted name; a list's items with and without `[]`."""
    for word, kind in section.items():
        name = f"{at}.{word}" if at else word
        yield name
        if isinstance(kind, Items):
            yield from dotted(kind.section, name)
            yield from dotted(kind.section, f"{name}[]")
        elif isinstance(kind, Mapping):
            yield from dotted(kind, name)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{page.name}: {target}"
        assert REPOSITORY in (aim, *aim.parents), f"{page.name}: {target} leaves the repository"
        assert not anchor or anchor in anchors(aim), f"{page.name}: {target}"


def test_generated_parts_are_current() -> None:
    done = subprocess.run([sys.executable, DOCS / "generate", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pages
def test_codes_exist(page: Path) -> None:
    known = {code.text for code in Code}
    named = set(re.findall(r"\bVT-[A-Z]+\b", page.read_text()))
    assert named <= known


def test_every_job_failure_is_explained() -> None:
    text = (DOCS / "errors.md").read_text()
    for code in Code:
        if code.status >= 70:
            assert f"\n### {code.text} ({code.status})\n" in text, code.text


@pages
def test_request_keys_exist(page: Path) -> None:
    for line in page.read_text().splitlines():
        for value in re.findall(r"-vm ([^\s`]+=[^\s`]+)", line):
            keys = {item.partition("=")[0] for item in value.split(",")}
            assert keys <= set(KEYS) or line.endswith("# exits 2"), f"{page.name}: {line}"


def test_every_request_key_is_documented() -> None:
    text = (DOCS / "users.md").read_text()
    for key in KEYS:
        assert f"`{key}=" in text, key


@pages
def test_configuration_keys_exist(page: Path) -> None:
    known = set(dotted(SCHEMA))
    for span in spans(page):
        name = span.partition(":")[0]
        if _DOTTED.fullmatch(name) and name.partition(".")[0].rstrip("[]") in SCHEMA and not name.endswith(_FILES):
            assert name in known, f"{page.name}: {span}"


def test_readme_is_a_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= README_LINES


def test_readme_and_docs_link_every_page() -> None:
    linked = "".join(prose(page) for page in PAGES)
    for page in DOCS.glob("*.md"):
        assert re.search(rf"\]\((?:docs/)?{re.escape(page.name)}[)#]", linked), page.name


def test_every_example_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for example in sorted((REPOSITORY / "examples").iterdir()):
        assert example.name in text, example.name


def test_changelog_has_this_version() -> None:
    assert f"## {vmgr.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_dependency_is_justified() -> None:
    text = (DOCS / "dependencies.md").read_text()
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    python = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    names = {re.split(r"[<>=!~ ]", line.strip())[0] for line in python.splitlines()}
    for listed in ("contrib/packages.txt", "tests/packages.txt"):
        names |= {line.partition("#")[0].strip() for line in (REPOSITORY / listed).read_text().splitlines()}
    missing = {name for name in names if name and f"| `{name}`" not in text}
    assert not missing
    documented = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    assert not documented - names, "justified, and not needed any more"
