"""A learner directory under several processes: the first one writes, the others wait and read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everlora.export import ExportReport
from everlora.store import LearnerStore
from everlora.training import processes

__all__ = ["create_directory", "exported", "is_writer", "reread", "writing"]


def create_directory(path: str | Path, header: Mapping[str, Any], *, device: str, **options: Any) -> LearnerStore:
    """Make a learner directory, see `LearnerStore.create`; it is not open for writing."""
    group = processes(device)
    with group.together():
        if group.is_first:
            with LearnerStore.create(path, header, **options) as store:
                return store
    return LearnerStore.open(path)


@contextmanager
def writing(path: str | Path, *, device: str) -> Iterator[LearnerStore]:
    """Open a learner directory, in the first process for writing, until no process needs it any more.

    Raises:
        StoreError: no learner there, or it cannot be written.
        LockedError: another program is writing to it.
        ProcessError: another one of the processes failed.
    """
    group = processes(device)
    with group.together(), LearnerStore.open(path, write=group.is_first) as store:
        group.check()  # all have read the same state before any goes on
        yield store


def is_writer(store: LearnerStore, *, device: str) -> bool:
    """Wait until all processes have something to write, and tell whether this is the one that writes it.

    Raises:
        ProcessError: another one of the processes failed before it came this far.
    """
    processes(device).check()
    return store.is_writable


def reread(store: LearnerStore, *, device: str) -> LearnerStore:
    """Return the directory as it is after `writing`."""
    return store if processes(device).is_first else LearnerStore.open(store.root)


def exported(write: Callable[[], ExportReport], *, device: str) -> ExportReport:
    """Let the first process write an export, and tell all processes what it wrote.

    Raises:
        ProcessError: the first process failed.
    """
    group = processes(device)
    report = None
    with group.together():
        if group.is_first:
            report = write()
    values = {} if report is None else {**dataclasses.asdict(report), "folder": str(report.folder)}
    told = group.gather({"report": values})[0]["report"]
    return report or ExportReport(**{**told, "folder": Path(told["folder"])})
