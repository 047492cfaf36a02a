"""Fused projections: one layer that computes query, key and value at once, taken apart into three and put back.

The slices of such a layer are ordinary linear layers whose weights are views of its own, so that nothing is copied
and each can be adapted by its name, `qkv.query` for instance, while the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everlora.errors import ShapeError
from everlora.lowrank.layer import LowRankLinear

__all__ = ["SLICES", "FusedProjection", "join_factors", "slice_names", "split_candidates", "split_factors"]

SLICES = ("query", "key", "value")

# Layers whose output is all queries, then all keys, then all values. Other fused layers mix them head by head
# (query_key_value, in_proj), so that none of the three is a run of rows.
_LINEAR, _TRANSPOSED = ("qkv", "Wqkv"), ("c_attn",)

Factors = tuple[Tensor, Tensor]


class FusedProjection(nn.Module):
    """Stands in the place of a fused layer; its children `query`, `key` and `value` compute a third each.

    The layer itself is kept aside, unchanged, out of sight of `parameters()` and `state_dict()`: its weight is seen
    through the children, which share its memory and are frozen. A layer of GPT-2 with a transposed weight `(in, out)`
    has children with the weight the usual way round.

    Args:
        original: a layer that `split_candidates` takes apart.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._kept = (original,)  # in a tuple, so that it does not become a child
        self.out_features, self.in_features = self._matrix().shape
        for name, (weight, bias) in self._views().items():
            # On the meta device nothing is allocated and no random number is drawn.
            child = nn.Linear(self.in_features, len(weight), bias=bias is not None, device="meta")
            child.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                child.bias = nn.Parameter(bias, requires_grad=False)
            self.add_module(name, child.train(original.training))
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The fused layer, with the `requires_grad` it came with."""
        return self._kept[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the fused layer as it holds it, for code that looks up a dtype or device."""
        weight: Tensor = self.original.get_parameter("weight")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the fused layer."""
        bias: Tensor | None = self.original.bias  # type: ignore[assignment]
        return bias

    @property
    def is_transposed(self) -> bool:
        """Whether the fused layer holds its weight as `(in, out)`."""
        return not isinstance(self.original, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`, the outputs of the slices side by side."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)

    def rows(self, name: str) -> slice:
        """Rows of the fused weight that belong to a slice."""
        third = self.out_features // len(SLICES)
        start = SLICES.index(name) * third
        return slice(start, start + third)

    def effective_weight(self) -> Tensor:
        """Return the fused weight with the branches of its adapted slices added, laid out as the layer holds it.

        It has the dtype of the layer; rows of slices that are not adapted are the layer's own, bit for bit.

        Raises:
            UnsupportedError: the base is quantised.
        """
        weight = self.weight.detach().clone()
        matrix = weight.T if self.is_transposed else weight
        for name in SLICES:
            child = self.get_submodule(name)
            if isinstance(child, LowRankLinear):
                matrix[self.rows(name)] = child.effective_weight().to(weight.dtype)
        return weight

    def _matrix(self) -> Tensor:
        """The fused weight as `(out, in)`, a view."""
        return self.weight.T if self.is_transposed else self.weight

    def _views(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight `(out / 3, in)` and bias of each slice, in the memory of the fused layer."""
        matrix, bias = self._matrix().detach(), self.bias
        return {
            name: (matrix[self.rows(name)], None if bias is None else bias.detach()[self.rows(name)]) for name in SLICES
        }

    def _tie(self) -> None:
        """Let the slices be views of the fused layer again, after something gave them tensors of their own."""
        for name, (weight, bias) in self._views().items():
            child = self.get_submodule(name)
            plain = child.base if isinstance(child, LowRankLinear) else child
            plain.get_parameter("weight").data = weight
            if bias is not None:
                plain.get_parameter("bias").data = bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedProjection:
        """Move or convert the slices and the fused layer together."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.original._apply(fn)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tie the slices of a copy to the copy of the fused layer."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tie()


def _can_split(name: str, module: nn.Module) -> bool:
    """Whether a layer of that qualified name is known to hold queries, keys and values one after the other."""
    last, weight = name.rsplit(".", 1)[-1], getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return False
    # With fewer keys than queries the borders lie elsewhere, so only three equal parts are taken for granted.
    if last in _LINEAR and type(module) is nn.Linear:
        return weight.shape[0] == len(SLICES) * weight.shape[1]
    # GPT-2's layer is told by its form, since its class belongs to a library that is not imported here.
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    is_transposed = type(module).__name__ == "Conv1D" and sizes == tuple(weight.shape)
    return last in _TRANSPOSED and is_transposed and weight.shape[1] == len(SLICES) * weight.shape[0]


def slice_names(model: nn.Module) -> list[str]:
    """Qualified names of the slices of fused projections that `attach` can adapt, apart or not yet.

    Fused layers that share their last name with one that cannot be taken apart are left out, lest only some of a
    model's blocks be adapted.
    """
    whole = {name: module for name, module in model.named_modules() if _is_fused(name) and not _inside(model, name)}
    odd = {name.rsplit(".", 1)[-1] for name, module in whole.items() if not _is_apart_or_can_be(name, module)}
    return [f"{name}.{part}" for name in whole if name.rsplit(".", 1)[-1] not in odd for part in SLICES]


def join_factors(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Put the factors of slices together to those of the fused layers, in the model's own names.

    Args:
        model: with the fused layers taken apart.
        factors: layer name to `(down, up)`.

    Returns:
        The same, but one pair for all slices of a fused layer: their `down` one below the other, and `up` with a block
        for each, in its own rows. Rows of other slices are zero.
    """
    joined: dict[str, Factors] = {}
    for name, (down, up) in factors.items():
        parent, _, part = name.rpartition(".")
        whole = model.get_submodule(parent)
        if not isinstance(whole, FusedProjection):
            joined[name] = down, up
            continue
        placed = up.new_zeros(whole.out_features, up.shape[1])
        placed[whole.rows(part)] = up
        before = joined.get(parent, (down[:0], placed[:, :0]))
        joined[parent] = torch.cat([before[0], down]), torch.cat([before[1], placed], dim=1)
    return joined


