"""What a learner directory says about itself, read without loading a model (and so without torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everlora.store import FORGOTTEN, FORMAT_VERSION, LearnerStore, TaskData

__all__ = ["describe", "read_status", "together"]


def read_status(path: str | Path) -> dict[str, Any]:
    """Describe a learner: what it has learned, at what cost, and what became of its older tasks.

    Args:
        path: a learner directory; it may be read-only, or in use by a writer.

    Returns:
        A mapping of plain values. `method`, `scenario`, `model` (where the base lies), `base_sha256`, `options`,
        `columns`, `keep_states` and `created` come from the learner; `labels` lists all labels in the order they were
        first seen; `digest` is the learner's; `forgotten` lists what left on request: `when`, `left` (how much, by
        kind), `reason` and a hash of the `request`. `tasks` has one mapping per task:

        - `index` (from 0), `name`, `folder`, `labels`, `new_labels`, `known_labels`, `num_examples`, `num_validation`,
            `num_truncated`, `created`;
        - `seconds`, `steps`, `peak_memory_bytes`, `trainable_parameters`, `stored_parameters`: its cost;
        - `accuracy_when_learned`, `accuracy_now`, `change` (their difference): fractions on the rows kept back from
            the task, None where none were kept; `validation_size` is the number of these rows. What is true now is
            None, too, where some of them were forgotten since it was measured;
        - `cross_entropy_when_learned`, `cross_entropy_now`: nats a token of a language model on such rows, else None.

        What a learner did not write is None or empty. `accuracy_now` and `accuracy_when_learned` of the whole are the
        means over the tasks that have them, and `change` the mean over all but the newest.

    Raises:
        StoreError: no learner there, or a manifest is missing, damaged, changed or from a newer format.
    """
    return describe(LearnerStore.open(path))


def describe(store: LearnerStore) -> dict[str, Any]:
    """Describe an open learner, as `read_status` does."""
    header = store.header
    tasks = [store.read_task(entry.index) for entry in store.tasks]
    latest = _mapping(tasks[-1].record.get("evaluation")) if tasks else {}
    described = [_describe(task, latest) for task in tasks]
    return {
        "path": str(store.root),
        "format_version": FORMAT_VERSION,
        "method": header.get("method"),
        "scenario": header.get("scenario"),
        "model": header.get("base_model"),
        "base_sha256": header.get("base_sha256"),
        "options": header.get("options", {}),
        "columns": header.get("columns", {}),
        "created": header.get("created"),
        "keep_states": store.keep_states,
        "digest": store.digest,
        "forgotten": list(header.get(FORGOTTEN, [])),
        "num_tasks": len(tasks),
        "labels": list(dict.fromkeys(label for task in described for label in task["labels"])),
        "accuracy_when_learned": _mean([task["accuracy_when_learned"] for task in described]),
        "accuracy_now": _mean([task["accuracy_now"] for task in described]),
        "change": _mean([task["change"] for task in described[:-1]]),
        "tasks": described,
    }


def together(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what `read_status` says of some tasks.

    Args:
        tasks: mappings of its list `tasks`.

    Returns:
        `num_tasks`; `num_examples`, `seconds`, `num_new_labels` and `num_known_labels`, sums; `accuracy_when_learned`,
        `accuracy_now`, `change`, `cross_entropy_when_learned` and `cross_entropy_now`, means over tasks that have them.
        None where no task has any.
    """
    means = ("accuracy_when_learned", "accuracy_now", "change", "cross_entropy_when_learned", "cross_entropy_now")
    return {
        "num_tasks": len(tasks),
        **{key: _sum([task.get(key) for task in tasks]) for key in ("num_examples", "seconds")},
        **{f"num_{key}": sum(len(task[key]) for task in tasks) for key in ("new_labels", "known_labels")},
        **{key: _mean([task.get(key) for task in tasks]) for key in means},
    }


def _describe(task: TaskData, latest: Mapping[str, Any]) -> dict[str, Any]:
    record, entry = task.record, task.entry
    cost = _mapping(record.get("cost"))
    key = str(entry.index)
    first, last = _mapping(record.get("evaluation")).get(key), _mapping(latest.get(key))
    if _rows(last) not in (None, record.get("num_validation", _rows(last))):
        last = {}  # rows were forgotten since
    then, now = _ratio(first, "correct", "size"), _ratio(last, "correct", "size")
    return {
        "index": entry.index,
        "name": entry.name,
        "folder": entry.folder,
        "labels": list(record.get("labels", [])),
        "new_labels": list(record.get("new_labels", [])),
        "known_labels": list(record.get("known_labels", [])),
        "num_examples": record.get("num_examples"),
        "num_validation": record.get("num_validation"),
        "num_truncated": record.get("num_truncated"),
        "created": record.get("created"),
        "seconds": _total(cost.get("seconds")),
        "steps": cost.get("steps"),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
        "trainable_parameters": cost.get("trainable_parameters"),
        "stored_parameters": cost.get("stored_parameters"),
        "validation_size": _mapping(latest.get(key)).get("size"),
        "accuracy_when_learned": then,
        "accuracy_now": now,
        "change": None if then is None or now is None else now - then,
        "cross_entropy_when_learned": _ratio(first, "nll", "tokens"),
        "cross_entropy_now": _ratio(last, "nll", "tokens"),
    }


def _rows(cell: Mapping[str, Any]) -> int | None:
    """How many rows a figure is of; language learners of earlier versions did not write it."""
    rows: int | None = cell.get("size", cell.get("rows"))
    return rows


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _ratio(counts: object, part: str, whole: str) -> float | None:
    values = _mapping(counts)
    return float(values[part] / values[whole]) if values.get(whole) else None


def _total(seconds: object) -> float | None:
    """Wall seconds, given as a number or as parts with their `total`."""
    value = seconds.get("total") if isinstance(seconds, Mapping) else seconds
    return float(value) if isinstance(value, int | float) else None


def _sum(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) if present else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
