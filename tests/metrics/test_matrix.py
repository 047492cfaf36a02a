"""The accuracy matrix: the worked example, the invariants, missing cells and refused input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.errors import DataError, NumericError, OptionError, ShapeError
from everlora.metrics import AccuracyMatrix

NAN = float("nan")
SIZES = [100, 100, 200, 50]
COUNTS = [[90, 20, 50, 5], [70, 80, 60, 8], [75, 84, 170, 10], [50, 86, 130, 48]]
BASELINE = [0.12, 0.10, 0.20, 0.08]
INDIVIDUAL = [0.92, 0.88, 0.86, 0.96]
TOLERANCE = 1e-9


def example(**options: object) -> AccuracyMatrix:
    return AccuracyMatrix.from_counts(COUNTS, SIZES, baseline=BASELINE, individual=INDIVIDUAL, **options)  # type: ignore[arg-type]


GOLDEN = {
    "last": 0.7425,
    "last_samples": 314 / 450,
    "avg": (90 + 75 + 244 / 3 + 74.25) / 400,
    "avg_samples": (0.9 + 0.75 + 329 / 400 + 314 / 450) / 4,
    "avg_without_first": (75 + 244 / 3 + 74.25) / 300,
    "aulc": (82.5 + (75 + 244 / 3) / 2 + (244 / 3 + 74.25) / 2) / 300,
    "learning_acc": 0.8775,
    "intransigence": 0.0275,
    "forgetting": 0.58 / 3,
    "forgetting_clipped": 0.20,
    "forgetting_from_diag": 0.18,
    "bwt": -0.18,
    "bwt_avg": -0.85 / 6,
    "bwt_avg_positive": 0.0,
    "remembering": 1 - 0.85 / 6,
    "bwt_trace": -0.135,
    "fwt": 0.32 / 3,
    "fwt_avg": 1.21 / 6,
    "retention": (50 / 90 + 86 / 80 + 65 / 85) / 3,
    "retention_skipped": 0.0,
    "worst_task": 0.50,
}
# The same numbers as the worked example prints them, so that a slip in the fractions above would show.
PRINTED = {
    "last_samples": 69.7778,
    "avg": 80.1458,
    "avg_samples": 79.2569,
    "avg_without_first": 76.8611,
    "aulc": 79.4861,
    "forgetting": 19.3333,
    "bwt_avg": -14.1667,
    "remembering": 85.8333,
    "fwt": 10.6667,
    "fwt_avg": 20.1667,
    "retention": 79.8420,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_summary_of_the_worked_example(name: str) -> None:
    value = example().summary()[name]
    assert value == pytest.approx(GOLDEN[name], abs=TOLERANCE)
    if name in PRINTED:
        assert round(100 * value, 4) == PRINTED[name]


def test_curves_of_the_worked_example() -> None:
    curves = example().curves()
    assert curves["acc_step"] == pytest.approx([0.90, 0.75, 2.44 / 3, 0.7425], abs=TOLERANCE)
    assert curves["acc_step_samples"] == pytest.approx([0.90, 0.75, 0.8225, 314 / 450], abs=TOLERANCE)
    expected = {
        "forgetting": [0.20, 0.055, 0.58 / 3],
        "forgetting_from_diag": [0.20, 0.055, 0.18],
        "bwt": [-0.20, -0.055, -0.18],
    }
    for name, numbers in expected.items():
        assert curves[name][0] is None
        assert curves[name][1:] == pytest.approx(numbers, abs=TOLERANCE)


def test_two_task_collapse() -> None:
    summary = AccuracyMatrix([[0.95, NAN], [0.45, 0.90]]).summary()
    assert summary["forgetting"] == pytest.approx(0.50, abs=TOLERANCE)
    assert summary["bwt"] == pytest.approx(-0.50, abs=TOLERANCE)
    assert summary["bwt_trace"] == pytest.approx(-0.25, abs=TOLERANCE)


def test_counts_and_fractions_give_the_same_numbers() -> None:
    values = np.array(COUNTS) / np.array(SIZES)
    from_values = AccuracyMatrix(values, SIZES, BASELINE).summary()
    from_counts = example().summary()
    for name in from_values.keys() - {"intransigence"}:
        assert from_values[name] == pytest.approx(from_counts[name], abs=1e-12)


def test_joint_gap_and_task_aware_numbers() -> None:
    aware = np.minimum(np.array(COUNTS) + 5, SIZES)
    recognised = np.minimum(np.array(COUNTS) + 2, SIZES)
    matrix = example(task_aware=aware, task_correct=recognised, joint=[0.95, 0.9, 0.9, 0.95])
    summary = matrix.summary()
    assert summary["joint_gap"] == pytest.approx(0.925 - 0.7425, abs=TOLERANCE)
    assert summary["task_aware_last"] == pytest.approx((0.55 + 0.91 + 0.675 + 1.0) / 4, abs=TOLERANCE)
    assert summary["task_aware_last_samples"] == pytest.approx((55 + 91 + 135 + 50) / 450, abs=TOLERANCE)
    assert summary["task_recognition"] == pytest.approx((52 + 88 + 132 + 50) / 450, abs=TOLERANCE)
    assert matrix.curves()["task_aware_step"][0] == pytest.approx(0.95, abs=TOLERANCE)


def test_one_task_has_no_transfer_numbers() -> None:
    matrix = AccuracyMatrix.from_counts([[7]], [10], baseline=[0.1])
    summary, reasons = matrix.summary(), matrix.reasons()
    assert summary["last"] == summary["avg"] == summary["worst_task"] == pytest.approx(0.7)
    undefined = {name for name, value in summary.items() if value is None}
    assert undefined >= {
        "forgetting",
        "forgetting_clipped",
        "bwt",
        "bwt_avg",
        "bwt_trace",
        "fwt",
        "fwt_avg",
        "retention",
    }
    assert undefined >= {"aulc", "avg_without_first"}
    assert set(reasons) == undefined
    assert all(reasons.values())


def test_joint_run_fills_only_the_last_row() -> None:
    counts = [[None, None, None], [None, None, None], [8, 6, 9]]
    matrix = AccuracyMatrix.from_counts(counts, [10, 10, 10])
    summary = matrix.summary()
    assert summary["last"] == pytest.approx(23 / 30)
    assert summary["last_samples"] == pytest.approx(23 / 30)
    assert summary["worst_task"] == pytest.approx(0.6)
    for name in ("avg", "avg_samples", "learning_acc", "forgetting", "forgetting_clipped", "bwt", "aulc", "fwt"):
        assert summary[name] is None
        assert matrix.reasons()[name]
    assert matrix.curves()["acc_step"] == [None, None, pytest.approx(23 / 30)]


@pytest.mark.parametrize("hole", [NAN, None, -1])
def test_ways_to_write_a_count_that_was_not_measured(hole: float | None) -> None:
    matrix = AccuracyMatrix.from_counts([[9, hole], [5, 8]], [10, 10])
    assert np.isnan(matrix.values[0, 1])
    assert matrix.summary()["forgetting"] == pytest.approx(0.4)


def test_masked_counts_are_not_measured() -> None:
    counts = np.ma.MaskedArray([[9, 3], [5, 8]], mask=[[False, True], [False, False]])
    assert np.isnan(AccuracyMatrix.from_counts(counts, [10, 10]).values[0, 1])


def test_missing_cell_is_none_and_skip_reports_the_count() -> None:
    counts = np.array(COUNTS, dtype=float)
    counts[3, 1] = NAN
    matrix = AccuracyMatrix.from_counts(counts, SIZES)
    assert matrix.summary()["last"] is None
    assert matrix.summary()["forgetting"] is None
    assert "1 of 4" in matrix.reasons()["last"]
    skipping = matrix.summary(missing="skip")
    assert skipping["last"] == pytest.approx((0.5 + 0.65 + 0.96) / 3)
    assert skipping["last_count"] == 3
    assert skipping["last_samples"] == pytest.approx((50 + 130 + 48) / 350)
    assert skipping["forgetting"] == pytest.approx(0.30)
    assert skipping["forgetting_count"] == 2


def test_nothing_measured_is_none_even_when_skipping() -> None:
    matrix = AccuracyMatrix.from_counts([[-1, -1], [-1, -1]], [10, 10])
    assert matrix.summary(missing="skip")["last"] is None
    assert "none" in matrix.reasons(missing="skip")["last"]


def test_task_measured_only_at_the_end_is_left_out_of_forgetting_and_named() -> None:
    values = [[0.9, NAN, NAN], [0.8, NAN, NAN], [0.6, 0.7, 0.8]]
    matrix = AccuracyMatrix(values)
    assert matrix.summary()["forgetting"] == pytest.approx(0.3)
    assert matrix.notes()["forgetting"].endswith("task 2")
    assert matrix.summary()["bwt"] is None


def test_forward_transfer_needs_columns_for_future_classes() -> None:
    zeros_ahead = AccuracyMatrix([[0.9, 0.0], [0.5, 0.8]], baseline=[0.0, 0.0])
    assert zeros_ahead.summary()["fwt"] is None
    assert zeros_ahead.reasons()["fwt"] == "head has no columns for future classes"
    unmeasured = AccuracyMatrix([[0.9, NAN], [0.5, 0.8]], baseline=[0.1, 0.1])
    assert "head has no columns for future classes" in unmeasured.reasons()["fwt"]
    assert "baseline" in AccuracyMatrix([[0.9, 0.2], [0.5, 0.8]]).reasons()["fwt"]


def test_retention_skips_a_task_that_was_never_learned() -> None:
    summary = AccuracyMatrix([[0.0, NAN, NAN], [0.1, 0.8, NAN], [0.1, 0.4, 0.9]]).summary()
    assert summary["retention"] == pytest.approx(0.5)
    assert summary["retention_skipped"] == 1
    assert AccuracyMatrix([[0.0, NAN], [0.1, 0.8]]).summary()["retention"] is None


def test_without_sizes_numbers_over_samples_are_none() -> None:
    matrix = AccuracyMatrix([[0.9, NAN], [0.5, 0.8]])
    assert matrix.summary()["last_samples"] is None
    assert matrix.reasons()["avg_samples"] == "needs the sizes of the test sets"


def test_the_callers_arrays_stay_as_they_were_and_ours_cannot_be_written() -> None:
    counts = np.array([[9.0, -1.0], [5.0, 8.0]])
    matrix = AccuracyMatrix.from_counts(counts, [10, 10])
    assert counts[0, 1] == -1.0
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1.0


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: AccuracyMatrix([[90.0]]), NumericError, "divide percentages by 100"),
        (lambda: AccuracyMatrix([[float("inf")]]), NumericError, "values"),
        (lambda: AccuracyMatrix([[-0.1]]), NumericError, "values"),
        (lambda: AccuracyMatrix([[0.5, 0.5]]), ShapeError, r"\(T, T\)"),
        (lambda: AccuracyMatrix([]), ShapeError, "values"),
        (lambda: AccuracyMatrix(0.5), ShapeError, "values"),
        (lambda: AccuracyMatrix([[0.5], [0.5, 0.5]]), ShapeError, "rectangular"),
        (lambda: AccuracyMatrix([[0.5]], sizes=[1, 2]), ShapeError, "sizes"),
        (lambda: AccuracyMatrix([[0.5]], sizes=[0]), DataError, "task 1"),
        (lambda: AccuracyMatrix([[0.5]], baseline=[0.1, 0.2]), ShapeError, "baseline"),
        (lambda: AccuracyMatrix.from_counts([[11]], [10]), DataError, "more than the 10"),
        (lambda: AccuracyMatrix.from_counts([[0.5]], [10]), NumericError, "whole numbers"),
        (lambda: AccuracyMatrix.from_counts([[1, 2]], [10]), ShapeError, "correct"),
        (lambda: AccuracyMatrix.from_counts([[5]], [10], task_aware=[[4]]), DataError, "task_aware"),
        (lambda: AccuracyMatrix.from_counts([[5]], [10], task_correct=[[4]]), DataError, "task_correct"),
        (lambda: AccuracyMatrix.from_counts([[5]], [10], [[5, 1], [1, 5]]), ShapeError, r"sizes|task_aware"),
        (lambda: AccuracyMatrix.from_counts([[5]], [10], individual=[50]), NumericError, "individual"),
        (lambda: AccuracyMatrix([[0.5]]).summary(missing="zero"), OptionError, "zero"),  # type: ignore[arg-type]
    ],
)
def test_refused_input(build: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()  # type: ignore[operator]


def test_repr_names_size_and_last() -> None:
    assert repr(example()) == "AccuracyMatrix(num_tasks=4, last=0.7425)"


def test_importing_metrics_imports_no_torch() -> None:
    code = "import sys, everlora.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- properties ------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn, min_tasks: int = 2, equal_sizes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Full matrices of counts with their sizes."""
    count = draw(st.integers(min_tasks, 6))
    size = st.integers(1, 60)
    sizes = np.array([draw(size)] * count if equal_sizes else draw(st.lists(size, min_size=count, max_size=count)))
    cells = draw(st.lists(st.floats(0, 1), min_size=count * count, max_size=count * count))
    return np.floor(np.array(cells).reshape(count, count) * sizes), sizes


