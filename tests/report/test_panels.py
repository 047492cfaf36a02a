"""What methods recorded, on the page: panels over tasks, and accuracy between the weights of two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from everlora.report import render_report
from everlora.report.charts import Scale, Series, line_chart
from tests.report.test_page import Page

Results = Callable[..., dict[str, Any]]
MAGNITUDES = {"task 10": [None, None, 0.5], "task 0": [1.0, 0.9, -0.8125], "tasks 1 to 9": [None, 1.25, 0.75]}


@pytest.fixture
def one(make_results: Results) -> dict[str, Any]:
    """Results of two seeds of one method, which recorded nothing yet."""
    results = make_results(seeds=(1, 2))
    results["runs"] = [run | {"panels": {}} for run in results["runs"] if run["method"] == "falling"]
    return results


def test_figures_of_tasks_are_set_against_the_task_after_which_they_were_taken(one: dict[str, Any]) -> None:
    one["runs"][0]["panels"] = {"magnitude": MAGNITUDES}
    page = Page(render_report(one))
    assert page.tables["Magnitude of each task's direction: Falling"] == [
        ["of task", "1", "2 to 10", "11"],
        ["after 1", "1.00", "", ""],
        ["after 2", "0.90", "1.25", ""],
        ["after 3", "-0.81", "0.75", "0.50"],
    ]
    assert "task 1, after task 3: -0.81" in page.text
    assert "task 2 to 10, after task 2: 1.25" in page.text


def test_other_figures_are_averaged_over_runs_and_named_shortly(one: dict[str, Any]) -> None:
    names = ["encoder.layer.0.attention.query", "encoder.layer.1.attention.query"]
    for run, values in zip(one["runs"], ([0.25, 0.5], [0.75, 0.25]), strict=True):
        run["panels"] = {"some_share": {name: [None, value, 0.125] for name, value in zip(names, values, strict=True)}}
    page = Page(render_report(one))
    assert page.tables["Some share: Falling"] == [
        ["after task", "1", "2", "3"],
        ["0", "", "0.500", "0.125"],
        ["1", "", "0.375", "0.125"],
    ]
    assert "0, after task 2: 0.500" in page.text


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([3.0, 12.0], ["3", "12"]),
        ([0.0, 64.25], ["0.0", "64.2"]),
        ([1e-7, 2e-7], ["1.0e-07", "2.0e-07"]),
        ([0.0, 0.0], ["0", "0"]),
    ],
)
def test_numbers_have_digits_that_fit_their_size(one: dict[str, Any], values: list[float], shown: list[str]) -> None:
    one["runs"][0]["panels"] = {"x": {"layer": values}}
    page = Page(render_report(one))
    assert page.tables["X: Falling"][1][1:] == shown
    assert not any("nan" in (attributes.get("style") or "") for _, attributes in page.tags)


def test_too_many_curves_are_a_table_only(one: dict[str, Any]) -> None:
    charts = []
    for count in (14, 15):
        one["runs"][0]["panels"] = {"x": {f"layer {k}": [1.0, 2.0, float(k)] for k in range(count)}}
        page = Page(render_report(one))
        charts.append(sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in page.tags))
        assert len(page.tables["X: Falling"]) == count + 1
    assert charts == [6, 5]


def test_curves_that_all_agree_are_one(one: dict[str, Any]) -> None:
    one["runs"][0]["panels"] = {"total_rank": {f"layer.{k}.query": [4.0, 8.0, 12.0] for k in range(24)}}
    page = Page(render_report(one))
    assert page.tables["Total rank per layer: Falling"][1:] == [["each of 24", "4", "8", "12"]]
    assert "each of 24, after task 2: 8" in page.text


def test_small_negative_and_equal_values_stay_inside_the_chart() -> None:
    scale = Scale(unit=1.0, spec=".4f", bounds=(-float("inf"), float("inf")), least=1e-4, words="")
    for values in ([-3e-4, 2e-4], [7e-4, 7e-4]):
        chart = line_chart("t", "", [Series("a", values, [None, None])], scale=scale)
        assert chart is not None
        assert all(chart.top <= y <= chart.bottom for line in chart.lines for _, y, _ in line.points)
        assert all(tick.text != "-0" and "e-1" not in tick.text for tick in chart.y_ticks)
        assert chart.left > 50, "room for the longest number"


def path(*, jump: bool = True, aware: bool = True) -> dict[str, Any]:
    """From the first to the second task; the first has 40 test rows, the second 50."""
    counts: list[tuple[Any, list[int]]] = [("before", [36]), (-0.5, [20, 5]), (0.0, [30, 10]), (0.5, [28, 25])]
    counts += [(1.0, [24, 45]), (1.5, [10, 40])] + ([("start", [12, 10])] if jump else [])
    places = [{"at": at, "correct": numbers, "task_aware": [n + 2 for n in numbers]} for at, numbers in counts]
    if not aware:
        for place in places:
            del place["task_aware"]
    return {"first": 0, "second": 1, "points": 5, "places": places}


def test_numbers_of_a_path_are_the_stored_ones(one: dict[str, Any]) -> None:
    one["runs"] = one["runs"][:1]
    one["runs"][0]["paths"] = [path()]
    page = Page(render_report(one))
    table = page.tables["From task 1 to task 2: Falling"]
    assert table[0] == ["at", "0, old classes only", "0, where training began", "-0.5", "0", "0.5", "1", "1.5"]
    assert table[1] == ["task 1", "90.0", "30.0", "50.0", "75.0", "70.0", "60.0", "25.0"]
    assert table[2] == ["task 2", "", "20.0", "10.0", "20.0", "50.0", "90.0", "80.0"]
    assert table[3][:2] == ["task 1, own classes only", "95.0"]
    assert "task 1, at 0.5: 70.00" in page.text
    assert "task 2, own classes only, at 1: 94.00" in page.text
    assert "task 1, at 0 where training began: 30.00" in page.text
    stems = [attributes for tag, attributes in page.tags if attributes.get("class") == "stem"]
    assert len(stems) == 4
    heights = [float(stem["y1"] or "nan") - float(stem["y2"] or "nan") for stem in stems]
    assert heights[0] < 0 and heights[1] == 0, "down from 75 to 30 for the old task, and nothing for the new one"
    assert len(page.ids) == len(set(page.ids))


def test_a_path_without_a_jump_or_task_identity(one: dict[str, Any]) -> None:
    for run in one["runs"]:
        run["paths"] = [path(jump=False, aware=False)]
    page = Page(render_report(one))
    assert len(page.tables["From task 1 to task 2: Falling"]) == 3
    assert not [tag for tag, attributes in page.tags if attributes.get("class") == "stem"]
    assert "upright line" not in page.text and "open marker" in page.text
    assert "task 1, at 0.5: 70.00 ± 0.00" in page.text


def test_runs_that_measured_elsewhere_get_their_own_chart_and_gaps_their_reason(one: dict[str, Any]) -> None:
    other = path()
    other["places"] = [place for place in other["places"] if place["at"] != 0.5]
    gone = {"first": 1, "second": 2, "points": 5, "reason": "the <first> model is gone."}
    one["runs"][0]["paths"], one["runs"][1]["paths"] = [path(), gone], [other]
    page = Page(render_report(one))
    assert sum(attributes.get("class") == "stem" for _, attributes in page.tags) == 8
    assert "Seed 1, from task 2 to task 3: the <first> model is gone." in page.text


def test_a_page_without_paths_says_nothing_of_them(one: dict[str, Any]) -> None:
    assert "neighbouring tasks" not in Page(render_report(one)).text
