"""Both pages in a real browser, wide and narrow, light and dark: they render, fit, can be read, and ask for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sipit.cli import main
from sipit.report.audit import audit_page
from sipit.report.page import table
from tests.audit_records import CELL, HIDDEN, NOISY, RECORD, TRIAL
from tests.browser.chromium import EXECUTABLE, Chromium, Tab, chromium

pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed (Debian's package: chromium)"),
    pytest.mark.xdist_group("browser"),
]
_RESULTS = Path(__file__).parents[2] / "results"  # the committed records, so the committed page
_LEAST_CONTRAST = 4.5  # of text on its ground, WCAG 2.2 level AA
_CASES = list(itertools.product(("reproduction", "audit"), (1200, 390), ("light", "dark")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    assert main(["report", str(_RESULTS), "--out", str(folder / "reproduction.html")]) == 0
    deeper = [{**cell, "layer": 25, "site": "final"} for cell in (CELL, NOISY)]
    record = {**RECORD, "cells": [CELL, NOISY, HIDDEN, *deeper]}
    (folder / "audit.html").write_text(audit_page(record, [TRIAL], is_redacted=False), "utf-8")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture(scope="module", params=_CASES, ids=lambda case: "-".join(map(str, case)))
def tab(request: pytest.FixtureRequest, browser: Chromium, pages: dict[str, Path]) -> Tab:
    name, width, scheme = request.param
    found = Tab(browser, width=width, scheme=scheme)
    found.open(pages[name])
    found.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    return found


def test_it_renders_without_a_complaint_and_asks_for_nothing_but_itself(tab: Tab) -> None:
    assert tab.complaints() == []
    (address,) = [each for each in tab.requested() if not each.startswith("data:")]
    assert address.startswith("file://")
    sizes = "[...document.querySelectorAll('h1,table,svg')].map(e => e.getBoundingClientRect())"
    areas = tab.run(f"{sizes}.map(box => box.width * box.height)")
    assert len(areas) >= 4
    assert min(areas) > 0
    assert tab.run("Object.keys(JSON.parse(document.getElementById('record').textContent)).length") > 5


def test_nothing_reaches_past_the_edge_but_what_scrolls_by_itself(tab: Tab) -> None:
    assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = """[...document.querySelectorAll('body *')].filter(each => !each.closest('.wide,pre,script') &&
        each.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(each => each.outerHTML)"""
    assert tab.run(outside) == []


def test_every_text_stands_out_from_its_ground(tab: Tab) -> None:
    faint = tab.run(_CONTRASTS + f"found.filter(one => one.contrast < {_LEAST_CONTRAST})" + "})()")
    assert faint == []


def test_texts_of_figures_stay_apart_and_inside(tab: Tab) -> None:
    assert tab.run(_OVERLAPS) == []


def test_a_click_or_the_enter_key_sorts_a_table_both_ways(tab: Tab) -> None:
    column = """(heads => {const found = [...heads].find(each => each.classList.contains('n'));
        const body = found.closest('table').tBodies[0];
        return {found, read: () => [...body.rows].map(row => row.cells[found.cellIndex].dataset.value)
        .filter(v => v !== '').map(Number)}})(document.querySelectorAll('th[data-sort]'))"""
    tab.run(f"var sorted = {column}; sorted.found.click()")
    rising = tab.run("sorted.read()")
    assert len(rising) > 1
    assert rising == sorted(rising)
    assert tab.run("sorted.found.getAttribute('aria-sort')") == "ascending"
    tab.run("sorted.found.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))")
    assert tab.run("sorted.read()") == sorted(rising, reverse=True)
    assert tab.run("sorted.found.getAttribute('aria-sort')") == "descending"


def test_numbers_sort_before_words_and_blanks_come_last(browser: Chromium, tmp_path: Path) -> None:
    from sipit.report.page import page

    mixed: list[list[Any]] = [["item 10"], [None], [3], ["item 9"], [-2.5], [1e-7]]
    (tmp_path / "page.html").write_text(page("t", table(["a"], mixed), {}), "utf-8")
    tab = Tab(browser, width=800, scheme="light")
    tab.open(tmp_path / "page.html")
    read = "[...document.querySelectorAll('td')].map(cell => cell.textContent)"
    tab.run("document.querySelector('th').click()")
    assert tab.run(read) == ["-2.5", "1e-07", "3", "item 9", "item 10", ""]
    tab.run("document.querySelector('th').click()")
    assert tab.run(read) == ["item 10", "item 9", "3", "1e-07", "-2.5", ""]


def test_nothing_is_cut_off_on_paper(browser: Chromium, pages: dict[str, Path]) -> None:
    for page in pages.values():
        tab = Tab(browser, width=718, scheme="light")  # A4 within Chromium's margins, in CSS pixels
        tab.call("Emulation.setEmulatedMedia", media="print")
        tab.open(page)
        assert tab.run("document.documentElement.scrollWidth") <= 718


def test_the_report_prints_itself(tmp_path: Path) -> None:
    assert main(["report", str(_RESULTS), "--out", str(tmp_path / "p.html"), "--pdf", str(tmp_path / "p.pdf")]) == 0
    printed = (tmp_path / "p.pdf").read_bytes()
    assert printed.startswith(b"%PDF-")
    assert printed.rstrip().endswith(b"%%EOF")


# The contrast of each element that holds text, its own colour against the grounds that lie under it, mixed as the
# browser mixes them.
_CONTRASTS = """(() => {
const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const mixed = colours => {pixel.clearRect(0, 0, 1, 1); for (const one of ['white', ...colours])
  {pixel.fillStyle = one; pixel.fillRect(0, 0, 1, 1)} return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3)};
const light = rgb => {const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 :
  ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b};
const found = [];
for (const one of document.querySelectorAll('body *')) {
  const text = [...one.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
  if (!text || one.closest('script') || !one.getClientRects().length) continue;
  const grounds = [];
  for (let under = one; under; under = under.parentElement) grounds.unshift(getComputedStyle(under).backgroundColor);
  const style = getComputedStyle(one), ink = one.closest('svg') ? style.fill : style.color;
  const [p, q] = [light(mixed([...grounds, ink])), light(mixed(grounds))].sort((a, b) => b - a);
  found.push({text: text.slice(0, 40), ink, contrast: (p + .05) / (q + .05)});
}
return """
_OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
const edge = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')].map(e => ({name: e.textContent,
  box: e.getBoundingClientRect()}));
return [...texts.filter(({box}) => box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1 ||
  box.bottom > edge.bottom + 1).map(({name}) => `${name} is cut off`), ...texts.flatMap((one, i) => texts.slice(i + 1)
  .filter(({box}) => box.left < one.box.right - 1 && one.box.left < box.right - 1 && box.top < one.box.bottom - 3 &&
  one.box.top < box.bottom - 3).map(({name}) => `${one.name} over ${name}`))]})"""
