"""The man pages: current, right in the language of man(7), and complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY
from test_vmgr_commands import LEAVES, example

from vmgr.request import KEYS
from vsub.options import OWN

sys.path.insert(0, str(REPOSITORY / "docs"))

import manpages

PAGES = sorted((REPOSITORY / "man").glob("*.1"))
AGED = "missing date"
"""A page that is made anew has no date; it would never be current."""


def rendered(source: str) -> str:
    """What a reader sees of a page, on lines of any length."""
    mandoc = shutil.which("mandoc")
    if mandoc is None:
        pytest.skip("mandoc is not installed")
    argv = [mandoc, "-T", "utf8", "-O", "width=1000,indent=0"]
    text = subprocess.run(argv, input=source, capture_output=True, text=True, check=True).stdout
    return re.sub(".\b", "", text)


def test_they_are_current() -> None:
    assert {page.name: page.read_text() for page in PAGES} == manpages.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_finds_nothing(page: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(page)], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if AGED not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_groff_finds_nothing(page: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    argv = ["groff", "-man", "-Tutf8", "-Wbreak", "-ww", str(page)]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stderr == ""


def test_every_command_option_and_example_of_vmgr_is_there() -> None:
    text = rendered(manpages.vmgr_page())
    for path, command in LEAVES.items():
        name = " ".join(path)
        section = re.search(rf"^ *vmgr {name}\n(.*?)(?=^ *vmgr |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        found = text[section.start() :]
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert all(word in found for word in option.opts), f"{name}: {option.opts}"
        assert "vmgr " + " ".join(example(path)) in re.sub(r"['\"]", "", found), name


def test_every_key_and_word_of_vsub_is_there() -> None:
    text = rendered(manpages.vsub_page())
    for key, facts in KEYS.items():
        assert re.search(rf"^ *-vm {key}=(VALUE|FILE)\s+{re.escape(facts.help)}$", text, re.MULTILINE), key
    assert all(re.search(rf"(^| |\(){word}\b", text, re.MULTILINE) for word in OWN)


@FUZZ
@given(
    st.lists(
        st.text(st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_categories=["C", "Z", "M"]), min_size=1)
    )
)
def test_any_text_is_read_as_it_is(words: list[str]) -> None:
    page = f'.TH X 1 "" "x" "y"\n.SH NAME\nx \\- y\n.SH TEXT\n.nf\n{manpages.escape(chr(10).join(words))}\n.fi\n'
    shown = rendered(page).partition("TEXT\n")[2]
    assert shown.split()[: len(words)] == words
