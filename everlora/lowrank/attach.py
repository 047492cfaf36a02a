"""Find target layers in any model, put adapted layers in their place, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, TargetError, UnsupportedError, nearest
from everlora.lowrank.adapted import FORWARD_MODES, LowRankLayer, base_of
from everlora.lowrank.fused import FusedProjection
from everlora.lowrank.layer import AdaptedLayer, LowRankConv2d, LowRankLinear
from everlora.lowrank.modes import evaluating
from everlora.lowrank.patches import patch_geometry
from everlora.lowrank.ranks import layer_size
from everlora.lowrank.sharing import InputGroup
from everlora.lowrank.targets import Candidates

__all__ = ["attach", "detach", "input_groups", "require_one_group", "share_down"]


def attach(
    model: nn.Module,
    targets: Sequence[str] | str,
    rank: int | Mapping[str, int],
    *,
    forward_mode: str = "auto",
    train_down: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, LowRankLinear | LowRankConv2d]:
    """Replace target layers by adapted ones; the model computes the same as before until a branch is trained.

    Only the adapted layers' base parameters are frozen; what else is trained is for the caller to say.

    Args:
        model: changed in place.
        targets: names that end a layer's qualified name at a dot ("k_proj", "attention.k_proj"), or regular
            expressions for the whole name, known by a special sign or by the start "re:". What matches no layer may
            name slices of fused projections, such as "qkv.query"; their layer is taken apart, and frozen as a whole.
        rank: of the first block of every layer, 0 for none; or, by qualified name, of the layers to adapt, when only
            some of those that the targets select are wanted (see `capped_ranks`).
        forward_mode: as in `LowRankLayer`.
        train_down: as in `LowRankLayer`.
        generator: draws the down-projections, in the order of the names.

    Returns:
        Qualified name to adapted layer, sorted by name.

    Raises:
        TargetError: a target matches nothing, an adapted layer, or a module of a kind that cannot be adapted.
        OptionError: no target, a broken expression, an unknown mode, or a rank too large for a layer; nothing is
            changed.
    """
    if forward_mode not in FORWARD_MODES:
        raise OptionError(f"forward_mode={forward_mode!r} is not known; {nearest(forward_mode, FORWARD_MODES)}")
    candidates = Candidates.of(model)
    bases = candidates.select(targets)
    ranks = _ranks(rank, bases)
    apart = {name.rpartition(".")[0] for name in ranks if name in candidates.slices}
    for name in sorted(apart & ranks.keys()):
        raise TargetError(f"layer '{name}' is a target as a whole and in slices; name it or its slices")
    for name in apart & candidates.fused.keys():
        _replace(model, name, candidates.fused[name])
    adapted: dict[int, AdaptedLayer] = {}
    result: dict[str, AdaptedLayer] = {}
    options: dict[str, Any] = {"forward_mode": forward_mode, "train_down": train_down, "generator": generator}
    for name, first_rank in ranks.items():
        base = bases[name]
        if id(base) not in adapted:  # one layer under two names stays one layer
            kind = LowRankConv2d if isinstance(base, nn.Conv2d) else LowRankLinear
            layer = kind(base, first_rank, **options).train(base.training)
            adapted[id(base)] = result[name] = layer
        _replace(model, name, adapted[id(base)])
    return result


def detach(model: nn.Module) -> None:
    """Put the base layers back, with the `requires_grad` they had; all branches are dropped.

    Fused projections that `attach` took apart are whole again.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if isinstance(module, LowRankLayer):
            _replace(model, name, module.release())
    for name, module in modules:
        if isinstance(module, FusedProjection):
            _replace(model, name, module.original)


def input_groups(
    model: nn.Module, layers: Mapping[str, nn.Module] | Sequence[str], run: Callable[[], Any]
) -> dict[str, list[str]]:
    """Group layers that read the very same rows, by one traced forward pass in evaluation mode.

    Convolutions read the same rows where the tensor is the same and they cut the same patches from it.

    Args:
        model: put in evaluation mode for the trace and back.
        layers: name to layer, or the qualified names alone.
        run: executes one forward pass of the model, on a small real batch.

    Returns:
        Group name to its members, both in the order of `layers`; a group bears its first member's name. A layer
        that the pass did not reach is a group of its own.
    """
    named = dict(layers) if isinstance(layers, Mapping) else {name: model.get_submodule(name) for name in layers}
    # The tensors themselves are kept until the end, lest an address be used twice.
    seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in named}

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen[name].append((x, -1 if x.is_inference() else x._version))

        return hook

    handles = [layer.register_forward_pre_hook(listener(name), with_kwargs=True) for name, layer in named.items()]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for name, inputs in seen.items():
        tensors = tuple((id(x), version) for x, version in inputs)
        key = (tensors, patch_geometry(base_of(named[name]))) if tensors else name
        groups.setdefault(key, []).append(name)
    return {members[0]: members for members in groups.values()}


def require_one_group(layers: Mapping[str, LowRankLayer], what: str) -> None:
    """Refuse convolutions in groups, whose groups read different patches.

    Args:
        layers: name to layer.
        what: what is refused, for the message.

    Raises:
        UnsupportedError: a layer has groups; it is named.
    """
    for name, layer in layers.items():
        if layer.groups != 1:
            raise UnsupportedError(
                f"layer '{name}' is a convolution with {layer.groups} groups, for which {what} is not defined; name "
                "other layers with targets"
            )


def share_down(layers: Sequence[LowRankLayer]) -> None:
    """Let layers that read the same tensor share one `down` and compute `x down^T` once.

    Call it again after `start_block`, which gives a layer a `down` of its own.

    Args:
        layers: the members of one input group; the first one's `down` serves all.

    Raises:
        TargetError: the members' `down` differ and a branch is not at its start, so that sharing would change
            what the model computes.
    """
    if not layers:
        return
    first = layers[0]
    for layer in layers[1:]:
        same = layer.down is first.down or torch.equal(layer.down, first.down)
        fits = layer.down.shape == first.down.shape and not bool(layer.up.detach().any())
        if not same and not fits:
            raise TargetError(
                f"layers with down {tuple(first.down.shape)} and {tuple(layer.down.shape)} cannot share one: the "
                "shapes differ or a branch is already trained; share right after start_block"
            )
    group = first.group or InputGroup()
    for layer in layers:
        layer.group, layer.down = group, first.down


def _ranks(rank: int | Mapping[str, int], bases: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, int]:
    """Check the rank of every layer that is adapted."""
    if isinstance(rank, Mapping):
        unknown = sorted(rank.keys() - bases.keys())
        if unknown:
            raise OptionError(f"rank names the layer '{unknown[0]}', which no target selects; add it to the targets")
        ranks = {name: rank[name] for name in bases if name in rank}
    else:
        ranks = dict.fromkeys(bases, rank)
    for name, value in ranks.items():
        size = layer_size(bases[name])
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= size.full_rank:
            raise OptionError(
                f"layer '{name}' has {size.describe()}, so its rank is an integer from 0 to {size.full_rank}, "
                f"got {value!r}"
            )
    return ranks


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
