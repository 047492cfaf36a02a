"""What is measured after each task: for classes, the right answers on the test sets of the tasks so far."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from everlora.errors import DataError
from everlora.experiments.records import COUNTS, RunRecord
from everlora.learner import Learner
from everlora.streams import Examples, Stream, Task

__all__ = ["ClassMeasurement", "Measurement", "rows_to_test"]


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


def rows_to_test(task: Task) -> Examples:
    """The test rows of a task.

    Raises:
        DataError: there are none.
    """
    if task.test is None:
        raise DataError(f"task '{task.name}' has no test examples; give data with a test split.")
    return task.test
