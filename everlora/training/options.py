"""How a task is trained: epochs, optimiser, learning rates, augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

__all__ = ["TrainingOptions", "make_optimizer", "rate_factor"]


@dataclass(frozen=True)
class TrainingOptions:
    """How a task is trained.

    Attributes:
        epochs: passes over a task's rows.
        batch_size: rows in an optimiser step.
        eval_batch_size: rows in a forward pass without gradients.
        optimizer: `adam`, `adamw` or `sgd`; made anew for each task.
        lr: learning rate of the adapters.
        head_lr: learning rate of the heads; None takes `lr`. A head starts from nothing, so it wants a higher rate than
            the branches.
        alpha_lr_mult: learning rate of trained magnitudes, as a multiple of `lr`.
        momentum: of `sgd`.
        weight_decay: of the optimiser; magnitudes are never decayed.
        lr_schedule: per epoch: `cosine99` (official InfLoRA, ends at 1.6 % of `lr`), `cosine` (to 0), `steps` (a tenth
            at each of `milestones`), `constant`.
        milestones: epochs at which `steps` cuts the rate.
        augment: augmentation of images; `auto` is `crop_flip` for small images, `resized_crop_flip` above 64 pixels.
        precision: `float32`, or `bfloat16` for autocast.
        dropout: False keeps dropout off while training, as the official InfLoRA code does.
        keep_best: after the last epoch, go back to the one with the best accuracy on validation rows, the earliest of
            equals; without such rows the last one stands.
        drop_last: leave out an epoch's last batch when it is smaller than the others.
        seed: seed of all randomness.
    """

    epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 32
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] | None = 1e-2
    alpha_lr_mult: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["cosine99", "cosine", "constant", "steps"] = "cosine99"
    milestones: tuple[int, ...] = ()
    augment: Literal["auto", "none", "flip", "crop_flip", "resized_crop_flip"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    dropout: bool = True
    keep_best: bool = False
    drop_last: bool = False
    seed: int = 1993


def rate_factor(options: TrainingOptions, epoch: int) -> float:
    """Learning rate of an epoch over the initial one (section 9 of the InfLoRA reference for `cosine99`)."""
    last = options.epochs - 1
    if options.lr_schedule == "cosine99":
        return math.cos(99 * math.pi * epoch / (200 * last)) if last else 1.0
    if options.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
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
