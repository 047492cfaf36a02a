"""Weights whose entries are handed out among tasks: each entry belongs to one task, or is free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["MOST_TASKS", "OwnedLayer", "OwnedWeight", "weighted_layers"]

MOST_TASKS = 255
"""An owner is one byte, and 0 means free."""


class OwnedWeight(nn.Module):
    """One weight of a network, each entry of which is written by one task and read by it and all later ones.

    For task `t` the weight is `base + value` where the entry's owner is `t` or an earlier task, and `base` elsewhere.
    The base itself is never written. Life of a task: `begin`; after every step `restore`; once `prune`; then `finish`.

    Args:
        layer: holds the pretrained `weight`, which is the base.
        from_zero: the base is 0 instead, and the first task starts from the pretrained weight.

    Source: Mallya and Lazebnik, "PackNet", 2018; section 7.4 of the reference on convolutional networks.
    """

    owner: Tensor

    def __init__(self, layer: nn.Module, *, from_zero: bool = False) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self._layer = [layer]  # in a list: the layer belongs to the network
        self.from_zero = from_zero
        start = weight.detach().float().clone() if from_zero else torch.zeros_like(weight, dtype=torch.float32)
        self.value = nn.Parameter(start, requires_grad=False)
        self.register_buffer("owner", torch.zeros_like(weight, dtype=torch.uint8))
        self._trained_task: int | None = None
        self._mine: Tensor | None = None
        self._held: Tensor | None = None

    def weight(self, task: int) -> Tensor:
        """The weight as a task sees it, in the dtype of the pretrained one."""
        base = self._layer[0].weight
        assert isinstance(base, Tensor)
        value: Tensor = self.value
        if task != self._trained_task:  # the task being trained reads what is still free, and nobody comes after it
            value = torch.where((self.owner > 0) & (self.owner <= task + 1), value, 0.0)
        return (value if self.from_zero else base.float() + value).to(base.dtype)

    def begin(self, task: int) -> None:
        """Let a new task train the free entries."""
        self._trained_task = task
        self._mine = self.owner == 0
        self._held = self.value.detach().clone()
        self.value.requires_grad_(True)

    def restore(self) -> None:
        """Undo what an optimiser's momentum and decay did to entries that the task does not train."""
        if self._mine is not None and self._held is not None:
            with torch.no_grad():
                self.value.copy_(torch.where(self._mine, self.value, self._held))

    def prune(self, share: float) -> None:
        """Free the given share of the entries being trained, those of the smallest value; exactly `round(share n)`."""
        assert self._mine is not None and self._held is not None
        trained = self._mine.flatten().nonzero()[:, 0]
        order = self.value.detach().flatten()[trained].abs().argsort(stable=True)
        kept = self._mine.clone()
        kept.view(-1)[trained[order[: round(share * len(trained))]]] = False
        self.keep(kept)

    @property
    def trained(self) -> Tensor:
        """The entries that are being trained, a mask."""
        assert self._mine is not None
        return self._mine

    def keep(self, entries: Tensor) -> None:
        """Go on with a part of the entries being trained, given as a mask, and free the others."""
        assert self._mine is not None and self._held is not None
        entries = entries.to(self._mine.device)
        self._held[self._mine & ~entries] = 0.0
        self._mine = entries
        self.restore()

    def finish(self) -> None:
        """Give the task the entries that it trains; they never change again."""
        assert self._mine is not None and self._trained_task is not None
        self.owner[self._mine] = self._trained_task + 1
        self._mine = self._held = self._trained_task = None
        self.value.requires_grad_(False)
        self.value.grad = None

    @property
    def num_free(self) -> int:
        """Entries that belong to no task."""
        return int((self.owner == 0).sum())

    def num_owned(self, first_task: int = 0) -> int:
        """Entries of the given task and all later ones."""
        return int((self.owner > first_task).sum())

    def owned(self, task: int) -> dict[str, Tensor]:
        """What one task wrote: `values (n,)` in the order of the entries, and `places`, a bit for each entry."""
        mask = (self.owner == task + 1).flatten()
        bits = np.packbits(mask.cpu().numpy())
        return {"values": self.value.detach().flatten()[mask].cpu(), "places": torch.from_numpy(bits)}

    def load(self, task: int, owned: Mapping[str, Tensor]) -> None:
        """Put back what `owned` returned, task after task."""
        bits = np.unpackbits(owned["places"].numpy(), count=self.owner.numel())
        mask = torch.from_numpy(bits).bool().to(self.owner.device).view_as(self.owner)
        with torch.no_grad():
            if task == 0:
                self.value.zero_()
            self.value[mask] = owned["values"].to(self.value.device)
            self.owner[mask] = task + 1


class OwnedLayer(nn.Module):
    """A layer as one task sees it: with the entries of its weight that the task may read, and its own bias.

    Args:
        layer: the pretrained layer, shared by all tasks.
        weight: its weight with all tasks' entries, shared too.
        task: number of the task.
        own_bias: whether the task trains a bias of its own, where the layer has one.
    """

    def __init__(self, layer: nn.Module, weight: OwnedWeight, task: int, *, own_bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.task = task
        self._weight = [weight]  # in a list: it is no part of this task's version
        bias = layer._parameters.get("bias")
        self.own_bias = nn.Parameter(bias.detach().clone()) if own_bias and bias is not None else None

    @property
    def weight(self) -> Tensor:
        """The weight as the task sees it."""
        return self._weight[0].weight(self.task)

    @property
    def bias(self) -> Tensor | None:
        """The task's bias, or the pretrained one."""
        return self.layer._parameters.get("bias") if self.own_bias is None else self.own_bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the layer computes, with this task's weight and bias."""
        tensors = {"weight": self.weight}
        if self.own_bias is not None:
            tensors["bias"] = self.own_bias
        return torch.func.functional_call(self.layer, tensors, args, kwargs)


def weighted_layers(model: nn.Module, *, without: Collection[str] = ()) -> dict[str, nn.Module]:
    """Find the linear layers and convolutions of a network: all that have a weight matrix and are no embeddings.

    Args:
        model: the network.
        without: names of top-level children to leave out.

    Returns:
        Qualified name to layer; of layers whose weights are one tensor, the first.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_leaf = not any(True for _ in module.children()) and name.partition(".")[0] not in without
        if is_leaf and weight is not None and weight.ndim > 1 and not isinstance(module, nn.Embedding):
            found.setdefault(id(weight), (name, module))
    return dict(found.values())
