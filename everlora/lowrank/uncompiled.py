"""The one function that `torch.compile` calls without looking inside.

Which weight is current is found out from versions and identities of tensors, which no graph can hold. A module of its
own, because marking a function loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = ["forward_uncompiled"]


class _Layer(Protocol):
    def forward_eager(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""


def _forward(layer: _Layer, x: Tensor) -> Tensor:
    return layer.forward_eager(x)


# Runs the layer outside the graph: one break for each adapted layer.
forward_uncompiled = cast(Callable[[_Layer, Tensor], Tensor], torch.compiler.disable(_forward))  # type: ignore[no-untyped-call]
