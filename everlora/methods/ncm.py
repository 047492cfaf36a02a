"""Nearest class mean on a frozen encoder: nothing is trained, nothing can be forgotten.

The score of a class is `2 m.f - |m|^2`, which orders classes as the Euclidean distance from the feature `f` to the
class mean `m` does, and is linear in `f`. Means are running sums: a class that returns is averaged over all its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from everlora.errors import NumericError
from everlora.heads import HeadRows, competing, rows_of_means
from everlora.methods.base import Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.forgetting import INSEPARABLE, Forgetting, forget_sums
from everlora.methods.keys import task_key, tasks_in
from everlora.methods.registry import register

__all__ = ["NearestClassMean", "NearestClassMeanOptions"]


@dataclass(frozen=True)
class NearestClassMeanOptions:
    """Options of the nearest class mean.

    Attributes:
        metric: `euclidean` on the features, or `cosine`: features and means scaled to length 1.
    """

    metric: Literal["euclidean", "cosine"] = "cosine"


@register("ncm")
class NearestClassMean(Method):
    """Class means of frozen features (Mensink et al., 2013)."""

    options_type: ClassVar[type] = NearestClassMeanOptions

    def __init__(self, options: NearestClassMeanOptions, encoder: Encoder, *, seed: int) -> None:
        self.options = options
        self.encoder = encoder
        self.fixed_features = True
        self.tasks: list[tuple[int, ...]] = []
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []
        self._is_gathering = False

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Make room for the task's sums."""
        self.tasks.append(task.classes)
        self.sums.append(torch.zeros(len(task.classes), self.encoder.feature_dim, dtype=torch.float64))
        self.counts.append(torch.zeros(len(task.classes), dtype=torch.int64))

    def loss(self, batch: Batch) -> Loss:
        """Nothing is trained: never called, because `parameters` is empty."""
        raise NotImplementedError("the nearest class mean has no parameters to train")

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's features to the sums."""

        def add(batch: Batch, features: Tensor) -> None:
            places = (batch.labels.cpu()[:, None] == torch.tensor(task.classes)).int().argmax(dim=1)
            self.sums[-1].index_add_(0, places, self._scaled(features).double().cpu())
            self.counts[-1].index_add_(0, places, torch.ones_like(places))

        self._is_gathering = True
        collect(add, stage="class means", augment=False)
        self._is_gathering = False  # a head of statistics makes a pass of its own next
        self.sums[-1], self.counts[-1] = (self.processes.sum(total) for total in (self.sums[-1], self.counts[-1]))
        if not bool(torch.isfinite(self.sums[-1]).all()):
            raise NumericError(f"task '{task.name}' gave features that are not finite; check its rows and the model.")

    def gathered(self) -> State | None:
        """Sums and counts of the task so far, while they are made."""
        if not self._is_gathering:
            return None
        return {"sums": self.sums[-1], "counts": self.counts[-1]}

    def resume_gathering(self, state: State) -> None:
        """Go on from such sums and counts."""
        self.sums[-1], self.counts[-1] = state["sums"], state["counts"]

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Scores that are linear in the (scaled) features."""
        features = self.features(batch)
        weight, bias = (tensor.to(features.device) for tensor in self._rows())
        scores = self._scaled(features).float() @ weight.T + bias
        return competing(scores, None if task is None else self.tasks[task])

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """None."""
        return {}

    def head_rows(self) -> HeadRows:
        """One row a class."""
        weight, bias = self._rows()
        return HeadRows(weight, bias, tuple(range(len(bias))), normalize=self.options.metric == "cosine")

    def stored_parameters(self) -> int:
        """Those of the encoder: class means are statistics."""
        return self.encoder.num_parameters

    def state(self) -> State:
        """Classes, sums and counts of each task: written once, added up on use."""
        state: State = {}
        for index, classes in enumerate(self.tasks):
            state[task_key(index, "classes")] = list(classes)
            state[task_key(index, "sums")] = self.sums[index]
            state[task_key(index, "counts")] = self.counts[index]
        return state

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        for index in range(tasks_in(state, "classes")):
            self.tasks.append(tuple(state[task_key(index, "classes")]))
            self.sums.append(state[task_key(index, "sums")])
            self.counts.append(state[task_key(index, "counts")])

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let the means of classes go: such a class is never predicted again, unless it is learned again."""
        if not request.classes:
            request.remains(INSEPARABLE)
        return forget_sums(request, "sums", "counts")

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Weight `(classes, d)` and bias `(classes,)`; a class without rows can never win."""
        size = 1 + max(c for classes in self.tasks for c in classes)
        sums = torch.zeros(size, self.encoder.feature_dim, dtype=torch.float64)
        counts = torch.zeros(size, dtype=torch.int64)
        for classes, part, count in zip(self.tasks, self.sums, self.counts, strict=True):
            sums.index_add_(0, torch.tensor(classes), part)
            counts.index_add_(0, torch.tensor(classes), count)
        means = sums / counts.clamp(min=1)[:, None]
        if self.options.metric == "cosine":
            means = nn.functional.normalize(means, dim=1)
        return rows_of_means(means, counts)

    def _scaled(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=1) if self.options.metric == "cosine" else features
