"""What a learner returns: task results, predictions, evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Counts", "Evaluation", "Prediction", "TaskResult"]


@dataclass(frozen=True)
class Counts:
    """Correct rows of one evaluation.

    Attributes:
        correct: rows whose predicted class, among all seen, is right.
        size: rows.
        task_aware: rows that are right when only their own task's classes compete; None where that has no meaning.
        task_correct: rows predicted as some class of their own task; None where classes belong to several tasks.
    """

    correct: int
    size: int
    task_aware: int | None = None
    task_correct: int | None = None

    @property
    def accuracy(self) -> float:
        """`correct / size`, in [0, 1]."""
        return self.correct / self.size


@dataclass(frozen=True)
class Prediction:
    """The answer to one input.

    Attributes:
        label: name of the best class.
        score: its probability, softmax over the classes that compete.
        scores: probability of each of these classes by name, best first.
    """

    label: str
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on labelled rows.

    Attributes:
        accuracy: correct rows over all rows, in [0, 1].
        per_task: accuracy on the rows of each task, by task name; a row belongs to the task that taught its label
            first, or to the task that kept it.
        counts: the same as counts, by task name.
    """

    accuracy: float
    per_task: Mapping[str, float]
    counts: Mapping[str, Counts]


@dataclass(frozen=True)
class TaskResult:
    """What learning one task did.

    Attributes:
        index: number of the task, from 0.
        name: its name.
        labels: its labels.
        new_labels: those the learner had not seen.
        known_labels: those it had.
        num_examples: rows trained on.
        num_validation: rows kept for validation.
        seconds: wall seconds of the whole task.
        steps: optimiser steps.
        metrics: accuracy on the kept rows of each task so far, by task name; empty when none are kept.
        num_truncated: texts that were longer than the model takes.
    """

    index: int
    name: str
    labels: tuple[str, ...]
    new_labels: tuple[str, ...]
    known_labels: tuple[str, ...]
    num_examples: int
    num_validation: int
    seconds: float
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_truncated: int = 0
