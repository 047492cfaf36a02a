"""A task that was begun and is not finished: where its checkpoints go, and whether it is the one to go on with."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import everlora
from everlora.errors import DataError, OptionError
from everlora.settings import Settings
from everlora.store import LearnerStore, discard_checkpoints, newest_checkpoint, write_checkpoint
from everlora.streams import Examples
from everlora.training import Checkpoint, Interval, processes

__all__ = ["TaskCheckpoints", "open_checkpoints"]

logger = logging.getLogger("everlora.learner")

Rows = tuple[Examples, Examples | None]
"""Rows to learn from, and rows kept from them."""

_DIFFERENCES = {
    "name": "another name",
    "data": "other data",
    "validation": "other validation rows",
    "training": "other training options",
    "learner": "another state of the learner",
    "everlora": "another version of everlora",
}


class TaskCheckpoints:
    """The checkpoints of one task in a learner directory.

    Args:
        root: the directory.
        task: what the task is begun with, plain JSON.
        interval: how often one is due.
        resumed: what the task goes on from.
        writes: whether this process writes; of several, one does.
    """

    def __init__(
        self, root: Path, task: Mapping[str, Any], interval: Interval, *, resumed: Checkpoint | None, writes: bool
    ) -> None:
        self.resumed: Checkpoint | None = resumed
        self._root = root
        self._task = task
        self._interval = interval
        self._writes = writes
        self._last_step, self._step, self._last_time = 0, 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint; `step` counts the steps, and batches of passes, so far."""
        self._step = step
        return self._writes and self._interval.is_over(step - self._last_step, time.monotonic() - self._last_time)

    def save(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint; False where none are wanted.

        Raises:
            StoreError: it could not be written.
        """
        if not self._writes or self._interval.never:
            return False
        self.resumed = None  # it is in its place, or out of date, and need not fill the memory
        try:
            write_checkpoint(self._root, task=self._task, values=checkpoint.values, arrays=checkpoint.arrays)
        finally:  # a disk that refuses is not asked again at each step
            self._last_step, self._last_time = self._step, time.monotonic()
        return True


def open_checkpoints(
    store: LearnerStore, settings: Settings, *, name: str, rows: Rows, discard: bool, device: str
) -> TaskCheckpoints:
    """Find the checkpoint that a task goes on from, if it was begun before, and be ready to write more.

    Args:
        store: the learner's directory, in the first process open for writing.
        settings: the task is learned with.
        name: of the task.
        rows: of the task.
        discard: move what is left of an unfinished task to `removed/`.
        device: decides how several processes talk.

    Raises:
        DataError: another task is unfinished, with other data.
        OptionError: another task is unfinished, with another name or other options.
        ProcessError: another one of the processes failed.
    """
    group = processes(device)
    task = _identity(store, settings, name, rows)
    found = None
    with group.together():
        if discard and group.is_first and (aside := discard_checkpoints(store.root)) is not None:
            logger.warning("the unfinished task was moved to %s", aside)
    with group.together():  # all have read the same one before the first of them writes another
        found = newest_checkpoint(store.root)
        if found is not None:
            _require_same(store.root, found.task, task)
            _compare_recorded(found.task.get("recorded", {}), _recorded(device))
    return TaskCheckpoints(
        store.root,
        {**task, "recorded": _recorded(device)},
        Interval.of(settings.learner.checkpoint_every),
        resumed=None if found is None else Checkpoint(found.arrays, found.values),
        writes=group.is_first,
    )


def _identity(store: LearnerStore, settings: Settings, name: str, rows: Rows) -> dict[str, Any]:
    """What a task is begun with: with the same, it can be gone on with."""
    data, kept = rows
    return {
        "index": len(store.tasks),
        "name": name,
        "learner": store.digest,
        "data": _fingerprint(data),
        "validation": None if kept is None else _fingerprint(kept),
        "training": settings.as_parts()["training"],
        "everlora": everlora.__version__,
    }


def _recorded(device: str) -> dict[str, Any]:
    """What may change the last bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "processes": processes(device).size,
        "device": torch.device(device).type,
        "torch": str(torch.__version__),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _fingerprint(rows: Examples) -> str:
    """Of rows and their ids, which key what is drawn for each."""
    digest = hashlib.sha256(rows.fingerprint.encode())
    digest.update(np.ascontiguousarray(rows.ids).data)
    return digest.hexdigest()


def _require_same(root: Path, found: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    """Refuse to go on with an unfinished task as if it were another one."""
    different = [key for key in _DIFFERENCES if found.get(key) != task[key]]
    if different:
        kind = DataError if {"data", "validation"} & set(different) else OptionError
        words = ", ".join(_in_words(key, found.get(key), task[key]) for key in different)
        raise kind(
            f"{root} has an unfinished task '{found.get('name')}', begun with {words}; go on with what it was begun "
            "with, or put it aside with --discard-unfinished (discard_unfinished=True)."
        )


def _compare_recorded(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say where last bits may differ."""
    for key, value in now.items():
        if key in before and before[key] != value:  # earlier versions recorded less
            parts = (key, before.get(key), value)
            logger.warning("a task begun with %s=%s goes on with %s: last bits of its result may differ", *parts)


def _in_words(key: str, before: Any, now: Any) -> str:
    if key != "training" or not isinstance(before, Mapping):
        return _DIFFERENCES[key]
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"{_DIFFERENCES[key]} ({', '.join(f'{name}={before.get(name)}' for name in names)})"
