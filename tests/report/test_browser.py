"""The page in a real browser: it loads nothing and complains of nothing, its numbers are those of the results, it can
be used by keyboard, and printed."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everlora.report import format_table, render_report, summarise, tables
from tests.report.browser import NAMES, Browser, open_browser
from tests.report.conftest import sample_results
from tests.report.language_results import language_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"none of {', '.join(NAMES)} is installed"),
]

TABLES = """[...document.querySelectorAll('table')].map(t => [t.caption.textContent,
[...t.rows].map(r => [...r.cells].map(c => c.textContent))])"""
FOCUS = """(() => { const e = document.activeElement, b = e.getBoundingClientRect(), s = getComputedStyle(e);
return {tag: e.tagName, name: e.getAttribute('aria-label') || e.textContent.trim().slice(0, 60),
seen: b.right > 0 && b.width > 0 && b.height > 0, outline: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0}
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def classes() -> dict[str, Any]:
    results = sample_results(num_tasks=4)
    for run in results["runs"]:
        run["task_confusion"] = [[10, 20, 5, 5], [0, 50, 0, 0], [1, 2, 50, 7], [0, 0, 0, 70]]
        run["resolved"] = {"method": {"rank": 4}, "training": {"lr": 0.001, "seed": run["seed"]}}
    return results


RESULTS = {"classes": classes(), "language": copy.deepcopy(language_results())}


@pytest.fixture(params=RESULTS)
def results(request: pytest.FixtureRequest) -> Any:
    return RESULTS[request.param]


@pytest.fixture
def page(results: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render_report(json.loads(json.dumps(results))), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_loads_alone_and_fits(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    ground, ink = (
        [int(part) for part in re.findall(r"\d+", browser.value(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    assert (sum(ground) < sum(ink)) == dark and abs(sum(ground) - sum(ink)) > 450


def test_the_numbers_on_the_page_are_those_of_the_results(
    browser: Browser, page: Path, results: dict[str, Any]
) -> None:
    browser.open(page)
    shown = dict(browser.value(TABLES))
    for caption, table in tables(results):
        assert shown[caption] == [table.columns, *table.rows]
    if results["stream"].get("scenario") != "language":
        rows = summarise(results)
        caption = "Mean ± sample deviation over runs; every test sample weighs the same"
        assert shown[caption][1:] == format_table(rows, mean="samples").rows
        assert shown["Falling: task predicted"][1][1:] == ["25.0", "50.0", "12.5", "12.5"]


def test_the_keyboard_reaches_all_that_can_be_used_and_leaves_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    wanted = browser.value("document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    hidden = browser.value("document.querySelectorAll('details:not([open]) :is(a, summary, [tabindex=\"0\"])').length")
    closed = browser.value("document.querySelectorAll('details:not([open]) > summary').length")
    reached = []
    for _ in range(wanted + 5):
        browser.press("Tab", 9)
        focus = browser.value(FOCUS)
        if focus["tag"] == "BODY":
            break
        reached.append(focus)
    assert focus["tag"] == "BODY", "the end of the page lets go of the focus"
    assert len(reached) == wanted - hidden + closed
    assert reached[0]["name"] == "Skip to the content"
    assert all(one["seen"] and one["outline"] and one["name"] for one in reached), reached


def test_enter_jumps_to_the_content_and_opens_details(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    assert browser.value("location.hash") == "#content"
    browser.value("document.querySelector('details:not([open]) > summary').focus()")
    before = browser.value("document.querySelectorAll('details[open]').length")
    browser.press("Enter", 13, "\r")
    assert browser.value("document.querySelectorAll('details[open]').length") == before + 1


def test_what_tables_and_charts_are_called(browser: Browser, page: Path) -> None:
    browser.open(page)
    unnamed = """[...document.querySelectorAll('svg[role=img]')].filter(s => !s.getAttribute('aria-labelledby')
.split(' ').every(i => document.getElementById(i).textContent.trim())).length"""
    assert browser.value(unnamed) == 0
    assert browser.value("[...document.querySelectorAll('table')].filter(t => !t.caption).length") == 0
    assert browser.value("document.querySelectorAll('th:not([scope])').length") == 0


def test_print_is_light_and_shows_what_is_folded(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, dark=True, media="print")
    colour = browser.value("getComputedStyle(document.documentElement).getPropertyValue('--ground')")
    assert colour.strip() == "#fff"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    inside = "document.querySelector('details:not([open]) table').getBoundingClientRect().height"
    assert browser.value(inside) > 0
    browser.open(page)
    printed = tmp_path / "report.pdf"
    printed.write_bytes(browser.pdf())
    assert printed.read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", "-layout", printed, "-"], capture_output=True, text=True, check=True).stdout
        assert "Every run" in text and "Skip to the content" not in text
