"""How a task is trained: epochs, optimiser, learning rates, augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

__all__ = ["Length", "TrainingOptions", "make_optimizer", "rate_factor", "steps_per_epoch"]


@dataclass(frozen=True)
class TrainingOptions:
    """How a task is trained.

    Attributes:
        epochs: passes over a task's rows.
        max_steps: exactly so many optimiser steps a task, whatever `epochs` says: passes are repeated until then, and
            the last one is cut short.
        batch_size: rows in an optimiser step, over all its pieces and processes.
        micro_batches: in how many pieces each process computes its part of a step, so that less memory is needed; the
            gradient is that of the whole step. Rows of earlier tasks are drawn once for the step and shared out alike.
        eval_batch_size: rows in a forward pass without gradients.
        optimizer: `adam`, `adamw` or `sgd`; made anew for each task, where the method does not carry its moments on.
        lr: learning rate of the adapters.
        head_lr: learning rate of the heads; None takes `lr`. A head starts from nothing, so it wants a higher rate than
            the branches.
        alpha_lr_mult: learning rate of trained magnitudes, as a multiple of `lr`.
        momentum: of `sgd`.
        weight_decay: of the optimiser; magnitudes are never decayed.
        lr_schedule: `cosine99` (official InfLoRA, ends at 1.6 % of `lr`), `cosine` (to 0), `linear` (to 0), `steps` (a
            tenth at each of `milestones`), `constant`.
        schedule_per: whether the schedule goes on with each `epoch` or each optimiser `step` of the task.
        milestones: epochs at which `steps` cuts the rate.
        warmup_steps: over so many optimiser steps at the start of each task, what the schedule says is multiplied by a
            factor that grows by equal parts and is 1 at the last of them.
        clip_norm: gradients of a step whose norm, over all that is trained, is larger are scaled down to it.
        augment: augmentation of images; `auto` is `crop_flip` for small images, `resized_crop_flip` above 64 pixels.
        precision: `float32`, or `bfloat16` for autocast.
        checkpoint_gradients: keep only the inputs of each block while training, and compute the block again on the way
            back: less memory, about a third more time. For networks of transformers.
        packing: language models only: lay rows of the task end to end in lines of the greatest length, which leaves
            little padding; no row sees another. Rows of earlier tasks are never packed.
        dropout: False keeps dropout off while training, as the official InfLoRA code does.
        keep_best: after the last epoch, go back to the one with the best accuracy on validation rows, the earliest of
            equals; without such rows the last one stands.
        drop_last: leave out an epoch's last batch when it is smaller than the others.
        seed: seed of all randomness.
    """

    epochs: Annotated[int, Field(ge=1)] = 5
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    micro_batches: Annotated[int, Field(ge=1)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] | None = 1e-2
    alpha_lr_mult: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["cosine99", "cosine", "linear", "constant", "steps"] = "cosine99"
    schedule_per: Literal["epoch", "step"] = "epoch"
    milestones: tuple[int, ...] = ()
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    augment: Literal["auto", "none", "flip", "crop_flip", "resized_crop_flip"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_gradients: bool = False
    packing: bool = False
    dropout: bool = True
    keep_best: bool = False
    drop_last: bool = False
    seed: int = 1993


@dataclass(frozen=True)
class Length:
    """How long a task is trained.

    Attributes:
        epochs: passes over the rows, of which the last may be cut short.
        steps: optimiser steps.
    """

    epochs: int
    steps: int

    @classmethod
    def of(cls, options: TrainingOptions, steps_per_epoch: int) -> Length:
        """The length that options ask for, with so many steps in a whole pass."""
        if options.max_steps is None:
            return cls(options.epochs, options.epochs * steps_per_epoch)
        return cls(math.ceil(options.max_steps / steps_per_epoch), options.max_steps)


def steps_per_epoch(options: TrainingOptions, num_rows: int) -> int:
    """Optimiser steps in a whole pass over `num_rows` rows."""
    steps, rest = divmod(num_rows, options.batch_size)
    return steps + 1 if rest and not (steps and options.drop_last) else steps


def rate_factor(options: TrainingOptions, epoch: int, step: int = 0, length: Length | None = None) -> float:
    """Learning rate over the initial one (section 9 of the InfLoRA reference for `cosine99`).

    Args:
        options: of the training.
        epoch: from 0.
        step: optimiser steps of the task before this one.
        length: of the task; without it the epochs of the options, for a schedule by epochs.
    """
    place, count = (epoch, options.epochs if length is None else length.epochs)
    if options.schedule_per == "step" and length is not None:
        place, count = step, length.steps
    warm = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    return _schedule(options, epoch, place, count) * warm


def _schedule(options: TrainingOptions, epoch: int, place: int, count: int) -> float:
    """The schedule's factor at `place` of `count` epochs or steps."""
    if options.lr_schedule == "cosine99":
        return math.cos(99 * math.pi * place / (200 * (count - 1))) if count > 1 else 1.0
    if options.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * place / count))
    if options.lr_schedule == "linear":
        return 1 - place / count
    if options.lr_schedule == "steps":
        return 0.1 ** sum(epoch >= milestone for milestone in options.milestones)
    return 1.0


def make_optimizer(options: TrainingOptions, groups: Mapping[str, Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """Make the optimiser of one task.

    `head` and `magnitudes` have learning rates of their own; `magnitudes` and `norm` are not decayed.
    """
    head_lr = options.lr if options.head_lr is None else options.head_lr
    special: dict[str, dict[str, float]] = {
        "head": {"lr": head_lr},
        "norm": {"weight_decay": 0.0},
        "magnitudes": {"lr": options.lr * options.alpha_lr_mult, "weight_decay": 0.0},
    }
    sets: list[dict[str, Any]] = [{"params": list(params), **special.get(name, {})} for name, params in groups.items()]
    if options.optimizer == "sgd":
        return torch.optim.SGD(sets, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(sets, lr=options.lr, weight_decay=options.weight_decay)
