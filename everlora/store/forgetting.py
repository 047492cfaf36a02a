"""Forgetting on request in a learner directory: folders are written anew, and what they replace is deleted.

The one exception to "nothing deletes". The commit that makes the new folders count also lists, in the header, all that
is to be deleted; a second commit, when it is gone, takes the list away. A writer killed in between leaves the list to
the next one, which deletes before it does anything else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from everlora.errors import StoreError
from everlora.store import layout
from everlora.store.changes import write_folder
from everlora.store.checkpoints import CHECKPOINT_FOLDER, StoredCheckpoint, read_checkpoint
from everlora.store.commits import commit
from everlora.store.files import dump_arrays, load_arrays, read_bytes, sync_folder
from everlora.store.layout import Index, StateEntry, TaskEntry

__all__ = [
    "FORGOTTEN",
    "PENDING",
    "Replacement",
    "all_checkpoints",
    "finish_forgetting",
    "removed_arrays",
    "with_replacements",
]

FORGOTTEN = "forgotten"
"""Name in the header: records of requests."""
PENDING = "forgetting"
"""Name in the header: paths still to be deleted."""

_VERSION = {"format_version": layout.FORMAT_VERSION}  # a manifest is brought up to date when it is read
_MAY_BE_DELETED = ("checkpoint", "removed", "state", "tasks")


@dataclass(frozen=True)
class Replacement:
    """What a task's folder holds instead of what it held.

    Attributes:
        record: entries of the record that change.
        arrays: file name -> its arrays; None for a file that goes.
    """

    record: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, np.ndarray] | None] = field(default_factory=dict)


def with_replacements(
    root: Path,
    index: Index,
    tasks: Mapping[int, Replacement],
    states: Mapping[int, Mapping[str, np.ndarray]],
    *,
    record: Mapping[str, Any],
    delete: tuple[str, ...],
) -> Index:
    """Write new folders beside the old ones, and return the learner.json that names them.

    Args:
        root: the learner's directory, locked by the caller.
        index: its learner.json.
        tasks: number -> what changes.
        states: number of the task it was written after -> all arrays of the new state.
        record: of the request, plain JSON.
        delete: paths below the directory of what goes besides the folders that are replaced.

    Raises:
        StoreError: a file to be carried over is missing or changed.
        OSError: the disk refuses.
    """
    new_tasks = {number: _write_task(root, index.tasks[number], change) for number, change in tasks.items()}
    entries = {entry.index: entry for entry in index.states}
    new_states = {number: _write_state(root, entries[number], arrays) for number, arrays in states.items()}
    replaced = [index.tasks[number].folder for number in tasks] + [entries[number].folder for number in states]
    header = {
        **index.header,
        FORGOTTEN: [*index.header.get(FORGOTTEN, []), dict(record)],
        PENDING: [*replaced, *delete],
    }
    return replace(
        index,
        header=header,
        tasks=tuple(new_tasks.get(entry.index, entry) for entry in index.tasks),
        states=tuple(new_states.get(entry.index, entry) for entry in index.states),
    )


def finish_forgetting(root: Path, index: Index) -> Index:
    """Delete what a request to forget left to be deleted, then say in learner.json that it is done.

    Args:
        root: the learner's directory, locked by the caller.
        index: its learner.json as it stands on the disk.

    Returns:
        Its learner.json afterwards.

    Raises:
        OSError: the disk refuses.
    """
    pending = index.header.get(PENDING)
    if pending is None:
        return index
    listed = {entry.folder for entry in index.tasks} | {entry.folder for entry in index.states}
    parents = set()
    for relative in pending if isinstance(pending, list) else ():
        path = _deletable(root, relative)
        if path is None or relative in listed or not os.path.lexists(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        parents.add(path.parent)
    for parent in sorted(parents):
        if parent.is_dir():
            sync_folder(parent)
    done = replace(index, header={key: value for key, value in index.header.items() if key != PENDING})
    commit(root, done)
    return done


def all_checkpoints(root: Path) -> Iterator[StoredCheckpoint | None]:
    """Yield every checkpoint of an unfinished task, None for one that cannot be read."""
    parent = root / CHECKPOINT_FOLDER
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        try:
            yield read_checkpoint(root, folder)
        except StoreError:
            yield None


def removed_arrays(root: Path) -> Iterator[tuple[str, dict[str, np.ndarray] | None]]:
    """Yield path and arrays of every file of arrays that was moved to `removed/`, None for one that cannot be read.

    What an interrupted writer left of a file is among them.
    """
    for path in sorted((root / "removed").rglob("*.safetensors")):
        if path.is_dir():
            continue
        try:
            arrays: dict[str, np.ndarray] | None = load_arrays(read_bytes(path), path)
        except StoreError:
            arrays = None
        yield path.relative_to(root).as_posix(), arrays


def _write_task(root: Path, entry: TaskEntry, change: Replacement) -> TaskEntry:
    manifest = layout.read_manifest(root, entry.folder, layout.TASK_FILE, entry.sha256)
    files = {}
    for name in manifest["files"]:
        data = layout.read_listed(root, entry.folder, manifest["files"], name)
        arrays = change.arrays.get(name, {})
        if arrays is not None:
            files[name] = dump_arrays(arrays, name) if name in change.arrays else data
    about = {key: value for key, value in manifest.items() if key != "files"} | _VERSION
    about["record"] = {**manifest["record"], **change.record}
    folder = _free(root, f"tasks/{entry.index:03d}-{layout.slug(entry.name)}")
    return replace(
        entry, folder=folder, sha256=write_folder(root, folder, files, manifest=layout.TASK_FILE, about=about)
    )


def _write_state(root: Path, entry: StateEntry, arrays: Mapping[str, np.ndarray]) -> StateEntry:
    manifest = layout.read_manifest(root, entry.folder, layout.STATE_FILE, entry.sha256)
    files = {layout.STATE_ARRAYS_FILE: dump_arrays(arrays, layout.STATE_ARRAYS_FILE)}
    about = {key: value for key, value in manifest.items() if key != "files"} | _VERSION
    folder = _free(root, f"state/{entry.index:03d}")
    return replace(
        entry, folder=folder, sha256=write_folder(root, folder, files, manifest=layout.STATE_FILE, about=about)
    )


def _free(root: Path, folder: str) -> str:
    """A name that no folder has: `state/000-v2` for `state/000`."""
    number = 2
    while os.path.lexists(root / f"{folder}-v{number}"):
        number += 1
    return f"{folder}-v{number}"


def _deletable(root: Path, relative: object) -> Path | None:
    """The path of something that forgetting may delete; None for anything else that a header could name."""
    if not isinstance(relative, str):
        return None
    parts = relative.split("/")
    if parts[0] not in _MAY_BE_DELETED or any(part in ("", ".", "..") for part in parts):
        return None
    path = root / relative
    return path if path.parent.resolve().is_relative_to(root.resolve()) else None
