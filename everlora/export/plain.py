"""Tensors of the plain network inside a live one that holds adapters and modules of tasks."""

from __future__ import annotations

from torch import Tensor, nn

from everlora.isolation.ownership import OwnedLayer
from everlora.lowrank import FusedProjection, LowRankLayer

__all__ = ["bare_state", "merged_state"]


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the plain network that computes what a live one does, on the CPU, by the plain network's own names.

    Each adapted layer becomes one weight, in the dtype of its base: the sum of base, past and current block is formed
    in float32 and rounded once. Weights whose entries belong to several tasks are those that the active task reads.
    Fused projections that were taken apart are whole again. `model` is not changed.
    """
    return _state(model, adapters=True)


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what `merged_state` does, without what adapted layers add to their bases."""
    return _state(model, adapters=False)


def _state(model: nn.Module, *, adapters: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(model.state_dict())
    modules = dict(model.named_modules(remove_duplicate=False))
    fused = {name for name, module in modules.items() if isinstance(module, FusedProjection)}
    for name, module in modules.items():
        if not isinstance(module, LowRankLayer | FusedProjection | OwnedLayer) or name.rpartition(".")[0] in fused:
            continue
        inner = f"{name}.base."
        base = {f"{name}.{key.removeprefix(inner)}": value for key, value in state.items() if key.startswith(inner)}
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        if isinstance(module, LowRankLayer) and not adapters:
            state |= base  # with what a quantised weight has beside it
            continue
        summed = adapters and not isinstance(module, OwnedLayer)
        state[f"{name}.weight"] = _sum(module) if summed else module.weight
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias
    return {key: value.detach().cpu() for key, value in state.items()}


def _sum(module: nn.Module) -> Tensor:
    assert isinstance(module, LowRankLayer | FusedProjection)
    return module.effective_weight().to(module.weight.dtype)
