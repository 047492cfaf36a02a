"""The epochs of one task: batches in a keyed order, for every method."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everlora.errors import NumericError, UnsupportedError
from everlora.methods.base import Batch, State, TaskInfo
from everlora.streams.keyed import fold_key, keyed_permutation
from everlora.training.checkpoint import below, optimizer_entries, put_entries_back, under
from everlora.training.checkpointing import checkpointing, set_blocks_training
from everlora.training.data import TaskData
from everlora.training.moments import moments, put_back
from everlora.training.options import Length, make_optimizer, rate_factor
from everlora.training.out_of_memory import free_memory, is_out_of_memory
from everlora.training.pieces import own_pieces, piece_batch, require_whole_steps, split_step
from everlora.training.validation import make_validation

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Epochs"]

logger = logging.getLogger("everlora.training")


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
        self._micro_batches = trainer.options.micro_batches
        self._epoch_number = 0
        self._losses: list[float] = []  # of the epoch that is running
        self._factor = 1.0
        self._optimizer: torch.optim.Optimizer | None = None

    def run(self, groups: dict[str, list[nn.Parameter]]) -> None:
        """Train the given groups of parameters for as long as the options say, from where a checkpoint says.

        Raises:
            NumericError: the loss is not finite.
            UnsupportedError: options that the network or the method cannot follow.
        """
        optimizer = self._optimizer = make_optimizer(self.options, groups)
        carried = self.method.optimizer_state()
        self._trained = [parameter for parameters in groups.values() for parameter in parameters]
        saved, is_over = self.trainer.saver.training()
        if saved is not None:
            self._put_back(saved, optimizer)
        elif carried is not None:
            put_back(optimizer, groups, carried)
        if not is_over:
            self._run(optimizer, goes_on=saved is not None)
        if carried is None:
            self._optimizer = None
        else:
            self.method.keep_optimizer(moments(optimizer, groups))
        self.trainer.backbone.eval()

    def _run(self, optimizer: torch.optim.Optimizer, *, goes_on: bool) -> None:
        cached = self.trainer.features(self.data, "features") if self.trainer.features_are_fixed() else None
        self._train_mode()
        if self._moving_norms():
            require_whole_steps(self.processes.size, self._micro_batches)
        length = Length.of(self.options, len(self.order(0)))
        if not goes_on:
            self._validate()
        with checkpointing(self.trainer.backbone, self.options.checkpoint_gradients):
            for epoch in range(self._epoch_number, length.epochs):
                row = self._epoch(epoch, optimizer, cached, length)
                self.method.after_epoch(epoch, length.epochs)
                self.log.append({"epoch": epoch, **row, **self._validate()})
                self._tell({"epoch": epoch + 1, **{f"epoch {key}": value for key, value in self.log[-1].items()}})
        with torch.no_grad():
            for tensor, best in zip(self._state(), self._best, strict=False):
                tensor.copy_(best)
        self._best = []
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._trained):
            raise NumericError(f"training of task '{self.task.name}' led to weights that are not finite; lower lr.")

    def progress(self) -> State:
        """What training changed so far, for a checkpoint; without the optimiser where it is not needed any more."""
        optimizer = {} if self._optimizer is None else optimizer_entries(self._optimizer, self._trained)
        return {
            "epoch": self._epoch_number,
            "factor": self._factor,
            "micro_batches": self._micro_batches,
            "log": self.log,
            "curve": self.curve,
            "best_value": self._best_value if self._best else None,
            "losses": torch.tensor(self._losses, dtype=torch.float64),
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            **under("trained/", _numbered(self._state())),
            **under("best/", _numbered(self._best)),
            **under("optimizer/", optimizer),
        }

    def _put_back(self, saved: State, optimizer: torch.optim.Optimizer) -> None:
        """Go on from what `progress` returned."""
        self._epoch_number, self._factor = saved["epoch"], saved["factor"]
        self._micro_batches = saved["micro_batches"]
        self.log = saved["log"]
        self.curve = [(value, seconds) for value, seconds in saved["curve"]]
        self._losses, self.step_seconds = saved["losses"].tolist(), saved["step_seconds"].tolist()
        tensors = self._state()
        with torch.no_grad():
            for key, value in below(saved, "trained/").items():
                tensors[int(key)].copy_(value)
        best = below(saved, "best/")
        self._best = [best[key].to(tensors[int(key)]) for key in sorted(best)]
        if saved["best_value"] is not None:
            self._best_value = saved["best_value"]
        put_entries_back(optimizer, self._trained, below(saved, "optimizer/"))
        self.trainer.saver.put_method_back()

    def _train_mode(self) -> None:
        """Put the network into the mode it trains in."""
        self.trainer.backbone.train(self.options.dropout)
        if self.options.checkpoint_gradients:
            set_blocks_training(self.trainer.backbone)
        self.method.train_mode()

    def _epoch(
        self, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None, length: Length
    ) -> dict[str, float]:
        """Train on all rows once, or on as many as the task's steps still allow; return mean loss and last rate.

        Of an epoch that a checkpoint was written in, the steps before it are left out.
        """
        self._epoch_number = epoch
        self._train_mode()
        done = len(self._losses)
        for rows in self.order(epoch)[done : done + length.steps - len(self.step_seconds)]:
            step, started = len(self.step_seconds), time.monotonic()
            self._factor = rate_factor(self.options, epoch, step, length)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * self._factor
            self._losses.append(self._step(rows, epoch, optimizer, cached))
            self.step_seconds.append(time.monotonic() - started)
            self.trainer.progress(f"train {self.task.name}", step + 1, length.steps)
            self._tell({"loss": self._losses[-1], "lr": self.options.lr * self._factor})
            self.trainer.saver.after_step(self.progress)
        losses, self._losses = self._losses, []
        return {"loss": float(np.mean(losses)), "lr": self.options.lr * self._factor}

    def _tell(self, figures: dict[str, float]) -> None:
        """Tell who watches, from one of the processes."""
        if self.trainer.watch is not None and self.processes.is_first:
            self.trainer.watch.step(len(self.step_seconds), figures)

    def _step(self, rows: Tensor, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None) -> float:
        """Make one step on the given rows of the task; return its loss.

        Where memory runs out, the step is begun anew in twice as many pieces, and so are those after it.
        """
        self.method.before_step(rows)
        value = self._gradients(rows, epoch, optimizer, cached)
        while value is None:
            self._micro_batches *= 2
            logger.warning(
                "out of memory at step %d of task '%s': from now on each step of %d rows is computed in %d pieces",
                *(len(self.step_seconds), self.task.name, len(rows), self._micro_batches * self.processes.size),
            )
            optimizer.zero_grad(set_to_none=True)
            free_memory()
            value = self._gradients(rows, epoch, optimizer, cached)
        value = self.processes.sum_gradients(self._trained, value)
        self._require_finite(value, optimizer)
        self.method.after_backward()
        if self.options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self.options.clip_norm)
        optimizer.step()
        self.method.after_step(True)
        return value

    def _gradients(
        self, rows: Tensor, epoch: int, optimizer: torch.optim.Optimizer, cached: Tensor | None
    ) -> float | None:
        """Gradients of this process's part of a step; return its part of the loss, None where memory ran out."""
        step = len(self.step_seconds)
        key = (self.options.seed, self.task.index, epoch, step)
        generator = torch.Generator().manual_seed(fold_key(self.options.seed, "memory", self.task.index, epoch, step))
        recalled = self.method.recall(len(rows), generator)
        count = self.processes.size * self._micro_batches
        pieces = split_step(self.trainer.backbone, self.data.encoded, rows, recalled, count)
        # a row of the memory may come back at each step, and is augmented anew each time
        draws = 1_000_003 * (self.task.index + 1) + step
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        try:
            with self.processes.together():
                for piece in own_pieces(pieces, self.processes.rank, self.processes.size):
                    # dropout is keyed by the step's place, and by the piece's where there are more, not by what ran
                    torch.manual_seed(fold_key(*key) if len(pieces) == 1 else fold_key(*key, piece.number))
                    batch = piece_batch(
                        self.trainer, self.data, piece, recalled, epoch=epoch, cached=cached, draws=draws
                    )
                    value += self._backward(batch, optimizer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if count >= len(rows) or self._moving_norms():
                raise UnsupportedError(
                    f"a step of {len(rows)} rows needs more memory than there is, and cannot be computed in smaller "
                    "pieces; lower batch_size."
                ) from error
            return None  # the step is begun anew outside of this block, where nothing of the failed pass is alive
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
                f"{optimizer.param_groups[0]['lr']:.2g}), batch {len(self._losses)} of epoch {self._epoch_number}; "
                "lower lr, or look for bad rows."
            )

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


def _numbered(tensors: list[Tensor]) -> State:
    return {f"{place:05d}": tensor for place, tensor in enumerate(tensors)}
