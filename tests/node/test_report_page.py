"""The page of `vmgr report` in a real browser: nothing is fetched, nothing runs, all is where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, program
from nodesite import TEMPLATES
from reports import BEGAN, HOSTILE, an_attempt, failed, hostile, parts_of

from vmgr.errors import printable
from vmgr.report.page import draw_page
from vmgr.report.timeline import newest, plan

BOXES = """[...document.querySelectorAll('.chart %s')].map(e => {
    const box = e.getBoundingClientRect();
    return {text: e.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom,
            fill: getComputedStyle(e).fill, kind: e.getAttribute('class')};
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no browser is installed")
    with Browser() as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(browser: Browser) -> None:
    """The browser lives through all tests of this file, and is waited for at its end."""


def page(folder: Path, *attempts: dict[str, Any], missing: Any = ()) -> Path:
    parts = newest(parts_of(*attempts))
    path = folder / "report.html"
    path.write_text(draw_page(parts, plan(parts, BEGAN + 60), dict(missing), TEMPLATES))
    return path


def luminance(colour: str) -> float:
    """Of a colour such as rgb(1, 2, 3), from 0 to 255."""
    red, green, blue = (float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_chart_is_where_it_belongs(browser: Browser, tmp_path: Path) -> None:
    path = page(tmp_path, an_attempt(), an_attempt("n2", 1))
    browser.open(path)
    assert browser.complaints == [] and browser.requests == [path.as_uri()]
    chart = browser.value(
        "(b => ({left: b.left, right: b.right}))(document.querySelector('.chart').getBoundingClientRect())"
    )
    bars = [box for box in browser.value(BOXES % "g rect") if box["kind"] != "detail"]
    assert len(bars) == 2 * 4 + 4 * 7
    for box in bars:
        assert chart["left"] < box["left"] < box["right"] < chart["right"], box
    rows: dict[float, list[Any]] = {}
    for box in bars:
        rows.setdefault(box["top"], []).append(box)
    assert len(rows) == 6
    for boxes in rows.values():
        assert all(one["right"] <= two["left"] + 1.6 for one, two in zip(boxes, boxes[1:])), "bars follow each other"
    job = next(box for box in bars if box["kind"] == "job")
    ticks = {box["text"]: (box["left"] + box["right"]) / 2 for box in browser.value(BOXES % ".tick")}
    second = (ticks["20 s"] - ticks["0 s"]) / 20
    assert job["left"] == pytest.approx(ticks["0 s"] + 7.9 * second, abs=1)
    assert job["right"] == pytest.approx(ticks["0 s"] + 20.9 * second, abs=1)
    for text in browser.value(BOXES % "text.in"):
        inside = [bar for bar in bars if bar["top"] <= text["top"] and text["bottom"] <= bar["bottom"] + 1]
        assert any(bar["left"] <= text["left"] and text["right"] <= bar["right"] for bar in inside), text
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    colours = {box["kind"]: box["fill"] for box in bars}
    assert len(set(colours.values())) == len(colours) and "rgb(0, 0, 0)" not in colours.values(), "the style is used"


def test_a_page_is_light_or_dark_as_its_reader_wants(browser: Browser, tmp_path: Path) -> None:
    path = page(tmp_path, *failed(), missing={"n3": "node n3 refuses the login"}.items())
    for scheme, is_dark in (("light", False), ("dark", True)):
        browser.open(path, scheme=scheme)
        paper, ink = (
            luminance(browser.value(f"getComputedStyle(document.body).{name}")) for name in ("backgroundColor", "color")
        )
        assert (paper < 60 and ink > 200) if is_dark else (paper > 220 and ink < 60)
        assert "failed (VT-BOOT)" in browser.value("document.body.innerText") and browser.complaints == []


def test_a_narrow_window_scrolls_inside_the_chart(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, an_attempt(), an_attempt("n2", 1)), width=420)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    path = page(tmp_path, *hostile(), missing={HOSTILE[0]: HOSTILE[1]}.items())
    browser.open(path)
    assert browser.complaints == [] and browser.requests == [path.as_uri()]
    assert browser.value("document.title") == f"{HOSTILE[3]}: vTorque report"
    assert (
        browser.value("document.querySelectorAll('script, img, iframe, a, form, h1:not(:first-of-type)').length") == 0
    )
    assert browser.value("document.querySelectorAll('h1').length") == 1
    text = browser.value("document.body.textContent")
    assert all(printable(name) in text for name in HOSTILE)
    labels = browser.value(BOXES % ".name")
    bars = browser.value(BOXES % "g rect")
    assert min(bar["left"] for bar in bars) > 200 and len(labels) == 1 + len(HOSTILE)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "long names are wrapped or cut"


def test_what_got_into_a_page_could_not_run(browser: Browser, tmp_path: Path) -> None:
    """The policy holds by itself: here the escaping has failed."""
    path = page(tmp_path, an_attempt())
    broken = (
        "<img src='http://vtorque.example/x'><script>document.title = 'owned'</script><p style='color: red' id=p>x</p>"
    )
    path.write_text(path.read_text().replace("<header>", f"{broken}<header>"))
    browser.open(path)
    assert browser.value("document.title") == "12.host: vTorque report"
    assert luminance(browser.value("getComputedStyle(document.getElementById('p')).color")) < 60
    assert len(browser.complaints) >= 3 and all("Content Security Policy" in told for told in browser.complaints)
