"""Find target layers in any model, put adapted layers in their place, and take them out again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from everlora.errors import OptionError, TargetError, nearest
from everlora.lowrank.fused import SLICES, FusedProjection, split_candidates
from everlora.lowrank.layer import FORWARD_MODES, LowRankLinear
from everlora.lowrank.sharing import InputGroup

__all__ = ["attach", "detach", "input_groups", "share_down"]

# One entry for each kind of layer that can be adapted.
_KINDS: dict[type[nn.Linear], type[LowRankLinear]] = {nn.Linear: LowRankLinear}
# Attention modules read this layer's weight directly and never call it, so a branch would do nothing.
_NEVER_CALLED = (NonDynamicallyQuantizableLinear,)
_PATTERN_SIGNS = set("*+?[](){}^$|\\")


def attach(
    model: nn.Module,
    targets: Sequence[str] | str,
    rank: int,
    *,
    forward_mode: str = "auto",
    train_down: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, LowRankLinear]:
    """Replace target layers by adapted ones; the model computes the same as before until a branch is trained.

    Only the adapted layers' base parameters are frozen; what else is trained is for the caller to say.

    Args:
        model: changed in place.
        targets: names that end a layer's qualified name at a dot ("k_proj", "attention.k_proj"), or regular
            expressions for the whole name, known by a special sign or by the start "re:". What matches no layer may
            name slices of fused projections, such as "qkv.query"; their layer is taken apart, and frozen as a whole.
        rank: of the first block of every layer, 0 for none.
        forward_mode: as in `LowRankLinear`.
        train_down: as in `LowRankLinear`.
        generator: draws the down-projections, in the order of the names.

    Returns:
        Qualified name to adapted layer, sorted by name.

    Raises:
        TargetError: a target matches nothing, an adapted layer, or a module of a kind that cannot be adapted.
        OptionError: no target, a broken expression, an unknown mode, or a rank too large for a layer; nothing is
            changed.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise OptionError("targets is empty; name at least one layer, for example 'k_proj'")
    if forward_mode not in FORWARD_MODES:
        raise OptionError(f"forward_mode={forward_mode!r} is not known; {nearest(forward_mode, FORWARD_MODES)}")
    modules = dict(_named_candidates(model))
    fused = split_candidates(modules)
    slices = {f"{name}.{part}": child for name, whole in fused.items() for part, child in whole.named_children()}
    for name, whole in list(modules.items()):
        if isinstance(whole, FusedProjection):  # taken apart before
            slices |= {child: modules.pop(child) for child in (f"{name}.{part}" for part in SLICES)}
    chosen = sorted({name for pattern in patterns for name in _matches(pattern, modules, slices)})
    bases = {name: _checked(name, {**slices, **modules}[name], rank) for name in chosen}
    apart = {name.rpartition(".")[0] for name in chosen if name in slices}
    for name in sorted(apart & set(chosen)):
        raise TargetError(f"layer '{name}' is a target as a whole and in slices; name it or its slices")
    for name in apart & set(fused):
        _replace(model, name, fused[name])
    adapted: dict[int, LowRankLinear] = {}
    result: dict[str, LowRankLinear] = {}
    for name, base in bases.items():
        if id(base) not in adapted:  # one layer under two names stays one layer
            kind = _KINDS[_kind_of(base) or nn.Linear]
            layer = kind(base, rank, forward_mode=forward_mode, train_down=train_down, generator=generator)
            adapted[id(base)] = result[name] = layer.train(base.training)
        _replace(model, name, adapted[id(base)])
    return result


def detach(model: nn.Module) -> None:
    """Put the base layers back, with the `requires_grad` they had; all branches are dropped.

    Fused projections that `attach` took apart are whole again.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if isinstance(module, LowRankLinear):
            _replace(model, name, module.release())
    for name, module in modules:
        if isinstance(module, FusedProjection):
            _replace(model, name, module.original)


def input_groups(
    model: nn.Module, layers: Mapping[str, nn.Module] | Sequence[str], run: Callable[[], Any]
) -> dict[str, list[str]]:
    """Group layers that read the very same tensor, by one traced forward pass in evaluation mode.

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

    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_pre_hook(listener(name), with_kwargs=True) for name, layer in named.items()]
    try:
        model.eval()
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    groups: dict[tuple[tuple[int, int], ...] | str, list[str]] = {}
    for name, inputs in seen.items():
        key = tuple((id(x), version) for x, version in inputs) or name
        groups.setdefault(key, []).append(name)
    return {members[0]: members for members in groups.values()}


def share_down(layers: Sequence[LowRankLinear]) -> None:
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


def _named_candidates(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules below `model` by qualified name, shared ones under each name, without the inside of adapted ones."""
    for name, child in model._modules.items():
        if child is None:
            continue
        yield prefix + name, child
        if not isinstance(child, LowRankLinear):
            yield from _named_candidates(child, f"{prefix}{name}.")


def _matches(pattern: str, modules: Mapping[str, nn.Module], slices: Mapping[str, nn.Module]) -> list[str]:
    """Return the names a target selects: layers, or where there are none, slices of fused layers."""
    found = _selected(pattern, modules) or _selected(pattern, slices)
    if not found:
        raise TargetError(f"target '{pattern}' matches no layer; {_nearest_names(pattern, {**modules, **slices})}")
    return found


def _selected(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """An expression passes over containers, a name does not."""
    if not pattern or pattern == "re:":
        raise OptionError("a target is empty; name a layer, for example 'k_proj'")
    if pattern.startswith("re:") or _PATTERN_SIGNS & set(pattern):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise OptionError(f"target '{pattern}' is not a valid regular expression: {error}") from error
        return [name for name, module in modules.items() if expression.fullmatch(name) and _is_leaf(module)]
    return [name for name in modules if name == pattern or name.endswith(f".{pattern}")]


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, LowRankLinear) or not any(True for _ in module.children())


def _nearest_names(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Compare with endings of the adaptable layers' names that have as many parts as the pattern."""
    parts = pattern.count(".") + 1
    adaptable = [name for name, module in modules.items() if _kind_of(module) is not None]
    if not adaptable:
        return "the model has no layer that can be adapted"
    return nearest(pattern, {".".join(name.split(".")[-parts:]) for name in adaptable})


def _kind_of(module: nn.Module) -> type[nn.Linear] | None:
    """Return the entry of the type table that a module falls under."""
    if isinstance(module, _NEVER_CALLED):
        return None
    return next((kind for kind in _KINDS if isinstance(module, kind)), None)


def _checked(name: str, module: nn.Module, rank: int) -> nn.Linear:
    """Refuse a chosen layer before anything is changed."""
    if isinstance(module, LowRankLinear):
        raise TargetError(f"layer '{name}' is adapted already; detach first, or start a new block on it")
    kind = _kind_of(module)
    if kind is None or not isinstance(module, kind):
        known = ", ".join(sorted(known.__name__ for known in _KINDS))
        slices = f", and slices such as '{name}.query'" if split_candidates({name: module}) else ""
        raise TargetError(
            f"layer '{name}' is a {type(module).__name__}, which cannot be adapted; supported: {known}{slices}"
        )
    limit = min(module.in_features, module.out_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= limit:
        raise OptionError(
            f"layer '{name}' has {module.in_features} inputs and {module.out_features} outputs, so its rank is an "
            f"integer from 0 to {limit}, got {rank!r}"
        )
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
