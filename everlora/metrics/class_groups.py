"""How the PyCIL family of projects groups classes by number, and the forgetting it computes from the groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from everlora.metrics.formulas import FloatArray

__all__ = ["class_groups", "forgetting_by_column", "forgetting_by_sorted_label"]


def class_groups(classes: Sequence[int] | None, step: int) -> list[tuple[str, int]] | None:
    """Return the labels of the class groups printed after `step`, each with the task it covers.

    The family cuts `[0, first)` and then steps of `increment` while the start lies below the highest class number, so
    a last group of one class is never printed.

    Args:
        classes: number of new classes in each task, or None when that is not known.
        step: the row, from 0.

    Returns:
        Pairs such as `("00-09", 0)`; None when the class counts are unknown or not of the form first, increment,
        increment, ..., at most increment.
    """
    if classes is None:
        return None
    first, increment = classes[0], classes[1] if len(classes) > 1 else classes[0]
    if any(count != increment for count in classes[1:-1]) or any(count > increment for count in classes[1:]):
        return None
    starts = [0, *range(first, sum(classes[: step + 1]) - 1, increment)]
    ends = [first - 1, *(start + increment - 1 for start in starts[1:])]
    return [(f"{start:0>2}-{end:0>2}", task) for task, (start, end) in enumerate(zip(starts, ends, strict=True))]


def forgetting_by_column(values: FloatArray, classes: Sequence[int] | None) -> float | None:
    """Return the family's forgetting in percent with one task per column; tasks stand for groups that are unknown.

    Args:
        values: `(T, T)` fractions, NaN where not measured.
        classes: number of new classes in each task, or None.

    Returns:
        None for a single task or when a cell is missing.
    """
    groups = [class_groups(classes, step) for step in range(len(values))]
    rows = [
        list(range(step + 1)) if found is None else [task for _, task in found] for step, found in enumerate(groups)
    ]
    return _forgetting(values, rows)


def forgetting_by_sorted_label(values: FloatArray, classes: Sequence[int] | None) -> float | None:
    """Return the family's forgetting in percent with the columns sorted by label as text, "100-119" before "20-39".

    Args:
        values: `(T, T)` fractions, NaN where not measured.
        classes: number of new classes in each task; None gives None, as the labels are then unknown.

    Returns:
        The number, wrong by construction once labels have different lengths.
    """
    rows = []
    for step in range(len(values)):
        groups = class_groups(classes, step)
        if groups is None:
            return None
        rows.append([task for _, task in sorted(groups)])
    return _forgetting(values, rows)


def _forgetting(values: FloatArray, rows: Sequence[Sequence[int]]) -> float | None:
    """Mean over columns but the last of greatest minus last entry, in the zero-padded table of rounded percentages.

    `rows[i]` lists the tasks in the order in which row `i` of the table holds them.
    """
    count = len(values)
    if count < 2:
        return None
    table = np.zeros((count, count))
    for step, tasks in enumerate(rows):
        table[step, : len(tasks)] = np.round(100.0 * values[step, list(tasks)], 2)
    result = float(np.mean((table.max(axis=0) - table[-1])[:-1]))
    return None if np.isnan(result) else result
