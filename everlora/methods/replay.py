"""Rehearsal: a small buffer of raw rows of earlier tasks, trained along with every batch (experience replay).

Each step takes the current batch and rows drawn from the buffer, augmented anew, and minimises one cross-entropy
averaged over all of them. It is the only method here that keeps data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everlora.buffer import ReplayBuffer
from everlora.methods.base import Batch, Collect, Encoder, Loss, Recalled, State, TaskInfo
from everlora.methods.forgetting import Forgetting, forget_rows
from everlora.methods.registry import register
from everlora.methods.rehearsal import IGNORED, Rehearsal, joined, stack_rows
from everlora.methods.tuned import TunedMethod

__all__ = ["Replay", "ReplayOptions"]


@dataclass(frozen=True)
class ReplayOptions:
    """Options of rehearsal.

    Attributes:
        size: rows the buffer holds at most.
        batch: rows drawn for each step; None draws as many as the batch has.
        insert: when a task's rows go by the buffer: all at its end (`task_end`), or each when it is first trained on
            (`online`).
        balanced: keep as many rows of each class, and not of each task in proportion to its size.
        loss: cross-entropy over all `seen` classes, or for each row over the classes of its own task (`local`).
        rank: rank of the LoRA.
        alpha: the LoRA counts with alpha over rank, as PEFT has it; None for 1.
        targets: name patterns of the layers to adapt; None takes those of the model.
        train: `adapter` trains the LoRA, `all` the whole encoder, `head` nothing but the heads; `auto` takes `all` for
            networks with batch norms, `adapter` for others.
        bn: of batch norms, along with `all`: `shared` trains scale and shift and lets the statistics move,
            `affine_only` keeps the pretrained statistics, `frozen_eval` keeps everything.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
        forward_mode: how an adapted layer computes.
    """

    size: Annotated[int, Field(ge=1)] = 500
    batch: Annotated[int, Field(ge=1)] | None = None
    insert: Literal["task_end", "online"] = "task_end"
    balanced: bool = False
    loss: Literal["local", "seen"] = "seen"
    rank: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] | None = None
    train: Literal["auto", "adapter", "all", "head"] = "auto"
    bn: Literal["shared", "affine_only", "frozen_eval"] = "shared"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"


@register("replay", aliases={"er": "replay"})
class Replay(TunedMethod):
    """Experience replay with a reservoir: section 7.2 of the reference on convolutional networks."""

    options_type: ClassVar[type] = ReplayOptions
    options: ReplayOptions
    all_heads_train = True

    def __init__(self, options: ReplayOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.rehearsal = Rehearsal(
            options.size,
            seed=seed,
            insert=options.insert,
            balanced=options.balanced,
            by_task=encoder.output_head is not None,
        )

    @property
    def buffer(self) -> ReplayBuffer:
        """The rows kept."""
        return self.rehearsal.buffer

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's head; earlier heads go on training."""
        super().begin_task(task, collect)
        self.rehearsal.begin_task(task, collect)

    def before_step(self, rows: Tensor) -> None:
        """Note the rows that will have been trained on."""
        self.rehearsal.before_step(rows)

    def recall(self, count: int, generator: torch.Generator) -> Recalled | None:
        """Draw rows of the buffer, from when on it holds one of an earlier task."""
        return self.rehearsal.recall(self.options.batch or count, generator, newest=len(self.heads.classes) - 1)

    def loss(self, batch: Batch) -> Loss:
        """One cross-entropy, averaged over the rows, or tokens, of the batch and of the buffer."""
        parts = joined(batch, len(self.heads.classes) - 1)
        features = stack_rows([self.features(part) for part in parts])
        labels = stack_rows([part.labels for part in parts], IGNORED)
        tasks = torch.cat([part.tasks for part in parts if part.tasks is not None])
        return Loss(self.heads.joint_loss(features, labels, tasks, self.options.loss))

    def after_step(self, stepped: bool) -> None:
        """Let the rows of the batch go by the buffer, if that is done online."""
        self.rehearsal.after_step()

    def progress_state(self) -> State:
        """The buffer, where rows go by it during training."""
        return self.rehearsal.progress_state()

    def load_progress_state(self, state: State) -> None:
        """Put the buffer back."""
        self.rehearsal.load_progress_state(state)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the heads, and let the task's rows go by the buffer, if that is done at its end."""
        super().end_task(task, collect)
        self.rehearsal.end_task(task)

    def panels(self) -> dict[str, dict[str, float]]:
        """Rows of each task in the buffer, and the bytes of all."""
        return self.rehearsal.panels(len(self.heads.classes))

    def state(self) -> State:
        """Heads, fine-tuned weights and the buffer, all as they are now."""
        if not self.heads.classes:
            return super().state()
        return {**super().state(), **self.rehearsal.state()}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        super().load_state(state)
        self.rehearsal.load_state(state)

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let rows leave the buffer."""
        return {**super().forget(request), **forget_rows(request)}
