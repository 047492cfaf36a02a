"""The stable adapter: a float32 copy of the trained one that follows it slowly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from everlora.callbacks.adapters import trained_places
from everlora.errors import StoreError
from everlora.lowrank import interpolate_

__all__ = ["StableAdapter", "check_shapes"]


class StableAdapter:
    """Weights of the same names and shapes as the trained adapter's, outside the model and its optimiser.

    PEFT's `set_adapter` would switch gradients on and off; here the layers' own parameters are exchanged for others
    within a block and come back untouched.

    Attributes:
        parameters: name to weight, float32, without gradient.
    """

    def __init__(self, model: PeftModel) -> None:
        self._places = trained_places(model)
        self._dropouts = [m for path, m in model.named_modules() if "lora_dropout" in path.split(".")]
        self.parameters = {
            name: nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=False)
            for name, (_, _, p) in self._places.items()
        }

    @property
    def plastic(self) -> dict[str, nn.Parameter]:
        """The trained adapter's parameters."""
        return {name: parameter for name, (_, _, parameter) in self._places.items()}

    def update(self, retention: float) -> None:
        """Move towards the trained adapter: `stable <- retention * stable + (1 - retention) * plastic`."""
        with torch.no_grad():
            interpolate_(list(self.parameters.values()), list(self.plastic.values()), retention)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the stable adapter, without adapter dropout; then with its own again."""
        modes = [module.training for module in self._dropouts]
        try:
            for name, (module, attribute, _) in self._places.items():
                setattr(module, attribute, self.parameters[name])
            for module in self._dropouts:
                module.training = False
            yield
        finally:
            for module, attribute, own in self._places.values():
                setattr(module, attribute, own)
            for module, mode in zip(self._dropouts, modes, strict=True):
                module.training = mode

    def state(self) -> dict[str, Tensor]:
        """Return the weights, for a checkpoint within a task."""
        return {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}

    def load_state(self, state: Mapping[str, Tensor], *, source: object) -> None:
        """Put back what `state` returned.

        Raises:
            StoreError: names or shapes differ.
        """
        check_shapes(self.parameters, state, source=source)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


def check_shapes(own: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: object) -> None:
    """Check that weights have the names and shapes of others.

    Raises:
        StoreError: they do not.
    """
    for name in sorted(own.keys() | found.keys()):
        expected, given = (tuple(t[name].shape) if name in t else None for t in (own, found))
        if expected != given:
            raise StoreError(
                f"{source}: expected weight '{name}' of shape {expected or 'none at all'}, as the model's adapter has, "
                f"found {given or 'none'}; continue with the same adapter settings"
            )
