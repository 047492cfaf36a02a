"""Accuracy along the straight line through the weights after one task and after the next."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from everlora.errors import DataError, OptionError, UnsupportedError
from everlora.evaluation import Evaluator
from everlora.experiments.data import Progress
from everlora.learner import Learner
from everlora.methods import method_spec
from everlora.methods.base import Method
from everlora.streams import Examples
from everlora.training import TaskTrainer

__all__ = ["accuracy_along_path", "has_path", "measured_pair", "path_positions"]

logger = logging.getLogger("everlora.experiments")

FIRST, LAST = -0.5, 1.5


def path_positions(points: int) -> list[float]:
    """Return `points` positions spread evenly from -0.5 to 1.5, with 0 and 1 put in where they are missing.

    Raises:
        OptionError: fewer than 2 points.
    """
    if points < 2:
        raise OptionError(f"a path needs 2 points or more, found {points}; give 0 to measure none.")
    even = {round(FIRST + (LAST - FIRST) * index / (points - 1), 6) for index in range(points)}
    return sorted(even | {0.0, 1.0})


def has_path(method: str) -> bool:
    """Whether a registered method can go back to the weights between two tasks."""
    return method_spec(method).method_class.path is not Method.path


def accuracy_along_path(
    learner: Learner, first: int, tests: Sequence[Examples], positions: Iterable[float]
) -> Iterator[dict[str, Any]]:
    """Count correct test rows at weights `W_first + position * (W_second - W_first)`, `second = first + 1`.

    The classes of all tasks up to `second` compete, also at position 0, where nothing was learned of the newest yet.

    Args:
        learner: it has learned both tasks, and maybe more.
        first: the earlier of the two tasks.
        tests: test rows of all tasks up to `second`.
        positions: where on the line; 0 is the model after `first`, 1 that after `second`.

    Yields:
        For each place a dict of `at`, `correct` and, unless classes return in later tasks, `task_aware` (only the row's
        own task's classes compete), by task. `at` is first `before` (the model after `first` with its own classes
        only: the row of the accuracy matrix), then each position, and last, for a method whose training went on from
        other weights, `start` (those weights).

    Raises:
        UnsupportedError: the method does not keep earlier models.
        DataError: one of the two models cannot be rebuilt.
    """
    method, second = learner.method, first + 1
    for position in (0.0, 1.0):  # refused before anything is measured
        with method.path(first, second, position, heads=second):
            pass
    labels = [tuple(task["labels"]) for task in learner.card()["tasks"][: second + 1]]
    before = method.path(first, second, 0.0, heads=second)
    yield {"at": "before", **_measure(learner, before, tests[:second], labels[:second])}
    for position in positions:
        model = method.path(first, second, position, heads=second + 1)
        yield {"at": position, **_measure(learner, model, tests, labels)}
    start = method.path_start(second, heads=second + 1)
    if start is not None:
        yield {"at": "start", **_measure(learner, start, tests, labels)}


def measured_pair(
    learner: Learner, first: int, tests: Sequence[Examples], points: int, *, progress: Progress
) -> dict[str, Any] | None:
    """Return what a run's record keeps of one pair of tasks.

    Args:
        learner: it has learned both tasks.
        first: the earlier one.
        tests: test rows of all tasks up to the later one.
        points: number of positions.
        progress: called with a stage, the places done and their number.

    Returns:
        `first`, `second`, `points` and either `places`, or `reason` where a model cannot be rebuilt; None, with a
        line in the log, where the options of the method rule paths out.
    """
    entry: dict[str, Any] = {"first": first, "second": first + 1, "points": points}
    positions, places = path_positions(points), []
    try:
        for place in accuracy_along_path(learner, first, tests, positions):
            places.append(place)
            progress(f"path from task {first + 1} to {first + 2}", min(len(places), len(positions)), len(positions))
    except UnsupportedError as error:
        logger.warning("no accuracy along the path from task %d to %d: %s", first + 1, first + 2, error)
        return None
    except DataError as error:
        return entry | {"reason": str(error)}
    return entry | {"places": places}


def _measure(
    learner: Learner, model: AbstractContextManager[None], tests: Sequence[Examples], labels: Sequence[tuple[str, ...]]
) -> dict[str, list[int]]:
    """Count in the model of a `with` block, where only the classes of the tasks with these labels compete."""
    num_classes = len({label for group in labels for label in group})
    trainer = TaskTrainer(learner.backbone, learner.method, learner.settings.training)
    evaluator = Evaluator(trainer, learner.classes[:num_classes])
    by_task = learner.scenario == "task_incremental"
    with model:
        counts = [
            evaluator.count(rows, labels[index], labels, task=index, given=by_task) for index, rows in enumerate(tests)
        ]
    aware = [one.task_aware for one in counts if one.task_aware is not None]
    return {"correct": [one.correct for one in counts]} | ({"task_aware": aware} if len(aware) == len(counts) else {})
