"""Adapted layers and what else a task owns, as one adapter in PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everlora.errors import UnsupportedError
from everlora.export.plain import bare_state
from everlora.lowrank import (
    AdaptedLayer,
    Direction,
    FusedProjection,
    LowRankConv2d,
    LowRankLayer,
    compress,
    join_factors,
)
from everlora.peft_format import lora_config, module_tensors, saved_modules, to_peft_tensors

__all__ = ["PeftAdapter", "changed_modules", "collect_factors"]


@dataclass(frozen=True)
class _Pair:
    """Factors of one layer as PEFT will multiply them; `scale * up @ down` is what the layer gains."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class PeftAdapter:
    """Factors of all layers in the base model's own names.

    Attributes:
        pairs: layer name to factors, none of rank 0.
        truncation: relative Frobenius error of each layer's update, where its rank was cut.
    """

    pairs: Mapping[str, _Pair]
    truncation: Mapping[str, float]

    def tensors(self, model: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
        """Name all tensors as PEFT does.

        Args:
            model: the live network, with the layers in place.
            saved: modules that are written whole, see `changed_modules`.
        """
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, pair in self.pairs.items():
            layer = model.get_submodule(name)
            factors[name] = pair.down, pair.up
            if isinstance(layer, LowRankConv2d):
                factors[name] = layer.as_kernels(pair.down, pair.up)
        named = to_peft_tensors(factors)
        for name in saved_modules(saved, [name for name, _ in model.named_modules()]):
            whole = bare_state(model.get_submodule(name))
            named |= module_tensors(name, {key: value.clone() for key, value in whole.items()})
        return {name: tensor.contiguous() for name, tensor in named.items()}

    def config(
        self, model: nn.Module, saved: Sequence[str], *, base: str, base_class: tuple[str, str] | str | None
    ) -> dict[str, Any]:
        """Content of `adapter_config.json`.

        Args:
            model: as in `tensors`.
            saved: likewise.
            base: where the base model is loaded from.
            base_class: how its class is found, see `everlora.peft_format.lora_config`.
        """
        wholes = [model.get_submodule(name) for name in self.pairs]
        ranks = {name: len(pair.down) for name, pair in self.pairs.items()}
        # Rounded, since `alpha / rank * rank` need not be `alpha`, and some tools want an integer.
        alphas = {name: round(pair.scale * ranks[name], 9) for name, pair in self.pairs.items()}
        return lora_config(
            ranks,
            base_model=base,
            base_class=base_class,
            transposed=any(isinstance(whole, FusedProjection) and whole.is_transposed for whole in wholes),
            alphas={name: int(alpha) if alpha.is_integer() else alpha for name, alpha in alphas.items()},
            modules_to_save=saved,
            modules=[name for name, _ in model.named_modules() if name],
        )


def collect_factors(model: nn.Module, layers: Mapping[str, AdaptedLayer], max_rank: int | None) -> PeftAdapter:
    """Take the factors of adapted layers, one pair each.

    The factors of all blocks stand side by side, each block's scale taken into its up-projection; a layer with but one
    block keeps its scale for PEFT's `lora_alpha`, unless layers differ in it, since not every tool reads more than one.
    A total rank above that of a full matrix is brought down to it without error, and one above `max_rank` at the least
    error.

    Args:
        model: the live network.
        layers: name to adapted layer.
        max_rank: largest rank of a layer; None for no limit.

    Raises:
        UnsupportedError: no layer has a low-rank block, or one that PEFT cannot compute.
        OptionError: `max_rank` is not a positive integer.
    """
    for name, layer in sorted(layers.items()):
        if isinstance(layer, LowRankConv2d):
            _require_peft(name, layer)
    whole = {name: _pair_of(model, name, layer) for name, layer in sorted(layers.items())}
    scales = {name: pair.scale for name, pair in whole.items()}
    joined = join_factors(model, {name: (pair.down, pair.up) for name, pair in whole.items()})
    pairs = {name: _Pair(*pair, scales.get(name, 1.0)) for name, pair in joined.items() if pair[0].shape[0]}
    if not pairs:
        raise UnsupportedError(
            "a PEFT adapter needs low-rank factors, and no layer has any: what was learned lies in the network's own "
            "weights or in the head; export merged instead"
        )
    errors: dict[str, float] = {}
    for name, pair in pairs.items():
        full = min(pair.up.shape[0], pair.down.shape[1])
        limit = full if max_rank is None else max_rank
        compressed = compress([Direction(pair.down, pair.up)], None, limit)  # checks the rank even if nothing is cut
        if len(pair.down) > min(limit, full):
            cut = compressed.direction
            pairs[name] = _Pair(cut.down.float().contiguous(), cut.up.float().contiguous(), pair.scale)
            if limit < full:
                errors[name] = compressed.error_rel
    return PeftAdapter(_evenly_scaled(pairs), errors)


def changed_modules(
    model: nn.Module, pretrained: Mapping[str, Tensor], adapter: PeftAdapter, *, unread: tuple[str, ...] = ()
) -> list[str]:
    """Names of the modules beside the adapted layers that hold other tensors than the pretrained ones, sorted.

    Args:
        model: the live network.
        pretrained: state of the base as plain tools load it.
        adapter: of the same network.
        unread: what the names of tensors begin with that the features do not depend on.

    Raises:
        UnsupportedError: an adapted layer does not start from the pretrained weights, or the network has tensors that
            the base has not.
    """
    live = bare_state(model)
    strange = sorted(live.keys() ^ pretrained.keys())
    if strange:
        raise UnsupportedError(
            f"an adapter for PEFT leaves the modules of its base as they are, but '{strange[0]}' is in only one of "
            "the two networks; export merged instead"
        )
    names = [name for name in live if not name.startswith(unread)] if unread else list(live)
    changed = sorted({name.rpartition(".")[0] for name in names if not torch.equal(live[name], pretrained[name].cpu())})
    for name in changed:
        if name in adapter.pairs or isinstance(model.get_submodule(name), LowRankLayer) or not name:
            raise UnsupportedError(
                f"the weights of layer '{name}' are not the pretrained ones that its low-rank factors would be added "
                "to; export merged instead"
            )
    return changed


def _pair_of(model: nn.Module, name: str, layer: AdaptedLayer) -> _Pair:
    """Past and current block as one pair, float32 on the CPU."""
    parent = model.get_submodule(name.rpartition(".")[0])
    single = not layer.total_rank and not isinstance(parent, FusedProjection)
    if single and float(layer.coefficients()[-1]) == layer.scale:
        return _Pair(_plain(layer.down), _plain(layer.up), layer.scale)
    down, up = layer.factors()
    return _Pair(_plain(down), _plain(up))


def _evenly_scaled(pairs: Mapping[str, _Pair]) -> Mapping[str, _Pair]:
    """Take scales that differ into the up-projections."""
    if len({pair.scale for pair in pairs.values()}) == 1:
        return pairs
    return {name: _Pair(pair.down, pair.up * pair.scale) for name, pair in pairs.items()}


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().float().cpu().contiguous()


def _require_peft(name: str, layer: LowRankConv2d) -> None:
    try:
        layer.require_peft()
    except UnsupportedError as error:
        raise UnsupportedError(f"layer '{name}': {error}") from None
