"""The heads that methods have in common: making, keeping and realigning them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from everlora.errors import DataError, UnsupportedError
from everlora.heads import Aligner, AlignmentOptions, LanguageHead, TaskHeads
from everlora.methods.base import Batch, Collect, Encoder, State, TaskInfo, Together
from everlora.methods.gathering import gather_rows
from everlora.methods.keys import keyed_generator, task_key, tasks_in

__all__ = [
    "Heads",
    "aligner_of",
    "check_classes",
    "features_by_class",
    "heads_state",
    "load_head",
    "load_heads",
    "make_heads",
    "realign",
]

Heads: TypeAlias = TaskHeads | LanguageHead
"""What turns features into scores; both have the same verbs."""


def make_heads(encoder: Encoder, init: str = "uniform") -> Heads:
    """Return heads that grow with the tasks, or the output layer of a causal language model."""
    output = encoder.output_head
    return TaskHeads(encoder.feature_dim, init) if output is None else LanguageHead(output)


def heads_state(heads: Heads, aligner: Aligner | None) -> State:
    """Rows of every head: written once, or, when they are realigned after each task, carried on."""
    state: State = {} if aligner is None else dict(aligner.state())
    for index, classes in enumerate(heads.classes):
        prefix = task_key(index, "head/") if aligner is None else f"aligned/{index:03d}/"
        state |= {f"{prefix}{name}": rows for name, rows in heads.task_rows(index).items()}
        state[task_key(index, "classes")] = list(classes)
    return state


def load_heads(heads: Heads, aligner: Aligner | None, state: State) -> int:
    """Put back what `heads_state` returned; return the number of tasks."""
    count = tasks_in(state, "classes")
    for index in range(count):
        load_head(heads, state, index, task_key(index, "head/") if aligner is None else f"aligned/{index:03d}/")
    if aligner is not None:
        aligner.load_state(state)
    return count


def load_head(heads: Heads, state: State, index: int, prefix: str) -> None:
    """Put back the head of one task, whose rows stand under `prefix`."""
    rows = {name: state[prefix + name] for name in ("weight", "bias") if prefix + name in state}
    heads.load_task(state[task_key(index, "classes")], **rows)


def features_by_class(task: TaskInfo, collect: Collect, processes: Together) -> dict[int, Tensor]:
    """Features `(n, d)` of each class of the task, without augmentation, on the CPU; in each process all of them."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(batch: Batch, features: Tensor) -> None:
        rows.append(features.cpu())
        labels.append(batch.labels.cpu())

    collect(keep, stage="class statistics", augment=False)
    seen = gather_rows(processes, {"features": rows, "labels": labels})
    return {c: seen["features"][seen["labels"] == c] for c in task.classes}


def aligner_of(options: Any, encoder: Encoder) -> Aligner | None:
    """Make the aligner that options ask for; those named `alignment_...` are the fields of `AlignmentOptions`.

    Raises:
        UnsupportedError: for a causal language model, which has no class heads.
    """
    if not options.alignment:
        return None
    if encoder.output_head is not None:
        raise UnsupportedError("alignment is for heads of classes, which a language model has not; leave it out.")
    names = [field.name for field in dataclasses.fields(AlignmentOptions)]
    given = {name: getattr(options, f"alignment_{name}") for name in names if hasattr(options, f"alignment_{name}")}
    return Aligner(AlignmentOptions(**given))


def realign(
    aligner: Aligner | None, heads: Heads, task: TaskInfo, collect: Collect, *, processes: Together, seed: int
) -> None:
    """Realign all heads after a task, with a generator of the task's own; does nothing without an aligner."""
    if aligner is not None and isinstance(heads, TaskHeads):
        generator = keyed_generator(seed, task.index, "alignment")
        aligner.end_task(heads, task.index, features_by_class(task, collect, processes), generator)


def check_classes(task: TaskInfo, seen: Sequence[tuple[int, ...]], *, over: str, strict: bool = False) -> None:
    """Refuse tasks that a locally trained head cannot learn.

    Raises:
        DataError: a single class under a loss over that class alone; or known classes where `strict` forbids them.
    """
    if over == "local" and len(task.classes) == 1 and not task.judged_apart:
        raise DataError(
            f"task '{task.name}' has one class, which a head trained on that task alone cannot learn; "
            "use --set loss=seen, --set head=ridge, the method ncm, or a task of two classes or more."
        )
    known = set(task.classes) & {c for classes in seen for c in classes}
    if strict and known:
        raise DataError(f"task '{task.name}' repeats {len(known)} known classes, which strict_new_classes forbids.")
