"""Checkpoints of a task that is being learned: `checkpoint/000001/` and so on below a learner, gone when it is done.

Each folder holds `arrays.safetensors` and `checkpoint.json`, which names the sha256 of the arrays and ends with its
own. A folder gets its name when it is whole. The newest two are kept; the newest one that is whole counts.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everlora.errors import StoreError
from everlora.store.files import (
    MAX_JSON_BYTES,
    checksum,
    dump_arrays,
    dump_json,
    inside,
    load_arrays,
    load_json,
    move,
    read_bytes,
    sync_folder,
    temporary_name,
    write_file,
    writing,
)

__all__ = [
    "CHECKPOINT_FOLDER",
    "StoredCheckpoint",
    "checkpoint_folders",
    "newest_checkpoint",
    "read_checkpoint",
    "task_of_checkpoint",
    "tidy_checkpoints",
    "write_checkpoint",
]

logger = logging.getLogger("everlora.store")

CHECKPOINT_FOLDER = "checkpoint"
_ARRAYS_FILE = "arrays.safetensors"
_JSON_FILE = "checkpoint.json"
_FORMAT_VERSION = 1
_KEPT = 2
_HIDDEN = f".{CHECKPOINT_FOLDER}.tmp-"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint as it was read.

    Attributes:
        task: what the task was begun with, as it was given to `write_checkpoint`.
        values: plain JSON values.
        arrays: named arrays.
    """

    task: dict[str, Any]
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_checkpoint(
    root: Path, *, task: Mapping[str, Any], values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Path:
    """Write a checkpoint of the unfinished task of a learner, and let go of all but the newest two.

    Args:
        root: the learner's directory, locked by the caller.
        task: plain JSON: what the task is begun with; `index` is its number.
        values: plain JSON.
        arrays: any shapes, dtypes that safetensors has.

    Returns:
        Its folder.

    Raises:
        StoreError: a value that cannot be stored, or the disk refuses; older checkpoints are as they were.
    """
    data = dump_arrays(arrays, _ARRAYS_FILE)
    body = {
        "format_version": _FORMAT_VERSION,
        "files": {_ARRAYS_FILE: {"sha256": checksum(data), "size": len(data)}},
        "task": dict(task),
        "values": dict(values),
    }
    document = _sealed(body)
    parent = root / CHECKPOINT_FOLDER
    with writing(root):
        final = parent / f"{max([0, *map(_number, _folders(parent))]) + 1:06d}"
        working = parent / temporary_name(final.name)
        try:
            write_file(working / _ARRAYS_FILE, data)
            write_file(working / _JSON_FILE, document)
            sync_folder(working)
            move(working, final)
        except OSError:
            shutil.rmtree(working, ignore_errors=True)  # it may be what fills the disk
            raise
        sync_folder(root)
        for old in _folders(parent)[_KEPT:]:
            _delete(old)
    return final


def newest_checkpoint(root: Path) -> StoredCheckpoint | None:
    """Return the newest checkpoint that is whole; broken ones are passed over, and the log says so."""
    for folder in checkpoint_folders(root):
        try:
            return read_checkpoint(root, folder)
        except StoreError as error:
            logger.warning("a checkpoint is passed over: %s", error)
    return None


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders of the checkpoints of a learner, whole or broken, newest first."""
    return _folders(root / CHECKPOINT_FOLDER)


def read_checkpoint(root: Path, folder: Path) -> StoredCheckpoint:
    """Read one checkpoint; raises StoreError where it is broken."""
    body = _read_document(root, folder)
    return StoredCheckpoint(body["task"], body["values"], _read_arrays(root, folder, body["files"]))


def task_of_checkpoint(root: Path) -> dict[str, Any] | None:
    """Return what the unfinished task of a learner was begun with; None where there is none that can be read."""
    for folder in checkpoint_folders(root):
        with contextlib.suppress(StoreError):
            task: dict[str, Any] = _read_document(root, folder)["task"]
            return task
    return None


def tidy_checkpoints(root: Path, num_tasks: int) -> Path | None:
    """Delete checkpoints of finished tasks, and what a writer that was killed left of one.

    Args:
        root: the learner's directory, locked by the caller.
        num_tasks: how many tasks it has learned.

    Returns:
        The folder of the checkpoints where they are of a task that cannot be the next one: to be moved aside.
    """
    parent = root / CHECKPOINT_FOLDER
    task = task_of_checkpoint(root)
    index = num_tasks if task is None else task["index"]
    if index > num_tasks:
        return parent
    if index < num_tasks:
        _delete(parent)
    for junk in (*root.glob(f"{_HIDDEN}*"), *parent.glob(".*.tmp-*")):
        shutil.rmtree(junk)
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
    return None


def _sealed(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON whose last entry is the sha256 of all the others."""
    text = dump_json(body, _JSON_FILE)
    return text.removesuffix(b"\n}\n") + f',\n  "sha256": "{checksum(text)}"\n}}\n'.encode("ascii")


def _read_document(root: Path, folder: Path) -> dict[str, Any]:
    """Read and check a checkpoint.json."""
    path = inside(root, f"{CHECKPOINT_FOLDER}/{folder.name}/{_JSON_FILE}")
    data = read_bytes(path, limit=MAX_JSON_BYTES)
    body = load_json(data, path)
    body.pop("sha256", None)
    if _sealed(body) != data:
        raise StoreError(f"{path} has a wrong checksum: it was changed after it was written")
    parts = [body.get(name) for name in ("files", "task", "values")]
    if body.get("format_version") != _FORMAT_VERSION or not all(isinstance(part, dict) for part in parts):
        raise StoreError(f"{path} is not a checkpoint that this version of everlora reads")
    if not isinstance(body["task"].get("index"), int):
        raise StoreError(f"{path} does not say which task it is of")
    return body


def _read_arrays(root: Path, folder: Path, files: Mapping[str, Any]) -> dict[str, np.ndarray]:
    path = inside(root, f"{CHECKPOINT_FOLDER}/{folder.name}/{_ARRAYS_FILE}")
    listed = files.get(_ARRAYS_FILE)
    data = read_bytes(path)
    if listed != {"sha256": checksum(data), "size": len(data)}:
        raise StoreError(f"{path} has a wrong size or checksum: it was cut short or changed")
    return load_arrays(data, path)


def _folders(parent: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name)


def _delete(folder: Path) -> None:
    """Delete a folder so that no part of it is ever taken for the whole."""
    hidden = folder.with_name(temporary_name(folder.name))
    move(folder, hidden)
    shutil.rmtree(hidden)
