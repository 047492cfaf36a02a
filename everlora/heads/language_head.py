"""The output layer of a causal language model, in the place that a classifier has elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from everlora.heads.task_heads import HeadRows

__all__ = ["LanguageHead"]


class LanguageHead:
    """Scores of the next token, by the model's own output layer: one for all tasks, with nothing to add for a task.

    It has the verbs of `TaskHeads`, so that methods need not know which of the two they have. Features are the last
    hidden states `(n, T, d)`, labels token ids `(n, T)`, -100 where nothing is to be learned; position t predicts the
    label of position t + 1.

    Attributes:
        classes: one empty tuple for each task.

    Source: section 2 of the reference on I-LoRA, L_ce.
    """

    def __init__(self, output: nn.Module) -> None:
        self.output = output
        self.classes: list[tuple[int, ...]] = []

    def add_task(self, classes: Sequence[int] = (), generator: torch.Generator | None = None) -> None:
        """Count one more task."""
        self.classes.append(())

    def load_task(self, classes: Sequence[int] = ()) -> None:
        """Count one more task."""
        self.add_task()

    def first(self, count: int) -> LanguageHead:
        """The same: no task has an output layer of its own."""
        return self

    def task_rows(self, index: int) -> dict[str, Tensor]:
        """What a task adds: nothing."""
        return {}

    def freeze(self) -> None:
        """Nothing here is trained on its own."""

    def train_all(self) -> None:
        """Nothing here is trained on its own."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters in training: none."""
        return []

    def logits(self, features: Tensor) -> Tensor:
        """Scores of all tokens, `(..., d)` to `(..., vocabulary)`, float32."""
        weight = next(self.output.parameters(), None)
        fitting = features if weight is None or not weight.is_floating_point() else features.to(weight.dtype)
        scores: Tensor = self.output(fitting)
        return scores.float()

    def class_logits(self, features: Tensor, task: int | None = None) -> Tensor:
        """Scores of all tokens after each position."""
        return self.logits(features)

    def loss(self, features: Tensor, labels: Tensor, over: str = "local") -> Tensor:
        """Cross-entropy, the mean over all labelled tokens of the batch.

        Args:
            features: `(n, T, d)`.
            labels: `(n, T)`.
            over: without effect; there is one output layer.
        """
        scores, wanted = self._supervised(features, labels)
        return nn.functional.cross_entropy(scores, wanted)

    def joint_loss(self, features: Tensor, labels: Tensor, tasks: Tensor, over: str = "seen") -> Tensor:
        """The same over rows of several tasks."""
        return self.loss(features, labels)

    def outputs(self, features: Tensor, labels: Tensor, count: int) -> list[Tensor]:
        """What distillation keeps: scores `(N, vocabulary)` float32 at the positions that predict a label."""
        return [self._supervised(features, labels)[0]]

    def rows(self) -> HeadRows:
        """A classifier without rows."""
        return HeadRows(torch.zeros(0, 0), torch.zeros(0), ())

    def _supervised(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        following = labels[:, 1:]
        places = following != -100
        # only these positions go through the output layer, whose result is the largest tensor of a step
        return self.logits(features[:, :-1][places]), following[places]
