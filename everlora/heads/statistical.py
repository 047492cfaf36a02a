"""Heads that are computed from statistics of the features: nothing is trained, so nothing of them can be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from everlora.heads.class_means import competing, rows_of_means
from everlora.heads.discriminant import DiscriminantFit, fit_discriminant
from everlora.heads.expansion import Expansion
from everlora.heads.ridge import RidgeFit, fit_ridge
from everlora.heads.statistics import FeatureStatistics
from everlora.heads.task_heads import HeadRows

__all__ = ["HeadOptions", "StatisticalHead", "held_out"]

_HELD_OUT = 5  # of so many rows one judges


def held_out(rows: Tensor) -> Tensor:
    """Which rows are not fitted at first, but choose a penalty: `(n,)` bool, from their numbers `(n,)`."""
    return rows % _HELD_OUT == _HELD_OUT - 1


@dataclass(frozen=True)
class HeadOptions:
    """What turns features into scores of classes.

    Attributes:
        head: `linear`, one trained head a task (the published methods); `cosine`, the same on features and rows of
            length 1, from class means on; `ncm`, nearest class mean; `lda`, linear discriminant analysis, and `ridge`,
            ridge regression, both from the Gram matrix and class sums of all tasks; `ridge_random_features`, the
            latter on random ReLU features. All but the first two are fitted after a task's training, which goes on as
            with `linear`.
        head_features: number of random ReLU features.
        head_penalty: of the ridge, in units of the Gram matrix's mean eigenvalue; of `lda` in those of the covariance
            within classes. None chooses it on a fifth of the training rows of all tasks, and fits all rows with it.
        head_drift: `linear` moves the statistics of earlier tasks along with the features, by a linear map fitted to
            the current task's rows before and after its training; `measure` only says how far features moved, and how
            much of that such a map explains; `none` saves the pass before training.
        adapt_tasks: how many tasks, the first ones, the method learns from; the features then stay as they are, and
            later tasks enter the statistics alone, which costs one pass over their rows. None adapts to every task;
            needs a head of statistics.
    """

    head: Literal["linear", "cosine", "ncm", "lda", "ridge", "ridge_random_features"] = "linear"
    head_features: Annotated[int, Field(ge=1)] = 2000
    head_penalty: Annotated[float, Field(gt=0)] | None = None
    head_drift: Literal["none", "measure", "linear"] = "none"
    adapt_tasks: Annotated[int, Field(ge=1)] | None = None


class StatisticalHead:
    """Scores of classes from statistics of expanded features.

    Args:
        options: what it is.
        feature_dim: length of a feature vector.
        seed: of the random features.

    Attributes:
        expand: turns features into what is summed up.
        tasks: class indices of each task.
    """

    def __init__(self, options: HeadOptions, feature_dim: int, *, seed: int) -> None:
        self.options = options
        self._means = options.head == "ncm"
        random = options.head_features if options.head == "ridge_random_features" else 0
        self.expand = Expansion(feature_dim, random, seed, normalize=self._means, bias=options.head.startswith("ridge"))
        self.fitted, self.held_out = self._empty(), self._empty()
        self.tasks: list[tuple[int, ...]] = []
        self._fit: RidgeFit | DiscriminantFit | None = None
        self._scores: tuple[Tensor, Tensor] | None = None

    def _empty(self) -> FeatureStatistics:
        return FeatureStatistics(self.expand.dim, gram=not self._means)

    def gathering(self) -> StatisticalHead:
        """An empty head of the same kind, to gather the rows of one task."""
        twin = StatisticalHead(self.options, self.expand.features, seed=self.expand.seed)
        twin.expand = self.expand
        return twin

    def update(self, features: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Add rows: `features (n, d)`, `labels (n,)` and `rows (n,)`, their numbers, by which a fifth is held out."""
        expanded = self.expand(features)
        held = held_out(rows).to(features.device)
        if self._means:
            held = torch.zeros_like(held)
        for statistics, chosen in ((self.fitted, ~held), (self.held_out, held)):
            statistics.update(expanded[chosen], labels.to(features.device)[chosen])

    def add_task(self, classes: Sequence[int], part: StatisticalHead) -> None:
        """Add a task and what was gathered of it."""
        self.tasks.append(tuple(int(c) for c in classes))
        self.fitted.merge(part.fitted)
        self.held_out.merge(part.held_out)
        for statistics in (self.fitted, self.held_out):
            statistics.grow(self.num_classes())
        self._fit = self._scores = None

    def map(self, matrix: Tensor) -> None:
        """Move all statistics along with expanded features that became `matrix f`, `(dim, dim)` float64."""
        self.fitted, self.held_out = self.fitted.mapped(matrix), self.held_out.mapped(matrix)
        self._fit = self._scores = None

    def num_classes(self) -> int:
        """Number of classes, assuming indices are dense from 0."""
        return 1 + max((c for classes in self.tasks for c in classes), default=-1)

    def counts(self) -> Tensor:
        """Rows of each class, `(classes,)`."""
        return self.fitted.counts + self.held_out.counts

    def fit(self) -> RidgeFit | DiscriminantFit | None:
        """The classifier of all rows so far, with the penalty chosen; None for class means."""
        if self._fit is None and not self._means:
            fit = fit_discriminant if self.options.head == "lda" else fit_ridge
            self._fit = fit(self.fitted, self.held_out, penalty=self.options.head_penalty)
        return self._fit

    def class_logits(self, features: Tensor, task: int | None = None) -> Tensor:
        """Score of every class, `(n, classes)` float32; `-inf` for one without rows, or outside of `task`.

        Scores of a ridge regression are divided by the mean squared error of an indicator on the rows held out: they
        are the log posterior, up to a constant, of indicators with normal errors of that variance.

        Raises:
            DataError: every class that could be the answer was forgotten.
        """
        weight, bias = (tensor.to(features.device) for tensor in self._rows())
        scores = self.expand(features).to(weight.dtype) @ weight.T + bias
        return competing(scores, None if task is None else self.tasks[task]).float()

    def rows(self) -> HeadRows:
        """The head as plain rows."""
        weight, bias = self._rows()
        if self.expand.bias:
            weight, bias = weight[:, :-1], bias + weight[:, -1]
        projection = self.expand.projection if self.expand.random else None
        return HeadRows(
            weight.float(), bias.float(), tuple(range(len(bias))), self.expand.normalize, projection=projection
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Weight `(classes, dim)` and bias `(classes,)` float32, on expanded features."""
        if self._scores is None:
            counts = self.counts()
            fit = self.fit()
            if fit is None:
                self._scores = rows_of_means(functional.normalize(self.fitted.means(), dim=1), counts)
            elif isinstance(fit, DiscriminantFit):
                self._scores = fit.weight.float(), fit.bias.float()
            else:
                absent = torch.where(counts > 0, 0.0, -torch.inf)
                self._scores = (fit.weight / self._variance(fit)).float(), absent.float()
        return self._scores

    def _variance(self, fit: RidgeFit) -> float:
        error = min(fit.errors, default=1.0)
        return max(error / max(self.num_classes(), 1), 1e-4)

    def state(self) -> dict[str, Any]:
        """Statistics by name, and the classes of each task."""
        parts = {"fitted": self.fitted, "held_out": self.held_out}
        tensors = {f"{name}/{kind}": t for name, part in parts.items() for kind, t in part.state().items()}
        return {**tensors, "tasks": [list(classes) for classes in self.tasks]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, part in (("fitted", self.fitted), ("held_out", self.held_out)):
            part.load_state({k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")})
        self.tasks = [tuple(classes) for classes in state["tasks"]]
        self._fit = self._scores = None
