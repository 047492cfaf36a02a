"""Elastic weight consolidation: weights that earlier tasks depend on are held where those tasks left them.

How much a task depends on a weight is read off the diagonal of the Fisher information, the mean square of the gradient
of the true label's log-likelihood after training. The penalty is a quadratic around the weights after the newest task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from everlora.methods.base import Batch, Collect, Encoder, Loss, State, TaskInfo
from everlora.methods.keys import keyed_generator
from everlora.methods.registry import register
from everlora.methods.tuned import TunedMethod

__all__ = ["ElasticWeightConsolidation", "EwcOptions", "quadratic_penalty"]


@dataclass(frozen=True)
class EwcOptions:
    """Options of elastic weight consolidation.

    Attributes:
        ewc_lambda: weight of the penalty.
        gamma: how much of the earlier tasks' Fisher information counts on after each task; 1 forgets none.
        fisher_samples: rows to measure the Fisher information of a task on, drawn at random; None takes all.
        normalize_fisher: divide each task's Fisher information by its mean, so that `ewc_lambda` means the same for any
            model and loss; None does so for language models.
        fisher: square the gradient of every row (`sample`), or the sum of the gradients of every batch (`batch`), which
            is fast, and right on average where the gradients of a trained network cancel.
        loss: cross-entropy over the task's own classes (`local`) or over all `seen` classes.
        rank: rank of the LoRA.
        alpha: the LoRA counts with alpha over rank, as PEFT has it; None for 1.
        targets: name patterns of the layers to adapt; None takes those of the model.
        train: `adapter` trains the LoRA, `all` the whole encoder; `auto` takes `all` for networks with batch norms,
            `adapter` for others.
        bn: of batch norms, along with `all`: `shared` trains scale and shift and lets the statistics move,
            `affine_only` keeps the pretrained statistics, `frozen_eval` keeps everything.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
        forward_mode: how an adapted layer computes.
    """

    ewc_lambda: Annotated[float, Field(ge=0)] = 100.0
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    fisher_samples: Annotated[int, Field(ge=1)] | None = 256
    normalize_fisher: bool | None = None
    fisher: Literal["sample", "batch"] = "sample"
    loss: Literal["local", "seen"] = "local"
    rank: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] | None = None
    train: Literal["auto", "adapter", "all"] = "auto"
    bn: Literal["shared", "affine_only", "frozen_eval"] = "shared"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"


@register("ewc")
class ElasticWeightConsolidation(TunedMethod):
    """EWC (Kirkpatrick et al., 2017) with one running Fisher information (Schwarz et al., 2018)."""

    options_type: ClassVar[type] = EwcOptions
    options: EwcOptions

    def __init__(self, options: EwcOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._gathering: dict[str, Tensor] = {}

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's head; what earlier tasks left is what the penalty pulls towards."""
        super().begin_task(task, collect)
        trained = self.tuned.named_parameters()
        self.anchor = {name: trained[name].detach().clone() for name in self.importance}
        self.importance = {name: value.to(trained[name].device) for name, value in self.importance.items()}

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head, and the penalty from the second task on."""
        own = super().loss(batch).value
        if not self.importance:
            return Loss(own)
        held = quadratic_penalty(self.tuned.named_parameters(), self.anchor, self.importance)
        terms = {"cross_entropy": float(own.detach()), "penalty": float(held.detach())}
        return Loss(own + self.options.ewc_lambda * held, terms)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Measure the task's Fisher information and add it to what is left of the earlier tasks'."""
        new = self._measure(task, collect)
        kept = self.options.gamma
        old = self.importance
        self.importance = {name: value + kept * old[name] if name in old else value for name, value in new.items()}
        super().end_task(task, collect)

    def gathered(self) -> State | None:
        """The sums of squared gradients of the running pass."""
        return dict(self._gathering) or None

    def resume_gathering(self, state: State) -> None:
        """Go on from such sums."""
        for name, total in self._gathering.items():
            total.copy_(state[name])

    def state(self) -> State:
        """Heads, fine-tuned weights, and the Fisher information; the weights are what the penalty pulls towards."""
        return {**super().state(), **{f"fisher/{name}": value.cpu() for name, value in self.importance.items()}}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        super().load_state(state)
        self.importance = {k.removeprefix("fisher/"): v for k, v in state.items() if k.startswith("fisher/")}

    def panels(self) -> dict[str, dict[str, float]]:
        """Mean Fisher information of each trained tensor."""
        return {"fisher": {name: float(value.mean()) for name, value in self.importance.items()}}

    def _measure(self, task: TaskInfo, collect: Collect) -> dict[str, Tensor]:
        """Diagonal of the empirical Fisher information of what is trained of the encoder, in evaluation mode.

        The log-likelihood of a row of a language model is the mean over its labelled tokens.
        """
        trained = self.tuned.named_parameters()
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        chosen = torch.ones(task.num_examples, dtype=torch.bool)
        limit = self.options.fisher_samples
        if limit is not None and limit < task.num_examples:
            order = torch.randperm(task.num_examples, generator=keyed_generator(self.seed, task.index, "fisher"))
            chosen[order[limit:]] = False

        def add(batch: Batch, features: Tensor) -> None:
            for part in self._parts(batch, chosen):
                with torch.enable_grad():
                    loss = self.heads.loss(self.features(part), part.labels, self.options.loss)
                    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.add_((len(part.labels) * gradient).square())

        self._gathering = sums
        collect(add, stage="fisher information", augment=False)
        self._gathering = {}
        sums = {name: self.processes.sum(total) for name, total in sums.items()}
        return self._normalized({name: total / int(chosen.sum()) for name, total in sums.items()})

    def _normalized(self, fisher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Divide by the mean over all elements, where the options ask for it."""
        wanted = self.options.normalize_fisher
        if not (self.encoder.output_head is not None if wanted is None else wanted):
            return fisher
        mean = sum(float(value.sum()) for value in fisher.values()) / sum(value.numel() for value in fisher.values())
        return {name: value / mean for name, value in fisher.items()} if mean > 0 else fisher

    def _parts(self, batch: Batch, chosen: Tensor) -> Iterator[Batch]:
        """Split the chosen rows of a batch as their gradients are to be squared."""
        places = torch.arange(len(batch.labels))
        if batch.rows is not None:
            places = places[chosen[batch.rows.cpu()]]
        size = 1 if self.options.fisher == "sample" else max(len(places), 1)
        for part in torch.split(places, size) if len(places) else ():
            rows = part.to(batch.labels.device)
            yield Batch({name: value[rows] for name, value in batch.inputs.items()}, batch.labels[rows])


def quadratic_penalty(
    trained: Mapping[str, nn.Parameter], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """Half the sum of squared distances from an anchor, each element weighted: `0.5 sum F (theta - theta*)^2`.

    Args:
        trained: theta by name.
        anchor: theta* by the same names.
        importance: F by the same names, not negative.
    """
    terms = [(importance[name] * (trained[name] - anchor[name]).square()).sum() for name in importance]
    return 0.5 * torch.stack(terms).sum()
