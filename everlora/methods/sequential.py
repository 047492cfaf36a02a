"""Plain fine-tuning, one encoder trained on task after task without protection: the lower bound of every table.

The same class with other options gives two more reference rows: `joint` sees the rows of all tasks at once (the upper
bound), and `probe` leaves the encoder frozen and trains the heads only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from everlora.methods.base import Collect, Encoder, TaskInfo
from everlora.methods.classifiers import aligner_of, realign
from everlora.methods.registry import register
from everlora.methods.tuned import TunedMethod

__all__ = ["Sequential", "SequentialOptions"]


@dataclass(frozen=True)
class SequentialOptions:
    """Options of sequential fine-tuning.

    Attributes:
        rank: rank of the LoRA.
        alpha: the LoRA counts with alpha over rank, as PEFT has it; None for 1.
        targets: name patterns of the layers to adapt; None takes those of the model.
        train: `adapter` trains the LoRA, `all` the whole encoder, `head` nothing but the head; `auto` takes `all` for
            networks with batch norms, `adapter` for others.
        bn: of batch norms, along with `all`: `shared` trains scale and shift and lets the statistics move,
            `affine_only` keeps the pretrained statistics, `frozen_eval` keeps everything.
        trains_on: `task` for one task after the other, `stream` for the rows of all tasks at once.
        loss: cross-entropy over the task's own classes (`local`) or over all `seen` classes.
        head_init: a new head's rows: `uniform` (official) or `zeros`, which makes heads of different tasks more alike.
        forward_mode: how an adapted layer computes.
        alignment: realign all heads after each task on features drawn from class Gaussians, as InfLoRA's "CA" does.
        alignment_epochs: passes over the drawn features.
        alignment_lr: learning rate of the alignment.
    """

    rank: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] | None = None
    train: Literal["auto", "adapter", "all", "head"] = "auto"
    bn: Literal["shared", "affine_only", "frozen_eval"] = "shared"
    trains_on: Literal["task", "stream"] = "task"
    loss: Literal["local", "seen"] = "local"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"
    alignment: bool = False
    alignment_epochs: Annotated[int, Field(ge=1)] = 5
    alignment_lr: Annotated[float, Field(gt=0)] = 0.01


@register(
    "sequential",
    presets={"joint": {"trains_on": "stream"}, "probe": {"train": "head"}},
    aliases={"seq": "sequential", "head_only": "probe"},
    about={
        "joint": "All tasks' rows at once through one encoder: the upper bound.",
        "probe": "A frozen encoder with heads trained task after task.",
    },
)
class Sequential(TunedMethod):
    """Train one LoRA, everything, or only heads on each task in turn, with one head per task."""

    options_type: ClassVar[type] = SequentialOptions

    def __init__(self, options: SequentialOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.trains_on = options.trains_on
        self.aligner = aligner_of(options, encoder)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the head, and realign all heads if asked for; the encoder stays as this task left it."""
        super().end_task(task, collect)
        realign(self.aligner, self.heads, task, collect, processes=self.processes, seed=self.seed)
