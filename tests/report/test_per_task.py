"""Figures of single tasks on the page: forgetting, confusion, cost; and how the run was set up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from everlora.metrics import AccuracyMatrix
from everlora.report import render_report, summarise
from everlora.report.costs import cost_figures
from everlora.report.setup_tables import resolved_options
from tests.report.language_results import language_results
from tests.report.test_page import Page

FALL = "Points below the task's best accuracy, after the last task"


def test_forgetting_of_each_task_is_its_fall_and_their_mean_the_methods(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    rows = {row[0]: row[1:] for row in page.tables[FALL][1:]}
    runs = [run for run in results["runs"] if run["method"] == "falling"]
    values = [AccuracyMatrix.from_counts(run["correct"], run["sizes"]).values for run in runs]
    first = [max(one[0, 0], one[1, 0]) - one[2, 0] for one in values]
    assert rows["Falling"][0] == f"{100 * sum(first) / 3:.1f}"
    assert page.tables[FALL][0] == ["task", "1", "2"] and "Together" not in rows
    forgetting = summarise(results)[0]["metrics"]["forgetting"]["mean"]
    assert forgetting is not None
    assert sum(map(float, rows["Falling"])) / 2 == pytest.approx(100 * forgetting, abs=0.1)


def test_confusion_is_in_shares_of_the_true_task(results: dict[str, Any]) -> None:
    falling = [run for run in results["runs"] if run["method"] == "falling"]
    for run, moved in zip(falling, (0, 10, 20), strict=True):
        run["task_confusion"] = [[40 - moved, moved, 0], [0, 50, 0], [30, 15, 15]]
    page = Page(render_report(results))
    assert page.tables["Falling: task predicted"] == [
        ["rows", "1", "2", "3"],
        ["of 1", "75.0", "25.0", "0.0"],
        ["of 2", "0.0", "100.0", "0.0"],
        ["of 3", "50.0", "25.0", "25.0"],
    ]
    own = sum(100 * (40 - moved + 50 + 15) / 150 for moved in (0, 10, 20)) / 3
    assert f"{own:.2f} % of all rows" in page.text
    assert "Steady: task predicted" not in page.tables


def test_costs_stand_at_their_tasks(make_results: Callable[..., dict[str, Any]]) -> None:
    results = make_results(seeds=(1, 2))
    results["runs"][0]["cost"][1]["seconds"] = 7.0  # the other run took 3
    for run in results["runs"]:
        run["reference_parameters"] = 8000
    together = [run for run in results["runs"] if run["method"] == "together"]
    for run in together:
        run["cost"] = run["cost"][-1:]
    page = Page(render_report(results))
    seconds = {row[0]: row[1:] for row in page.tables["Seconds for each task, in seconds"][1:]}
    assert seconds["Falling"] == ["2.0 ± 0.0", "5.0 ± 2.8", "4.0 ± 0.0"]
    assert seconds["Together"] == ["–", "–", "4.0 ± 0.0"]  # noqa: RUF001
    grown = page.tables["Parameters added to the pretrained network, in percent"]
    assert grown[1] == ["Falling", *["12.50 ± 0.00"] * 3]
    assert page.tables["Parameters trained for each task"][1][3].startswith("1,236")
    assert "Falling, task 2: 5.0 ± 2.8" in page.text


def test_a_run_without_costs_has_no_such_section() -> None:
    assert cost_figures({"a": [{"cost": []}]}, 2) is None


def test_a_row_has_the_same_colour_in_all_charts_of_a_language_run() -> None:
    styles = {}
    figures = cost_figures({"Forgetful": language_results()["runs"][1:2]}, 3, styles={"Forgetful": 2})
    assert figures is not None
    styles = {line.style for chart in figures.charts for line in chart.lines}
    assert styles == {2}


def test_options_as_resolved_are_told_apart_by_row(results: dict[str, Any]) -> None:
    ranks = {"falling": 4, "steady": 8, "together": 4}
    for run in results["runs"]:
        run["resolved"] = {
            "method": {"rank": ranks[run["method"]]},
            "training": {"lr": 0.001, "seed": run["seed"], "schedule": None},
        }
    results["commits"] = {"everlora": "abc123, with changes"}
    page = Page(render_report(results))
    assert page.tables["Of the first run of each row"] == [
        ["Option", "Falling", "Steady", "Together"],
        ["method.rank", "4", "8", "4"],
    ]
    assert page.tables["Options that all rows share"][1:] == [["training.lr", "0.001"], ["training.schedule", "null"]]
    assert ["commit of everlora", "abc123, with changes"] in page.tables["Versions"]


def test_options_of_rows_with_one_label_and_of_older_results() -> None:
    runs = [{"method": name, "label": "Same", "options": {"lr": rate}} for name, rate in (("a", 1.0), ("b", 2.0))]
    same, differing = resolved_options(runs)
    assert same is None and differing is not None
    assert differing.columns == ["Option", "Same (a)", "Same (b)"] and differing.rows == [["lr", "1.0", "2.0"]]
    assert resolved_options([]) == (None, None)


def test_every_section_can_be_jumped_to(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links[0] == "#content" and len(links) > 4
    assert {str(link)[1:] for link in links} <= set(page.ids)
