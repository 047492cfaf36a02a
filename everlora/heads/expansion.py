"""Features of features: what a statistical head sums up in place of what the encoder gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Expansion"]


@dataclass(frozen=True)
class Expansion:
    """Turns features `(n, d)` into what a statistical head sums up, `(n, dim)`; nothing of it is trained.

    Attributes:
        features: d.
        random: number of random ReLU features `relu(P f)` in place of f; 0 for f itself. The rows of P are standard
            normal over `sqrt(d)`, drawn from the seed on the CPU, so that every process and machine has the same.
        seed: of the draw.
        normalize: scale f to length 1 first.
        bias: append a constant 1, so that no class has to pass through the origin.
    """

    features: int
    random: int = 0
    seed: int = 0
    normalize: bool = False
    bias: bool = True

    @property
    def dim(self) -> int:
        """Length of what comes out."""
        return (self.random or self.features) + self.bias

    @cached_property
    def projection(self) -> Tensor:
        """P, `(random, d)` float32."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.random, self.features, generator=generator) / math.sqrt(self.features)

    def __call__(self, features: Tensor) -> Tensor:
        """Expand `(n, d)`; float32 comes out, or float64 where that came in."""
        rows = features if features.dtype == torch.float64 else features.float()
        if self.normalize:
            rows = functional.normalize(rows, dim=1)
        if self.random:
            rows = functional.relu(rows @ self.projection.to(rows).T)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if self.bias else rows
