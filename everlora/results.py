"""What a learner returns: task results, predictions, evaluations of classes and of language."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from everlora.html_tables import NOTHING, html_table, percent

__all__ = ["Counts", "Evaluation", "Forgotten", "LanguageEvaluation", "LanguageScore", "Prediction", "TaskResult"]


@dataclass(frozen=True)
class Counts:
    """Correct rows of one evaluation.

    Attributes:
        correct: rows whose predicted class, among all seen, is right.
        size: rows.
        task_aware: rows that are right when only their own task's classes compete; None where that has no meaning.
        task_correct: rows predicted as some class of their own task; None where classes belong to several tasks.
        predicted: rows by the label that was predicted, without those that never were; None where the task was given.
    """

    correct: int
    size: int
    task_aware: int | None = None
    task_correct: int | None = None
    predicted: Mapping[str, int] | None = field(default=None, compare=False, repr=False)

    @property
    def accuracy(self) -> float:
        """`correct / size`, in [0, 1]."""
        return self.correct / self.size


@dataclass(frozen=True)
class Forgotten:
    """What left a learner on request, and what could not.

    Attributes:
        left: how much, by kind: `buffer_rows`, `validation_rows`, `class_means`, `gaussians`, `prototypes`,
            `checkpoints` (of an unfinished task, which begins anew), `removed_files` (of what was put aside before);
            `earlier_...` in states kept for `rollback`. Empty when nothing was found, and nothing was changed then.
        remaining: sentences on what stays, and on rows that could not be looked at.
    """

    left: Mapping[str, int]
    remaining: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The answer to one input.

    Attributes:
        label: name of the best class; None for *none of these* (see `Learner.predict`), whose scores stay.
        score: probability of the best class, softmax over the classes that compete.
        scores: probability of each of these classes by name, best first.
        text: what a language model wrote; None for a class. `label` is then empty, unless the input named its labels.
    """

    label: str | None
    score: float
    scores: Mapping[str, float]
    text: str | None = None


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

    def _repr_html_(self) -> str:
        """A table of the tasks, for notebooks."""
        rows = [(name, str(self.counts[name].size), percent(share)) for name, share in self.per_task.items()]
        size = sum(counts.size for counts in self.counts.values())
        caption = f"Accuracy {percent(self.accuracy)} % on {size} rows"
        return html_table(caption, ("Task", "Rows", "Accuracy %"), rows)


@dataclass(frozen=True)
class LanguageScore:
    """How well a language model does on some rows.

    Attributes:
        nll: negative log-likelihood of all scored tokens, nats.
        tokens: scored tokens.
        num_bytes: UTF-8 bytes of the text that they stand for.
        rows: rows.
        correct: rows whose label was the likeliest, or whose text was exactly right; None where that was not measured.
        answers: rows that `correct` is out of.
        rouge_l: mean F1 of ROUGE-L over rows that were written, None where none were.
        written: how many rows were.

    Source: section 9 of the reference on I-LoRA.
    """

    nll: float
    tokens: int
    num_bytes: int
    rows: int
    correct: int | None = None
    answers: int = 0
    rouge_l: float | None = None
    written: int = 0

    @property
    def cross_entropy(self) -> float:
        """Nats a token, weighted by tokens; NaN without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the cross-entropy."""
        return math.exp(self.cross_entropy)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN without bytes."""
        return self.nll / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan

    @property
    def accuracy(self) -> float | None:
        """`correct / answers`; None where no row was answered."""
        return None if self.correct is None or not self.answers else self.correct / self.answers

    def __add__(self, other: LanguageScore) -> LanguageScore:
        """Put the scores of two sets of rows together."""
        written = [(s.rouge_l, s.written) for s in (self, other) if s.rouge_l is not None]
        weight = sum(rows for _, rows in written)
        return LanguageScore(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            self.rows + other.rows,
            None if self.correct is None and other.correct is None else (self.correct or 0) + (other.correct or 0),
            self.answers + other.answers,
            sum(rouge * rows for rouge, rows in written) / weight if weight else None,
            weight,
        )


@dataclass(frozen=True)
class LanguageEvaluation:
    """How well a language model does, in all and by task.

    Attributes:
        total: over all rows.
        per_task: by task name.
    """

    total: LanguageScore
    per_task: Mapping[str, LanguageScore]

    def _repr_html_(self) -> str:
        """A table of the tasks, for notebooks."""
        columns = ("Task", "Rows", "Tokens", "Nats a token", "Perplexity", "Right %")
        rows = [
            (
                name,
                str(score.rows),
                str(score.tokens),
                f"{score.cross_entropy:.4f}",
                f"{score.perplexity:.2f}",
                percent(score.accuracy),
            )
            for name, score in {**self.per_task, "all": self.total}.items()
        ]
        return html_table(f"{self.total.cross_entropy:.4f} nats a token on {self.total.rows} rows", columns, rows)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None where rows have none to compare."""
        return self.total.accuracy

    @property
    def cross_entropy(self) -> float:
        """Nats a token."""
        return self.total.cross_entropy


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

    def _repr_html_(self) -> str:
        """A table of the tasks so far, for notebooks."""
        caption = (
            f"Task {self.index + 1} '{self.name}': {self.num_examples} rows, {self.steps} steps, {self.seconds:.1f} s"
        )
        if not self.metrics:
            return html_table(
                caption, ("New labels", "Known labels"), [(_listed(self.new_labels), _listed(self.known_labels))]
            )
        heading, show = ("Accuracy %", percent) if self.labels else ("Nats a token", "{:.4f}".format)
        rows = [(task, show(value)) for task, value in self.metrics.items()]
        return html_table(caption, ("On rows kept of", heading), rows)


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(labels) or NOTHING
