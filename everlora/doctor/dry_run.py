"""A task tried out in memory: all hooks on a sample, and a few steps, with the clock running."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from everlora.backbones import Backbone
from everlora.doctor.findings import Finding
from everlora.doctor.flags import Flags
from everlora.doctor.layer_checks import check_ranks
from everlora.methods.base import Method, TaskInfo
from everlora.settings import Settings
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer

__all__ = ["Measured", "dry_run", "sample_of"]

STEPS = 5
_BATCHES = 2
_TRAIN = "train "


@dataclass(frozen=True)
class Measured:
    """What the sample cost.

    Attributes:
        findings: on what is trained and what is frozen.
        rows: of the sample, as they are encoded.
        width: mean length of a row in tokens; 1 for images.
        steps: that were made.
        step_seconds: of one.
        pass_seconds: of all passes over the sample that a task makes beside its steps.
        fixed_seconds: of the rest, which does not depend on the number of rows.
        peak_memory_bytes: greatest use of memory.
        parameters: elements that are trained.
    """

    findings: list[Finding]
    rows: int
    width: float
    steps: int
    step_seconds: float
    pass_seconds: float
    fixed_seconds: float
    peak_memory_bytes: int
    parameters: int


def dry_run(
    row: str, settings: Settings, backbone: Backbone, method: Method, info: TaskInfo, data: TaskData
) -> Measured:
    """Learn a few steps of a task and finish it; method and network are of no use afterwards.

    Args:
        row: the method, or row of a recipe, for findings.
        settings: all options.
        backbone: the network, on its device.
        method: ready for the task.
        info: the task.
        data: a sample of its rows, see `sample_of`.

    Raises:
        EverloraError: what learning would fail with.
    """
    options = dataclasses.replace(settings.training, max_steps=STEPS, keep_best=False)
    watch = _Watch(lambda: Flags(backbone, method))
    report = TaskTrainer(backbone, method, options, progress=watch).learn(info, data)
    findings = [*check_ranks(row, settings.method_options, method)]
    if watch.flags is not None:
        findings += watch.flags.check(row)
    stepping = report.step_seconds * report.steps
    # Features that are computed once, before the steps, are a pass like those of the method.
    beside = max(report.seconds["train"] - stepping, 0.0) if method.fixed_features else 0.0
    passes = report.seconds["collect"] + beside
    lengths = backbone.lengths(data.encoded)
    return Measured(
        findings=findings,
        rows=len(data),
        width=1.0 if lengths is None or not len(lengths) else float(np.mean(lengths)),
        steps=report.steps,
        step_seconds=report.step_seconds,
        pass_seconds=passes,
        fixed_seconds=max(report.seconds["total"] - stepping - passes, 0.0),
        peak_memory_bytes=report.peak_memory_bytes,
        parameters=report.trainable_parameters,
    )


def sample_of(examples: Examples, *, batch_size: int) -> Examples:
    """Take rows for some whole batches, every class among them, spread over the set."""
    count = min(len(examples), max(_BATCHES * batch_size, 2 * len(examples.classes)))
    if examples.labels is None:
        return examples.select(np.linspace(0, len(examples) - 1, count).astype(np.int64))
    by_class = [rows.tolist() for rows in examples.rows_by_label.values()]
    longest = max(len(rows) for rows in by_class)
    in_turn = [rows[index] for index in range(longest) for rows in by_class if index < len(rows)]
    return examples.select(np.sort(np.asarray(in_turn[:count], dtype=np.int64)))


class _Watch:
    """Takes down what is trained once the first step is made; a progress callback like any other."""

    def __init__(self, take: Callable[[], Flags]) -> None:
        self.flags: Flags | None = None
        self._take = take

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.flags is None and stage.startswith(_TRAIN):
            self.flags = self._take()
