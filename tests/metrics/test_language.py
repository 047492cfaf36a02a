"""`ScoreMatrix`: a worked example of three tasks, one task, and missing cells."""

from __future__ import annotations

import numpy as np
import pytest

from everlora.errors import NumericError, ShapeError
from everlora.metrics.language import ScoreMatrix

NAN = float("nan")
# cross-entropies after each of three tasks, and of the base model
LOSSES = [[3.0, 4.5, 5.5], [3.4, 2.5, 5.0], [3.8, 2.9, 2.0]]
BASE = [5.0, 4.8, 5.6]
BACKWARD = ["bwt", "bwt_trace", "fwt", "forgetting"]


def test_worked_example() -> None:
    matrix = ScoreMatrix.from_cross_entropy(
        LOSSES,
        BASE,
        abilities={"general": {"stories": (-1.3, -1.9), "facts": (0.40, 0.38)}, "safety": {"harm": (0.5, 0.75)}},
    )
    assert matrix.summary() == pytest.approx(
        {
            "last": -(3.8 + 2.9 + 2.0) / 3,
            "avg": -(3.0 + (3.4 + 2.5) / 2 + (3.8 + 2.9 + 2.0) / 3) / 3,
            "bwt": -((3.8 - 3.0) + (2.9 - 2.5)) / 2,  # -0.6
            "bwt_trace": -((3.8 - 3.0) + (2.9 - 2.5)) / 3,  # -0.4
            "fwt": ((4.8 - 4.5) + (5.6 - 5.0)) / 2,  # 0.45
            "forgetting": ((3.8 - 3.0) + (2.9 - 2.5)) / 2,  # 0.6
            "learning": -(3.0 + 2.5 + 2.0) / 3,
            "delta_general": (-0.6 - 0.02) / 2,
            "delta_safety": 0.25,
        }
    )
    assert matrix.reasons() == {}


def test_forgetting_is_from_the_best_and_may_differ_from_backward_transfer() -> None:
    summary = ScoreMatrix([[1.0, 0.0, 0.0], [4.0, 2.0, 0.0], [3.0, 5.0, 6.0]]).summary()
    assert summary["bwt"] == pytest.approx(((3 - 1) + (5 - 2)) / 2)
    assert summary["forgetting"] == pytest.approx(((4 - 3) + (2 - 5)) / 2)  # gains count, with their sign


def test_one_task_has_no_transfer() -> None:
    matrix = ScoreMatrix([[0.5]], [0.1])
    summary = matrix.summary()
    assert [summary[name] for name in BACKWARD] == [None] * 4
    assert matrix.reasons() == dict.fromkeys(BACKWARD, "needs at least two tasks")
    assert (summary["last"], summary["avg"], summary["learning"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("cell", "lost"),
    [
        ((2, 0), {"last", "avg", "bwt", "bwt_trace", "forgetting"}),
        ((1, 0), {"avg", "forgetting"}),
        ((1, 1), {"avg", "bwt", "bwt_trace", "forgetting", "learning"}),
        ((2, 2), {"last", "avg", "learning"}),
        ((1, 2), {"fwt"}),
        ((0, 2), set()),
    ],
)
def test_a_missing_cell_takes_away_what_needs_it(cell: tuple[int, int], lost: set[str]) -> None:
    losses = np.array(LOSSES)
    losses[cell] = NAN
    matrix = ScoreMatrix.from_cross_entropy(losses, BASE)
    assert {name for name, value in matrix.summary().items() if value is None} == lost
    assert set(matrix.reasons()) == lost
    assert all("not measured" in reason for reason in matrix.reasons().values())


def test_a_run_without_base_or_with_missing_sets() -> None:
    matrix = ScoreMatrix(LOSSES, abilities={"general": {"a": (0.1, None), "b": (0.2, 0.3)}, "empty": {}})
    assert matrix.summary()["fwt"] is None and matrix.summary()["delta_general"] is None
    reasons = matrix.reasons()
    assert set(reasons) == {"fwt", "delta_general", "delta_empty"}
    assert "base model" in reasons["fwt"]
    assert reasons["delta_general"] == "1 of 2 numbers it needs were not measured"
    partial = ScoreMatrix(LOSSES, [None, None, 1.0])
    assert "not measured" in partial.reasons()["fwt"]


def test_scores_of_zero_are_scores() -> None:
    assert ScoreMatrix(np.zeros((2, 2)), [0.0, 0.0]).summary()["fwt"] == 0.0


def test_what_is_given_stays_as_it_is() -> None:
    given = np.array(LOSSES)
    matrix = ScoreMatrix.from_cross_entropy(given, BASE)
    given[0, 0] = 99.0
    assert matrix.values[0, 0] == -3.0
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1.0
    assert repr(matrix) == "ScoreMatrix(num_tasks=3, last=-2.9000)"


def test_refused_input() -> None:
    with pytest.raises(ShapeError, match="values must have shape"):
        ScoreMatrix([[1.0, 2.0]])
    with pytest.raises(ShapeError, match="baseline must have shape"):
        ScoreMatrix([[1.0]], [1.0, 2.0])
    with pytest.raises(ShapeError, match="rectangular"):
        ScoreMatrix([[1.0], [1.0, 2.0]])
    with pytest.raises(NumericError, match="infinite"):
        ScoreMatrix([[float("inf")]])
    with pytest.raises(ShapeError, match="ability 'general'"):
        ScoreMatrix([[1.0]], abilities={"general": {"a": (1.0, 2.0, 3.0)}})  # type: ignore[dict-item]
