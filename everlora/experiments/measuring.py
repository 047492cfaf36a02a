"""What is measured after each task: for classes, the right answers on the test sets of the tasks so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from everlora.errors import DataError
from everlora.experiments.records import COUNTS, RunRecord
from everlora.learner import Learner
from everlora.streams import Examples, Stream, Task

__all__ = ["ClassMeasurement", "Measurement", "rows_to_test", "task_confusion"]


class Measurement(Protocol):
    """One kind of measurement: its place in the record, and what it does at which moment."""

    def empty(self, num_tasks: int) -> dict[str, Any]:
        """What a record holds before anything is measured."""

    def begin(self, learner: Learner, record: RunRecord, stream: Stream) -> None:
        """Measure before the first task; called whenever a run starts or goes on, and to be done once."""

    def measure(self, learner: Learner, record: RunRecord, stream: Stream, index: int) -> None:
        """Put what is measured after task `index` into the record, without writing it."""


class ClassMeasurement:
    """Right answers on the test set of every task so far."""

    def empty(self, num_tasks: int) -> dict[str, Any]:
        """Square tables of counts without a number, and no sizes."""
        counts: dict[str, Any] = {name: [[None] * num_tasks for _ in range(num_tasks)] for name in COUNTS}
        return counts | {"sizes": [None] * num_tasks}

    def begin(self, learner: Learner, record: RunRecord, stream: Stream) -> None:
        """Nothing: without a class there is nothing to get right."""

    def measure(self, learner: Learner, record: RunRecord, stream: Stream, index: int) -> None:
        """Count right answers on the tests of all tasks up to `index`."""
        counts = learner.evaluate_tasks([(task.index, rows_to_test(task)) for task in stream.tasks[: index + 1]])
        record.put_counts([dataclasses.asdict(one) for one in counts], index)
        labels = [task.labels for task in stream.tasks[: index + 1]]
        record.values["task_confusion"] = task_confusion([one.predicted for one in counts], labels)


def task_confusion(
    predicted: Sequence[Mapping[str, int] | None], labels: Sequence[Sequence[str]]
) -> list[list[int]] | None:
    """Count rows by their own task and by the task whose class was predicted.

    Args:
        predicted: for each task, how many of its test rows were predicted as which label.
        labels: of each of these tasks.

    Returns:
        `(T, T)`, a row for each true task; None where the task was given or a label belongs to several tasks.
    """
    owner = {label: task for task, names in enumerate(labels) for label in names}
    if len(owner) < sum(map(len, labels)):
        return None
    rows = []
    for counts in predicted:
        if counts is None:
            return None
        row = [0] * len(labels)
        for label, count in counts.items():
            row[owner[label]] += count
        rows.append(row)
    return rows


def rows_to_test(task: Task) -> Examples:
    """The test rows of a task.

    Raises:
        DataError: there are none.
    """
    if task.test is None:
        raise DataError(f"task '{task.name}' has no test examples; give data with a test split.")
    return task.test
