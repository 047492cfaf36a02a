"""Products of low-rank factors that come in groups, as those of a grouped convolution do.

With g groups, `down` is `(g * rank, in)`, the rows of the first group first, and `up` is `(out, rank)`; each group of
`out / g` rows of `up` multiplies its own `rank` rows of `down`. One group is the plain product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_product", "join_rows", "per_group"]


def per_group(factor: Tensor, groups: int) -> Tensor:
    """View `(groups * n, m)` as `(groups, n, m)`."""
    return factor.reshape(groups, factor.shape[0] // groups, factor.shape[1])


def join_rows(downs: Sequence[Tensor], groups: int) -> Tensor:
    """Put the rows of several `down` below each other, group by group."""
    if groups == 1:
        return torch.cat(list(downs))
    return torch.cat([per_group(down, groups) for down in downs], dim=1).flatten(0, 1)


def add_product(
    total: Tensor, up: Tensor, down: Tensor, *, groups: int = 1, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Compute `total + scale * up @ down`.

    Args:
        total: `(out, in)`.
        up: `(out, rank)`, the dtype of `total`.
        down: `(groups * rank, in)`, likewise.
        groups: see above.
        scale: see above.
        out: `(out, in)`, contiguous, takes the result; `total` itself where it is None.

    Returns:
        What took the result.
    """
    if groups == 1:
        if out is None:
            return total.addmm_(up, down, alpha=scale)
        return torch.addmm(total, up, down, alpha=scale, out=out)
    target = total if out is None else out
    parts = (per_group(t, groups) for t in (total, up, down))
    torch.baddbmm(*parts, alpha=scale, out=per_group(target, groups))
    return target
