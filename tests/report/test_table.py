"""Rows of the comparison table against the matrices they come from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from everlora.errors import DataError, OptionError
from everlora.metrics import AccuracyMatrix
from everlora.report import format_table, summarise


def test_means_and_deviations_are_those_of_the_runs(results: dict[str, Any]) -> None:
    rows = summarise(results)
    assert [row["label"] for row in rows] == ["Falling", "Steady", "Together"]
    falling = rows[0]
    runs = [run for run in results["runs"] if run["method"] == "falling"]
    for name in ("last", "avg", "last_samples", "forgetting", "bwt", "task_aware_last", "task_recognition"):
        values = [
            AccuracyMatrix.from_counts(r["correct"], r["sizes"], r["task_aware"], r["task_correct"]).summary()[name]
            for r in runs
        ]
        assert falling["metrics"][name]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert falling["metrics"][name]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert falling["metrics"][name]["n"] == 3
    assert falling["seeds"] == [1, 2, 3]
    assert json.loads(json.dumps(rows)) == rows


def test_cost_is_summed_over_tasks_and_averaged_over_runs(results: dict[str, Any]) -> None:
    cost = summarise(results)[0]["cost"]
    assert cost["seconds"] == {"mean": 9.0, "sd": 0.0, "n": 3}
    assert cost["seconds_per_task"]["mean"] == 3.0
    assert cost["steps"]["mean"] == 30.0
    assert cost["trainable_parameters"]["mean"] == 1236.0
    assert cost["peak_memory_bytes"]["mean"] == 1002.0


def test_undefined_numbers_stay_undefined(results: dict[str, Any]) -> None:
    together = summarise(results)[2]
    assert together["metrics"]["last"]["n"] == 3
    assert together["metrics"]["avg"] == {"mean": None, "sd": None, "n": 0}
    assert format_table([together]).rows[0][2:4] == ["–", "–"]  # noqa: RUF001


def test_a_number_only_some_runs_have_says_how_many(results: dict[str, Any]) -> None:
    results["runs"][0]["correct"][0][0] = None
    rows = summarise(results)
    assert rows[0]["metrics"]["avg"]["n"] == 2
    assert format_table(rows).rows[0][2].endswith("(n=2)")
    assert "n=" not in format_table(rows).rows[0][1]


def test_one_run_has_no_deviation(make_results: Callable[..., dict[str, Any]]) -> None:
    table = format_table(summarise(make_results(seeds=(1,))))
    assert all("±" not in cell for row in table.rows for cell in row)
    assert table.rows[0][-1] == "1"


def test_the_two_means_are_never_in_one_table(results: dict[str, Any]) -> None:
    rows = summarise(results)
    by_task, by_sample = format_table(rows), format_table(rows, mean="samples")
    assert not any("sample" in column for column in by_task.columns)
    assert not any("task mean" in column for column in by_sample.columns)
    statistic = rows[0]["metrics"]["last_samples"]
    assert by_sample.rows[0][1] == f"{100 * statistic['mean']:.2f} ± {100 * statistic['sd']:.2f}"
    assert by_sample.rows[0][1] != by_task.rows[0][1]
    assert all(len(row) == len(by_task.columns) for row in by_task.rows)


def test_runs_without_cost_or_task_aware_counts(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        run |= {"cost": [], "task_aware": None, "task_correct": None, "sizes": None}
    rows = summarise(results)
    assert rows[0]["metrics"]["task_aware_last"]["mean"] is None
    assert format_table(rows).rows[0][4:7] == ["–", "–", "–"]  # noqa: RUF001


def test_unknown_mean_is_refused(results: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="median"):
        format_table(summarise(results), mean="median")  # type: ignore[arg-type]


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda results: results.pop(name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.update(format=2), "format 1, found 2"),
        (_without("stream"), "'stream'"),
        (_without("runs"), "'runs'"),
        (lambda r: r["runs"][0].pop("method"), "'method'"),
        (lambda r: r["runs"][1].pop("correct"), "'steady' with seed 1 must have the field 'correct'"),
        (lambda r: r["runs"][0]["correct"][0].__setitem__(0, 99), "'falling' with seed 1: .*more than"),
        (lambda r: r["runs"].append(copy.deepcopy(r["runs"][0])), "two runs with seed 1"),
        (lambda r: r["stream"].update(num_tasks=4), "3 tasks but its stream has 4"),
    ],
)
def test_unusable_results_are_refused(
    results: dict[str, Any], spoil: Callable[[dict[str, Any]], object], words: str
) -> None:
    spoil(results)
    with pytest.raises(DataError, match=words):
        summarise(results)
