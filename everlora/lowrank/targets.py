"""Which layers of a model a target names, and whether each can be adapted."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from everlora.errors import OptionError, TargetError, nearest
from everlora.lowrank.adapted import LowRankLayer, base_of
from everlora.lowrank.fused import SLICES, FusedProjection, split_candidates
from everlora.lowrank.layer import AdaptedLayer, LowRankConv2d, LowRankLinear
from everlora.lowrank.ranks import layer_size

__all__ = ["KINDS", "Candidates", "capped_ranks", "find_targets", "rank_cap"]

logger = logging.getLogger("everlora.lowrank")

# One entry for each kind of layer that can be adapted.
KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
# Attention modules read this layer's weight directly and never call it, so a branch would do nothing.
_NEVER_CALLED = (NonDynamicallyQuantizableLinear,)
_PATTERN_SIGNS = set("*+?[](){}^$|\\")


@dataclass(frozen=True)
class Candidates:
    """What targets of a model are compared with.

    Attributes:
        modules: qualified name to module, shared ones under each name, without the inside of adapted ones.
        fused: name of a fused projection to its stand-in with slices, not yet in the model.
        slices: name of a slice to its layer.
    """

    modules: dict[str, nn.Module]
    fused: dict[str, FusedProjection]
    slices: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Candidates:
        """Look through a model."""
        modules = dict(_below(model))
        fused = split_candidates(modules)
        slices = {f"{name}.{part}": child for name, whole in fused.items() for part, child in whole.named_children()}
        for name, whole in list(modules.items()):
            if isinstance(whole, FusedProjection):  # taken apart before
                slices |= {child: modules.pop(child) for child in (f"{name}.{part}" for part in SLICES)}
        return cls(modules, fused, slices)

    def select(self, targets: Sequence[str] | str) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the layers that targets name, by qualified name, sorted.

        Raises:
            TargetError: a target matches nothing, an adapted layer, or a module of a kind that cannot be adapted.
            OptionError: no target, or a broken expression.
        """
        patterns = [targets] if isinstance(targets, str) else list(targets)
        if not patterns:
            raise OptionError("targets is empty; name at least one layer, for example 'k_proj'")
        chosen = sorted({name for pattern in patterns for name in self._matches(pattern)})
        bases = {name: _adaptable(name, self[name]) for name in chosen}
        _refuse_tied(bases)
        return bases

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name] if name in self.modules else self.slices[name]

    def _matches(self, pattern: str) -> list[str]:
        """Return the names a target selects: layers, or where there are none, slices of fused layers."""
        found = _selected(pattern, self.modules) or _selected(pattern, self.slices)
        if not found:
            near = _nearest_names(pattern, {**self.modules, **self.slices})
            raise TargetError(f"target '{pattern}' matches no layer; {near}")
        return found


def find_targets(model: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Return the qualified names, sorted, of the layers that `attach` would adapt for these targets.

    Args:
        model: not changed.
        patterns: names that end a layer's qualified name at a dot ("k_proj", "attention.k_proj"), or regular
            expressions for the whole name, known by a special sign or by the start "re:". What matches no layer may
            name slices of fused projections, such as "qkv.query".

    Raises:
        TargetError: a pattern matches nothing, an adapted layer, or a module of a kind that cannot be adapted.
        OptionError: no pattern, or a broken expression.
    """
    return list(Candidates.of(model).select(patterns))


def rank_cap(module: nn.Module, rank: int) -> int:
    """Lower a rank to what makes sense for one layer: its full rank, and no more parameters than the layer has.

    Args:
        module: a linear layer or a convolution, plain or adapted.
        rank: what is wanted, at least 0.

    Returns:
        The rank to use. 0 says that the layer is better left alone: of a depthwise convolution even one unit of rank
        is larger than the layer.

    Raises:
        OptionError: `rank` is no integer of at least 0.
        TargetError: the module is neither linear nor a two-dimensional convolution.

    Source: section 3.3 of the reference on convolutional networks.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise OptionError(f"rank must be an integer of at least 0, got {rank!r}")
    size = layer_size(base_of(module))
    return min(rank, size.full_rank, size.break_even)


def capped_ranks(model: nn.Module, names: Iterable[str], rank: int) -> dict[str, int]:
    """Lower a rank layer by layer to `rank_cap`, without the layers that are better left alone.

    Args:
        model: not changed.
        names: qualified names, as `find_targets` returns them.
        rank: what is wanted.

    Returns:
        Name to rank of at least 1, in the order of `names`; what `attach` takes as `rank`. A layer whose rank had to
        be lowered is named in the log.
    """
    candidates = Candidates.of(model)
    caps = {name: rank_cap(candidates[name], rank) for name in names}
    lowered = [f"{name} ({cap})" if cap else f"{name} (left out)" for name, cap in caps.items() if cap < rank]
    if lowered:
        logger.info("rank %d is more than %d layers can use: %s", rank, len(lowered), ", ".join(lowered))
    return {name: cap for name, cap in caps.items() if cap}


def _below(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model._modules.items():
        if child is None:
            continue
        yield prefix + name, child
        if not isinstance(child, LowRankLayer):
            yield from _below(child, f"{prefix}{name}.")


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
    """A parametrised layer keeps modules of its own inside, and is a layer nevertheless."""
    return isinstance(module, (LowRankLayer, *KINDS)) or not any(True for _ in module.children())


def _nearest_names(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Compare with endings of the adaptable layers' names that have as many parts as the pattern."""
    parts = pattern.count(".") + 1
    adaptable = [name for name, module in modules.items() if _kind_of(module) is not None]
    if not adaptable:
        return "the model has no layer that can be adapted"
    return nearest(pattern, {".".join(name.split(".")[-parts:]) for name in adaptable})


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the entry of the type table that a module falls under."""
    if isinstance(module, _NEVER_CALLED):
        return None
    return next((kind for kind in KINDS if isinstance(module, kind)), None)


def _adaptable(name: str, module: nn.Module) -> nn.Linear | nn.Conv2d:
    """Refuse a chosen layer before anything is changed."""
    if isinstance(module, LowRankLayer):
        raise TargetError(f"layer '{name}' is adapted already; detach first, or start a new block on it")
    if _kind_of(module) is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
        known = ", ".join(sorted(known.__name__ for known in KINDS))
        slices = f", and slices such as '{name}.query'" if split_candidates({name: module}) else ""
        raise TargetError(
            f"layer '{name}' is a {type(module).__name__}, which cannot be adapted; supported: {known}{slices}"
        )
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor):
        raise TargetError(
            f"layer '{name}' computes its weight from other parameters (weight norm, spectral norm, pruning), so a "
            "branch has no weight to stand beside; remove the parametrisation first"
        )
    if is_lazy(weight):
        raise TargetError(f"layer '{name}' has no weight yet; run the model once before adapting it")
    if isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward:
        raise TargetError(
            f"layer '{name}' is a {type(module).__name__}, which computes otherwise than a Conv2d; adapt other layers"
        )
    return module


def _refuse_tied(bases: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
    """Refuse two convolutions with one weight: their branches would no longer be one."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, base in bases.items():
        if not isinstance(base, nn.Conv2d):
            continue
        first, owner = owners.setdefault(id(base.weight), (name, base))
        if owner is not base:
            raise TargetError(
                f"layers '{first}' and '{name}' are two convolutions with one weight, which cannot be adapted apart; "
                "name one of them"
            )
