"""Autograd functions of an adapted layer with magnitudes: the past is frozen, its coefficients are trained.

With `y = x W^T`, `W = W0 + sum_k c_k up_k down_k` and `g` the gradient of `y`, a coefficient receives
`<g^T x, up_k down_k>`, which costs either two thin products over all columns of the past or one product `g^T x` and
cheap contractions. Source: section 5 of the method page of SD-LoRA.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from everlora.errors import OptionError, nearest
from everlora.lowrank.precision import without_autocast
from everlora.lowrank.working import PastFactors, WorkingWeight

__all__ = [
    "GRADIENT_FORMS",
    "Branches",
    "factored_scaled",
    "folded_scaled",
    "known_form",
    "sum_by_block",
    "takes_dense",
]

GRADIENT_FORMS = ("auto", "thin", "dense")
_THIN_COST = 1.2  # a multiply-add of a thin product over one of a full product, measured on a CPU at widths 384, 768

Gradients = tuple[Tensor | None, ...]


class Branches(NamedTuple):
    """All blocks of a layer. `coefficients`: `(blocks + 1,)`, the last for the current block."""

    up: Tensor
    down: Tensor
    coefficients: Tensor
    past: PastFactors


def known_form(form: str) -> str:
    """Return `form`.

    Raises:
        OptionError: it is none of `GRADIENT_FORMS`.
    """
    if form not in GRADIENT_FORMS:
        raise OptionError(f"gradient_form={form!r} is not known; {nearest(str(form), GRADIENT_FORMS)}")
    return form


def takes_dense(form: str, tokens: int, size: tuple[int, int], ranks: tuple[int, int]) -> bool:
    """Say whether the gradients are computed from `g^T x`, by counts of multiply-adds where `form` is `"auto"`.

    Args:
        form: one of `GRADIENT_FORMS`.
        tokens: rows of `x`.
        size: `(out, in)`.
        ranks: of the past together, and of the current block, which takes twice as many thin products.
    """
    if form != "auto":
        return form == "dense"
    columns, full = ranks[0] + 2 * ranks[1], size[0] * size[1]
    return _THIN_COST * tokens * columns * (size[0] + size[1]) > (tokens + columns) * full


def folded_scaled(x: Tensor, bias: Tensor | None, branches: Branches, working: WorkingWeight, form: str) -> Tensor:
    """Multiply by the working weight, with gradients to `x`, `bias`, both factors and the coefficients.

    Of the activations only `x` is kept for the backward pass, however long the past.

    Args:
        x: `(..., in)` in the dtype of the product.
        bias: `(out,)` or None.
        branches: the blocks; the past is constant.
        working: holds the weight, refreshed for this forward pass.
        form: one of `GRADIENT_FORMS`.

    Returns:
        `(..., out)`.

    Raises:
        UnsupportedError: in the backward pass, when the working weight was rebuilt since.
    """
    up, down, coefficients, past = branches
    result = _FoldedScaled.apply(x, bias, up, down, coefficients, past, working, form)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


def factored_scaled(y: Tensor, x: Tensor, branches: Branches) -> Tensor:
    """Add all blocks to a base layer's output by thin products in the precision of the factors.

    For the backward pass `x down_past^T`, `(tokens, total_rank)`, is kept.

    Args:
        y: `(..., out)`, what the base layer gave.
        x: `(..., in)`, what it read.
        branches: the blocks; the past is constant.

    Returns:
        `(..., out)` in the dtype of `y`, rounded once.
    """
    return cast(Tensor, _FactoredScaled.apply(y, x, *branches))  # type: ignore[no-untyped-call]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _row_products(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `sum_n left_in right_in` in `dtype`; overwrites `left` where it has that dtype."""
    return left.to(dtype).mul_(right).sum(1)


def sum_by_block(columns: Tensor, past: PastFactors, last: Tensor, like: Tensor) -> Tensor:
    """Sum what the columns of the past receive by block, and put the current block's share behind.

    Args:
        columns: `(total_rank,)`.
        past: says which block each belongs to.
        last: the current block's share, a scalar.
        like: `(blocks + 1,)`, the coefficients.

    Returns:
        `(blocks + 1,)`, dtype and device of `like`.
    """
    total = torch.zeros_like(like)
    total.index_add_(0, past.columns, columns.to(total.dtype))
    total[-1] = last
    return total


class _Needs(NamedTuple):
    up: bool
    down: bool
    coefficients: bool


def _dense(g: Tensor, x: Tensor, branches: Branches, needs: _Needs) -> Gradients:
    """Return the gradients of up, down and coefficients from `G = g^T x`."""
    up, down, coefficients, past = branches
    full = (g.T @ x).to(up.dtype)
    back = up.T @ full
    shares = None
    if needs.coefficients:
        columns = _row_products(past.up.T @ full, past.down, up.dtype)
        shares = sum_by_block(columns, past, (back * down).sum(), coefficients)
    up_gradient = (full @ down.T).mul_(coefficients[-1]) if needs.up else None
    return up_gradient, back.mul_(coefficients[-1]) if needs.down else None, shares


