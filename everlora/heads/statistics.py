"""Sums over features that make a classifier: a Gram matrix, one sum a class, and counts; streamed and merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everlora.errors import NumericError, ShapeError
from everlora.lowrank.precision import full_precision, normal_mode

__all__ = ["FeatureStatistics"]


class FeatureStatistics:
    """What a classifier on frozen features needs to know of all rows it ever saw, in float64.

    Sums do not depend, beyond rounding, on the order of the rows, nor on how they were spread over tasks, processes
    and machines: statistics of parts are merged by adding them up.

    Args:
        dim: length of a feature vector.
        gram: keep the `(dim, dim)` matrix of second moments; means alone do without.

    Attributes:
        gram: sum of `f f^T` over all rows, `(dim, dim)`; None where it is not kept.
        sums: sum of the features of each class, `(classes, dim)`.
        counts: rows of each class, `(classes,)` int64.
        forgotten: degrees of freedom of classes whose sums and counts were taken out on request: how their rows
            scattered about their mean stays in `gram`.
    """

    def __init__(self, dim: int, *, gram: bool = True) -> None:
        self.dim = dim
        self.gram = torch.zeros(dim, dim, dtype=torch.float64) if gram else None
        self.sums = torch.zeros(0, dim, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.forgotten = 0

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter of rows about the means of their classes."""
        return self.count - int((self.counts > 0).sum()) + self.forgotten

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.counts.sum())

    def grow(self, classes: int) -> None:
        """Make room for so many classes; those that are there stay."""
        more = classes - len(self.counts)
        if more > 0:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(more, self.dim)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: `(n, dim)`.
            labels: `(n,)` class indices; new ones are given room.

        Raises:
            ShapeError: a shape does not fit.
            NumericError: a feature is not finite; nothing was added.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or len(labels) != len(features):
            raise ShapeError(
                f"expected features (n, {self.dim}) and n labels, got {tuple(features.shape)}, {tuple(labels.shape)}."
            )
        if not len(labels):
            return
        with normal_mode(), full_precision(features.device):
            rows, numbers = features.detach().cpu().double(), labels.cpu()
            if not bool(torch.isfinite(rows).all()):
                raise NumericError("features that are not finite cannot be summed; check the rows and the model.")
            self.grow(int(numbers.max()) + 1)
            if self.gram is not None:
                self.gram += rows.T @ rows
            self.sums.index_add_(0, numbers, rows)
            self.counts += torch.bincount(numbers, minlength=len(self.counts))

    def merge(self, other: FeatureStatistics) -> None:
        """Add the rows that other statistics have seen.

        Raises:
            ShapeError: they are of another kind.
        """
        if other.dim != self.dim or (other.gram is None) != (self.gram is None):
            raise ShapeError(f"cannot merge statistics of {other.dim} features into those of {self.dim}.")
        self.grow(len(other.counts))
        if self.gram is not None and other.gram is not None:
            self.gram += other.gram
        self.sums[: len(other.sums)] += other.sums
        self.counts[: len(other.counts)] += other.counts
        self.forgotten += other.forgotten

    def copy(self) -> FeatureStatistics:
        """Statistics of the same rows, which can be changed apart."""
        twin = FeatureStatistics(self.dim, gram=self.gram is not None)
        twin.merge(self)
        return twin

    def mapped(self, matrix: Tensor) -> FeatureStatistics:
        """Statistics of the rows `f -> matrix f`, as if each had been mapped before it was added.

        Args:
            matrix: `(dim, dim)` float64.
        """
        twin = FeatureStatistics(self.dim, gram=self.gram is not None)
        twin.gram = None if self.gram is None else matrix @ self.gram @ matrix.T
        twin.sums, twin.counts, twin.forgotten = self.sums @ matrix.T, self.counts.clone(), self.forgotten
        return twin

    def means(self) -> Tensor:
        """Mean of each class, `(classes, dim)`; zeros for a class without rows."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def state(self) -> dict[str, Tensor]:
        """Gram matrix, sums and counts by name, and `forgotten` where something was."""
        gram = {} if self.gram is None else {"gram": self.gram.clone()}
        forgotten = {"forgotten": torch.tensor(self.forgotten)} if self.forgotten else {}
        return {**gram, "sums": self.sums.clone(), "counts": self.counts.clone(), **forgotten}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.gram = None if self.gram is None else state["gram"].clone()
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.forgotten = int(state.get("forgotten", 0))
