from __future__ import annotations

from everlora.experiments.measuring import task_confusion
from everlora.experiments.tracked import moment_figures

LABELS = [("a", "b"), ("c",)]


def test_rows_are_counted_by_their_task_and_the_one_predicted() -> None:
    assert task_confusion([{"a": 3, "c": 2, "b": 1}, {"c": 4}], LABELS) == [[4, 2], [0, 4]]


def test_where_no_task_is_recognised_nothing_is_counted() -> None:
    assert task_confusion([{"a": 3}, None], LABELS) is None
    assert task_confusion([{"a": 3}, {"a": 1}], [("a", "b"), ("a", "b")]) is None


def test_figures_of_a_moment() -> None:
    values = {"correct": [[5, None], [4, 3]], "sizes": [10, 6]}
    assert moment_figures(values, ["x", "y"], 0) == {"accuracy/mean of tasks": 0.5, "accuracy/x": 0.5}
    assert moment_figures(values, ["x", "y"], 1) == {
        "accuracy/mean of tasks": 0.45,
        "accuracy/x": 0.4,
        "accuracy/y": 0.5,
    }
    measured = [{"variant": None, "tests": [{"nll": 6.0, "tokens": 2}, None]}]
    language = {"language": {"stages": [{"task": 1, "measured": measured}]}}
    assert moment_figures(language, ["x", "y"], 1) == {"nats a token/mean of tasks": 3.0, "nats a token/x": 3.0}
    assert moment_figures(language, ["x", "y"], 0) == {}
