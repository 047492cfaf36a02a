"""What rows kept from training say while a task is trained: accuracy, or the mean loss of a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from everlora.backbones.batches import IGNORED
from everlora.errors import UnsupportedError
from everlora.heads import LanguageHead
from everlora.methods.base import Batch, TaskInfo
from everlora.training.data import TaskData

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Validation", "make_validation"]


class Validation:
    """Accuracy on kept rows, the task given.

    Attributes:
        name: of the figure in the log.
        sign: 1 where more is better, -1 where less is.
        has_curve: whether the figure is an accuracy, of which reports draw curves.
    """

    name: ClassVar[str] = "validation"
    sign: ClassVar[int] = 1
    has_curve: ClassVar[bool] = True

    def __init__(self, trainer: TaskTrainer, task: TaskInfo, data: TaskData) -> None:
        self.trainer = trainer
        self.task = task
        self.data = data

    def measure(self) -> float:
        """Measure with the weights that predict, as they are now; of several processes each measures some batches."""
        total, weight = 0.0, 0.0
        with self.trainer.method.predicting(), torch.no_grad():
            for value, count in self._figures():
                total, weight = total + value, weight + count
        sums = self.trainer.processes.sum(torch.tensor([total, weight], dtype=torch.float64))
        return float(sums[0] / sums[1])

    def _figures(self) -> Iterator[tuple[float, int]]:
        """Yield, for each batch, the sum of the figure and over how many."""
        for rows, batch in self.trainer.batches(self.data, "validation"):
            with self.trainer.autocast():
                scores = self.trainer.method.logits(batch, self.task.index)
            yield float((scores.argmax(dim=1).cpu() == self.data.labels[rows]).sum()), len(rows)


class _TokenLoss(Validation):
    """Mean negative log-likelihood of all labelled tokens of kept rows, in nats."""

    name = "validation_nll"
    sign = -1
    has_curve = False

    def __init__(self, trainer: TaskTrainer, task: TaskInfo, data: TaskData) -> None:
        super().__init__(trainer, task, data)
        output = trainer.backbone.output_head
        if output is None:
            raise UnsupportedError(f"{trainer.backbone.architecture} has no output layer to measure tokens with.")
        self._head = LanguageHead(output)

    def _figures(self) -> Iterator[tuple[float, int]]:
        for _, batch in self.trainer.batches(self.data, "validation"):
            count = int((batch.labels[:, 1:] != IGNORED).sum())
            yield count * float(self._loss(batch)), count

    def _loss(self, batch: Batch) -> Tensor:
        with self.trainer.autocast():
            return self._head.loss(self.trainer.backbone.features(batch.inputs), batch.labels)


def make_validation(trainer: TaskTrainer, task: TaskInfo, data: TaskData | None) -> Validation | None:
    """Return what measures the kept rows of a task; None without any."""
    if data is None or not len(data):
        return None
    kind = _TokenLoss if trainer.backbone.modality == "language" else Validation
    return kind(trainer, task, data)
