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

from everlora.errors import NumericError, UnsupportedError
from everlora.methods.base import Batch, Recalled, TaskInfo
from everlora.streams.keyed import fold_key, keyed_permutation
from everlora.training.checkpointing import checkpointing, set_blocks_training
from everlora.training.data import TaskData
from everlora.training.moments import moments, put_back
from everlora.training.options import Length, make_optimizer, rate_factor
from everlora.training.pieces import Piece, own_pieces, split_step
from everlora.training.validation import make_validation

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
        self.processes = trainer.processes
        self.task = task
        self.data = data
        self.validation = make_validation(trainer, task, validation)
        self.log: list[dict[str, float]] = []
        self.curve: list[tuple[float, float]] = []
        self.step_seconds: list[float] = []
        self._trained: list[nn.Parameter] = []
        self._best: list[Tensor] = []
        self._best_value = -math.inf

    def run(self, groups: dict[str, list[nn.Parameter]]) -> None:
        """Train the given groups of parameters for as long as the options say.

        Raises:
            NumericError: the loss is not finite.
            UnsupportedError: options that the network or the method cannot follow.
        """
        optimizer = make_optimizer(self.options, groups)
        carried = self.method.optimizer_state()
        if carried is not None:
            put_back(optimizer, groups, carried)
        cached = self.trainer.features(self.data, "features") if self.trainer.features_are_fixed() else None
        self._trained = [parameter for parameters in groups.values() for parameter in parameters]
        self._train_mode()
        self._refuse_split_statistics()
        length = Length.of(self.options, len(self.order(0)))
        self._validate()
        with checkpointing(self.trainer.backbone, self.options.checkpoint_gradients):
            for epoch in range(length.epochs):
                row = self._epoch(epoch, optimizer, cached, length)
                self.method.after_epoch(epoch, length.epochs)
                self.log.append({"epoch": epoch, **row, **self._validate()})
        for tensor, best in zip(self._state(), self._best, strict=False):
            with torch.no_grad():
                tensor.copy_(best)
        if carried is not None:
            self.method.keep_optimizer(moments(optimizer, groups))
        self.trainer.backbone.eval()

    def _train_mode(self) -> None:
        """Put the network into the mode it trains in."""
        self.trainer.backbone.train(self.options.dropout)
        if self.options.checkpoint_gradients:
            set_blocks_training(self.trainer.backbone)
        self.method.train_mode()

    def _refuse_split_statistics(self) -> None:
        pieces = self.processes.size * self.options.micro_batches
        if pieces > 1 and self._moving_norms():
            raise UnsupportedError(
                "batch norms whose statistics move must see all rows of a step at once, found "
                f"{self.processes.size} processes with {self.options.micro_batches} micro-batches; use one of each, or "
                "options of the method that keep the statistics."
            )

    def _epoch(
        self, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None, length: Length
    ) -> dict[str, float]:
        """Train on all rows once, or on as many as the task's steps still allow; return mean loss and last rate."""
        losses, factor = [], 1.0
        self._train_mode()
        for rows in self.order(epoch)[: length.steps - len(self.step_seconds)]:
            step, started = len(self.step_seconds), time.monotonic()
            factor = rate_factor(self.options, epoch, step, length)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            losses.append(self._step(rows, epoch, optimizer, cached))
            self.step_seconds.append(time.monotonic() - started)
            self.trainer.progress(f"train {self.task.name}", step + 1, length.steps)
        return {"loss": float(np.mean(losses)), "lr": self.options.lr * factor}

    def _step(self, rows: Tensor, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None) -> float:
        """Make one step on the given rows of the task; return its loss."""
        step = len(self.step_seconds)
        key = (self.options.seed, self.task.index, epoch, step)
        self.method.before_step(rows)
        generator = torch.Generator().manual_seed(fold_key(self.options.seed, "memory", self.task.index, epoch, step))
        recalled = self.method.recall(len(rows), generator)
        count = self.processes.size * self.options.micro_batches
        pieces = split_step(self.trainer.backbone, self.data.encoded, rows, recalled, count)
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        with self.processes.together():
            for piece in own_pieces(pieces, self.processes.rank, self.processes.size):
                # dropout is keyed by the step's place, and by the piece's where there are more, not by what ran before
                torch.manual_seed(fold_key(*key) if len(pieces) == 1 else fold_key(*key, piece.number))
                value += self._backward(self._batch(piece, epoch, cached, recalled), optimizer)
        value = self.processes.sum_gradients(self._trained, value)
        self._require_finite(value, optimizer)
        self.method.after_backward()
        if self.options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self.options.clip_norm)
        optimizer.step()
        self.method.after_step(True)
        return value

    def _backward(self, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
        """Add a piece's part of the gradient; return its part of the loss."""
        self._train_mode()
        with self.trainer.autocast():
            loss = self.method.loss(batch).value
        if batch.share.supervised != 1:
            loss = loss * batch.share.supervised
        value = float(loss.detach())
        if self.processes.size == 1:  # several processes must agree, so they look at their sum
            self._require_finite(value, optimizer)
        torch.autograd.backward(loss)
        return value

    def _require_finite(self, value: float, optimizer: torch.optim.Optimizer) -> None:
        if not math.isfinite(value):
            raise NumericError(
                f"the loss of task '{self.task.name}' is {value} at step {len(self.step_seconds)} (learning rate "
                f"{optimizer.param_groups[0]['lr']:.2g}); lower lr, or look for bad rows."
            )

    def _batch(self, piece: Piece, epoch: int, cached: Tensor | None, recalled: Recalled | None) -> Batch:
        """The rows of a piece, and with them its rows of earlier tasks, which are augmented like the others."""
        packed = self.options.packing
        batch = self.trainer.batch(self.data, piece.rows, epoch=epoch, cached=cached, pack=packed)
        if recalled is None or not len(piece.memory):
            return replace(batch, share=piece.share)
        # a row of the memory may come back at each step, and is augmented anew each time
        draws = 1_000_003 * (self.task.index + 1) + len(self.step_seconds)
        inputs = self.trainer.inputs(recalled.encoded, piece.memory, draws)
        device = batch.labels.device
        labels = inputs.pop("labels", recalled.labels[piece.memory]).to(device)
        memory = Batch(inputs, labels, tasks=recalled.tasks[piece.memory].to(device))
        return replace(batch, memory=memory, share=piece.share)

    def _validate(self) -> dict[str, float]:
        """Measure the validation rows, and remember the weights when they are the best so far."""
        if self.validation is None:
            return {}
        seconds = sum(self.step_seconds)
        value = self.validation.measure()
        if self.validation.has_curve:
            self.curve.append((value, seconds))
        if self.options.keep_best and self.method.settled and self.validation.sign * value > self._best_value:
            self._best_value = self.validation.sign * value
            self._best = [tensor.detach().clone() for tensor in self._state()]
        return {self.validation.name: value, "seconds": seconds}

    def _state(self) -> list[Tensor]:
        """What training changes: the trained parameters, and the statistics of batch norms that move."""
        self._train_mode()
        moving = [buffer for norm in self._moving_norms() for buffer in norm.buffers()]
        self.trainer.backbone.eval()
        return [*self._trained, *moving]

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
