"""What a request to forget changes in a learner's directory: found first, written afterwards in one go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones import Backbone
from everlora.errors import StoreError
from everlora.kept_rows import KEPT_FILE, pack_rows, unpack_rows
from everlora.methods.base import Method, State
from everlora.methods.forgetting import Forgetting, differences
from everlora.methods.keys import task_key
from everlora.selection import Selection
from everlora.snapshot import ADDED_FILE
from everlora.store import MAX_JSON_BYTES, LearnerStore, Replacement, all_checkpoints, removed_arrays
from everlora.store.checkpoints import CHECKPOINT_FOLDER
from everlora.store.files import load_json, read_bytes
from everlora.store.layout import TASK_FILE
from everlora.streams import Examples

__all__ = ["ForgettingPlan"]

_BUFFER = ("buffer/", "method/buffer/")
_STATISTICS = ("sums", "statistics/", "recognition/means", "gathered/sums")
_LABEL_STAYS = "The name of a class stays in the list of labels, because numbers of other classes hang on its place."


class ForgettingPlan:
    """What a request changes in a directory.

    Attributes:
        left: how much leaves, by kind.
        tasks: number -> what changes in its folder.
        states: number -> arrays of the new state.
        delete: paths of other files and folders that go.
        remaining: sentences on what cannot leave.
    """

    def __init__(self, store: LearnerStore, method: Method, selection: Selection) -> None:
        self.left: Counter[str] = Counter()
        self.tasks: dict[int, Replacement] = {}
        self.states: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        self.delete: list[str] = []
        self.remaining: list[str] = []
        self._store, self._method, self._selection = store, method, selection
        self._like = selection.backbone.encode(_no_rows(selection.backbone), np.empty(0, dtype=np.int64))
        self._plan_states()
        self._plan_validation()
        if selection.label is not None and self.left:
            self.remaining.append(_LABEL_STAYS)
        self._plan_removed()
        self._plan_checkpoints()

    def _request(self, state: State) -> Forgetting:
        selection = self._selection
        return Forgetting(state, selection.of_encoded, self._like, selection.whole_classes)

    def _plan_states(self) -> None:
        """Ask the method to forget in each kept state, the newest first: it changes the tasks' entries, too."""
        added = _added(self._store)
        for entry in reversed(self._store.states):
            arrays, values = self._store.read_state(entry.index)
            carried: State = {**_tensors(arrays), **values}
            within = {key: value for key, value in added.items() if int(key.split("/")[1]) <= entry.index}
            request = self._request({**within, **carried})
            found = self._method.forget(request)
            is_newest = entry is self._store.states[-1]
            self.left.update(found if is_newest else {f"earlier_{kind}": count for kind, count in found.items()})
            if is_newest:
                self.remaining += request.remaining
                self._plan_added(added, differences(added, request.state), request.state)
                added = {key: value for key, value in request.state.items() if key.startswith("tasks/")}
            if differences(carried, request.state):
                kept = {name: request.state[name] for name in arrays if name in request.state}
                self.states[entry.index] = {name: tensor.numpy() for name, tensor in kept.items()}

    def _plan_added(self, before: State, changed: set[str], after: State) -> None:
        for index in sorted({int(key.split("/")[1]) for key in changed}):
            prefix = task_key(index, "")
            names = [key for key, value in before.items() if key.startswith(prefix) and isinstance(value, Tensor)]
            arrays = {key.removeprefix(prefix): after[key].numpy() for key in names if key in after}
            self.tasks[index] = Replacement(arrays={ADDED_FILE: arrays or None})

    def _plan_validation(self) -> None:
        for entry in self._store.tasks:
            task = self._store.read_task(entry.index)
            if KEPT_FILE not in task.files:
                continue
            examples = unpack_rows(task.arrays(KEPT_FILE))
            goes = self._selection.of_kept(examples, entry.index)
            if not goes.any():
                continue
            kept = examples.select(~goes)
            before = self.tasks.get(entry.index, Replacement())
            arrays = {**before.arrays, KEPT_FILE: pack_rows(kept) if len(kept) else None}
            self.tasks[entry.index] = Replacement({"num_validation": len(kept)}, arrays)
            self.left["validation_rows"] += int(goes.sum())

    def _plan_removed(self) -> None:
        for path, arrays in removed_arrays(self._store.root):
            if arrays is None or self._is_meant(path, arrays):
                self.delete.append(path)
                self.left["removed_files"] += 1

    def _is_meant(self, path: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> bool:
        """Whether a file that was put aside holds what is to be forgotten, or may do.

        What its numbers of tasks and classes meant is not known any more, so these exclude nothing.
        """
        selection = self._selection
        loose = Selection(selection.backbone, [], [], condition=selection.condition, rows=selection.rows)
        names = ("ids", "labels.ends", "texts.ends", "images", "language.ends")
        if "ids" in arrays and any(name in arrays for name in names[1:]):
            try:
                examples: Examples = unpack_rows(arrays)
            except (StoreError, ValueError, IndexError):
                return True
            loose.label = selection.label
            return self._may_be_of_task(path) and bool(loose.of_kept(examples, -1).any())
        for prefix in _BUFFER:
            if f"{prefix}labels" not in arrays:
                continue
            rows = {k.removeprefix(f"{prefix}rows/"): v for k, v in arrays.items() if k.startswith(f"{prefix}rows/")}
            labels = torch.from_numpy(np.array(arrays[f"{prefix}labels"]))
            if len(labels) and loose.of_encoded(self._like.from_arrays(rows), labels, labels).any():
                return True
        is_statistic = any(part in name for name in arrays for part in _STATISTICS)
        return is_statistic and bool(selection.whole_classes)

    def _may_be_of_task(self, path: str) -> bool:
        """Whether rows that were put aside may be of the task that is meant: its name stands beside them."""
        if self._selection.task is None:
            return True
        try:
            record = (self._store.root / path).with_name(TASK_FILE)
            name = load_json(read_bytes(record, limit=MAX_JSON_BYTES), record).get("name")
        except StoreError:
            return True
        return bool(name == self._selection.names[self._selection.task])

    def _plan_checkpoints(self) -> None:
        """An unfinished task does not go on: what it computed so far was computed with what is forgotten."""
        count, is_meant = 0, bool(self.left)
        for stored in all_checkpoints(self._store.root):
            count += 1
            is_meant = is_meant or stored is None or self._is_in_checkpoint(_tensors(stored.arrays) | stored.values)
        if count and is_meant:
            self.delete.append(CHECKPOINT_FOLDER)
            self.left["checkpoints"] = count

    def _is_in_checkpoint(self, state: State) -> bool:
        own = {key.removeprefix("method/"): value for key, value in state.items() if key.startswith("method/")}
        return bool(self._method.forget(self._request(own)))


def _no_rows(backbone: Backbone) -> Any:
    if backbone.modality == "image":
        side = backbone.image_size or 1
        return np.empty((0, side, side, 3), dtype=np.uint8)
    return []


def _added(store: LearnerStore) -> State:
    """What the tasks added, factors of adapters left out."""
    return {key: value for entry in store.tasks for key, value in _added_by(store, entry.index)}


def _added_by(store: LearnerStore, index: int) -> Iterator[tuple[str, Any]]:
    task = store.read_task(index)
    yield from ((task_key(index, name), value) for name, value in task.record["values"].items())
    if ADDED_FILE in task.files:
        yield from ((task_key(index, k), value) for k, value in _tensors(task.arrays(ADDED_FILE)).items())


def _tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> State:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
