"""Low-rank adapters of a task's own beside frozen layers that all tasks share."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, TargetError
from everlora.isolation.norms import NormMode, norm_copies, norm_layers
from everlora.lowrank import AdaptedLayer, LowRankConv2d, LowRankLinear, attach, capped_ranks, find_targets

__all__ = ["AdapterPlan", "Scaling", "adapter_targets", "factors_of", "factors_to_rows"]


class Scaling:
    """Rank and alpha of one kind of layer; a branch counts with `alpha / rank`, in capped layers too."""

    def __init__(self, rank: int, alpha: float | None = None) -> None:
        self.rank = rank
        self.scale = 1.0 if alpha is None or rank == 0 else alpha / rank


def adapter_targets(
    model: nn.Module,
    targets: Sequence[str] | None,
    default: Callable[[], Sequence[str]],
    *,
    without: Collection[str] = (),
) -> list[str]:
    """Names of the layers to adapt.

    Args:
        model: the network. A fused projection of which only slices are wanted is taken apart.
        targets: patterns as `attach` takes them. None: in a network with several convolutions, all of them and all
            linear layers; else the default.
        default: gives the patterns for a network that is no convolutional one.
        without: names of top-level children that are never adapted, such as a classifier.

    Raises:
        TargetError: a target matches nothing that can be adapted, or lies in a child that is left out.
    """
    if targets is None and sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:
        kinds = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        targets = [f"re:{re.escape(name)}" for name in kinds if name.partition(".")[0] not in without]
    patterns = default() if targets is None else targets
    names = find_targets(model, patterns)
    unread = [name for name in names if name.partition(".")[0] in without]
    if unread:
        raise TargetError(f"layer '{unread[0]}' does not change the features; name other layers with targets")
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if not set(names) <= known:  # slices, which exist once their projection is taken apart
        for name, layer in attach(model, patterns, 0).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
    return names


class AdapterPlan:
    """Which layers of a network a task adapts, with which ranks, and which norms it owns.

    Args:
        model: the network, as pretrained.
        names: layers to adapt, see `adapter_targets`.
        convolutions: rank and alpha of convolutions; ranks are lowered to what makes sense for a layer.
        linears: rank and alpha of linear layers, likewise.
        norm: what a task owns of the normalisation layers.
        copy_rest: give a task a whole copy of those layers for which even one unit of rank is larger than the layer.
        without: names of top-level children that are left alone.

    Attributes:
        ranks: name to rank of each adapted layer, in order.
        scales: name to what its branch counts with.
        copied: names of the layers that a task has a whole copy of.
        norms: names of the normalisation layers.

    Raises:
        OptionError: nothing is left to adapt or copy.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        convolutions: Scaling,
        linears: Scaling,
        norm: NormMode,
        copy_rest: bool = False,
        without: Collection[str] = (),
    ) -> None:
        self.norm = norm
        self.norms = list(norm_layers(model, without=without))
        first = [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)]
        rest = [name for name in names if name not in first]
        ranks = capped_ranks(model, first, convolutions.rank) | capped_ranks(model, rest, linears.rank)
        self.ranks = {name: ranks[name] for name in names if name in ranks}
        self.scales = {name: (convolutions if name in first else linears).scale for name in self.ranks}
        self.copied = [name for name in first if copy_rest and convolutions.rank and name not in ranks]
        self._first: dict[str, AdaptedLayer] = {}
        if not self.ranks and not self.copied:
            raise OptionError("no layer is left to adapt at this rank; raise the rank, or name layers with targets")

    @property
    def points(self) -> list[str]:
        """Names of all modules that a task has its own version of."""
        return [*self.ranks, *self.copied, *self.norms]

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha of each adapted layer: its branch counts with alpha over its rank."""
        return {name: rank * self.scales[name] for name, rank in self.ranks.items()}

    def build(self, base: Callable[[str], nn.Module], generator: torch.Generator) -> dict[str, nn.Module]:
        """Make the modules of a task: fresh adapters, which change nothing yet, copies and norms.

        Args:
            base: gives the module that the task starts from, by name.
            generator: draws the down-projections, in the order of the names.
        """
        modules: dict[str, nn.Module] = {
            name: self._adapter(name, base(name), rank, generator) for name, rank in self.ranks.items()
        }
        modules |= {name: copy.deepcopy(base(name)).requires_grad_(True) for name in self.copied}
        return modules | norm_copies({name: base(name) for name in self.norms}, self.norm)

    def _adapter(self, name: str, base: nn.Module, rank: int, generator: torch.Generator) -> AdaptedLayer:
        kind = LowRankConv2d if isinstance(base, nn.Conv2d) else LowRankLinear
        layer = kind(base, rank, scale=self.scales[name], generator=generator).train(base.training)  # type: ignore[arg-type]
        # One working weight serves the adapters of all tasks, since only one of them is in place at a time; it knows
        # the factors it was built from, and is built anew when it meets others.
        layer._working = self._first.setdefault(name, layer)._working
        return layer


def factors_of(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter in the shapes PEFT stores: `(rank, in)`, `(out, rank)`, or as kernels."""
    if isinstance(layer, LowRankConv2d):
        return layer.as_kernels(layer.down, layer.up)
    return layer.down, layer.up


def factors_to_rows(layer: AdaptedLayer, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `factors_of`: `down` and `up` in the shapes the layer holds them.

    Raises:
        ShapeError: the kernels are not those of such a layer.
    """
    down, up = factors["down"], factors["up"]
    if isinstance(layer, LowRankConv2d):
        down, up = layer.as_rows(down, up)
    return {"down": down, "up": up}
