"""What happens to normalisation layers when one network serves many tasks.

A frozen convolution behind a batch norm in training mode still changes what earlier tasks see, because the running
statistics follow the newest data. Each mode says what a task owns of these layers, and whether statistics move.
Source: section 4 of the reference on convolutional networks.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BeforeValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "NOT_SHARED",
    "NormMode",
    "batch_norms",
    "has_batch_norm",
    "norm_copies",
    "norm_layers",
    "set_statistics_moving",
    "statistics_move",
    "train_by_mode",
]

NormMode: TypeAlias = Literal["per_task", "affine_only", "adabn", "frozen_eval"]
"""`per_task`: scale, shift and statistics of its own. `affine_only`: its own scale and shift over the pretrained
statistics. `adabn`: its own statistics under the pretrained scale and shift. `frozen_eval`: everything pretrained."""

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _refuse_shared(mode: Any) -> Any:
    """Say why there is no such mode, which people may expect."""
    if mode == "shared":
        raise ValueError(
            "statistics that all tasks share would follow the newest task and change what earlier tasks see; take "
            "per_task, or affine_only to keep the pretrained statistics"
        )
    return mode


NOT_SHARED = BeforeValidator(_refuse_shared)
"""For the annotation of an option that takes a `NormMode`: says why `shared` is none."""


def norm_layers(model: nn.Module, *, without: Collection[str] = ()) -> dict[str, nn.Module]:
    """Normalisation layers of a network by qualified name: batch, group, layer and root-mean-square norms.

    Args:
        model: the network.
        without: names of top-level children to leave out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and name.partition(".")[0] not in without
    }


def batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The batch norms in and below some modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, _BatchNorm)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a network keeps running statistics, as convolutional networks do."""
    return bool(batch_norms([model]))


def norm_copies(layers: Mapping[str, nn.Module], mode: NormMode) -> dict[str, nn.Module]:
    """Copy the normalisation layers that a task owns under a mode.

    Args:
        layers: the layers a task starts from, as `norm_layers` returns them.
        mode: see `NormMode`.

    Returns:
        Qualified name to copy, `requires_grad` set where scale and shift are trained; empty for `frozen_eval`.
    """
    if mode == "frozen_eval":
        return {}
    if mode == "adabn":  # layers without statistics would be copies of what is shared
        layers = {name: layer for name, layer in layers.items() if isinstance(layer, _BatchNorm)}
    return {name: train_by_mode(copy.deepcopy(layer), mode) for name, layer in layers.items()}


def train_by_mode(module: nn.Module, mode: NormMode) -> nn.Module:
    """Make all parameters of a task's own module trainable, those of its norms only where the mode trains them."""
    module.requires_grad_(True)
    if mode not in ("per_task", "affine_only"):
        for part in module.modules():
            if isinstance(part, _NORMS):
                part.requires_grad_(False)
    return module


def statistics_move(mode: NormMode) -> bool:
    """Whether the batch norms of a task follow its data while it is learned."""
    return mode in ("per_task", "adabn")


def set_statistics_moving(modules: Iterable[nn.Module]) -> None:
    """Put the batch norms in and below the given modules into training mode; `Backbone.train` and `eval` end it."""
    for norm in batch_norms(modules):
        norm.train()
