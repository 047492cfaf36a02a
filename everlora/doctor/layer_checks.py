"""The layers that a method adapts: whether its targets name any, and whether its rank suits them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from everlora.backbones import Backbone
from everlora.doctor.findings import Finding, broken, note
from everlora.errors import EverloraError
from everlora.lowrank import find_targets
from everlora.lowrank.adapted import base_of
from everlora.lowrank.ranks import layer_size
from everlora.methods.base import Method
from everlora.methods.language_targets import ALL_LINEAR, ATTENTION

__all__ = ["check_ranks", "check_targets", "check_width", "told_of"]

_MOST_NAMES = 3


def check_targets(row: str, options: Any, model: nn.Module) -> Iterator[Finding]:
    """Look for every target by itself, for when attaching failed at the first that is wrong.

    Args:
        row: the method, or row of a recipe, for findings.
        options: of the method; without `targets` of their own the method chooses, and nothing is said.
        model: the network, with nothing attached.
    """
    words = (ALL_LINEAR, ATTENTION)  # which stand for layers of language models
    for pattern in [one for one in getattr(options, "targets", None) or () if one not in words]:
        try:
            find_targets(model, pattern)
        except EverloraError as error:
            yield told_of(row, error)


def check_width(row: str, options: Any, backbone: Backbone) -> Iterator[Finding]:
    """Name the linear layers that are narrower than the rank that is asked for; for when attaching failed.

    Args:
        row: the method, or row of a recipe, for findings.
        options: of the method.
        backbone: with nothing attached.
    """
    rank = getattr(options, "rank", None)
    try:
        names = find_targets(backbone.model, tuple(getattr(options, "targets", None) or backbone.default_targets))
    except EverloraError:
        return
    layers = {name: backbone.model.get_submodule(name) for name in names if _is_whole(backbone.model, name)}
    sizes = {name: layer_size(layer) for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    narrow = [name for name, size in sizes.items() if isinstance(rank, int) and rank > size.full_rank]
    if narrow:
        least = min(sizes[name].full_rank for name in narrow)
        what = f"asks for rank {rank}, above the width of {len(narrow)} of {len(names)} layers: {_listed(narrow)}"
        yield broken(row, what, f"set rank to {least} or less")


def check_ranks(row: str, options: Any, method: Method) -> Iterator[Finding]:
    """Say which layers have a smaller rank than was asked for, or branches that outgrow them.

    Args:
        row: the method, or row of a recipe, for findings.
        options: of the method.
        method: newly made, or in the middle of a task.
    """
    rank, layers = getattr(options, "rank", None), method.layers()
    if not isinstance(rank, int) or not layers:
        return
    sizes = {name: layer_size(base_of(layer)) for name, layer in layers.items()}
    narrow = [name for name in layers if rank > sizes[name].full_rank]
    if narrow:
        least = min(sizes[name].full_rank for name in narrow)
        what = f"asks for rank {rank}, above the width of {len(narrow)} of {len(layers)} layers: {_listed(narrow)}"
        yield note(row, what, f"it is lowered there; rank {least} fits all")
    large = [name for name in layers if sizes[name].break_even < rank <= sizes[name].full_rank]
    if large:
        least = max(1, min(sizes[name].break_even for name in large))
        what = f"asks for rank {rank}, at which branches are larger than their layers: {_listed(large)}"
        yield note(row, what, f"rank {least} is the largest at which none is")


def told_of(row: str, error: EverloraError) -> Finding:
    """Make a finding of an error: its sentence says what is wrong and, after the last semicolon, the mend."""
    what, _, mend = str(error).rstrip(".").rpartition("; ")
    return broken(row, f"cannot be trained: {what or mend}", mend if what else "choose another value")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMES]) + more


def _is_whole(model: nn.Module, name: str) -> bool:
    """Whether a name is a module of the network, and no slice of a fused one."""
    return name in dict(model.named_modules())
