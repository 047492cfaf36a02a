"""Passes over the rows of a task, which its method asks for before and after training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everlora.methods.base import Batch, TaskInfo
from everlora.streams.keyed import fold_key
from everlora.training.data import TaskData

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Collector"]


class Collector:
    """A method's passes over the current task's training rows (see `Collect`).

    Args:
        trainer: makes batches and runs the encoder.
        task: the task.
        data: its training rows.
        validation: rows kept from training, if any.
    """

    def __init__(self, trainer: TaskTrainer, task: TaskInfo, data: TaskData, validation: TaskData | None) -> None:
        self.trainer = trainer
        self.task = task
        self.data = data
        self.validation = validation

    def rows(self, numbers: Tensor | None = None) -> tuple[Any, Tensor]:
        """Rows as they were encoded, and their labels; see `Collect`."""
        chosen = torch.arange(len(self.data)) if numbers is None else numbers.cpu()
        return self.data.encoded.select(chosen), self.data.labels[chosen]

    def __call__(
        self,
        visit: Callable[[Batch, Tensor], None] | None = None,
        *,
        stage: str,
        before: Callable[[Batch], None] | None = None,
        augment: bool = True,
        max_batches: int | None = None,
        validation: bool = False,
    ) -> int:
        """Pass over the rows; of several processes each visits some of the batches, see `Collect`."""
        started = time.monotonic()
        data = self.validation if validation else self.data
        if data is None:
            return 0
        # the epoch of a pass lies below 0 and is its own, so its draws differ from those of training
        epoch = -1 - fold_key(stage) % 1_000_003 if augment and not validation else None
        trainer, saver, group = self.trainer, self.trainer.saver, self.trainer.processes
        trainer.backbone.eval()
        batches = trainer.row_batches(data, max_batches)
        done, seen = saver.enter_pass(stage)
        while done < len(batches):
            # one batch for each process at a time, so that all know of the same place in the pass
            now = batches[done : done + group.size]
            for rows in group.own(now):
                self._visit(trainer.batch(data, rows, epoch=epoch), visit, before)
            done, seen = done + len(now), seen + sum(map(len, now))
            saver.after_batch(stage, done, seen)
            trainer.progress(stage, done, len(batches))
        trainer.collect_seconds += time.monotonic() - started
        return seen

    def _visit(
        self, batch: Batch, visit: Callable[[Batch, Tensor], None] | None, before: Callable[[Batch], None] | None
    ) -> None:
        if before is not None:
            before(batch)
        encoded = self.trainer.encoded(batch)
        if visit is not None and encoded.features is not None:
            visit(encoded, encoded.features)
