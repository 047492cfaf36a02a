"""What is trained and what is frozen in the middle of a task: the method's parameters, and all the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from everlora.backbones import Backbone
from everlora.doctor.findings import Finding, broken, note, warning
from everlora.lowrank.adapted import LowRankLayer
from everlora.methods.base import Method

__all__ = ["Flags"]

_MOST_NAMES = 3


class Flags:
    """The parameters of a network and a method at one moment of training, and what became of them since.

    Args:
        backbone: the network.
        method: between `begin_task` and `end_task`.
    """

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self._named = _parameters(backbone, method)
        self._branches = _branches(backbone)
        mine = [parameter for group in method.parameters().values() for parameter in group]
        self._trained = {id(parameter) for parameter in mine}
        self._frozen_though_trained = [self._name(one) for one in mine if not one.requires_grad]
        self._free = [name for name, one in self._named.items() if one.requires_grad and id(one) not in self._trained]
        # Of the network alone: what a method keeps beside it, such as a moving average, may change at every step.
        frozen = {name: one for name, one in backbone.model.named_parameters() if id(one) not in self._trained}
        self._versions = {name: one._version for name, one in frozen.items()}

    def check(self, row: str) -> Iterator[Finding]:
        """Compare, after some steps, with what should be.

        Args:
            row: the method, or row of a recipe, for findings.
        """
        report = "report it as a defect of the method, or of a layer that was changed by hand"
        if self._frozen_though_trained:
            yield broken(row, f"trains what is frozen: {_listed(self._frozen_though_trained)}", report)
        if self._free:
            what = f"leaves {len(self._free)} parameters open that it does not train: {_listed(self._free)}"
            yield warning(row, what, "their gradients are computed in vain; freeze them")
        moved = [name for name, before in self._versions.items() if self._named[name]._version != before]
        if moved := [name for name in moved if id(self._named[name]) not in self._branches]:
            what = f"changed {len(moved)} frozen weights of the network within a few steps: {_listed(moved)}"
            yield broken(row, what, report)
        of_network = [
            parameter.numel()
            for name, parameter in self._named.items()
            if id(parameter) in self._trained and id(parameter) not in self._branches and not name.startswith("head ")
        ]
        if of_network:
            what = f"trains {sum(of_network)} weights beside low-rank branches and heads, in {len(of_network)} tensors"
            yield note(row, what, "nothing, if that is what its options mean")

    def _name(self, parameter: nn.Parameter) -> str:
        return next((name for name, one in self._named.items() if one is parameter), "a parameter without a name")


def _parameters(backbone: Backbone, method: Method) -> dict[str, nn.Parameter]:
    """All parameters by name; those of the method's own modules begin with `head `."""
    named = dict(backbone.model.named_parameters())
    for number, module in enumerate(method.own_modules()):
        for name, parameter in module.named_parameters():
            named.setdefault(f"head {number}.{name}", parameter)
    return named


def _branches(backbone: Backbone) -> set[int]:
    """The factors of adapted layers, which are a method's own."""
    layers = [module for module in backbone.model.modules() if isinstance(module, LowRankLayer)]
    return {id(parameter) for layer in layers for parameter in layer._parameters.values() if parameter is not None}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMES]) + more
