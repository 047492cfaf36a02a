"""The one training loop: batches in a keyed order, for every method."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everlora.backbones import Backbone
from everlora.errors import DataError, NumericError
from everlora.methods.base import Batch, Method, TaskInfo
from everlora.streams import Examples
from everlora.streams.augment import augment
from everlora.streams.keyed import fold_key, keyed_permutation
from everlora.training.options import TrainingOptions, make_optimizer, rate_factor

__all__ = ["Progress", "TaskData", "TaskTrainer", "TrainingReport", "peak_memory_bytes"]

Progress = Callable[[str, int, int], None]
"""Called often as `progress(stage, done, total)`."""


@dataclass(frozen=True)
class TaskData:
    """Rows of one task, encoded once.

    Attributes:
        encoded: what `Backbone.encode` returned.
        labels: `(n,)` class indices.
        ids: `(n,)` int64, keys of all per-row randomness.
    """

    encoded: Any
    labels: Tensor
    ids: Tensor

    @classmethod
    def of(cls, backbone: Backbone, examples: Examples, class_index: dict[str, int]) -> TaskData:
        """Encode examples; `class_index` maps every label name to its class index.

        Raises:
            DataError: no rows, or a label that has no index.
        """
        if len(examples) == 0:
            raise DataError("the data set has no rows; give at least one row a class.")
        names = [] if examples.labels is None else [str(name) for name in examples.labels]
        unknown = sorted({name for name in names if name not in class_index})
        if unknown:
            raise DataError(
                f"label '{unknown[0]}' ({len(unknown)} in all) is unknown to the learner; known: "
                + ", ".join(list(class_index)[:8])
            )
        labels = torch.tensor([class_index[name] for name in names], dtype=torch.long)
        ids = torch.as_tensor(np.ascontiguousarray(examples.ids), dtype=torch.long)
        return cls(backbone.encode(examples.inputs, examples.ids), labels, ids)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)


@dataclass(frozen=True)
class TrainingReport:
    """What training one task cost.

    Attributes:
        steps: optimiser steps.
        seconds: wall seconds by part: `train`, `collect`, `total`.
        trainable_parameters: elements that were trained.
        peak_memory_bytes: peak of the device's allocator, or of the process on a CPU.
        log: one row per epoch: epoch, mean loss, learning rate.
    """

    steps: int
    seconds: dict[str, float]
    trainable_parameters: int
    peak_memory_bytes: int
    log: list[dict[str, float]] = field(default_factory=list)


class TaskTrainer:
    """Teach one task to a method; it sees the task's training rows and nothing else."""

    def __init__(
        self, backbone: Backbone, method: Method, options: TrainingOptions, *, progress: Progress | None = None
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.options = options
        self.device = backbone.device
        self._progress = progress or (lambda stage, done, total: None)
        self.collect_seconds = 0.0

    def learn(self, task: TaskInfo, data: TaskData) -> TrainingReport:
        """Run all hooks of a task.

        Raises:
            NumericError: the loss is not finite; the message names the step and the learning rate.
        """
        started, self.collect_seconds = time.monotonic(), 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            return self._learn(task, data, started)

    def _learn(self, task: TaskInfo, data: TaskData, started: float) -> TrainingReport:
        collector = _Collector(self, task, data)
        self.method.begin_task(task, collector)
        groups = {name: params for name, params in self.method.parameters().items() if params}
        trainable = sum(p.numel() for params in groups.values() for p in params)
        begun = time.monotonic()
        log, steps = self._train(task, data, groups) if groups else ([], 0)
        trained = time.monotonic()
        self.method.end_task(task, collector)
        total = time.monotonic() - started
        seconds = {"train": trained - begun, "collect": self.collect_seconds, "total": total}
        return TrainingReport(steps, seconds, trainable, peak_memory_bytes(self.device), log)

    def encode(
        self,
        data: TaskData,
        stage: str,
        *,
        before: Callable[[Batch], None] | None = None,
        epoch: int | None = None,
        max_batches: int | None = None,
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Run the encoder without gradients over all rows, texts of like length together.

        Args:
            data: the rows.
            stage: name for the progress callback.
            before: called with each batch before the encoder runs.
            epoch: key of the augmentation, or None for the evaluation transform.
            max_batches: stop early.

        Yields:
            Row numbers `(m,)` and the batch with its features.
        """
        self.backbone.eval()
        lengths = self.backbone.lengths(data.encoded)
        order = torch.arange(len(data)) if lengths is None else torch.as_tensor(lengths).argsort(stable=True)
        batches = torch.split(order, self.options.eval_batch_size)[:max_batches]
        for done, rows in enumerate(batches):
            batch = self._batch(data, rows, epoch=epoch)
            if before is not None:
                before(batch)
            with torch.no_grad(), self._autocast():
                features = self.backbone.features(batch.inputs)
            yield rows, replace(batch, features=features)
            self._progress(stage, done + 1, len(batches))

    def features(self, data: TaskData, stage: str) -> Tensor:
        """Features `(n, d)` of all rows, in the order of the rows, without augmentation."""
        result = torch.empty(len(data), self.backbone.feature_dim, device=self.device)
        for rows, batch in self.encode(data, stage):
            if batch.features is not None:
                result[rows.to(self.device)] = batch.features
        return result

    def _train(
        self, task: TaskInfo, data: TaskData, groups: dict[str, list[nn.Parameter]]
    ) -> tuple[list[dict[str, float]], int]:
        options = self.options
        optimizer = make_optimizer(options, groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        total = options.epochs * math.ceil(len(data) / options.batch_size)
        log, step = [], 0
        cached = self.features(data, "features") if self._features_are_fixed() else None
        for epoch in range(options.epochs):
            factor = rate_factor(options, epoch)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            losses = []
            for rows in self._order(data, task.index, epoch):
                # dropout is keyed by the step's place, not by what ran before
                torch.manual_seed(fold_key(options.seed, task.index, epoch, step))
                batch = self._batch(data, rows, epoch=epoch, cached=cached)
                losses.append(self._step(batch, optimizer, task, step))
                step += 1
                self._progress(f"train {task.name}", step, total)
            log.append({"epoch": epoch, "loss": float(np.mean(losses)), "lr": options.lr * factor})
        self.backbone.eval()
        return log, step

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, task: TaskInfo, step: int) -> float:
        self.backbone.train(self.options.dropout)
        with self._autocast():
            loss = self.method.loss(batch).value
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericError(
                f"the loss of task '{task.name}' is {value} at step {step} (learning rate "
                f"{optimizer.param_groups[0]['lr']:.2g}); lower lr, or look for bad rows."
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.method.after_backward()
        optimizer.step()
        self.method.after_step(True)
        return value

    def _order(self, data: TaskData, task: int, epoch: int) -> tuple[Tensor, ...]:
        """Rows of each batch of an epoch, drawn at random by key."""
        order = keyed_permutation(len(data), self.options.seed, task, epoch)
        return torch.split(order, self.options.batch_size)

    def _batch(self, data: TaskData, rows: Tensor, *, epoch: int | None, cached: Tensor | None = None) -> Batch:
        labels = data.labels[rows].to(self.device)
        if cached is not None:
            return Batch({}, labels, cached[rows])
        inputs = self.backbone.collate(data.encoded, rows, augment=self._augmentation(epoch))
        return Batch({name: tensor.to(self.device) for name, tensor in inputs.items()}, labels)

    def _autocast(self) -> torch.autocast:
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

    def _features_are_fixed(self) -> bool:
        return self.method.fixed_features and self._augment_name() == "none"


class _Collector:
    """A method's passes over the current task's training rows (see `Collect`)."""

    def __init__(self, trainer: TaskTrainer, task: TaskInfo, data: TaskData) -> None:
        self.trainer = trainer
        self.task = task
        self.data = data

    def __call__(
        self,
        visit: Callable[[Batch, Tensor], None] | None = None,
        *,
        stage: str,
        before: Callable[[Batch], None] | None = None,
        augment: bool = True,
        max_batches: int | None = None,
    ) -> int:
        started = time.monotonic()
        # the epoch of a pass lies below 0 and is its own, so its draws differ from those of training
        epoch = -1 - fold_key(stage) % 1_000_003 if augment else None
        seen = 0
        batches = self.trainer.encode(self.data, stage, before=before, epoch=epoch, max_batches=max_batches)
        for rows, batch in batches:
            if visit is not None and batch.features is not None:
                visit(batch, batch.features)
            seen += len(rows)
        self.trainer.collect_seconds += time.monotonic() - started
        return seen


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
