"""The formulas: each takes arrays of fractions and returns a `Measure`.

Throughout, `values` is `(T, T)` float64 with NaN for a cell that was not measured, `values[i, j]` belongs to task `j`
after task `i`, and `step` counts from 0. With `skip=False` one missing cell makes a mean undefined; with `skip=True`
the mean is taken over what is there and `count` says how many terms that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NO_FUTURE_COLUMNS",
    "ONE_TASK",
    "FloatArray",
    "Measure",
    "area_under_steps",
    "backward_transfer",
    "backward_transfer_all_rows",
    "forgetting",
    "forward_transfer",
    "forward_transfer_all_rows",
    "mapped",
    "mean_of",
    "retention",
    "seen_mean",
    "undefined",
]

FloatArray: TypeAlias = NDArray[np.float64]

ONE_TASK = "needs at least two tasks"
NO_FUTURE_COLUMNS = "head has no columns for future classes"


@dataclass(frozen=True)
class Measure:
    """One number with what is needed to judge it.

    Attributes:
        value: the number, or None where it is not defined.
        reason: why `value` is None; empty otherwise.
        count: how many terms the mean was taken over.
        note: something a reader should know although `value` is defined, such as tasks left out.
    """

    value: float | None
    reason: str = ""
    count: int = 0
    note: str = ""


def undefined(reason: str) -> Measure:
    """Return a measure that has no value, for the given reason."""
    return Measure(None, reason)


def mean_of(terms: Sequence[float] | FloatArray, *, skip: bool, weights: FloatArray | None = None) -> Measure:
    """Average `terms`, or say why that cannot be done.

    Args:
        terms: `(k,)`, NaN for a term that was not measured.
        skip: leave missing terms out instead of giving up.
        weights: `(k,)`, for instance test-set sizes; None weighs all terms alike.

    Returns:
        The (weighted) mean with the number of terms used.
    """
    numbers = np.asarray(terms, dtype=np.float64)
    measured = ~np.isnan(numbers)
    count, missing = int(measured.sum()), int((~measured).sum())
    if missing and not skip:
        return Measure(None, f"{missing} of {len(numbers)} numbers it needs were not measured", count)
    if count == 0:
        return undefined("none of the numbers it needs was measured")
    chosen = None if weights is None else weights[measured]
    return Measure(float(np.average(numbers[measured], weights=chosen)), count=count)


def seen_mean(values: FloatArray, step: int, *, skip: bool, weights: FloatArray | None = None) -> Measure:
    """Mean accuracy over the tasks seen up to `step`: over tasks, or over samples when `weights` are test-set sizes."""
    seen = None if weights is None else weights[: step + 1]
    return mean_of(values[step, : step + 1], skip=skip, weights=seen)


def forgetting(values: FloatArray, step: int, *, skip: bool, include_last: bool = False) -> Measure:
    """How far each earlier task has fallen from its best, averaged; positive is bad.

    The best is taken over the measured rows from the task's own up to the one before `step`, so a task that ends above
    its previous best counts negative. A task with no such row is left out and named in the note.

    Args:
        values: `(T, T)`.
        step: the row to judge, from 0.
        skip: leave out tasks whose cell in row `step` is missing.
        include_last: let row `step` itself compete for the best, which clips every term at zero.

    Returns:
        The mean over tasks `0..step-1`.

    Source: Chaudhry et al., 2018 (`include_last=False`).
    """
    if step < 1:
        return undefined(ONE_TASK)
    terms, left_out = [], []
    for task in range(step):
        earlier = values[task:step, task]
        if np.isnan(earlier).all():
            left_out.append(str(task + 1))
            continue
        last = float(values[step, task])
        best = float(np.nanmax(earlier))
        terms.append((max(best, last) if include_last else best) - last)
    if not terms:
        return undefined("no task was measured in a row before the last one")
    result = mean_of(terms, skip=skip)
    if not left_out or result.value is None:
        return result
    return Measure(
        result.value, count=result.count, note=f"left out, only the last row measured: task {', '.join(left_out)}"
    )


def backward_transfer(values: FloatArray, step: int, *, skip: bool) -> Measure:
    """Mean of `values[step, j] - values[j, j]` over the earlier tasks (Lopez-Paz and Ranzato, 2017); below 0 is bad."""
    if step < 1:
        return undefined(ONE_TASK)
    return mean_of(values[step, :step] - values.diagonal()[:step], skip=skip)


def backward_transfer_all_rows(values: FloatArray, *, skip: bool) -> Measure:
    """Mean of `values[i, j] - values[j, j]` over every later row `i > j` (Diaz-Rodriguez et al., 2018)."""
    if len(values) < 2:
        return undefined(ONE_TASK)
    rows, columns = np.tril_indices(len(values), k=-1)
    return mean_of(values[rows, columns] - values.diagonal()[columns], skip=skip)


def forward_transfer(values: FloatArray, baseline: FloatArray | None, *, skip: bool) -> Measure:
    """Mean of `values[j-1, j] - baseline[j]`: what earlier tasks give a task before it is trained.

    Undefined where the head cannot answer future classes at all: then every such cell and the baseline are zero by
    construction and the difference says nothing.
    """
    if len(values) < 2:
        return undefined(ONE_TASK)
    ahead = values.diagonal(offset=1)
    if np.isnan(ahead).all():
        return undefined(
            f"no task was measured before its own training; in class-incremental runs the {NO_FUTURE_COLUMNS}"
        )
    if baseline is None:
        return undefined("needs the accuracies before any training (baseline)")
    if not np.any(ahead) and not np.any(baseline[1:]):
        return undefined(NO_FUTURE_COLUMNS)
    return mean_of(ahead - baseline[1:], skip=skip)


def forward_transfer_all_rows(values: FloatArray, *, skip: bool) -> Measure:
    """Mean over all cells above the diagonal, without a baseline (Diaz-Rodriguez et al., 2018)."""
    if len(values) < 2:
        return undefined(ONE_TASK)
    ahead = values[np.triu_indices(len(values), k=1)]
    if np.isnan(ahead).all():
        return undefined(
            f"no task was measured before its own training; in class-incremental runs the {NO_FUTURE_COLUMNS}"
        )
    return mean_of(ahead, skip=skip)


def retention(values: FloatArray, *, skip: bool) -> tuple[Measure, Measure]:
    """Mean of `values[T, j] / values[j, j]` over the earlier tasks, and how many were skipped for a zero diagonal."""
    if len(values) < 2:
        return undefined(ONE_TASK), undefined(ONE_TASK)
    first, last = values.diagonal()[:-1], values[-1, :-1]
    usable = first != 0  # NaN counts as usable here: a missing cell is the mean's business, not a zero
    skipped = Measure(float((~usable).sum()), count=len(first))
    if not usable.any():
        return undefined("every task had accuracy 0 right after its own training"), skipped
    return mean_of(last[usable] / first[usable], skip=skip), skipped


def area_under_steps(curve: Sequence[float | None]) -> Measure:
    """Trapezoid area under the accuracies at the ends of the tasks, divided by the number of intervals."""
    if len(curve) < 2:
        return undefined(ONE_TASK)
    points = [point for point in curve if point is not None]
    if len(points) < len(curve):
        return undefined(f"{len(curve) - len(points)} of {len(curve)} points of the curve are undefined")
    return Measure(float(np.trapezoid(points)) / (len(points) - 1), count=len(points))


def mapped(measure: Measure, change: float) -> Measure:
    """Return `measure` with its value multiplied by `change`."""
    if measure.value is None:
        return measure
    return Measure(measure.value * change + 0.0, count=measure.count, note=measure.note)
