"""What stands where in a learner directory, and the manifests that vouch for it.

```
learner.json            names every task and state folder with the sha256 of its manifest; ends with its own sha256
tasks/000-january/      task.json (manifest and record) and the files it lists
state/000/              state.json (manifest and values) and the arrays it lists
removed/0000/           what a rollback or an interrupted run left over; never read
```

A chain of checksums starts at learner.json: its own, then each manifest's, then each file's.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everlora.errors import StoreError
from everlora.store.files import MAX_JSON_BYTES, checksum, dump_json, inside, load_arrays, load_json, read_bytes
from everlora.store.migrations import upgrade_index, upgrade_manifest

__all__ = [
    "FORMAT_VERSION",
    "LEARNER_FILE",
    "LOG_FILE",
    "RECORD_KEYS_WITHOUT_EFFECT",
    "STATE_ARRAYS_FILE",
    "STATE_FILE",
    "TASK_FILE",
    "Index",
    "KeepStates",
    "StateEntry",
    "TaskData",
    "TaskEntry",
    "read_index",
    "read_listed",
    "read_manifest",
    "read_versioned_index",
    "record_of",
    "slug",
]

FORMAT_VERSION = 1
LEARNER_FILE = "learner.json"
TASK_FILE = "task.json"
LOG_FILE = "log.jsonl"
STATE_FILE = "state.json"
STATE_ARRAYS_FILE = "arrays.safetensors"

# Entries of a task's record that say how the task went, not what the learner does next. The digest leaves them out.
RECORD_KEYS_WITHOUT_EFFECT = frozenset({"cost", "created", "environment", "evaluation", "metrics", "versions"})

KeepStates = Literal["newest", "all"]

# checksums of files that this process wrote or checked: writing a long list out once more is what takes time
_KNOWN: deque[str] = deque(maxlen=64)
_TASK_FOLDER = re.compile(r"tasks/\d{3,}-[a-z0-9-]{1,60}\Z")
_STATE_FOLDER = re.compile(r"state/\d{3,}(-v\d{1,9})?\Z")


@dataclass(frozen=True)
class TaskEntry:
    """One task as learner.json lists it.

    Attributes:
        index: position in the order of learning, from 0.
        name: the name the task was given, any text.
        folder: path of its folder below the learner, such as `tasks/000-january`.
        sha256: checksum of its task.json.
    """

    index: int
    name: str
    folder: str
    sha256: str


@dataclass(frozen=True)
class StateEntry:
    """What the method carried on after task `index`: its folder and the checksum of its state.json."""

    index: int
    folder: str
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of learner.json."""

    header: dict[str, Any]
    keep_states: KeepStates
    tasks: tuple[TaskEntry, ...] = ()
    states: tuple[StateEntry, ...] = ()

    def dump(self) -> bytes:
        """Return the bytes of learner.json; its last entry is the sha256 of all the others.

        Raises:
            StoreError: the header is not plain JSON.
        """
        body: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "header": self.header,
            "keep_states": self.keep_states,
            "states": [vars(entry) for entry in self.states],
            "tasks": [vars(entry) for entry in self.tasks],
        }
        data = _sealed(body)
        _KNOWN.append(checksum(data))
        return data


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The bytes of a learner.json of any version: canonical JSON with the checksum of all before it as last entry."""
    text = dump_json(body, LEARNER_FILE)
    return text.removesuffix(b"\n}\n") + f',\n  "sha256": "{checksum(text)}"\n}}\n'.encode("ascii")


def read_index(root: Path) -> Index:
    """Read and check `root/learner.json`; one of an older format is brought up to date in memory.

    Raises:
        StoreError: there is no learner, the file is damaged or from a newer format, or an entry is not what everlora
            writes.
    """
    return read_versioned_index(root)[0]


def read_versioned_index(root: Path) -> tuple[Index, int]:
    """Do what `read_index` does, and tell the format version of the file."""
    path = root / LEARNER_FILE
    if not path.is_file():
        raise StoreError(f"no learner in {root}: {LEARNER_FILE} is not there; create one with `everlora init {root}`")
    data = read_bytes(path, limit=MAX_JSON_BYTES)
    value = load_json(data, path)
    version = value.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        body = {key: item for key, item in value.items() if key != "sha256"}
        newer = isinstance(version, int) and version > FORMAT_VERSION
        if not newer:  # of a newer one this code knows nothing, not even how it is sealed
            _compare_sealed(path, _sealed(body), data)
        value = upgrade_index(body, version, FORMAT_VERSION, path)
    try:
        index = _index_from_json(value, path)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{path} lacks a field or has one of the wrong type ({error}); restore it from a backup"
        ) from error
    if version == FORMAT_VERSION and checksum(data) not in _KNOWN:
        _compare_sealed(path, index.dump(), data)
    return index, version


def _compare_sealed(path: Path, expected: bytes, found: bytes) -> None:
    """Comparing what would be written checks the checksum, and that no byte differs from what everlora writes."""
    if expected != found:
        raise StoreError(f"{path} has a wrong checksum: it was changed after it was written; restore it from a backup")


def _index_from_json(value: Mapping[str, Any], path: Path) -> Index:
    header, keep_states = value["header"], value["keep_states"]
    if not isinstance(header, dict) or keep_states not in ("newest", "all"):
        raise TypeError("header or keep_states")
    tasks = tuple(TaskEntry(**entry) for entry in value["tasks"])
    states = tuple(StateEntry(**entry) for entry in value["states"])
    for position, task in enumerate(tasks):
        if task.index != position or not isinstance(task.name, str):
            raise TypeError(f"task {position}")
        _check_entry(task, _TASK_FOLDER, path)
    for state in states:
        if not isinstance(state.index, int) or not 0 <= state.index < len(tasks):
            raise TypeError(f"state {state.index}")
        _check_entry(state, _STATE_FOLDER, path)
    return Index(header, keep_states, tasks, states)


def _check_entry(entry: TaskEntry | StateEntry, pattern: re.Pattern[str], path: Path) -> None:
    if not isinstance(entry.sha256, str) or not isinstance(entry.folder, str):
        raise TypeError(f"entry {entry.index}")
    if not pattern.match(entry.folder):
        raise StoreError(
            f"{path} names the folder {entry.folder!r}, which is not one that everlora writes inside the learner; "
            "the file was changed by hand, so restore it from a backup"
        )


def read_manifest(root: Path, folder: str, name: str, sha256: str) -> dict[str, Any]:
    """Read `root/folder/name` (task.json or state.json) and check it against `sha256`.

    Raises:
        StoreError: the file is missing, changed, or not a manifest.
    """
    path = inside(root, f"{folder}/{name}")
    data = read_bytes(path, limit=MAX_JSON_BYTES)
    _compare(path, data, sha256)
    value = upgrade_manifest(load_json(data, path), FORMAT_VERSION, path)
    files = value.get("files")
    if not isinstance(files, dict) or not all(_is_listing(listed) for listed in files.values()):
        raise StoreError(f"{path} lists no files with their sizes and checksums; restore it from a backup")
    return value


def record_of(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the record in the manifest of a task, read from `path`; raises StoreError where there is none."""
    record = manifest.get("record")
    if not isinstance(record, dict):
        raise StoreError(f"{path} has no record; restore it from a backup")
    return record


