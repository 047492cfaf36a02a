"""How features moved while a task was learned, seen on that task's own rows: a linear map from old to new features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlora.errors import ShapeError
from everlora.heads.ridge import RidgePath

__all__ = ["Drift", "DriftSums"]

_PENALTIES = tuple(10.0**power for power in range(-6, 3))


@dataclass(frozen=True)
class Drift:
    """How features moved.

    Attributes:
        matrix: `(dim, dim)` float64; `matrix f` is the estimate of where the feature f moved to.
        relative: root of the mean squared movement over that of the old features.
        explained: share of the squared movement that the map explains on rows it was not fitted to, at most 1; with
            nothing to explain 0.
    """

    matrix: Tensor
    relative: float
    explained: float


class DriftSums:
    """Sums over rows seen before and after: merged over processes by adding them up.

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.sums = torch.zeros(2, 2, dim, dim, dtype=torch.float64)  # fitted or held out; old with old, move with old
        self.squares = torch.zeros(2, dtype=torch.float64)  # of the movement
        self.sizes = torch.zeros(2, dtype=torch.float64)  # of the old features

    def update(self, old: Tensor, new: Tensor, held: Tensor) -> None:
        """Add rows: `old` and `new` `(n, dim)`, and which of them, `(n,)` bool, only judge the map.

        Raises:
            ShapeError: the shapes differ.
        """
        if old.shape != new.shape:
            raise ShapeError(f"expected the same rows before and after, got {tuple(old.shape)} and {tuple(new.shape)}.")
        for part, chosen in enumerate((~held, held)):
            before = old[chosen].detach().cpu().double()
            move = new[chosen].detach().cpu().double() - before
            self.sums[part, 0] += before.T @ before
            self.sums[part, 1] += move.T @ before
            self.squares[part] += move.square().sum()
            self.sizes[part] += before.square().sum()

    def fit(self) -> Drift:
        """Fit `move = (matrix - 1) old` by ridge regression, its penalty chosen on the rows that judge.

        Where no penalty explains anything of their movement, the map is the identity.
        """
        total, judged = float(self.sizes.sum()), float(self.squares[1])
        relative = (float(self.squares.sum()) / total) ** 0.5 if total else 0.0
        path = RidgePath(self.sums[0, 0], self.sums[0, 1])
        errors = path.errors(self.sums[1, 0], self.sums[1, 1], _PENALTIES)
        best = min(range(len(errors)), key=lambda index: errors[index])
        identity = torch.eye(self.sums.shape[-1], dtype=torch.float64)
        if errors[best] >= 0:  # no better than nothing moving
            return Drift(identity, relative, 0.0)
        return Drift(identity + path.solution(_PENALTIES[best]), relative, -errors[best] / judged)
