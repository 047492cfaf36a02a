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

from everlora.heads import TaskHeads
from everlora.methods.base import Batch, Collect, Encoder, Loss, TaskInfo
from everlora.methods.registry import register
from everlora.methods.tuned import EpochCounter, TunedMethod, evaluating

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
        self._epochs = EpochCounter(0)
        self._trained_on: Tensor | None = None
        self._warm = False

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Copy the network as it is, then add the task's head."""
        self.teacher = Teacher(self.encoder, self.heads) if self.heads.classes else None
        self._epochs = EpochCounter(task.num_examples)
        super().begin_task(task, collect)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head and distillation of the old ones; only the former while warming up."""
        self._trained_on = batch.rows
        self._warm = self._is_warming_up(batch)
        if self._warm:
            with evaluating(self.encoder.model), torch.no_grad():
                features = self.features(batch)
            return Loss(self.heads.loss(features, batch.labels, self.options.loss))
        features = self.features(batch)
        own = self.heads.loss(features, batch.labels, self.options.loss)
        if self.teacher is None:
            return Loss(own)
        old = self.teacher.row_logits(batch)
        new = [self.heads.row_logits(features, index).float() for index in range(len(old))]
        kept = distillation(new, old, self.options.temperature, q2=self.options.lwf_q2)
        terms = {"cross_entropy": float(own.detach()), "distillation": float(kept.detach())}
        return Loss(own + self.options.lwf_lambda * kept, terms)

    def after_backward(self) -> None:
        """While warming up, drop all gradients but the new head's: the optimiser skips what has none."""
        if self._warm:
            for head in self.heads.linears[:-1]:
                head.zero_grad(set_to_none=True)

    def after_step(self, stepped: bool) -> None:
        """Note which rows were trained on, for the count of epochs."""
        if self._trained_on is not None:
            self._epochs.count(self._trained_on.cpu())
        self._trained_on = None

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the heads and let go of the copy."""
        super().end_task(task, collect)
        self.teacher = None

    def _is_warming_up(self, batch: Batch) -> bool:
        if self.teacher is None or batch.rows is None:
            return False
        return self._epochs.epoch(batch.rows.cpu()) < self.options.warmup_epochs


class Teacher:
    """A frozen copy of a network and its heads; it shares whatever the network does not train.

    Args:
        encoder: copied, but for parameters that are frozen.
        heads: copied.
    """

    def __init__(self, encoder: Encoder, heads: TaskHeads) -> None:
        frozen = {id(p): p for p in encoder.model.parameters() if not p.requires_grad}
        self.encoder = copy.deepcopy(encoder, dict(frozen))
        self.encoder.model.requires_grad_(False).eval()
        self.heads = copy.deepcopy(heads).requires_grad_(False)

    def row_logits(self, batch: Batch) -> list[Tensor]:
        """Logits `(n, rows)` float32 of each old head, without gradients."""
        with torch.no_grad():
            features = self.encoder.features(batch.inputs)
            return [self.heads.row_logits(features, index).float() for index in range(len(self.heads.classes))]


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
