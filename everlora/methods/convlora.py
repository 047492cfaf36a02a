"""ConvLoRA: low-rank adapters on convolutions, with norms and a head of its own for each task, on a frozen network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from everlora.errors import OptionError, UnsupportedError
from everlora.isolation import (
    NOT_SHARED,
    AdapterPlan,
    Scaling,
    adapter_targets,
    batch_norms,
    parts_of,
    statistics_move,
    train_by_mode,
)
from everlora.lowrank import FusedProjection
from everlora.methods.base import Batch, Collect, Encoder, TaskInfo
from everlora.methods.isolated import IsolatedMethod
from everlora.methods.registry import register

__all__ = ["ConvLoRA", "ConvLoRAOptions"]


@dataclass(frozen=True)
class ConvLoRAOptions:
    """Options of ConvLoRA.

    Attributes:
        rank: rank of the adapters of convolutions, per group, lowered in layers too small for it; 0 adapts none.
        alpha: a branch counts with `alpha / rank`, in lowered layers too.
        rank_linear: rank of the adapters of linear layers, likewise.
        alpha_linear: as `alpha`, for linear layers.
        targets: name patterns of the layers to adapt; None takes all convolutions and hidden linear layers, or in a
            transformer keys and values.
        norm: what a task owns of the normalisation layers: `per_task` all of it, `affine_only` (scale and shift),
            `adabn` (statistics) or `frozen_eval` (nothing).
        init_from: a task's adapters and norms start `fresh`, or from those of the `previous` task.
        first_task: `adapter` never trains the network; `full` trains all of it on the first task and freezes it then.
        depthwise: layers for which one unit of rank is larger than the layer: `skip` them, or give each task a whole
            copy (`full_delta`).
        bn_recalibrate: estimate the statistics of a task's batch norms anew after training, over all of its rows.
        select: how the task is recognised when it is not given, by features of a fixed network (`prototype`,
            `mahalanobis`) or by the logits of all tasks.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
    """

    rank: Annotated[int, Field(ge=0)] = 4
    alpha: Annotated[float, Field(gt=0)] = 4.0
    rank_linear: Annotated[int, Field(ge=0)] = 30
    alpha_linear: Annotated[float, Field(gt=0)] = 30.0
    targets: tuple[str, ...] | None = None
    norm: Annotated[Literal["per_task", "affine_only", "adabn", "frozen_eval"], NOT_SHARED] = "per_task"
    init_from: Literal["fresh", "previous"] = "fresh"
    first_task: Literal["adapter", "full"] = "adapter"
    depthwise: Literal["skip", "full_delta"] = "skip"
    bn_recalibrate: bool = False
    select: Literal["max_softmax", "entropy", "energy", "prototype", "mahalanobis", "concat"] = "prototype"
    head_init: Literal["uniform", "zeros"] = "uniform"


@register("convlora")
class ConvLoRA(IsolatedMethod):
    """Frozen network, and for each task low-rank adapters, normalisation layers and a head.

    Source: sections 3 and 4 of the reference on convolutional networks.
    """

    options_type: ClassVar[type] = ConvLoRAOptions

    def __init__(self, options: ConvLoRAOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        if options.bn_recalibrate and not statistics_move(options.norm):
            raise OptionError(
                f"bn_recalibrate estimates statistics that norm={options.norm} leaves as they were pretrained; take "
                "norm=per_task or adabn, or leave it out."
            )
        self.options = options
        self.replaces_base = options.first_task == "full"
        names = adapter_targets(encoder.model, options.targets, lambda: encoder.default_targets, without=self.unread)
        sliced = {name.rpartition(".")[0] for name in names}
        if self.replaces_base and any(isinstance(encoder.model.get_submodule(n), FusedProjection) for n in sliced):
            raise UnsupportedError(
                "first_task=full of convlora cannot train a fused projection of which it adapts slices; take "
                "first_task=adapter, or name other layers with targets."
            )
        self.plan = AdapterPlan(
            encoder.model,
            names,
            convolutions=Scaling(options.rank, options.alpha),
            linears=Scaling(options.rank_linear, options.alpha_linear),
            norm=options.norm,
            copy_rest=options.depthwise == "full_delta",
            without=self.unread,
        )

    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """Put fresh adapters, or those of the task before, beside the frozen network; copy it for a full first task."""
        original = self.task_modules.original
        if not self.replaces_base:
            return self._start(index, self.plan.build(original, generator))
        if index == 0:
            paths = parts_of(self.encoder.model, self.plan.points, without=self.unread)
            copies = copy.deepcopy({path: original(path) for path in paths})  # at once, for tied weights
            return {path: train_by_mode(module, self.options.norm) for path, module in copies.items()}
        first = self.task_modules.version(0)
        return {**first, **self._start(index, self.plan.build(first.__getitem__, generator))}

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Estimate statistics anew if asked for, then freeze the task and learn to recognise it."""
        if self.options.bn_recalibrate:
            norms = batch_norms(self.task_modules.own(task.index).values())
            with _cumulative(norms):
                collect(None, stage="batch norms", before=lambda batch: _move(norms, batch))
        super().end_task(task, collect)

    def task_values(self, index: int) -> dict[str, object]:
        """Alpha of each adapted layer, as the adapter's configuration needs it."""
        return {} if self.replaces_base and index == 0 else {"alphas": self.plan.alphas}

    def _start(self, index: int, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Let new modules start from those of the task before, where that is asked for and it has such."""
        first = 1 if self.replaces_base else 0
        if self.options.init_from == "previous" and index > first:
            before = self.task_modules.version(index - 1)
            for path, module in modules.items():
                module.load_state_dict(before[path].state_dict())
        return modules


def _move(norms: list[_BatchNorm], batch: Batch) -> None:
    """Let statistics follow a batch; a single row may have none."""
    for norm in norms:
        norm.train(len(batch.labels) > 1)


@contextmanager
def _cumulative(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norms forget their statistics and take plain means over all batches inside the block."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
