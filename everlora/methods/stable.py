"""A second set of factors for the layers that are trained: it follows them slowly and has no gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, ShapeError, TargetError
from everlora.lowrank import AdaptedLayer, interpolate_
from everlora.methods.base import State

__all__ = ["Factors", "StableAdapter", "check_scales", "factors_of", "factors_state", "factors_under", "set_factors"]

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name to `(down, up)`, `(rank, in)` and `(out, rank)`, without what they count with."""


class StableAdapter(nn.Module):
    """Factors of the shapes of the layers' own, in their dtype, which is float32 for bases of half precision, too.

    A module, so that it goes where the model goes.

    Args:
        layers: the layers to follow, by name.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer]) -> None:
        super().__init__()
        self._layers = dict(layers)
        self._tensors = nn.ParameterList(
            nn.Parameter(factor.detach().clone(), requires_grad=False)
            for layer in layers.values()
            for factor in (layer.down, layer.up)
        )

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors themselves, not copies."""
        tensors = list(self._tensors)
        return {name: (tensors[2 * i], tensors[2 * i + 1]) for i, name in enumerate(self._layers)}

    def follow(self, retention: float) -> None:
        """Go towards the layers' factors: `stable <- retention * stable + (1 - retention) * plastic`; 0 copies.

        Raises:
            OptionError: `retention` lies outside of 0 to 1.

        Source: section 2 of the reference on I-LoRA.
        """
        interpolate_(list(self._tensors), self._plastic(), retention)

    def lead(self) -> None:
        """Copy these factors to the layers."""
        with torch.no_grad():
            for mine, theirs in zip(self._tensors, self._plastic(), strict=True):
                theirs.copy_(mine)

    def set(self, factors: Factors) -> None:
        """Take the values of given factors, one pair for each layer."""
        with torch.no_grad():
            for name, pair in self.factors().items():
                for mine, given in zip(pair, factors[name], strict=True):
                    mine.copy_(given)

    def _plastic(self) -> list[Tensor]:
        return [factor for layer in self._layers.values() for factor in (layer.down, layer.up)]


def factors_of(layers: Mapping[str, AdaptedLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """The layers' own factors, not copies."""
    return {name: (layer.down, layer.up) for name, layer in layers.items()}


def set_factors(layers: Mapping[str, AdaptedLayer], factors: Factors) -> None:
    """Put values into the layers' factors.

    Raises:
        TargetError: the factors are of other layers.
        ShapeError: a factor does not fit its layer.
    """
    if factors.keys() != layers.keys():
        odd = sorted(factors.keys() ^ layers.keys())[0]
        raise TargetError(
            f"expected an adapter of the same {len(layers)} layers that are trained, found one of {len(factors)}, "
            f"which differ in '{odd}'; use the targets that it was made with."
        )
    for name, (down, up) in factors.items():
        layer = layers[name]
        if down.shape != layer.down.shape or up.shape != layer.up.shape:
            raise ShapeError(
                f"layer '{name}': expected factors of rank {layer.rank}, {tuple(layer.down.shape)} and "
                f"{tuple(layer.up.shape)}, found {tuple(down.shape)} and {tuple(up.shape)}; use its rank."
            )
    with torch.no_grad():
        for name, (down, up) in factors.items():
            layers[name].down.copy_(down)
            layers[name].up.copy_(up)


def check_scales(layers: Mapping[str, AdaptedLayer], factors: Factors, scales: Mapping[str, float]) -> None:
    """Refuse factors that count with another alpha over rank than the layers' own.

    Raises:
        OptionError: they do.
    """
    for name in factors:
        if name in layers and not math.isclose(scales[name], layers[name].scale, rel_tol=1e-6):
            raise OptionError(
                f"layer '{name}': expected an adapter that counts with alpha / rank = {layers[name].scale:g}, found "
                f"{scales[name]:g}; use the rank and alpha that it was made with."
            )


def factors_state(prefix: str, factors: Factors) -> State:
    """Write factors under `PREFIX/LAYER/down` and `up`, copies on the CPU."""
    sides = {name: zip(("down", "up"), pair, strict=True) for name, pair in factors.items()}
    return {f"{prefix}{name}/{side}": f.detach().cpu().clone() for name, pair in sides.items() for side, f in pair}


def factors_under(prefix: str, state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Read back what `factors_state` wrote; empty where there is nothing of it."""
    names = [k.removeprefix(prefix).removesuffix("/up") for k in state if k.startswith(prefix) and k.endswith("/up")]
    return {name: (state[f"{prefix}{name}/down"], state[f"{prefix}{name}/up"]) for name in names}
