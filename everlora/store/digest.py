"""The sha256 that says what a learner does next.

A task's folder never changes once it is written, so what it adds to the sum is remembered for as long as its file looks
the same: the cost of one more task does not grow with the number of those before.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from everlora.store import layout
from everlora.store.forgetting import FORGOTTEN, PENDING
from everlora.store.layout import Index, TaskEntry

__all__ = ["HEADER_KEYS_WITHOUT_EFFECT", "digest_of"]

# Where the base lies may change without changing what the learner computes: its sha256, also in the header, decides.
HEADER_KEYS_WITHOUT_EFFECT = frozenset({"base_model", "created", "versions", FORGOTTEN, PENDING})
_LEARNER_OPTIONS_WITHOUT_EFFECT = frozenset({"checkpoint_every"})
_MOST_REMEMBERED = 2048  # tasks, of a few kilobytes each


def digest_of(root: Path, index: Index) -> str:
    """Sum up all that decides what a learner does next: no clocks, costs, logs or paths.

    Args:
        root: the learner's directory.
        index: its learner.json.

    Raises:
        StoreError: the manifest of a task is missing or was changed.
    """
    header = {k: v for k, v in copy.deepcopy(dict(index.header)).items() if k not in HEADER_KEYS_WITHOUT_EFFECT}
    options = header.get("options")
    if isinstance(options, dict) and isinstance(options.get("learner"), dict):
        for name in _LEARNER_OPTIONS_WITHOUT_EFFECT:
            options["learner"].pop(name, None)
    place = os.path.abspath(root)
    tasks = ", ".join(_text_of(place, entry) for entry in index.tasks)
    # The manifest of the newest state holds its values and the checksum of its arrays, and no clock.
    state = index.states[-1].sha256 if index.states else None
    # one JSON object with its keys in order, put together from texts that are there already
    text = (
        f'{{"format_version": {_json(layout.FORMAT_VERSION)}, "header": {_json(header)}, "state": {_json(state)}, '
        f'"tasks": [{tasks}]}}'
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _text_of(root: str, entry: TaskEntry) -> str:
    """What a task adds, as JSON."""
    try:
        found = os.stat(f"{root}/{entry.folder}/{layout.TASK_FILE}")
    except OSError:  # the reader has the sentence for it
        return _read(root, entry)
    looks = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _remembered(root, entry, looks)


@functools.lru_cache(maxsize=_MOST_REMEMBERED)
def _remembered(root: str, entry: TaskEntry, looks: tuple[int, ...]) -> str:
    return _read(root, entry)


def _read(root: str, entry: TaskEntry) -> str:
    place = Path(root)
    manifest = layout.read_manifest(place, entry.folder, layout.TASK_FILE, entry.sha256)
    record = layout.record_of(manifest, place / entry.folder / layout.TASK_FILE)
    kept = {key: value for key, value in record.items() if key not in layout.RECORD_KEYS_WITHOUT_EFFECT}
    files = {name: listed["sha256"] for name, listed in manifest["files"].items() if name != layout.LOG_FILE}
    return _json({"index": entry.index, "name": entry.name, "record": kept, "files": files})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)
