"""A learner directory as the page of a run takes it: one run, measured on the rows that were kept back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everlora.store import LearnerStore

__all__ = ["learner_results"]

FORMAT = 1
Record = Mapping[str, Any]
_NOTES = (
    "Page of a learner, not of an experiment: one run, measured on the rows that were kept back from its tasks and "
    "never trained on, as many as there were at the time. Where none were kept, there is no accuracy; "
    "init --keep-validation N keeps some."
)


def learner_results(path: str | Path) -> dict[str, Any]:
    """Return what a learner directory holds in the form of `results.json`.

    Args:
        path: a learner directory; it may be read-only, or in use by a writer.

    Raises:
        StoreError: no learner there, or a manifest is missing, damaged, changed or from a newer format.
    """
    store = LearnerStore.open(path)
    header, names = store.header, [entry.name for entry in store.tasks]
    records = [store.read_task(entry.index).record for entry in store.tasks]
    is_language = header["scenario"] == "language"
    settings = header.get("options", {})
    run: dict[str, Any] = {
        "method": header["method"],
        "label": header["method"],
        "seed": settings.get("training", {}).get("seed"),
        "cost": [_cost(record, index) for index, record in enumerate(records)],
        "panels": _panels(records),
        "resolved": settings,
    }
    run |= {"language": _language(names, records)} if is_language else _shares(records)
    return {
        "format": FORMAT,
        "recipe": {"title": f"Learner {Path(path).resolve().name}"},
        "stream": {
            "name": header["scenario"],
            "scenario": header["scenario"],
            "num_tasks": len(names),
            "task_names": names,
            "task_labels": [list(record.get("labels", [])) for record in records],
            "sizes": [record.get("num_validation") for record in records],
            "train_sizes": [record.get("num_examples") for record in records],
            "test_sizes": [record.get("num_validation") for record in records],
        },
        "model": Path(header["base_model"]).name if Path(header["base_model"]).is_absolute() else header["base_model"],
        "created": header.get("created"),
        "versions": header.get("versions", {}),
        "runs": [run] if names else [],
        "notes": _NOTES,
    }


def _cost(record: Record, index: int) -> dict[str, Any]:
    cost = dict(record.get("cost") or {})
    seconds = cost.get("seconds")
    return cost | {"task": index, "seconds": seconds.get("total") if isinstance(seconds, Mapping) else seconds}


def _panels(records: Sequence[Record]) -> dict[str, dict[str, list[float | None]]]:
    """Curves over the tasks, from the figures after each of them."""
    panels: dict[str, dict[str, list[float | None]]] = {}
    for task, record in enumerate(records):
        for panel, figures in (record.get("panels") or {}).items():
            for name, value in figures.items():
                curve = panels.setdefault(panel, {}).setdefault(name, [])
                curve += [None] * (task - len(curve)) + [value]
    return panels


def _shares(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy on the kept rows of each task after each task, and how many they were at last.

    Shares and not counts, as forgetting leaves fewer rows to later moments.
    """
    count = len(records)
    shares: list[list[float | None]] = [[None] * count for _ in records]
    sizes = [1] * count  # of a task that keeps no rows; it is measured nowhere
    for moment, record in enumerate(records):
        for key, cell in (record.get("evaluation") or {}).items():
            shares[moment][int(key)], sizes[int(key)] = cell["correct"] / cell["size"], cell["size"]
    return {"accuracy": shares, "sizes": sizes}


def _language(names: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Cross-entropies on the kept rows of each task after each task; nothing was measured before the first."""
    stages = []
    for moment, record in enumerate(records):
        scores = record.get("evaluation") or {}
        stages.append({"task": moment, "measured": [_moment([scores.get(str(task)) for task in range(len(names))])]})
    return {
        "domains": list(names),
        "general_sets": [],
        "prompts": [],
        "base": _moment([None] * len(names)),
        "stages": stages,
    }


def _moment(tests: list[Any]) -> dict[str, Any]:
    return {"variant": None, "tests": tests, "retention": None, "samples": None, "general": None}
