"""What is written about a learner and its tasks beside their tensors, and how tasks are named."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import everlora
from everlora.backbones import Backbone, load_backbone, model_fingerprint
from everlora.errors import ModelError, OptionError
from everlora.kept_rows import KEPT_FILE, pack_rows
from everlora.methods.base import Method, TaskInfo
from everlora.results import TaskResult
from everlora.scenarios import kind_of_model
from everlora.settings import Settings
from everlora.snapshot import split_state
from everlora.store import LearnerStore
from everlora.streams import Examples
from everlora.training import TaskData, TrainingReport

__all__ = ["load_base", "provenance", "task_name", "task_number", "task_result", "write_task"]


_PREPARES = {
    "image": "image processor or the pooling",
    "text": "tokenizer, its length or the pooling",
    "language": "tokenizer or the template",
}


def provenance() -> dict[str, Any]:
    """When something was written, and by which versions."""
    versions = {"everlora": everlora.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}


def task_result(
    info: TaskInfo,
    labels: Sequence[str],
    known: Collection[str],
    data: TaskData,
    kept: Examples | None,
    *,
    report: TrainingReport,
    metrics: dict[str, float],
) -> TaskResult:
    """Put together what a learned task is: its labels, of which some were known before, and what it cost."""
    return TaskResult(
        index=info.index,
        name=info.name,
        labels=tuple(labels),
        new_labels=tuple(label for label in labels if label not in known),
        known_labels=tuple(label for label in labels if label in known),
        num_examples=len(data),
        num_validation=0 if kept is None else len(kept),
        seconds=report.seconds["total"],
        steps=report.steps,
        metrics=metrics,
        num_truncated=int(getattr(data.encoded, "num_truncated", 0)),
    )


def write_task(
    store: LearnerStore,
    method: Method,
    settings: Settings,
    result: TaskResult,
    report: TrainingReport,
    *,
    kept: Examples | None,
    outcome: Mapping[str, Any],
) -> None:
    """Write a learned task and what the method carries on to a learner directory.

    Args:
        store: open for writing.
        method: as it is after the task.
        settings: the task was learned with.
        result: what was learned.
        report: what it cost.
        kept: rows held back from the task.
        outcome: further plain values for the task's record.
    """
    files = split_state(method.newest_state(), result.index)
    if kept is not None:
        files.arrays[KEPT_FILE] = pack_rows(kept)
    device = next(method.encoder.model.parameters()).device
    record = {
        "labels": list(result.labels),
        "new_labels": list(result.new_labels),
        "known_labels": list(result.known_labels),
        "num_examples": result.num_examples,
        "num_validation": result.num_validation,
        "num_truncated": result.num_truncated,
        "training": settings.as_parts()["training"],
        "values": files.values,
        "panels": method.panels(),
        "cost": _cost(report, method),
        "environment": {
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        **outcome,
        **provenance(),
    }
    store.write_task(
        result.name,
        record=record,
        arrays=files.arrays,
        documents=files.documents,
        state_arrays=files.state_arrays,
        state_values=files.state_values,
        log=report.log,
    )


def _cost(report: TrainingReport, method: Method) -> dict[str, Any]:
    """Seconds, steps, memory and parameters of one task."""
    return {
        "seconds": report.seconds,
        "steps": report.steps,
        "peak_memory_bytes": report.peak_memory_bytes,
        "trainable_parameters": report.trainable_parameters,
        "stored_parameters": method.stored_parameters(),
        "step_seconds": report.step_seconds,
        "curve": report.curve,
    }


def task_name(name: str | None, dataset: Any, taken: Sequence[str]) -> str:
    """The name given, or one made from the file's name, that no earlier task has."""
    if name is not None:
        if name in taken or not name.strip():
            raise OptionError(f"the task name '{name}' is empty or taken; give another, or none.")
        return name
    plain = f"task-{len(taken) + 1}"
    if isinstance(dataset, str | Path) and Path(dataset).exists():
        plain = Path(dataset).resolve().stem or plain
    endings = ["", *(f"-{count}" for count in range(2, len(taken) + 3))]
    return next(plain + ending for ending in endings if plain + ending not in taken)


def task_number(task: str | int | None, names: Sequence[str], *, needed: bool) -> int | None:
    """Number of the task that inputs are said to belong to; None where none is said.

    Raises:
        OptionError: there is no such task, or none is said and it is `needed`.
    """
    if task is None:
        if needed:
            raise OptionError(
                "a task-incremental learner needs the task of the inputs; give task=, one of: " + ", ".join(names)
            )
        return None
    if isinstance(task, int) and 0 <= task < len(names):
        return task
    if str(task) not in names:
        raise OptionError(f"there is no task '{task}'; known: " + ", ".join(names))
    return names.index(str(task))


def load_base(header: Mapping[str, Any], moved_to: str | Path | None, settings: Settings) -> Backbone:
    """Load the base model a learner was made with, from where it lies now.

    Raises:
        ModelError: it is not found, or its hash is another.
    """
    source = moved_to if moved_to is not None else header["base_model"]
    try:
        kind = kind_of_model(header["scenario"])
        backbone = load_backbone(source, kind=kind, **settings.as_parts()["model"])
    except ModelError as error:
        if moved_to is not None:
            raise
        raise ModelError(f"{error} (if the base model moved, say where with --model or model=)") from error
    found = model_fingerprint(backbone.folder)
    if found != header["base_sha256"]:
        raise ModelError(
            f"the model at {source} is not the one the learner was made with (sha256 {found[:12]}..., expected "
            f"{header['base_sha256'][:12]}...); give the original with --model or model=."
        )
    # none in a learner of an encoder that was made before this was recorded
    if header.get("inputs_sha256") not in (None, backbone.inputs_fingerprint):
        raise ModelError(
            f"the {_PREPARES[backbone.modality]} at {source} is not the one the learner was made with, so that rows "
            "would become other inputs; put the original back."
        )
    return backbone
