"""Elastic weight consolidation on a PEFT adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from everlora.callbacks.adapters import trained_places
from everlora.callbacks.fisher import fisher_information
from everlora.callbacks.folders import dump_tensors, load_tensors
from everlora.callbacks.regularizer import Examples, Regularizer
from everlora.errors import NumericError, StoreError
from everlora.methods.ewc import quadratic_penalty

__all__ = ["ElasticAdapter", "ElasticOptions"]

logger = logging.getLogger("everlora.callbacks")

_FILE = "fisher.safetensors"


@dataclass(frozen=True)
class ElasticOptions:
    """Options of elastic weight consolidation on an adapter.

    Attributes:
        ewc_lambda: weight of the penalty; 0 leaves the training as it is without the callback.
        gamma: how much of the earlier tasks' Fisher information counts on after each task; 1 forgets none.
        fisher_samples: examples to measure the Fisher information of a task on.
        normalize_fisher: divide each task's Fisher information by its mean, so that the weight of the penalty has
            the same meaning whatever the model's likelihoods.
    """

    ewc_lambda: Annotated[float, Field(ge=0)] = 100.0
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    fisher_samples: Annotated[int, Field(ge=1)] = 200
    normalize_fisher: bool = True


class ElasticAdapter(Regularizer):
    """`lambda / 2 * sum F (theta - theta*)^2` over the adapter's trained weights, with one running F.

    Source: Kirkpatrick et al., 2017; Schwarz et al., 2018; section 10 of the reference on I-LoRA.
    """

    options_type: ClassVar[type] = ElasticOptions
    needs_examples: ClassVar[bool] = True
    options: ElasticOptions

    def __init__(self, options: ElasticOptions) -> None:
        super().__init__(options)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}  # F without the task being learned
        self._parameters: dict[str, nn.Parameter] = {}

    def begin(self, model: PeftModel, *, resumed: bool) -> None:
        """Check names and shapes against the earlier tasks' adapter."""
        self._parameters = parameters = _trained(model)
        self._earlier = dict(self.importance)
        for name, value in self.importance.items():
            found = tuple(parameters[name].shape) if name in parameters else "no such weight"
            if found != tuple(value.shape):
                raise StoreError(
                    f"expected a trained weight '{name}' of shape {tuple(value.shape)}, as earlier tasks had, found "
                    f"{found}; continue with the adapter of the task before"
                )
        for held in (self.importance, self.anchor):
            held.update({name: value.to(parameters[name].device) for name, value in held.items()})
        moved = [name for name, value in self.anchor.items() if not torch.equal(value, parameters[name].float())]
        if moved and not resumed:
            logger.warning(
                "the adapter does not start where the task before ended ('%s' differs): the penalty pulls it there; "
                "load that task's adapter with is_trainable=True",
                moved[0],
            )

    def penalty(self, model: PeftModel) -> Tensor:
        """Return the penalty."""
        if not self.importance:
            return torch.zeros(())
        parameters = self._parameters or _trained(model)
        return self.options.ewc_lambda * quadratic_penalty(parameters, self.anchor, self.importance)

    def gradients(self, model: PeftModel) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield `lambda * F * (theta - theta*)`."""
        if not self.importance or not self.options.ewc_lambda:
            return
        parameters = self._parameters or _trained(model)
        for name, importance in self.importance.items():
            moved = parameters[name].detach().float() - self.anchor[name]
            yield parameters[name], moved.mul_(importance).mul_(self.options.ewc_lambda)

    def finish(self, model: PeftModel, examples: Examples) -> None:
        """Measure the task's Fisher information, add it to `gamma` times the earlier tasks', and move the anchor."""
        parameters = _trained(model)
        new, used = fisher_information(model, parameters, examples, limit=self.options.fisher_samples)
        if self.options.normalize_fisher:
            mean = sum(float(f.sum()) for f in new.values()) / sum(f.numel() for f in new.values())
            if not mean > 0:
                raise NumericError("the Fisher information is zero throughout: no trained weight changes the loss")
            new = {name: value / mean for name, value in new.items()}
        old = {name: value.to(new[name].device) for name, value in self._earlier.items()}
        self.importance = {n: f + self.options.gamma * old[n] if n in old else f for n, f in new.items()}
        self.anchor = {name: p.detach().float().clone() for name, p in parameters.items()}
        logger.info("Fisher information measured on %d examples", used)

    def files(self) -> dict[str, bytes]:
        """Return F and the anchor as one file."""
        tensors = {f"fisher/{name}": value for name, value in self.importance.items()}
        tensors.update({f"anchor/{name}": value for name, value in self.anchor.items()})
        return {_FILE: dump_tensors(tensors)}

    def record(self) -> dict[str, Any]:
        """Return the mean of F, for people who look."""
        total = sum(value.numel() for value in self.importance.values())
        return {"mean_fisher": sum(float(f.sum()) for f in self.importance.values()) / max(total, 1)}

    def load(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put back F and the anchor."""
        if _FILE not in files:
            raise StoreError(f"expected a file {_FILE}, found none; the folder was written by another method")
        tensors = load_tensors(files[_FILE], Path(_FILE))
        self.importance = {k.removeprefix("fisher/"): v for k, v in tensors.items() if k.startswith("fisher/")}
        self.anchor = {k.removeprefix("anchor/"): v for k, v in tensors.items() if k.startswith("anchor/")}
        self._earlier = dict(self.importance)


def _trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, (_, _, parameter) in trained_places(model).items()}