def agree(left: dict[str, float | None], right: dict[str, float | None]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value is None) == (right[name] is None), name
        assert value is None or value == pytest.approx(right[name], abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(runs())
def test_order_and_identities_of_forgetting_and_transfer(run: tuple[np.ndarray, np.ndarray]) -> None:
    counts, sizes = run
    summary = AccuracyMatrix.from_counts(counts, sizes).summary()
    assert summary["forgetting_clipped"] >= summary["forgetting"] >= summary["forgetting_from_diag"] - 1e-12
    assert summary["bwt"] == -summary["forgetting_from_diag"]
    assert summary["bwt_trace"] == pytest.approx((len(sizes) - 1) / len(sizes) * summary["bwt"], abs=1e-12)
    assert summary["remembering"] == pytest.approx(1 - max(-summary["bwt_avg"], 0), abs=1e-12)
    assert summary["worst_task"] <= summary["last"] + 1e-12


@settings(max_examples=40, deadline=None)
@given(runs())
def test_the_three_forgettings_agree_when_no_column_rises(run: tuple[np.ndarray, np.ndarray]) -> None:
    counts, sizes = run
    falling = np.minimum.accumulate(np.tril(counts) + np.triu(np.full_like(counts, 1e6), k=1), axis=0)
    falling[np.triu_indices(len(sizes), k=1)] = NAN
    summary = AccuracyMatrix.from_counts(falling, sizes).summary()
    assert summary["forgetting"] == pytest.approx(summary["forgetting_clipped"], abs=1e-12)
    assert summary["forgetting"] == pytest.approx(summary["forgetting_from_diag"], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(runs(min_tasks=1, equal_sizes=True))
def test_both_means_agree_on_equal_sizes(run: tuple[np.ndarray, np.ndarray]) -> None:
    summary = AccuracyMatrix.from_counts(*run).summary()
    assert summary["last"] == pytest.approx(summary["last_samples"], abs=1e-12)
    assert summary["avg"] == pytest.approx(summary["avg_samples"], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(runs(min_tasks=1), st.integers(2, 9))
def test_scaling_counts_and_sizes_changes_nothing(run: tuple[np.ndarray, np.ndarray], factor: int) -> None:
    counts, sizes = run
    before = AccuracyMatrix.from_counts(counts, sizes).summary()
    agree(before, AccuracyMatrix.from_counts(counts * factor, sizes * factor).summary())


@settings(max_examples=40, deadline=None)
@given(runs(), st.randoms())
def test_order_of_tasks_does_not_change_the_end(run: tuple[np.ndarray, np.ndarray], random: object) -> None:
    counts, sizes = run
    order = np.arange(len(sizes))
    random.shuffle(order)  # type: ignore[attr-defined]
    before = AccuracyMatrix.from_counts(counts, sizes).summary()
    after = AccuracyMatrix.from_counts(counts[:, order], sizes[order]).summary()
    for name in ("last", "last_samples", "worst_task"):
        assert before[name] == pytest.approx(after[name], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(runs(), st.data())
def test_task_aware_and_recognition_bound_the_accuracy(run: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    counts, sizes = run
    spare = data.draw(st.floats(0, 1))
    more = np.floor(counts + spare * (sizes - counts))
    matrix = AccuracyMatrix.from_counts(counts, sizes, task_aware=more, task_correct=more)
    summary = matrix.summary()
    assert summary["task_aware_last"] >= summary["last"] - 1e-12
    assert summary["task_recognition"] >= summary["last_samples"] - 1e-12


@settings(max_examples=40, deadline=None)
@given(runs())
def test_cells_above_the_diagonal_change_nothing_about_the_past(run: tuple[np.ndarray, np.ndarray]) -> None:
    counts, sizes = run
    lower = counts.copy()
    lower[np.triu_indices(len(sizes), k=1)] = NAN
    full = AccuracyMatrix.from_counts(counts, sizes).summary()
    seen = AccuracyMatrix.from_counts(lower, sizes).summary()
    agree({k: v for k, v in full.items() if k != "fwt_avg"}, {k: v for k, v in seen.items() if k != "fwt_avg"})
    assert full["fwt_avg"] is not None
    assert seen["fwt_avg"] is None
