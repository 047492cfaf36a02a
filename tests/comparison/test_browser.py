"""The page in a real browser: it loads nothing, complains of nothing, and nothing but its tables scrolls sideways."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from everlora.comparison import compare
from tests.comparison.results import folder
from tests.report.browser import NAMES, open_browser
from tests.report.language_results import language_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"none of {', '.join(NAMES)} is installed"),
]


def test_the_page_loads_alone_and_fits_a_phone(tmp_path: Path) -> None:
    paths = [folder(tmp_path / "a"), folder(tmp_path / "c", language_results())]
    found = compare(paths)
    page = found.write(tmp_path / "page.html")
    expected = [shown.table.rows for _, tables, _ in found.sections() for shown in tables]
    with open_browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.open(page, width=width, dark=dark)
                assert browser.requests() == [page.resolve().as_uri()] and browser.complaints() == []
                assert browser.value("document.documentElement.scrollWidth") <= width
        shown = browser.value(
            "[...document.querySelectorAll('section > .scroll tbody')].map(t => [...t.rows].map(r => "
            "[...r.cells].map(c => c.textContent)))"
        )
        assert [rows for rows in shown if rows in expected] == expected