def split_factors(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Undo `join_factors`: share out the factors of fused layers among their slices.

    Each slice gets the columns of `up` that are not zero in its rows, with their rows of `down`; one without any is
    left out.

    Raises:
        ShapeError: factors that do not fit their fused layer.
    """
    result: dict[str, Factors] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (down, up) in factors.items():
        whole = modules.get(name)
        if not isinstance(whole, FusedProjection):
            result[name] = down, up
            continue
        if (down.shape[1:], up.shape[:1], len(down)) != ((whole.in_features,), (whole.out_features,), up.shape[1]):
            raise ShapeError(
                f"layer '{name}' has {whole.in_features} inputs and {whole.out_features} outputs, got down "
                f"{tuple(down.shape)} and up {tuple(up.shape)}"
            )
        for part in SLICES:
            rows = up[whole.rows(part)]
            used = rows.ne(0).any(dim=0)
            if bool(used.any()):
                result[f"{name}.{part}"] = down[used], rows[:, used]
    return result


def split_candidates(modules: Mapping[str, nn.Module]) -> dict[str, FusedProjection]:
    """Take apart, outside the model, each layer that can be; one layer under two names gives one."""
    made: dict[int, FusedProjection] = {}
    found = {name: module for name, module in modules.items() if _can_split(name, module)}
    for module in found.values():
        if id(module) not in made:
            made[id(module)] = FusedProjection(module)
    return {name: made[id(module)] for name, module in found.items()}


def _is_fused(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _LINEAR + _TRANSPOSED


def _inside(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), LowRankLinear | FusedProjection)


def _is_apart_or_can_be(name: str, module: nn.Module) -> bool:
    return isinstance(module, FusedProjection) or _can_split(name, module)
