"""Checks on what goes into an accuracy matrix: shapes, ranges, whole numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from everlora.errors import DataError, NumericError, ShapeError
from everlora.metrics.formulas import FloatArray

__all__ = ["checked_counts", "checked_fractions", "checked_not_below", "checked_sizes", "frozen"]


def frozen(array: FloatArray) -> FloatArray:
    """Return `array` made read-only, so that a shared matrix cannot be changed by who reads it."""
    array.setflags(write=False)
    return array


def checked_fractions(values: ArrayLike, name: str, *, dimensions: int, count: int | None = None) -> FloatArray:
    """Return `values` as read-only float64 after checking shape and range.

    Args:
        values: `(T,)` or `(T, T)`; NaN, None or masked for not measured.
        name: what the error message calls it.
        dimensions: 1 or 2.
        count: the number of tasks expected; None accepts any positive number.

    Raises:
        ShapeError: the shape differs.
        NumericError: a number lies outside [0, 1] or is infinite.
    """
    array = _floats(values, name)
    shape = (len(array) if array.ndim else 0,) * dimensions if count is None else (count,) * dimensions
    if array.shape != shape or array.size == 0:
        wanted = "(T, T) with T >= 1" if count is None else str(shape)
        raise ShapeError(f"{name} must have shape {wanted}, found {array.shape}")
    outside = array[~np.isnan(array) & ~((array >= 0.0) & (array <= 1.0))]
    if outside.size:
        raise NumericError(
            f"{name} must hold fractions between 0 and 1, found {outside[0]:g}; divide percentages by 100"
        )
    return frozen(array)


def checked_sizes(sizes: ArrayLike, count: int) -> FloatArray:
    """Return test-set sizes as read-only float64 `(T,)` after checking that each is a positive whole number.

    Raises:
        ShapeError: there is not one size per task.
        DataError: a size is zero, negative, missing or not whole.
    """
    array = _floats(sizes, "sizes")
    if array.shape != (count,):
        raise ShapeError(f"sizes must have shape ({count},), one per task, found {array.shape}")
    for task, size in enumerate(array.tolist()):
        if not (size >= 1 and float(size).is_integer()):
            raise DataError(f"task {task + 1} has a test set of {size:g} rows; give every task at least one test row")
    return frozen(array)


def checked_counts(counts: ArrayLike, sizes: ArrayLike, name: str) -> FloatArray:
    """Return counts as float64 `(T, T)`, NaN where not measured, after checking them against the test-set sizes.

    Raises:
        ShapeError: the matrix is not `(T, T)`, or its `T` is not that of `sizes`.
        NumericError: a count is infinite or not whole.
        DataError: a count exceeds the size of its test set.
    """
    array = _floats(counts, name)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise ShapeError(f"{name} must have shape (T, T) with T >= 1, found {array.shape}")
    rows = checked_sizes(sizes, len(array))
    array[array < 0] = np.nan
    measured = array[~np.isnan(array)]
    if not np.all(np.isfinite(measured)) or np.any(measured != np.round(measured)):
        raise NumericError(
            f"{name} must hold whole numbers of test rows, found a fraction or infinity; pass fractions "
            "to AccuracyMatrix(values) instead"
        )
    above = np.argwhere(array > rows)
    if above.size:
        step, task = (int(index) for index in above[0])
        raise DataError(
            f"{name}[{step}, {task}] is {array[step, task]:g}, more than the {rows[task]:g} test rows of "
            f"task {task + 1}; check that counts and sizes belong together"
        )
    return array


def checked_not_below(counts: FloatArray, correct: FloatArray, name: str) -> None:
    """Check that `counts` is nowhere below `correct`: a right class implies a right task and a right task-aware class.

    Raises:
        ShapeError: the shapes differ.
        DataError: a cell of `counts` is smaller.
    """
    if counts.shape != correct.shape:
        raise ShapeError(f"{name} must have the shape of correct, {correct.shape}, found {counts.shape}")
    below = np.argwhere(counts < correct)
    if below.size:
        step, task = (int(index) for index in below[0])
        raise DataError(
            f"{name}[{step}, {task}] is {counts[step, task]:g}, below the {correct[step, task]:g} right "
            "answers over all classes; both must count the same predictions of the same rows"
        )


def _floats(values: ArrayLike, name: str) -> FloatArray:
    """Copy to float64 with NaN for None and for masked cells."""
    source = np.ma.filled(values.astype(np.float64), np.nan) if isinstance(values, np.ma.MaskedArray) else values
    try:
        return np.array(source, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name} must be a rectangular array of numbers, found something else ({error})") from error
