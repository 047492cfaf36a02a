"""Which runs may stand in one table: those of the same stream, with the same order of tasks for the same seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everlora.comparison.reading import RunFolder
from everlora.errors import DataError

__all__ = ["StreamRuns", "by_stream"]


@dataclass
class StreamRuns:
    """The folders of one stream.

    Attributes:
        stream: the stream of the first folder, as its results describe it.
        folders: the folders.
        notes: what a reader must know of how they were put together.
    """

    stream: Mapping[str, Any]
    folders: list[RunFolder] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name, scenario, tasks and rows, by which streams can be told apart."""
        stream, first = self.stream, self.folders[0].results
        scenario = str(stream.get("scenario") or "").replace("_", "-")
        parts = [str(stream.get("name") or "stream"), scenario, f"{stream.get('num_tasks', '?')} tasks"]
        rows = [f"{sum(sizes):,} {kind}" for kind, sizes in _row_counts(stream).items() if sizes]
        if rows:
            parts.append(f"{' and '.join(rows)} rows")
        if _evaluated_on(first) != "test":
            parts.append(f"measured on {_evaluated_on(first)} rows")
        return ", ".join(part for part in parts if part)


def by_stream(folders: Sequence[RunFolder]) -> list[StreamRuns]:
    """Divide folders by stream, in order of first appearance.

    Two folders share a stream when name, scenario, number of tasks, classes, numbers of rows and the rows that
    accuracy is measured on agree, the data is the same to the last row, and the order of tasks is the same for every
    seed that both have.

    Raises:
        DataError: what a folder says of its stream cannot be read.
    """
    groups: list[StreamRuns] = []
    for folder in folders:
        try:
            _put(folder, groups)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder.path}/results.json is damaged: its stream cannot be read ({type(error).__name__}: {error}); "
                f"run the recipe again with --out {folder.path}."
            ) from error
    return groups


def _put(folder: RunFolder, groups: list[StreamRuns]) -> None:
    for stream in (folder.results.get("streams") or {}).values():
        _described(stream)  # whatever is damaged in one is said here
    identity = _identity(folder)
    alike = [group for group in groups if _identity(group.folders[0]) == identity]
    home = next(
        (group for group in alike if all(_reason_apart(other, folder) is None for other in group.folders)), None
    )
    if home is None:
        home = StreamRuns(folder.results["stream"])
        groups.append(home)
        if alike:
            reasons = ((other, _reason_apart(other, folder)) for other in alike[0].folders)
            other, reason = next((other, reason) for other, reason in reasons if reason)
            home.notes.append(f"{folder.name} {reason} {other.name}, so the two have tables of their own.")
    home.folders.append(folder)


def _identity(folder: RunFolder) -> str:
    values = _described(folder.results["stream"])
    return json.dumps({**values, "measured_on": _evaluated_on(folder.results)}, sort_keys=True)


def _described(stream: Mapping[str, Any]) -> dict[str, Any]:
    groups = stream.get("task_labels") or []
    if not isinstance(groups, list) or not all(isinstance(labels, list) for labels in groups):
        raise TypeError("task_labels is no list of lists")
    classes = [sorted(labels) for labels in groups]
    return {
        "name": stream.get("name"),
        "scenario": stream.get("scenario"),
        "num_tasks": stream.get("num_tasks"),
        "classes": sorted(str(label) for labels in classes for label in labels),
        "classes_per_task": [len(labels) for labels in classes],
        "rows": {kind: sum(sizes) for kind, sizes in _row_counts(stream).items()},
        "subsample": stream.get("subsample"),
    }


def _row_counts(stream: Mapping[str, Any]) -> dict[str, list[int]]:
    return {kind: [int(size) for size in stream.get(f"{kind}_sizes") or [] if size] for kind in ("train", "test")}


def _evaluated_on(results: Mapping[str, Any]) -> str:
    return str((results.get("settings") or {}).get("evaluate_on") or "test")


def _reason_apart(one: RunFolder, other: RunFolder) -> str | None:
    """Why the second cannot stand beside the first: other rows, or another order for a seed that both have.

    Results of earlier versions do not say which rows they read.
    """
    hashes = {folder.results.get("data_hash") for folder in (one, other)} - {None}
    if len(hashes) > 1:
        return "read other rows than"
    first, second = (folder.results.get("streams") or {} for folder in (one, other))
    if all(_order(first[seed]) == _order(second[seed]) for seed in first if seed in second):
        return None
    return "takes the classes in another order for the same seed than"


def _order(stream: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(stream.get(name) for name in ("order_hash", "train_sizes", "test_sizes"))
