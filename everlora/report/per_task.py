"""What became of each task by itself: how far it fell, and which task's classes its rows were taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everlora.metrics import AccuracyMatrix
from everlora.report.panels import HeatRows, mean_lists
from everlora.report.table import Group, show, statistic

__all__ = ["Confusion", "Forgotten", "confusions", "forgetting_by_task"]


@dataclass(frozen=True)
class Forgotten:
    """Fall of each task from its best accuracy, in points.

    Attributes:
        tasks: their numbers as headings; the last task has nothing to fall from.
        rows: label and mean over runs for each task.
        range: ends of the colour scale.
        texts: label and mean with deviation for each task.
    """

    tasks: list[str]
    rows: HeatRows
    range: tuple[float, float]
    texts: list[list[str]]


@dataclass(frozen=True)
class Confusion:
    """Which task's classes the rows of each task were taken for.

    Attributes:
        label: of the method.
        columns: numbers of the predicted tasks.
        rows: the true task and the share of its test rows predicted as some class of each task, in percent.
        recognised: share of all rows that were taken for their own task, in percent.
    """

    label: str
    columns: list[str]
    rows: HeatRows
    recognised: float


def forgetting_by_task(groups: Mapping[str, Group]) -> Forgotten | None:
    """Return how far each task but the last has fallen at the end; None where no method was measured in between.

    The mean of a row is the method's forgetting: best measured accuracy before the last moment, less the last one.
    """
    found = {label: [_falls(matrix) for _, matrix in group] for label, group in groups.items()}
    found = {label: falls for label, falls in found.items() if any(value is not None for run in falls for value in run)}
    if not found:
        return None
    rows = [(label, mean_lists(falls)) for label, falls in found.items()]
    numbers = [value for _, cells in rows for value in cells if value is not None]
    low = min(0.0, *numbers)
    texts = [
        [label, *(show(statistic(list(column)), len(falls)) for column in zip(*falls, strict=True))]
        for label, falls in found.items()
    ]
    count = max(len(cells) for _, cells in rows)
    tasks = [str(task + 1) for task in range(count)]
    return Forgotten(tasks, rows, (low, max(*numbers, low + 1.0)), texts)


def _falls(matrix: AccuracyMatrix) -> list[float | None]:
    values, last = matrix.values, matrix.num_tasks - 1
    falls: list[float | None] = []
    for task in range(last):
        earlier = values[task:last, task]
        known = not np.isnan(earlier).all() and not np.isnan(values[last, task])
        falls.append(100.0 * float(np.nanmax(earlier) - values[last, task]) if known else None)
    return falls


def confusions(groups: Mapping[str, Group]) -> list[Confusion]:
    """Return the confusion of tasks of every method that recorded it, as shares over the runs that did."""
    found = []
    for label, group in groups.items():
        recorded = [counts for run, _ in group if (counts := run.get("task_confusion"))]
        if recorded and len({len(counts) for counts in recorded}) == 1:
            found.append(_confusion(label, recorded))
    return found


def _confusion(label: str, recorded: Sequence[Sequence[Sequence[Any]]]) -> Confusion:
    counts = np.array(recorded, dtype=np.float64)  # (runs, true task, predicted task)
    sizes = counts.sum(axis=2, keepdims=True)
    shares = np.divide(100.0 * counts, sizes, out=np.full_like(counts, np.nan), where=sizes > 0).mean(axis=0)
    own = np.array([100.0 * np.trace(one) / one.sum() for one in counts if one.sum()])
    tasks = [str(task + 1) for task in range(len(shares))]
    rows: HeatRows = [
        (f"of {name}", [None if np.isnan(cell) else float(cell) for cell in row])
        for name, row in zip(tasks, shares, strict=True)
    ]
    return Confusion(label, tasks, rows, float(own.mean()) if len(own) else 0.0)