class _Past(NamedTuple):
    """Products with the past, `(total_rank, tokens)`: `inner = down x^T` and `outer = up^T g^T`, which is used up."""

    inner: Tensor
    outer: Tensor


def _past_products(g: Tensor, x: Tensor, past: PastFactors) -> _Past:
    return _Past(past.down.to(x.dtype) @ x.T, past.up.to(g.dtype).T @ g.T)


def _thin(g: Tensor, x: Tensor, branches: Branches, needs: _Needs, products: _Past | None = None) -> Gradients:
    """Return the gradients of up, down and coefficients from products of rank-many rows, given where they are known."""
    up, down, coefficients, past = branches
    forth, back = down.to(x.dtype) @ x.T, up.to(g.dtype).T @ g.T
    shares = None
    if needs.coefficients:
        inner, outer = _past_products(g, x, past) if products is None else products
        columns, last = _row_products(outer, inner, up.dtype), (forth.to(up.dtype) * back).sum()
        shares = sum_by_block(columns, past, last, coefficients)
    up_gradient = (forth @ g).to(up.dtype).mul_(coefficients[-1]).T.contiguous() if needs.up else None
    return up_gradient, (back @ x).to(up.dtype).mul_(coefficients[-1]) if needs.down else None, shares


class _FoldedScaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        coefficients: Tensor,
        past: PastFactors,
        working: WorkingWeight,
        form: str,
    ) -> Tensor:
        needs_x, _, *needs = ctx.needs_input_grad[:5]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((x, up, down, coefficients) if any(needs) else (None,) * 4))
        # Neither the past nor the weight is an activation. The weight is overwritten at the next step, so it has a
        # stamp of its own.
        ctx.weight = working.weight_as(x.dtype) if needs_x else None
        ctx.past, ctx.form = past, form
        ctx.working, ctx.generation = working, working.generation
        with without_autocast(x.device):
            return functional.linear(x, working.weight_as(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Gradients:
        if gradient is None:
            return (None,) * 8
        ctx.working.require(ctx.generation, changed="magnitudes")
        x, up, down, coefficients = ctx.saved_tensors
        needs_x, needs_bias, *rest = ctx.needs_input_grad[:5]
        shares: Gradients = (None, None, None)
        with without_autocast(gradient.device):
            x_gradient = gradient @ ctx.weight if needs_x else None
            flat = _flat(gradient)
            bias_gradient = flat.sum(0) if needs_bias else None
            if any(rest):
                needs, branches = _Needs(*rest), Branches(up, down, coefficients, ctx.past)
                total = ctx.past.columns.numel() if needs.coefficients else 0
                size = (gradient.shape[-1], x.shape[-1])
                dense = takes_dense(ctx.form, flat.shape[0], size, (total, down.shape[0]))
                shares = (_dense if dense else _thin)(flat, _flat(x), branches, needs)
        return x_gradient, bias_gradient, *shares, None, None, None


class _FactoredScaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, up: Tensor, down: Tensor, coefficients: Tensor, past: PastFactors
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(x.dtype, up.dtype)
        with without_autocast(x.device):
            flat = _flat(x).to(dtype)
            total = _flat(y).to(dtype)
            inner = past.down.to(dtype) @ flat.T
            if past.columns.numel():
                total = torch.addmm(total, inner.T, (past.up * coefficients[past.columns]).to(dtype).T)
            if down.shape[0]:
                total = torch.addmm(total, (down.to(dtype) @ flat.T).T, (up * coefficients[-1]).to(dtype).T)
        _, needs_x, *needs = ctx.needs_input_grad[:5]
        kept = (x if any(needs) else None, up, down, coefficients, inner if needs[2] else None)
        ctx.save_for_backward(*(kept if needs_x or any(needs) else (None,) * 5))
        ctx.past, ctx.compute, ctx.x_dtype = past, dtype, x.dtype
        return total.to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Gradients:
        if gradient is None:
            return (None,) * 6
        x, up, down, coefficients, inner = ctx.saved_tensors
        past, (_, needs_x, *rest) = ctx.past, ctx.needs_input_grad[:5]
        x_gradient, shares = None, cast(Gradients, (None, None, None))
        with without_autocast(gradient.device):
            g = _flat(gradient).to(ctx.compute)
            outer = past.up.to(ctx.compute).T @ g.T
            if needs_x:
                wide = outer.T @ (past.down * coefficients[past.columns, None]).to(ctx.compute)
                wide.addmm_(g @ up.to(ctx.compute), (down * coefficients[-1]).to(ctx.compute))
                x_gradient = wide.to(ctx.x_dtype).view(*gradient.shape[:-1], down.shape[1])
            if any(rest):
                branches = Branches(up, down, coefficients, past)
                products = None if inner is None else _Past(inner, outer)
                shares = _thin(g, _flat(x).to(ctx.compute), branches, _Needs(*rest), products)
        return gradient, x_gradient, *shares, None
