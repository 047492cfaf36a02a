"""The one training loop: all hooks of a task, around its epochs, for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from everlora.backbones import Backbone
from everlora.errors import OptionError, UnsupportedError
from everlora.methods.base import Batch, Method, TaskInfo
from everlora.streams.augment import augment
from everlora.training.checkpoint import Checkpoints, Saver
from everlora.training.data import TaskData
from everlora.training.epochs import Epochs
from everlora.training.options import Length, TrainingOptions, steps_per_epoch
from everlora.training.passes import Collector
from everlora.training.peak_memory import peak_memory_bytes, reset_peak_memory
from everlora.training.pieces import require_whole_steps
from everlora.training.processes import processes
from everlora.training.watching import Watcher

__all__ = ["Progress", "TaskTrainer", "TrainingReport"]

Progress = Callable[[str, int, int], None]
"""Called often as `progress(stage, done, total)`."""


@dataclass(frozen=True)
class TrainingReport:
    """What training one task cost.

    Attributes:
        steps: optimiser steps.
        seconds: wall seconds by part: `train`, `collect`, `total`.
        trainable_parameters: elements that were trained.
        peak_memory_bytes: peak of the device's allocator, or of the process on a CPU.
        log: one row per epoch: epoch, mean loss, learning rate; with validation rows their accuracy, the task given,
            as `validation`, or for a language model the mean loss of their tokens as `validation_nll`, and the seconds
            of training so far.
        step_seconds: median over the steps, without the first ten where there are more than twenty.
        curve: with validation rows, `(accuracy, seconds of training so far)` before the first epoch and after each;
            empty for a language model.
    """

    steps: int
    seconds: dict[str, float]
    trainable_parameters: int
    peak_memory_bytes: int
    log: list[dict[str, float]] = field(default_factory=list)
    step_seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)


class TaskTrainer:
    """Teach one task to a method; it sees the task's training rows and nothing else."""

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        options: TrainingOptions,
        *,
        progress: Progress | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.options = options
        self.device = backbone.device
        self.processes = processes(self.device)
        self.progress = progress if progress is not None and self.processes.is_first else _silent
        self.collect_seconds = 0.0
        self.watch: Watcher | None = None
        self._checkpoints = checkpoints
        self.saver = Saver(method, None, self.processes)

    def learn(self, task: TaskInfo, data: TaskData, validation: TaskData | None = None) -> TrainingReport:
        """Run all hooks of a task.

        Args:
            task: the task.
            data: its training rows.
            validation: rows kept from training, to measure after each epoch and choose the best by.

        Raises:
            NumericError: the loss is not finite; the message names the step and the learning rate.
            OptionError: an option that does not fit the model.
            UnsupportedError: options that the network or the method cannot follow.
            ProcessError: another one of the processes that train together failed.
            InterruptedLearning: somebody asked for a stop; a checkpoint was written, where there are any.
        """
        started, self.collect_seconds = time.monotonic(), 0.0
        self._check_options()
        self.saver = Saver(self.method, self._checkpoints, self.processes)
        self.method.processes = self.processes
        steps = Length.of(self.options, steps_per_epoch(self.options, len(data))).steps
        task = replace(task, num_examples=len(data), steps=steps)
        reset_peak_memory(self.device)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            return self._learn(task, data, validation, started)

    def _learn(self, task: TaskInfo, data: TaskData, validation: TaskData | None, started: float) -> TrainingReport:
        collector = Collector(self, task, data, validation)
        self.saver.begin(task.name)
        self.method.begin_task(task, collector)
        groups = {name: params for name, params in self.method.parameters().items() if params}
        trainable = sum(p.numel() for params in groups.values() for p in params)
        begun = time.monotonic()
        training = Epochs(self, task, data, validation)
        if groups:
            training.run(groups)
        self.saver.finish_training(training.progress)
        trained = time.monotonic()
        self.method.end_task(task, collector)
        total = time.monotonic() - started
        seconds = {"train": trained - begun, "collect": self.collect_seconds, "total": total}
        return TrainingReport(
            steps=len(training.step_seconds),
            seconds=seconds,
            trainable_parameters=trainable,
            peak_memory_bytes=peak_memory_bytes(self.device),
            log=training.log,
            step_seconds=training.typical_step(),
            curve=training.curve,
        )

    def row_batches(self, data: TaskData, max_batches: int | None = None) -> list[Tensor]:
        """Row numbers `(m,)` of each batch of a pass, texts of like length together."""
        lengths = self.backbone.lengths(data.encoded)
        order = torch.arange(len(data)) if lengths is None else torch.as_tensor(lengths).argsort(stable=True)
        return list(torch.split(order, self.options.eval_batch_size)[:max_batches])

    def batches(self, data: TaskData, stage: str) -> Iterator[tuple[Tensor, Batch]]:
        """Go through all rows in evaluation mode; of several processes each goes through some of the batches.

        Args:
            data: the rows.
            stage: name for the progress callback.

        Yields:
            Row numbers `(m,)` and the batch, not augmented.
        """
        self.backbone.eval()
        own = self.processes.own(self.row_batches(data))
        for done, rows in enumerate(own, start=1):
            yield rows, self.batch(data, rows, epoch=None)
            self.progress(stage, done, len(own))

    def encode(self, data: TaskData, stage: str) -> Iterator[tuple[Tensor, Batch]]:
        """Run the encoder without gradients over what `batches` goes through; the batches have their features."""
        for rows, batch in self.batches(data, stage):
            yield rows, self.encoded(batch)

    def encoded(self, batch: Batch) -> Batch:
        """The batch with its features, computed without gradients."""
        with torch.no_grad(), self.autocast():
            return replace(batch, features=self.backbone.features(batch.inputs))

    def features(self, data: TaskData, stage: str) -> Tensor:
        """Features `(n, d)` of all rows, in their order and without augmentation; in each process all of them."""
        result = torch.zeros(len(data), self.backbone.feature_dim, device=self.device)
        with self.processes.together():
            for rows, batch in self.encode(data, stage):
                if batch.features is not None:
                    result[rows.to(self.device)] = batch.features
        return self.processes.sum(result)  # the rows of other processes are zeros in each

    def batch(
        self, data: TaskData, rows: Tensor, *, epoch: int | None, cached: Tensor | None = None, pack: bool = False
    ) -> Batch:
        """Make the batch of the given rows, from their cached features where there are any.

        Args:
            data: rows of the task.
            rows: `(n,)` row numbers.
            epoch: key of the augmentation, or None for the evaluation transform.
            cached: features of all rows.
            pack: lay the rows of a language model end to end.
        """
        if cached is not None:
            return Batch({}, data.labels[rows].to(self.device), cached[rows], rows=rows)
        inputs = self.inputs(data.encoded, rows, epoch, pack=pack)
        labels = inputs.pop("labels", data.labels[rows])  # those of a language model come with its tokens
        return Batch(inputs, labels.to(self.device), rows=rows)

    def inputs(self, encoded: Any, rows: Tensor, epoch: int | None, *, pack: bool = False) -> dict[str, Tensor]:
        """Collate rows on the device; `epoch` is the key of their augmentation, None for the evaluation transform."""
        options: dict[str, Any] = {"pack": True} if pack else {"augment": self._augmentation(epoch)}
        tensors = self.backbone.collate(encoded, rows, **options)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def autocast(self) -> torch.autocast:
        """The precision to compute in."""
        enabled = self.options.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _augmentation(self, epoch: int | None) -> Callable[[Tensor, Tensor], Tensor] | None:
        name = self._augment_name()
        if epoch is None or name == "none":
            return None
        size = self.backbone.image_size
        return lambda images, ids: augment(name, images, ids, seed=self.options.seed, epoch=epoch, size=size)

    def _augment_name(self) -> str:
        if self.backbone.modality != "image":
            return "none"
        if self.options.augment != "auto":
            return self.options.augment
        return "crop_flip" if (self.backbone.image_size or 0) <= 64 else "resized_crop_flip"

    def features_are_fixed(self) -> bool:
        """Whether training may use features computed once: neither encoder nor inputs change."""
        return self.method.fixed_features and self._augment_name() == "none" and self.backbone.modality != "language"

    def _check_options(self) -> None:
        if self.method.moves_statistics():
            require_whole_steps(self.processes.size, self.options.micro_batches)
        if self.options.packing and self.backbone.modality != "language":
            raise OptionError(f"packing is for language models, found {self.backbone.architecture}; leave it out.")
        if self.options.keep_best and self.method.variants:
            raise UnsupportedError(
                f"keep_best would bring back the trained weights alone, and {type(self.method).__name__} predicts with "
                "others that go with them; leave it out."
            )


def _silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""
