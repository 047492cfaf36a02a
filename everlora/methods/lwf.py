"""Learning without forgetting: the network as it was before a task teaches it to keep the outputs of the old heads.

Beside the cross-entropy of the new task, each old head's softened outputs on the new task's rows are held close to
those that a frozen copy of the network gives for the same, equally augmented, rows. No old data are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from everlora.lowrank import exchanged
from everlora.lowrank.modes import evaluating
from everlora.methods.base import Batch, Collect, Encoder, Loss, State, TaskInfo
from everlora.methods.classifiers import Heads
from everlora.methods.registry import register
from everlora.methods.tuned import TunedEncoder, TunedMethod

__all__ = ["LearningWithoutForgetting", "LwfOptions", "Teacher", "distillation"]


@dataclass(frozen=True)
class LwfOptions:
    """Options of learning without forgetting.

    Attributes:
        lwf_lambda: weight of the distillation.
        temperature: q, by which logits are divided before the softmax; the larger, the more small outputs count.
        lwf_q2: multiply the distillation by q^2, which keeps its gradients' size when q changes.
        warmup_epochs: epochs at the start of each task but the first in which only the new head is trained, the
            encoder being in evaluation mode; they are part of the task's epochs.
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

    lwf_lambda: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    lwf_q2: bool = True
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    loss: Literal["local", "seen"] = "local"
    rank: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[str, ...] | None = None
    train: Literal["auto", "adapter", "all"] = "auto"
    bn: Literal["shared", "affine_only", "frozen_eval"] = "shared"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"


@register("lwf")
class LearningWithoutForgetting(TunedMethod):
    """LwF (Li and Hoiem, 2016): section 7.3 of the reference on convolutional networks."""

    options_type: ClassVar[type] = LwfOptions
    options: LwfOptions
    all_heads_train = True

    def __init__(self, options: LwfOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.teacher: Teacher | None = None
        self._epoch = 0

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Copy the network as it is, then add the task's head."""
        self.teacher = Teacher(self.tuned, self.heads) if self.heads.classes else None
        self._epoch = 0
        super().begin_task(task, collect)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head and distillation of the old ones; only the former while warming up."""
        if self._is_warming_up():
            with evaluating(self.encoder.model), torch.no_grad():
                features = self.features(batch)
            return Loss(self.heads.loss(features, batch.labels, self.options.loss))
        # the teacher first: it may put its own factors in place, and what a backward pass runs again wants these
        old = [] if self.teacher is None else self.teacher.outputs(batch)
        features = self.features(batch)
        own = self.heads.loss(features, batch.labels, self.options.loss)
        if self.teacher is None:
            return Loss(own)
        new = self.heads.outputs(features, batch.labels, self.teacher.num_tasks)
        kept = distillation(new, old, self.options.temperature, q2=self.options.lwf_q2)
        terms = {"cross_entropy": float(own.detach()), "distillation": float(kept.detach())}
        return Loss(own + self.options.lwf_lambda * kept, terms)

    def after_backward(self) -> None:
        """While warming up, drop all gradients but the new head's: the optimiser skips what has none."""
        if self._is_warming_up():
            newest = len(self.heads.classes) - 1
            for parameter in self.heads.first(newest).trained():
                parameter.grad = None

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Count the epochs of the warm-up."""
        self._epoch = epoch + 1

    def progress_state(self) -> State:
        """How many epochs of the task are over."""
        return {"epoch": self._epoch}

    def load_progress_state(self, state: State) -> None:
        """Go on after so many epochs."""
        self._epoch = state.get("epoch", 0)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the heads and let go of the copy."""
        super().end_task(task, collect)
        self.teacher = None

    def _is_warming_up(self) -> bool:
        return self.teacher is not None and bool(self.heads.trained()) and self._epoch < self.options.warmup_epochs


class Teacher:
    """A network and its heads as they are now, kept while the network goes on training.

    Of adapted layers only the factors are kept, and put in place for the teacher's pass; an encoder that is trained
    as a whole is copied, but for what it does not train.

    Args:
        tuned: the encoder with what is trained of it.
        heads: copied.
    """

    def __init__(self, tuned: TunedEncoder, heads: Heads) -> None:
        self.num_tasks = len(heads.classes)
        self._layers = tuned.layers
        self._factors = {
            name: (layer.down.detach().clone(), layer.up.detach().clone()) for name, layer in tuned.layers.items()
        }
        shared = {id(p): p for p in tuned.encoder.model.parameters() if not p.requires_grad or tuned.layers}
        # one memory for both, so that an output layer stays that of the copied network
        self.encoder = tuned.encoder if tuned.layers else copy.deepcopy(tuned.encoder, shared)
        self.heads: Heads = copy.deepcopy(heads, shared)
        if not tuned.layers:
            self.encoder.model.requires_grad_(False).eval()
        self.heads.freeze()

    def outputs(self, batch: Batch) -> list[Tensor]:
        """What is distilled, see `TaskHeads.outputs`; without gradients and in evaluation mode."""
        with torch.no_grad(), evaluating(self.encoder.model), exchanged(self._layers, self._factors):
            return self.heads.outputs(self.encoder.features(batch.inputs), batch.labels, self.num_tasks)


def distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, *, q2: bool = True
) -> Tensor:
    """Sum over heads of the divergence of softened outputs, `KL(softmax(z_old / q) || softmax(z / q))`.

    Args:
        student: logits `(n, classes of the head)` of each head.
        teacher: the same of the network that teaches.
        temperature: q.
        q2: multiply by q^2.

    Returns:
        A scalar: the mean over the batch.
    """
    total = student[0].new_zeros(())
    for new, old in zip(student, teacher, strict=True):
        mine, theirs = ((z / temperature).log_softmax(dim=1) for z in (new, old))
        total = total + nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return total * temperature**2 if q2 else total
