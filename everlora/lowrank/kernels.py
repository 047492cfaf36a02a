"""The working weight of a convolution as a function of its factors, so that autograd can do the rest.

A convolution's backward pass gives the gradient G of its weight by one product of the size of the forward pass. With
the kernels written as rows, the factors and coefficients then receive thin products of G, whatever the batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlora.lowrank.grouped import per_group
from everlora.lowrank.precision import without_autocast
from everlora.lowrank.scaled_products import sum_by_block
from everlora.lowrank.working import PastFactors

__all__ = ["trained_kernel"]

Gradients = tuple[Tensor | None, ...]


def trained_kernel(
    up: Tensor,
    down: Tensor,
    *,
    weight: Tensor,
    groups: int,
    scale: float,
    magnitudes: tuple[Tensor, PastFactors] | None,
) -> Tensor:
    """Return the working weight, with gradients to the factors and coefficients.

    Args:
        up: `(out, rank)`, the current block.
        down: `(groups * rank, in)`.
        weight: `(out, in, k1, k2)`, refreshed for this forward pass; constant.
        groups: of the factors.
        scale: what the current block counts with, without magnitudes.
        magnitudes: the coefficients `(blocks + 1,)` of all blocks, and the past; None without.

    Returns:
        The weight, in the same memory.
    """
    coefficients, past = (None, None) if magnitudes is None else magnitudes
    result = _TrainedKernel.apply(up, down, coefficients, past, weight, groups, scale)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


class _TrainedKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        up: Tensor,
        down: Tensor,
        coefficients: Tensor | None,
        past: PastFactors | None,
        weight: Tensor,
        groups: int,
        scale: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(up, down, coefficients)
        ctx.past, ctx.groups, ctx.scale = past, groups, scale
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Gradients:
        if gradient is None:
            return (None,) * 7
        up, down, coefficients = ctx.saved_tensors
        needs_up, needs_down, needs_coefficients = ctx.needs_input_grad[:3]
        scale = ctx.scale if coefficients is None else coefficients[-1]
        with without_autocast(gradient.device):
            groups = ctx.groups
            full = per_group(gradient.flatten(1).to(up.dtype), groups)
            rows = per_group(down, groups)
            back = per_group(up, groups).mT @ full
            shares = None
            if needs_coefficients:
                past = ctx.past
                products = per_group(past.up, groups).mT @ full
                columns = products.mul_(per_group(past.down, groups)).sum(dim=(0, 2))
                shares = sum_by_block(columns, past, (back * rows).sum(), coefficients)
            up_gradient = (full @ rows.mT).flatten(0, 1).mul_(scale) if needs_up else None
            down_gradient = back.flatten(0, 1).mul_(scale) if needs_down else None
        return up_gradient, down_gradient, shares, None, None, None, None
