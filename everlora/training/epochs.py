"""The epochs of one task: batches in a keyed order, for every method."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everlora.errors import NumericError
from everlora.methods.base import Batch, TaskInfo
from everlora.streams.keyed import fold_key, keyed_permutation
from everlora.training.data import TaskData
from everlora.training.options import make_optimizer, rate_factor

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Epochs"]


class Epochs:
    """The epochs of one task: steps, validation after each epoch, and the way back to the best one.

    Attributes:
        log: one row an epoch, see `TrainingReport`.
        curve: see `TrainingReport`.
        step_seconds: wall seconds of each step.
    """

    def __init__(self, trainer: TaskTrainer, task: TaskInfo, data: TaskData, validation: TaskData | None) -> None:
        self.trainer = trainer
        self.method = trainer.method
        self.options = trainer.options
        self.task = task
        self.data = data
        self.validation = validation
        self.log: list[dict[str, float]] = []
        self.curve: list[tuple[float, float]] = []
        self.step_seconds: list[float] = []
        self._best: list[Tensor] = []
        self._best_accuracy = -1.0

    def run(self, groups: dict[str, list[nn.Parameter]]) -> None:
        """Train the given groups of parameters for as many epochs as the options say."""
        options = self.options
        optimizer = make_optimizer(options, groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        fixed = self.trainer.features_are_fixed()
        cached = self.trainer.features(self.data, "features") if fixed else None
        trained = [parameter for parameters in groups.values() for parameter in parameters]
        self._validate(trained)
        for epoch in range(options.epochs):
            factor = rate_factor(options, epoch)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = self._epoch(epoch, optimizer, cached)
            self.method.after_epoch(epoch, options.epochs)
            self.log.append({"epoch": epoch, "loss": loss, "lr": options.lr * factor, **self._validate(trained)})
        for tensor, best in zip(self._state(trained), self._best, strict=False):
            with torch.no_grad():
                tensor.copy_(best)
        self.trainer.backbone.eval()

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None) -> float:
        """Train on all rows once; return the mean loss."""
        losses = []
        self.trainer.backbone.train(self.options.dropout)
        self.method.train_mode()
        batches = self.order(epoch)
        for rows in batches:
            step, started = len(self.step_seconds), time.monotonic()
            # dropout is keyed by the step's place, not by what ran before
            torch.manual_seed(fold_key(self.options.seed, self.task.index, epoch, step))
            batch = self.trainer.batch(self.data, rows, epoch=epoch, cached=cached)
            losses.append(self._step(self._with_memory(batch, epoch, step), optimizer, step))
            self.step_seconds.append(time.monotonic() - started)
            self.trainer.progress(f"train {self.task.name}", step + 1, len(batches) * self.options.epochs)
        return float(np.mean(losses))

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, step: int) -> float:
        self.trainer.backbone.train(self.options.dropout)
        self.method.train_mode()
        with self.trainer.autocast():
            loss = self.method.loss(batch).value
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericError(
                f"the loss of task '{self.task.name}' is {value} at step {step} (learning rate "
                f"{optimizer.param_groups[0]['lr']:.2g}); lower lr, or look for bad rows."
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.method.after_backward()
        optimizer.step()
        self.method.after_step(True)
        return value

    def _with_memory(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Add rows of earlier tasks, where the method has any; drawn by key and augmented like the others."""
        generator = torch.Generator().manual_seed(fold_key(self.options.seed, "memory", self.task.index, epoch, step))
        recalled = self.method.recall(len(batch.labels), generator)
        if recalled is None:
            return batch
        inputs = self.trainer.inputs(recalled.encoded, torch.arange(len(recalled.labels)), self._draws(step))
        device = batch.labels.device
        memory = Batch(inputs, recalled.labels.to(device), tasks=recalled.tasks.to(device))
        return replace(batch, memory=memory)

    def _draws(self, step: int) -> int:
        # a row of the memory may come back at each step, and is augmented anew each time
        return 1_000_003 * (self.task.index + 1) + step

    def _validate(self, trained: list[nn.Parameter]) -> dict[str, float]:
        """Measure the validation rows, and remember the weights when they are the best so far."""
        if self.validation is None or not len(self.validation):
            return {}
        seconds = sum(self.step_seconds)
        right = 0
        for rows, batch in self.trainer.batches(self.validation, "validation"):
            with torch.no_grad(), self.trainer.autocast():
                scores = self.method.logits(batch, self.task.index)
            right += int((scores.argmax(dim=1).cpu() == self.validation.labels[rows]).sum())
        accuracy = right / len(self.validation)
        self.curve.append((accuracy, seconds))
        if self.options.keep_best and self.method.settled and accuracy > self._best_accuracy:
            self._best_accuracy = accuracy
            self._best = [tensor.detach().clone() for tensor in self._state(trained)]
        return {"validation": accuracy, "seconds": seconds}

    def _state(self, trained: list[nn.Parameter]) -> list[Tensor]:
        """What training changes: the trained parameters, and the statistics of batch norms that move."""
        self.trainer.backbone.train(self.options.dropout)
        self.method.train_mode()
        moving = [buffer for norm in self._moving_norms() for buffer in norm.buffers()]
        self.trainer.backbone.eval()
        return [*trained, *moving]

    def _moving_norms(self) -> list[nn.Module]:
        """Batch norms in training mode."""
        return [m for m in self.trainer.backbone.modules() if isinstance(m, _BatchNorm) and m.training]

    def order(self, epoch: int) -> list[Tensor]:
        """Rows of each batch of an epoch, drawn at random by key."""
        order = keyed_permutation(len(self.data), self.options.seed, self.task.index, epoch)
        batches = list(torch.split(order, self.options.batch_size))
        rest = len(batches[-1])
        alone = rest == 1 and bool(self._moving_norms())  # a single row has no batch statistics
        if len(batches) > 1 and (alone or (self.options.drop_last and rest < self.options.batch_size)):
            batches.pop()
        return batches

    def typical_step(self) -> float:
        """Median seconds of a step; the first ten, which warm caches, are left out where enough others remain."""
        kept = self.step_seconds[10:] if len(self.step_seconds) > 20 else self.step_seconds
        return float(np.median(kept)) if kept else 0.0
