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
from everlora.methods.base import Batch, Collect, Encoder, Loss, Recalled, State, TaskInfo, keyed_generator
from everlora.methods.registry import register
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
        self.buffer = ReplayBuffer(options.size, balanced=options.balanced)
        self._inserting: _Inserting | None = None
        self._trained_on: Tensor | None = None

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's head; earlier heads go on training."""
        super().begin_task(task, collect)
        like, _ = collect.rows(torch.empty(0, dtype=torch.long))
        self.buffer.restore(like)
        self._inserting = _Inserting(self.buffer, task, collect, keyed_generator(self.seed, task.index, "buffer"))

    def before_step(self, rows: Tensor) -> None:
        """Note the rows that will have been trained on."""
        self._trained_on = rows

    def recall(self, count: int, generator: torch.Generator) -> Recalled | None:
        """Draw rows of the buffer, from when on it holds one of an earlier task."""
        newest = len(self.heads.classes) - 1
        if not bool((self.buffer.tasks < newest).any()):
            return None
        return Recalled(*self.buffer.draw(self.options.batch or count, generator))

    def loss(self, batch: Batch) -> Loss:
        """One cross-entropy, averaged over the rows of the batch and of the buffer."""
        labels, memory = batch.labels, batch.memory
        tasks = torch.full_like(labels, len(self.heads.classes) - 1)
        if memory is None or memory.tasks is None:
            features = self.features(batch)
        else:
            features = self._both(batch, memory)
            labels, tasks = torch.cat([labels, memory.labels]), torch.cat([tasks, memory.tasks])
        return Loss(self.heads.joint_loss(features, labels, tasks, self.options.loss))

    def after_step(self, stepped: bool) -> None:
        """Let the rows of the batch go by the buffer, if that is done online."""
        if self.options.insert == "online" and self._inserting is not None and self._trained_on is not None:
            self._inserting.add(self._trained_on.cpu())
        self._trained_on = None

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the heads, and let the task's rows go by the buffer, if that is done at its end."""
        super().end_task(task, collect)
        if self.options.insert == "task_end" and self._inserting is not None:
            self._inserting.add(torch.arange(task.num_examples))
        self._inserting = None

    def panels(self) -> dict[str, dict[str, float]]:
        """Rows of each task in the buffer, and the bytes of all."""
        counts = torch.bincount(self.buffer.tasks, minlength=len(self.heads.classes)).tolist()
        rows = {f"task {index}": float(count) for index, count in enumerate(counts)}
        return {"buffer_rows": rows, "buffer_bytes": {"buffer": float(self.buffer.nbytes)}}

    def state(self) -> State:
        """Heads, fine-tuned weights and the buffer, all as they are now."""
        if not self.heads.classes:
            return super().state()
        return {**super().state(), **{f"buffer/{name}": value for name, value in self.buffer.state().items()}}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        super().load_state(state)
        stored = {k.removeprefix("buffer/"): v for k, v in state.items() if k.startswith("buffer/")}
        if stored:
            self.buffer.load_state(stored)

    def _both(self, batch: Batch, memory: Batch) -> Tensor:
        """Features of the batch's rows and then of the memory's, in one pass where their shapes allow it.

        Batch norms in training mode must see all rows at once; texts of different lengths, which have none, are run
        in two passes and need no common padding.
        """
        first, second = batch.inputs, memory.inputs
        if first.keys() == second.keys() and all(first[k].shape[1:] == second[k].shape[1:] for k in first):
            return self.encoder.features({k: torch.cat([first[k], second[k]]) for k in first})
        return torch.cat([self.features(batch), self.features(memory)])


class _Inserting:
    """The rows of one task on their way by the buffer, each once."""

    def __init__(self, buffer: ReplayBuffer, task: TaskInfo, collect: Collect, generator: torch.Generator) -> None:
        self._buffer = buffer
        self._task = task
        self._collect = collect
        self._generator = generator
        self._done = torch.zeros(task.num_examples, dtype=torch.bool)

    def add(self, rows: Tensor) -> None:
        """Let those of the given rows `(n,)` go by that did not yet, un-augmented."""
        new = rows[~self._done[rows]]
        if len(new):
            self._done[new] = True
            encoded, labels = self._collect.rows(new)
            self._buffer.add(encoded, labels, self._task.index, self._generator)
