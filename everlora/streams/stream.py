"""Streams: data sets cut into the tasks that are learned one after another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everlora.errors import DataError, nearest
from everlora.streams.examples import Examples, natural_order
from everlora.streams.orders import class_order
from everlora.streams.splits import take_per_class, take_rows

__all__ = ["Stream", "Task", "by_class", "by_column", "by_datasets"]

Splits = Mapping[str, Examples]
Subsample = Mapping[str, int | None]

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        index: position in the stream, from 0.
        name: a short name, unique in the stream.
        labels: label names of the training rows, in the order of the stream's classes.
        train: training rows.
        test: test rows, None where the source has no test split.
        validation: the source's own validation rows, None where it has none.
    """

    index: int
    name: str
    labels: tuple[str, ...]
    train: Examples
    test: Examples | None
    validation: Examples | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        name: name of the data.
        scenario: `class_incremental`, `domain_incremental`, `task_incremental` or `language`.
        tasks: the tasks.
        class_names: the data set's own list of classes, in its own order.
        order: the classes (by class) or task names (by column, by data sets) in the order in which they are learned.
        order_seed: seed of the order, None for the data's own or a given order.
        subsample: rows kept per class of each split, or of each task's split where rows have no classes; empty when
            all were kept.
    """

    name: str
    scenario: str
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    order: tuple[str, ...]
    order_seed: int | None = None
    subsample: Mapping[str, int | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def order_hash(self) -> str:
        """The sha256, in hex, of the order: names and their positions in the data's own list of classes."""
        position = {name: index for index, name in enumerate(self.class_names)}
        pairs = [[position.get(name, -1), name] for name in self.order]
        return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a reader of results needs to rebuild the stream, as plain JSON values.

        Returns:
            `sizes` counts the labels of each task; `train_sizes`, `validation_sizes`, `test_sizes` count rows (None
            where a task has no such rows); `order_ids` are positions in the data's own list of classes.
        """
        position = {name: index for index, name in enumerate(self.class_names)}
        sizes = [len(task.labels) for task in self.tasks]
        listed = "-".join(str(size) for size in sizes)
        return {
            "name": self.name,
            "id": f"{self.name}/{self.scenario}/tasks={len(self.tasks)}/{listed}/{self.order_hash[:12]}",
            "scenario": self.scenario,
            "num_tasks": len(self.tasks),
            "task_names": [task.name for task in self.tasks],
            "task_labels": [list(task.labels) for task in self.tasks],
            "sizes": sizes,
            "train_sizes": [len(task.train) for task in self.tasks],
            "validation_sizes": [None if task.validation is None else len(task.validation) for task in self.tasks],
            "test_sizes": [None if task.test is None else len(task.test) for task in self.tasks],
            "class_names": list(self.class_names),
            "order": list(self.order),
            "order_ids": [position.get(name) for name in self.order],
            "order_seed": self.order_seed,
            "order_hash": self.order_hash,
            "subsample": dict(self.subsample),
        }


def by_class(
    splits: Splits,
    *,
    name: str,
    initial: int,
    increment: int,
    seed: int | None,
    scenario: str = "class_incremental",
    subsample: Subsample | None = None,
    subsample_seed: int = 0,
) -> Stream:
    """Cut a data set into tasks of new classes: `initial` classes first, then `increment` more per task.

    Args:
        splits: `"train"` and, where there are, `"validation"` and `"test"`, all labelled.
        name: name of the data.
        initial: classes of the first task (`B0-IncY` of the literature: `initial = increment = Y`).
        increment: classes of every later task; the last task takes what is left.
        seed: seed of the class order over the data set's own list of classes, None for that list's order.
        scenario: what the tasks mean; the rows are the same for every scenario.
        subsample: rows to keep per class, by split name; None or a missing split keeps all.
        subsample_seed: seed of that draw.

    Returns:
        A stream whose tasks have classes of their own.

    Raises:
        DataError: no train split or labels, a class without training rows, a test label that training never shows,
            or sizes out of range.
    """
    splits = _prepared(splits, subsample, subsample_seed)
    train = splits["train"]
    names = train.class_names if train.class_names is not None else train.classes
    _check_classes(splits, names)
    if not 1 <= initial <= len(names) or increment < 1:
        raise DataError(
            f"a stream over {len(names)} classes cannot start with {initial} classes and add {increment} per task; "
            f"choose initial from 1 to {len(names)} and increment from 1"
        )
    order = tuple(names[index] for index in class_order(len(names), seed))
    starts = [0, *range(initial, len(names), increment)]
    stops = [*starts[1:], len(names)]
    tasks = tuple(
        _class_task(splits, index, order[start:stop])
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
    return Stream(name, scenario, tasks, names, order, seed, dict(subsample or {}))


def by_column(
    splits: Splits,
    *,
    name: str,
    scenario: str = "domain_incremental",
    order: Sequence[str] | None = None,
    seed: int | None = None,
    subsample: Subsample | None = None,
    subsample_seed: int = 0,
) -> Stream:
    """Cut a data set into tasks by the values of its task column (`Examples.groups`), one task per value.

    Args:
        splits: as for `by_class`, each with groups.
        name: name of the data.
        scenario: what the tasks mean; the rows are the same for every scenario.
        order: the values in the order to learn them; values left out are not learned. None: sorted (numbers
            by value), or a permutation of the sorted values by `seed`.
        seed: seed of the permutation; must be None where `order` is given.
        subsample: rows to keep per class, by split name.
        subsample_seed: seed of that draw.

    Returns:
        A stream whose task names are the values.

    Raises:
        DataError: no groups, an unknown value in `order`, or a task without test rows where others have some.
    """
    for split, examples in splits.items():
        if examples.groups is None:
            raise DataError(f"the {split} rows of '{name}' have no task column; name it with --task-column")
    splits = _prepared(splits, subsample, subsample_seed)
    values = list(natural_order(_groups(splits["train"])))
    if order is not None and seed is not None:
        raise DataError("give either an order of tasks or a seed for one, not both")
    if order is not None:
        _check_order(order, values)
        values = list(order)
    elif seed is not None:
        values = [values[index] for index in class_order(len(values), seed)]
    tasks = tuple(_column_task(splits, index, value) for index, value in enumerate(values))
    train = splits["train"]
    names = train.class_names if train.class_names is not None else train.classes
    return Stream(name, scenario, tasks, names, tuple(values), seed, dict(subsample or {}))


def by_datasets(
    datasets: Sequence[tuple[str, Splits]],
    *,
    name: str,
    scenario: str,
    subsample: Subsample | None = None,
    subsample_seed: int = 0,
) -> Stream:
    """Make each data set of a list one task, in the order of the list.

    Args:
        datasets: `(task name, splits)` pairs; labels of the same name are the same class. Rows need no labels where
            the scenario is `language`.
        name: name of the stream.
        scenario: what the tasks mean.
        subsample: rows to keep per class, by split name; where the scenario is `language`, rows of each data set.
        subsample_seed: seed of that draw.

    Returns:
        A stream; row ids are moved so that no two tasks share one.

    Raises:
        DataError: an empty list, a repeated name, or images beside texts.
    """
    if not datasets:
        raise DataError(f"the stream '{name}' has no data sets; list at least one")
    task_names = [task_name for task_name, _ in datasets]
    repeated = sorted({task_name for task_name in task_names if task_names.count(task_name) > 1})
    if repeated:
        raise DataError(f"the stream '{name}' names '{repeated[0]}' twice; give every data set its own name")
    tasks: list[Task] = []
    class_names: dict[str, None] = {}
    offsets = dict.fromkeys(_SPLITS, 0)
    for index, (task_name, splits) in enumerate(datasets):
        parts = _prepared(splits, subsample, subsample_seed, are_labelled=scenario != "language")
        if tasks and parts["train"].modality != tasks[0].train.modality:
            raise DataError(f"'{task_name}' holds {parts['train'].modality}s beside {tasks[0].train.modality}s")
        parts = {split: _shift_ids(part, offsets, split) for split, part in parts.items()}
        train = parts["train"]
        class_names.update(dict.fromkeys(train.class_names or train.classes))
        tasks.append(Task(index, task_name, train.classes, train, parts.get("test"), parts.get("validation")))
    return Stream(name, scenario, tuple(tasks), tuple(class_names), tuple(task_names), None, dict(subsample or {}))


def _prepared(
    splits: Splits, subsample: Subsample | None, seed: int, *, are_labelled: bool = True
) -> dict[str, Examples]:
    """Check the splits and draw the rows to keep."""
    unknown = [split for split in (*splits, *(subsample or {})) if split not in _SPLITS]
    if unknown:
        raise DataError(f"'{unknown[0]}' is not a split; {nearest(unknown[0], _SPLITS)}")
    if "train" not in splits:
        raise DataError(f"a stream needs a train split, and there is only {', '.join(splits) or 'nothing'}")
    for split, examples in splits.items():
        if are_labelled and examples.labels is None:
            raise DataError(f"the {split} rows carry no labels; name the label column with --label-column")
        if not len(examples):
            raise DataError(f"the {split} split is empty; a stream needs rows in every split it is given")
    prepared = dict(splits)
    take = take_per_class if are_labelled else take_rows
    for split, count in (subsample or {}).items():
        if split in prepared and count is not None:
            prepared[split] = take(prepared[split], count, seed)
    return prepared


def _check_classes(splits: Splits, names: Sequence[str]) -> None:
    trained = set(splits["train"].classes)
    missing = [name for name in names if name not in trained]
    if missing:
        raise DataError(f"class '{missing[0]}' is listed but has no training rows; remove it from the list of classes")
    for split, examples in splits.items():
        unseen = [name for name in examples.classes if name not in trained]
        if unseen:
            raise DataError(f"label '{unseen[0]}' stands in the {split} rows but never in training; remove its rows")


def _class_task(splits: Splits, index: int, labels: tuple[str, ...]) -> Task:
    parts: dict[str, Examples | None] = {"test": None, "validation": None}
    for split, examples in splits.items():
        rows = [examples.rows_by_label[label] for label in labels if label in examples.rows_by_label]
        if len(rows) < len(labels):
            lost = next(label for label in labels if label not in examples.rows_by_label)
            raise DataError(f"class '{lost}' has training rows but none in the {split} split; add some")
        parts[split] = examples.select(np.sort(np.concatenate(rows)))
    train = parts["train"]
    assert train is not None
    return Task(index, f"task-{index + 1:02d}", labels, train, parts["test"], parts["validation"])


def _column_task(splits: Splits, index: int, value: str) -> Task:
    parts: dict[str, Examples | None] = {"test": None, "validation": None}
    for split, examples in splits.items():
        rows = np.flatnonzero(np.asarray(_groups(examples), dtype=object) == value)
        if not len(rows):
            raise DataError(f"task '{value}' has training rows but none in the {split} split; add some")
        parts[split] = examples.select(rows)
    train = parts["train"]
    assert train is not None
    return Task(index, value, train.classes, train, parts["test"], parts["validation"])


def _check_order(order: Sequence[str], values: Sequence[str]) -> None:
    unknown = [value for value in order if value not in values]
    if unknown:
        raise DataError(f"no training row belongs to task '{unknown[0]}'; {nearest(unknown[0], values)}")
    if len(set(order)) < len(order) or not order:
        raise DataError("the order of tasks must name each task once and at least one")


def _groups(examples: Examples) -> list[str]:
    return [] if examples.groups is None else [str(value) for value in examples.groups]


def _shift_ids(examples: Examples, offsets: dict[str, int], split: str) -> Examples:
    shifted = examples.ids + offsets[split]
    offsets[split] = int(shifted.max()) + 1
    return dataclasses.replace(examples, ids=shifted)
