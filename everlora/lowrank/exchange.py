"""Other factors in the place of adapted layers' own for a while, and factors that follow others as a moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, ShapeError
from everlora.lowrank.adapted import LowRankLayer

__all__ = ["exchanged", "interpolate_", "retention"]

Factors = Mapping[str, tuple[Tensor, Tensor]]


@contextmanager
def exchanged(layers: Mapping[str, LowRankLayer], factors: Factors) -> Iterator[None]:
    """Let each layer's current block have other factors, without gradients and without dropout; then its own again.

    Which parameters are trained, and in which mode the layers are, does not change, also when the block raises.

    Args:
        layers: name to layer.
        factors: name of each of these layers to `(down, up)`, of the shapes of its own. Parameters are taken as they
            are, so that what a layer computed from them is still known when they come again.

    Raises:
        ShapeError: factors that do not fit their layer, or a layer without any.
    """
    for name, layer in layers.items():
        shapes = [tuple(factor.shape) for factor in factors.get(name, ())]
        if shapes != [tuple(layer.down.shape), tuple(layer.up.shape)]:
            raise ShapeError(
                f"layer '{name}': expected factors of shapes {tuple(layer.down.shape)} and {tuple(layer.up.shape)}, "
                f"found {shapes or 'none'}"
            )
    own = {name: (layer.down, layer.up, layer.dropout) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.down, layer.up = (_frozen(factor) for factor in factors[name])
            layer.dropout = 0.0
        yield
    finally:
        for name, layer in layers.items():
            layer.down, layer.up, layer.dropout = own[name]


def interpolate_(slow: Sequence[Tensor], fast: Sequence[Tensor], retention: float) -> None:
    """Move tensors towards others in place: `slow <- retention * slow + (1 - retention) * fast`.

    `retention=0` copies exactly. A half-precision `slow` would stand still: keep it in float32.

    Raises:
        OptionError: `retention` lies outside of 0 to 1.
        ShapeError: the lists do not fit each other.

    Source: section 2 of the reference on I-LoRA.
    """
    if not 0.0 <= retention <= 1.0:
        raise OptionError(f"expected a retention from 0 to 1, got {retention!r}")
    if [t.shape for t in slow] != [t.shape for t in fast]:
        raise ShapeError(f"expected tensors of the same shapes, got {len(slow)} and {len(fast)} that differ")
    if not len(slow):
        return
    with torch.no_grad():
        torch._foreach_lerp_(list(slow), [t.detach().to(s) for s, t in zip(slow, fast, strict=True)], 1.0 - retention)


def retention(updates: int, ema_alpha: float, warmup: bool) -> float:
    """Weight of the old value in an update: `min(1 - 1 / (k + 1), ema_alpha)` with warm-up, `ema_alpha` without.

    With it the first update copies, and as long as it lasts the average is the plain mean of all values so far.

    Args:
        updates: how many were made before, k.
        ema_alpha: the weight of the old value that warm-up leads up to.
        warmup: see above.
    """
    return min(1.0 - 1.0 / (updates + 1), ema_alpha) if warmup else ema_alpha


def _frozen(factor: Tensor) -> nn.Parameter:
    return factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor.detach(), requires_grad=False)
