"""Ideas that `heads.py --idea` tries and that are no options of everlora, as none of them paid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from everlora import Learner
from everlora.heads import TaskHeads

__all__ = ["IDEAS", "AverageOfTasks", "squared_loss"]

IDEAS = ("squared_loss", "average")
"""`squared_loss` trains towards the indicators that ridge regression fits; `average` takes features by the mean over
tasks of a method's factors, while the training goes on from the newest."""


def _squared(self: TaskHeads, rows: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the newest task's rows, summed over its classes, mean over the batch."""
    own = torch.tensor(self.classes[-1], device=labels.device)
    wanted = (labels[:, None] == own[None, :]).float()
    return nn.functional.mse_loss(rows[:, rows.shape[1] - len(own) :].float(), wanted) * len(own)


@contextmanager
def squared_loss() -> Iterator[None]:
    """Within this context trained heads learn indicators by squared error instead of classes by cross-entropy."""
    with mock.patch.object(TaskHeads, "rows_loss", _squared):
        yield


class AverageOfTasks:
    """The mean over tasks of the factors that a method with one branch for all tasks trains."""

    def __init__(self, learner: Learner) -> None:
        self._model = learner.backbone.model
        self._means: dict[str, Tensor] = {}
        self._tasks = 0

    def add_task(self) -> None:
        """Count the factors as they are now in."""
        self._tasks += 1
        for name, factor in self._factors():
            mean = self._means.setdefault(name, torch.zeros_like(factor))
            mean += (factor.detach() - mean) / self._tasks

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the means are the model's factors; before the first task nothing changes."""
        kept = {name: factor.detach().clone() for name, factor in self._factors() if name in self._means}
        self._put(self._means)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, factor in self._factors():
                if name in values:
                    factor.copy_(values[name])

    def _factors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if name.endswith((".down", ".up")):
                yield name, tensor