def _is_listing(listed: object) -> bool:
    return isinstance(listed, dict) and isinstance(listed.get("sha256"), str) and isinstance(listed.get("size"), int)


def read_listed(root: Path, folder: str, files: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of one file of a manifest after checking size and sha256.

    Args:
        root: the learner's folder.
        folder: the task's or state's folder below it.
        files: the manifest's `files`: name -> `{"sha256": ..., "size": ...}`.
        name: one of them, such as `added.safetensors` or `stable/adapter_config.json`.

    Raises:
        StoreError: no such file is listed, or it is missing, cut short, changed or outside the folder.
    """
    path = inside(root / folder, name)
    listed = files.get(name)
    if not isinstance(listed, dict):
        raise StoreError(f"{root / folder} lists no file '{name}'; it has {', '.join(sorted(files)) or 'none'}")
    data = read_bytes(path)
    if len(data) != listed.get("size"):
        raise StoreError(
            f"{path} has {len(data)} bytes where {listed.get('size')} are expected: it was cut short or changed; "
            "restore it from a backup"
        )
    _compare(path, data, listed.get("sha256"))
    return data


def _compare(path: Path, data: bytes, expected: object) -> None:
    found = checksum(data)
    if found != expected:
        raise StoreError(
            f"{path} has a wrong checksum (sha256 {found[:12]}…, expected {str(expected)[:12]}…): it was changed after "
            "it was written; restore it from a backup"
        )


@dataclass(frozen=True)
class TaskData:
    """One task's folder, opened: the record at once, each file when asked for and after its checksum was verified.

    Attributes:
        entry: the task in learner.json.
        record: what the learner wrote about it (labels, sizes, cost, ...).
        files: names of the files in its folder, sorted.
    """

    root: Path
    entry: TaskEntry
    record: dict[str, Any]
    manifest: Mapping[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that belong to the task, sorted."""
        return tuple(sorted(self.manifest))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of the safetensors file `name`; raises StoreError when it is missing or changed."""
        return load_arrays(self._bytes(name), self.root / self.entry.folder / name)

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the file `name`; raises StoreError when it is missing or changed."""
        return load_json(self._bytes(name), self.root / self.entry.folder / name)

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the task's log, oldest first; raises StoreError when it is missing or changed."""
        path = self.root / self.entry.folder / LOG_FILE
        return [load_json(line, path) for line in self._bytes(LOG_FILE).splitlines()]

    def verify(self) -> None:
        """Check every file of the task; raises StoreError at the first that is missing or changed."""
        for name in self.files:
            self._bytes(name)

    def _bytes(self, name: str) -> bytes:
        return read_listed(self.root, self.entry.folder, self.manifest, name)


def slug(name: str) -> str:
    """Return a folder name for a task: lower-case ASCII letters, digits and dashes, at most 40 characters.

    Different names may give the same slug; the task's number in front keeps folders apart.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words[:40].strip("-") or "task"
