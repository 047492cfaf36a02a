"""The page and the tables of a sweep: every setting with its value, the best one marked, nothing loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from everlora.report.sweep import best_lines, markdown_table, sweep_rows, write_sweep_report
from tests.report.browser import NAMES, open_browser


def results(**changes: Any) -> dict[str, Any]:
    values = {(0.001, "a"): 0.5, (0.001, "<b>"): 0.75, (0.1, "a"): None, (0.1, "<b>"): 0.25}
    trials = [
        {
            "name": f"row-{number}",
            "row": "row",
            "label": "Row",
            "options": {"lr": lr, "kind": kind},
            "values": {} if value is None else {"1": value, "2": value},
            "mean": value,
            "deviation": None if value is None else 0.0125,
            "seconds": 1.25,
            "error": "the loss is not finite" if value is None else None,
        }
        for number, ((lr, kind), value) in enumerate(values.items())
    ]
    best = {
        "trial": "row-1",
        "label": "Row",
        "options": {"lr": 0.001, "kind": "<b>"},
        "mean": 0.75,
        "deviation": 0.0125,
    }
    best |= {"set": "--set lr=0.001 --set 'kind=<b>'", "ties": [], "edges": ["lr=0.001 is the smallest"]}
    whole = {"recipe": {"name": "r", "title": "A recipe", "text": "name: r"}, "setting": "standard", "first_task": True}
    whole |= {"rows_judged_by": "the first task", "fraction": 0.2, "metric": "last", "is_lower_better": False}
    whole |= {"space": {"lr": [0.001, 0.1], "kind": ["a", "<b>"]}, "random": None, "seeds": [1, 2], "options": {}}
    whole |= {"data": "given: data", "model": "m", "created": "now", "versions": {"everlora": "0"}, "trials": trials}
    return {**whole, "best": {"row": best}, **changes}


def test_rows_stand_best_first_and_what_failed_last() -> None:
    rows = sweep_rows(results())
    assert [row[0] for row in rows] == ["Row (best)", "Row", "Row", "Row"]
    assert [row[3] for row in rows][:3] == ["75.00 ± 1.25", "50.00 ± 1.25", "25.00 ± 1.25"] and rows[3][4] == "0"
    lower = sweep_rows(results(is_lower_better=True, metric="nats a token"))
    assert [row[3] for row in lower][:2] == ["0.2500 ± 0.0125", "0.5000 ± 0.0125"]
    assert best_lines(results())[-1] == "Row, lr=0.1, kind=a: no value, because the loss is not finite"


def test_markdown_has_a_line_for_each_setting() -> None:
    lines = markdown_table(results()).splitlines()
    assert lines[0] == "| Row | lr | kind | accuracy % | Seeds | Seconds |"
    assert lines[2] == "| Row (best) | 0.001 | <b> | 75.00 ± 1.25 | 2 | 1.2 |" and len(lines) == 10


def test_the_page_marks_the_best_and_escapes_values(tmp_path: Path) -> None:
    write_sweep_report(results(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page.replace("&lt;b&gt;", "") and "default-src 'none'" in page
    assert page.count("<figure>") == 2 and page.count("best of all, lr=0.001: 75.00") == 1
    assert "lr=0.1, kind=&lt;b&gt;: 25.00 ± 1.25" in page, "a setting that is not the best is an open marker"
    write_sweep_report(results(random=4), tmp_path / "drawn.html")
    assert "settings tried" in (tmp_path / "drawn.html").read_text(), "no line joins settings that were drawn"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"none of {', '.join(NAMES)} is installed")
def test_a_browser_loads_nothing_and_has_no_complaint(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_sweep_report(results(), page)
    with open_browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            browser.open(page, width=width)
            assert browser.requests() == [page.as_uri()] and browser.complaints() == []
            assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        shown = browser.value(
            "[...document.querySelectorAll('table')][0].rows[1].innerText.split('\\t').map(s => s.trim())"
        )
    assert shown == sweep_rows(results())[0]
