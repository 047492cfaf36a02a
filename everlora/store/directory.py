"""LearnerStore: one learner directory, opened for reading or, by one process at a time, for writing.

Replacing learner.json is the only commit point: what it does not name does not exist for a reader. A writer killed at
any moment therefore leaves the state before its change or after it, and the next writer puts leftovers aside.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock

from everlora.errors import StoreError
from everlora.store import layout
from everlora.store.changes import refuse_occupied, sweep, take_lock, write_folder
from everlora.store.commits import commit, commit_first, keep_former, set_aside, tidy
from everlora.store.digest import HEADER_KEYS_WITHOUT_EFFECT, digest_of
from everlora.store.files import dump_arrays, dump_json, load_arrays, read_bytes, writing
from everlora.store.forgetting import Replacement, finish_forgetting, with_replacements
from everlora.store.layout import Index, KeepStates, StateEntry, TaskData, TaskEntry

__all__ = ["HEADER_KEYS_WITHOUT_EFFECT", "LearnerStore"]

_NUM_NEWEST_STATES = 2  # the newest, and the one a reader that opened just before the last commit still needs


class LearnerStore:
    """A learner directory: append tasks, read them back verified, go back to an earlier one.

    Use `create` or `open`; both return a context manager. Reading needs no lock and no write permission.

    Attributes:
        root: the directory.
        is_writable: whether this object holds the writer's lock.
    """

    def __init__(self, root: Path, index: Index, lock: FileLock | None) -> None:
        self.root = root
        self._index = index
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, header: Mapping[str, Any], *, keep_states: KeepStates = "newest") -> LearnerStore:
        """Make a new learner directory, opened for writing; parent folders are made as needed.

        Args:
            path: a folder that holds no learner. Other files in it stay untouched.
            header: plain JSON values: `base_model` (where it lies), `base_sha256`, `method`, `options`, `scenario`, ...
            keep_states: `"newest"` keeps the carried-on state of the newest two tasks, `"all"` of every task, which
                lets `rollback` go back to any of them.

        Raises:
            StoreError: the folder holds a learner, is no folder, or cannot be written; the header is not plain JSON.
            LockedError: another process is writing there.
        """
        root = Path(path)
        if keep_states not in ("newest", "all"):
            raise StoreError(f"keep_states is {keep_states!r}; expected 'newest' or 'all'")
        index = Index(copy.deepcopy(dict(header)), keep_states)
        data = index.dump()
        if (root / layout.LEARNER_FILE).exists():
            raise StoreError(f"{root} holds a learner already; open it, or choose another folder for a new one")
        if root.exists() and not root.is_dir():
            raise StoreError(f"{root} is a file; a learner needs a folder, so choose another path")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
        lock = take_lock(root)
        try:
            refuse_occupied(root)
            with writing(root):
                commit_first(root, data)
        except BaseException:
            lock.release()
            raise
        return cls(root, index, lock)

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> LearnerStore:
        """Open an existing learner directory.

        Args:
            path: the directory.
            write: take the writer's lock, put aside what an interrupted writer left, and bring a learner.json of an
                older format up to date; the old one goes to `removed/`.

        Raises:
            StoreError: no learner there, or learner.json is damaged, changed or from a newer format.
            LockedError: `write` was asked for and another process is writing.
        """
        root = Path(path)
        index = layout.read_index(root)
        if not write:
            return cls(root, index, None)
        lock = take_lock(root)
        try:
            # Read again: the writer that held the lock a moment ago may have added a task.
            index, version = layout.read_versioned_index(root)
            store = cls(root, index, lock)
            with writing(root):
                store._index = index = finish_forgetting(root, index)
                sweep(root, index)
                if version != layout.FORMAT_VERSION:
                    keep_former(root, read_bytes(root / layout.LEARNER_FILE))
                    commit(root, index)
        except BaseException:
            lock.release()
            raise
        return store

    def close(self) -> None:
        """Give the writer's lock back. Closing twice is allowed."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> LearnerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_writable(self) -> bool:
        """Whether this object holds the writer's lock."""
        return self._lock is not None

    @property
    def header(self) -> dict[str, Any]:
        """What `create` was given (a copy), with the base model's path as last set."""
        return copy.deepcopy(self._index.header)

    @property
    def keep_states(self) -> KeepStates:
        """Which carried-on states stay on the disk: `"newest"` (two) or `"all"`."""
        return self._index.keep_states

    @property
    def tasks(self) -> tuple[TaskEntry, ...]:
        """The finished tasks in the order they were learned."""
        return self._index.tasks

    @property
    def states(self) -> tuple[StateEntry, ...]:
        """The states that are kept, oldest first; the last is that of the newest task."""
        return self._index.states

    def set_base_model(self, source: str) -> None:
        """Note where the base model lies now; nothing else of the header can change.

        Raises:
            StoreError: the store is not open for writing.
        """
        self._require_writable()
        with writing(self.root):
            self._commit(replace(self._index, header={**self._index.header, "base_model": source}))

    def write_task(
        self,
        name: str,
        *,
        record: Mapping[str, Any],
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        documents: Mapping[str, Mapping[str, Any]],
        state_arrays: Mapping[str, np.ndarray],
        state_values: Mapping[str, Any],
        log: Sequence[Mapping[str, Any]] = (),
    ) -> TaskEntry:
        """Append a finished task: its own folder, the state carried on, then learner.json, which makes it visible.

        Args:
            name: what the user calls the task.
            record: plain JSON: labels, sizes, seeds, cost, metrics. Keys in `RECORD_KEYS_WITHOUT_EFFECT` do not enter
                the digest.
            arrays: file name -> named arrays; a name may have a sub-folder, such as `stable/adapter_model.safetensors`.
            documents: file name -> JSON object, such as `adapter_config.json`.
            state_arrays: arrays the method carries on to the next task.
            state_values: plain JSON values the method carries on.
            log: one JSON object per line of log.jsonl.

        Raises:
            StoreError: not open for writing, a value that cannot be stored, a file name that leaves the folder, or
                the disk refuses; the directory then is as it was before.
        """
        self._require_writable()
        number = len(self.tasks)
        files = {file: dump_arrays(values, file) for file, values in arrays.items()}
        files |= {file: dump_json(value, file) for file, value in documents.items()}
        if len(files) < len(arrays) + len(documents) or {layout.TASK_FILE, layout.LOG_FILE} & set(files):
            raise StoreError(f"task '{name}' gives one file name twice; file names of a task must differ")
        files[layout.LOG_FILE] = b"".join(_log_line(line) for line in log)
        state_files = {layout.STATE_ARRAYS_FILE: dump_arrays(state_arrays, layout.STATE_ARRAYS_FILE)}
        version = {"format_version": layout.FORMAT_VERSION, "index": number}
        about_task = {**version, "name": name, "record": dict(record)}
        about_state = {**version, "values": dict(state_values)}
        with writing(self.root):
            sweep(self.root, self._index)
            task_folder = f"tasks/{number:03d}-{layout.slug(name)}"
            task_sha256 = write_folder(self.root, task_folder, files, manifest=layout.TASK_FILE, about=about_task)
            state_folder = f"state/{number:03d}"
            state_sha256 = write_folder(
                self.root, state_folder, state_files, manifest=layout.STATE_FILE, about=about_state
            )
            entry = TaskEntry(number, name, task_folder, task_sha256)
            states = (*self._index.states, StateEntry(number, state_folder, state_sha256))
            if self.keep_states == "newest":
                states = states[-_NUM_NEWEST_STATES:]
            self._commit(replace(self._index, tasks=(*self.tasks, entry), states=states))
            tidy(self.root, self._index)
        return entry

    def read_task(self, index: int) -> TaskData:
        """Open one task; its record is verified now, each file when it is asked for.

        Args:
            index: from 0; negative numbers count from the newest.

        Raises:
            StoreError: no such task, or its task.json is missing or changed.
        """
        if not -len(self.tasks) <= index < len(self.tasks):
            raise StoreError(f"{self.root} has {len(self.tasks)} tasks, and number {index} is not one of them")
        entry = self.tasks[index]
        manifest = layout.read_manifest(self.root, entry.folder, layout.TASK_FILE, entry.sha256)
        record = layout.record_of(manifest, self.root / entry.folder / layout.TASK_FILE)
        return TaskData(self.root, entry, record, manifest["files"])

    def read_state(self, index: int = -1) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what the method carried on after one task, verified: arrays and plain values.

        Args:
            index: the task it was written after; negative numbers count from the newest task.

        Raises:
            StoreError: no such task, its state is no longer kept, or a file is missing or changed.
        """
        number = index + len(self.tasks) if index < 0 else index
        entry = self._state_entry(number)
        manifest = layout.read_manifest(self.root, entry.folder, layout.STATE_FILE, entry.sha256)
        data = layout.read_listed(self.root, entry.folder, manifest["files"], layout.STATE_ARRAYS_FILE)
        values = manifest.get("values")
        if not isinstance(values, dict):
            raise StoreError(f"{self.root / entry.folder / layout.STATE_FILE} has no values; restore it from a backup")
        return load_arrays(data, self.root / entry.folder / layout.STATE_ARRAYS_FILE), values

    def rollback(self, to_task: int) -> tuple[TaskEntry, ...]:
        """Go back to the moment after the first `to_task` tasks; later ones move to `removed/`, nothing is deleted.

        Args:
            to_task: how many tasks stay, from 0.

        Returns:
            the entries that were moved away; empty when `to_task` is the present number.

        Raises:
            StoreError: not open for writing, more tasks than there are, or the state at that point is not kept or
                damaged.
        """
        self._require_writable()
        if isinstance(to_task, bool) or not 0 <= to_task <= len(self.tasks):
            raise StoreError(f"{self.root} has {len(self.tasks)} tasks, so it cannot go back to {to_task} of them")
        if to_task > 0:
            self.read_state(to_task - 1)  # nothing is moved away for a state that then turns out to be damaged
        dropped = self.tasks[to_task:]
        if not dropped:
            return ()
        states = tuple(entry for entry in self._index.states if entry.index < to_task)
        before = self._index.dump()
        with writing(self.root):
            # The list of what existed goes along, so that a mistaken rollback can be undone by hand.
            aside = keep_former(self.root, before)
            self._commit(replace(self._index, tasks=self.tasks[:to_task], states=states))
            tidy(self.root, self._index, aside)
        return dropped

    def drop_state(self, index: int) -> None:
        """Stop keeping an earlier state, a damaged one for instance: its folder moves to `removed/`.

        Args:
            index: the task it was written after; not the newest one, which the learner goes on from.

        Raises:
            StoreError: not open for writing, or no earlier state is kept under that number.
        """
        self._require_writable()
        entry = self._state_entry(index)
        if index == len(self.tasks) - 1:
            raise StoreError(f"{self.root} goes on from its state after task {index}, so that one stays; roll it back")
        states = tuple(other for other in self._index.states if other != entry)
        with writing(self.root):
            aside = keep_former(self.root, self._index.dump())
            self._commit(replace(self._index, states=states))
            with contextlib.suppress(OSError):  # it may be missing; one left behind goes with the next writer's sweep
                set_aside(self.root, entry.folder, aside)

    def forget(
        self,
        tasks: Mapping[int, Replacement],
        states: Mapping[int, Mapping[str, np.ndarray]],
        *,
        record: Mapping[str, Any],
        delete: Sequence[str] = (),
    ) -> None:
        """Replace what tasks and kept states hold, for good: what was there is deleted, and not kept in `removed/`.

        Args:
            tasks: number -> what changes in its folder.
            states: number of the task it was written after -> all arrays of the new state; its values stay.
            record: plain JSON, kept in the header under `forgotten`; it must not tell what was forgotten.
            delete: further paths below the directory that go: of checkpoints, or in `removed/`.

        Raises:
            StoreError: not open for writing, a file to be carried over is damaged, or the disk refuses; the directory
                is as it was, or all is forgotten and the sentence says what is still to be deleted.
        """
        self._require_writable()
        with writing(self.root):
            sweep(self.root, self._index)
            self._commit(with_replacements(self.root, self._index, tasks, states, record=record, delete=tuple(delete)))
        try:
            self._index = finish_forgetting(self.root, self._index)
        except OSError as error:
            raise StoreError(
                f"{self.root} has forgotten, but {error.filename or 'what was replaced'} could not be deleted "
                f"({error.strerror or error}); make that possible, and open the learner for writing: it goes then"
            ) from error

    @property
    def digest(self) -> str:
        """Sha256 over all that decides what the learner does next: no clocks, costs, logs or paths.

        Two learners with the same digest hold the same bits. Raises StoreError when a manifest was changed.
        """
        return digest_of(self.root, self._index)

    def verify(self) -> None:
        """Check every file of every task and kept state; raises StoreError at the first one missing or changed."""
        for entry in self.tasks:
            self.read_task(entry.index).verify()
        for state in self._index.states:
            self.read_state(state.index)

    def _state_entry(self, index: int) -> StateEntry:
        if not 0 <= index < len(self.tasks):
            raise StoreError(f"{self.root} has {len(self.tasks)} tasks, so there is no state after number {index}")
        for entry in self._index.states:
            if entry.index == index:
                return entry
        kept = ", ".join(str(entry.index + 1) for entry in self._index.states)
        raise StoreError(
            f"{self.root} no longer keeps its state after the first {index + 1} tasks; it can go back to 0, {kept} "
            "tasks; make learners with --keep-states all to go back to any"
        )

    def _require_writable(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self.root} is open for reading only; open it for writing to change it")

    def _commit(self, index: Index) -> None:
        commit(self.root, index)
        self._index = index


def _log_line(line: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"a line of {layout.LOG_FILE} is not plain JSON ({error}); convert it before saving"
        ) from error
