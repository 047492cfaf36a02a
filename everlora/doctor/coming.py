"""What is looked at before training: tasks that are still to be learned, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from everlora.doctor.findings import Finding
from everlora.streams import Examples

__all__ = ["ComingTask", "Estimate", "Outlook", "Part", "parts_of", "place"]


@dataclass(frozen=True, eq=False)
class ComingTask:
    """Rows of a task, learned already or still to come.

    Attributes:
        name: what findings call it: a file's name, or a task's.
        train: rows to learn from; None where they are not known any more.
        validation: rows to choose by.
        test: rows to be measured on.
    """

    name: str
    train: Examples | None
    validation: Examples | None = None
    test: Examples | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one split of one task."""

    task: str
    split: str
    rows: Examples

    @property
    def name(self) -> str:
        """What findings call it."""
        return f"{self.task} ({self.split})" if self.split != "training" else self.task


@dataclass(frozen=True)
class Estimate:
    """What a task will cost.

    Attributes:
        row: the method, or row of a recipe.
        task: name of the task.
        rows: training rows.
        steps: optimiser steps.
        seconds: about how long it takes, without evaluation.
        peak_memory_bytes: greatest use of the device's memory, or on a CPU of the process's.
        parameters: elements that are trained.
    """

    row: str
    task: str
    rows: int
    steps: int
    seconds: float
    peak_memory_bytes: int
    parameters: int


@dataclass
class Outlook:
    """What was found before training.

    Attributes:
        findings: what is broken first, then warnings, then notes.
        estimates: cost of each task.
        how: how the estimates were made, one sentence for each method that was measured.
    """

    findings: list[Finding] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    how: list[str] = field(default_factory=list)

    @property
    def is_broken(self) -> bool:
        """Whether something must be mended before training."""
        return any(finding.severity == "broken" for finding in self.findings)


def parts_of(tasks: list[ComingTask]) -> Iterator[Part]:
    """Every split of every task that is there."""
    for task in tasks:
        for split, rows in (("training", task.train), ("validation", task.validation), ("test", task.test)):
            if rows is not None and len(rows):
                yield Part(task.name, split, rows)


def place(rows: Examples, index: int) -> str:
    """A row in words: its number in its source, counted from 1, and how its text begins."""
    number = f"row {int(rows.ids[index]) + 1}"
    if rows.modality == "image":
        return number
    text = " ".join(str(rows.inputs[index]).split())
    return f"{number} '{text[:40]}{'...' if len(text) > 40 else ''}'"
