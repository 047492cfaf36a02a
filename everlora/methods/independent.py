"""A network or adapter of its own for each task, from the pretrained weights: nothing is shared, nothing forgotten."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from everlora.isolation import (
    NOT_SHARED,
    AdapterPlan,
    Scaling,
    adapter_targets,
    has_batch_norm,
    parts_of,
    train_by_mode,
)
from everlora.methods.base import Encoder
from everlora.methods.isolated import IsolatedMethod
from everlora.methods.registry import register

__all__ = ["Independent", "IndependentOptions"]


@dataclass(frozen=True)
class IndependentOptions:
    """Options of independent networks.

    Attributes:
        train: `all` fine-tunes a copy of the network for each task, `adapter` a LoRA and the task's own normalisation
            layers; `auto` is `all` for networks with batch norms, `adapter` for others.
        rank: rank of the LoRA, lowered in layers too small for it.
        alpha: a branch counts with `alpha / rank`; None takes the rank, so that it counts with 1.
        targets: name patterns of the layers to adapt; None takes keys and values, or in a network of convolutions all
            of its layers.
        norm: what a task owns of the normalisation layers: `per_task` all of it, `affine_only` (scale and shift),
            `adabn` (statistics) or `frozen_eval` (nothing).
        select: how the task is recognised when it is not given, by features of a fixed network (`prototype`,
            `mahalanobis`) or by the logits of all tasks.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
    """

    train: Literal["auto", "adapter", "all"] = "auto"
    rank: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] | None = None
    norm: Annotated[Literal["per_task", "affine_only", "adabn", "frozen_eval"], NOT_SHARED] = "per_task"
    select: Literal["max_softmax", "entropy", "energy", "prototype", "mahalanobis", "concat"] = "prototype"
    head_init: Literal["uniform", "zeros"] = "uniform"


@register("independent")
class Independent(IsolatedMethod):
    """A full fine-tuned copy, or an adapter, for each task: the upper reference for what a task alone can reach."""

    options_type: ClassVar[type] = IndependentOptions

    def __init__(self, options: IndependentOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.options = options
        model = encoder.model
        self.replaces_base = options.train == "all" or (options.train == "auto" and has_batch_norm(model))
        self.plan: AdapterPlan | None = None
        if not self.replaces_base:
            names = adapter_targets(model, options.targets, lambda: encoder.default_targets, without=self.unread)
            scaling = Scaling(options.rank, options.alpha)
            self.plan = AdapterPlan(
                model, names, convolutions=scaling, linears=scaling, norm=options.norm, without=self.unread
            )

    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """Copy the pretrained network, or put fresh adapters beside it."""
        if self.plan is not None:
            return self.plan.build(self.task_modules.original, generator)
        paths = parts_of(self.encoder.model, (), without=self.unread)
        copies = copy.deepcopy({path: self.task_modules.original(path) for path in paths})  # at once, for tied weights
        return {path: train_by_mode(module, self.options.norm) for path, module in copies.items()}

    def task_values(self, index: int) -> dict[str, object]:
        """Alpha of each adapted layer, as the adapter's configuration needs it."""
        return {} if self.plan is None else {"alphas": self.plan.alphas}
