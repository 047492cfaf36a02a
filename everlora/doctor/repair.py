"""Putting aside what is broken or does not belong: everything moves to `removed/`, nothing is deleted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from everlora.doctor.examination import Examination
from everlora.doctor.examine import examine, look_at
from everlora.doctor.findings import Finding
from everlora.doctor.folders import is_locked
from everlora.errors import LockedError
from everlora.store import LearnerStore, finish_forgetting
from everlora.store.changes import new_removed_folder, take_lock
from everlora.store.commits import set_aside
from everlora.store.files import writing
from everlora.store.layout import read_index

__all__ = ["Repaired", "repair", "way_back"]

_MOVABLE = ("checkpoint", "leftover", "special", "unlisted")


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        moved: paths below the learner's folder of what moved to `removed/`.
        kept_tasks: how many tasks the learner went back to; None where it did not.
        findings: what an examination finds afterwards.
    """

    moved: tuple[str, ...]
    kept_tasks: int | None
    findings: list[Finding]


def way_back(path: str | Path) -> int | None:
    """How many tasks `repair` with `go_back` would keep; None where the learner is whole or there is no way back."""
    return look_at(Path(path), base=False).way_back


def repair(path: str | Path, *, go_back: bool = False, model: str | Path | None = None, base: bool = True) -> Repaired:
    """Move what is broken, and can be done without, to `removed/`.

    That is what nobody lists, what an interrupted program left, links that lead outside, and an earlier state, kept
    for `rollback`, that is damaged. Where the learner itself is damaged, only `go_back` changes it.

    Args:
        path: the learner's folder.
        go_back: where tasks are damaged, go back to the newest moment at which everything was whole; these tasks and
            all later ones move to `removed/`, too.
        model: where the base model lies now, if it moved.
        base: let the examination that follows include the base model.

    Raises:
        StoreError: no learner there, its learner.json cannot be read, or the disk refuses.
        LockedError: another process is writing there.
    """
    root = Path(path)
    if is_locked(root):
        raise LockedError(f"{root} is being written to by another process; wait until it is done and try again")
    if look_at(root, base=False).store is None:
        return Repaired((), None, examine(root, model=model, base=base))
    lock = take_lock(root)
    try:
        with writing(root):  # what was to be deleted for good must not move to removed/
            finish_forgetting(root, read_index(root))
        seen = look_at(root, base=False)
        store = LearnerStore(root, read_index(root), lock)
        with writing(root):
            moved = _move_strays(seen)
        kept = seen.way_back if go_back else None
        if kept is not None:
            moved += [task.folder for task in store.tasks[kept:]]
            moved += [state.folder for state in store.states if state.index >= kept]
            store.rollback(kept)
        moved += _drop_states(seen, store)
    finally:
        lock.release()
    return Repaired(tuple(moved), kept, examine(root, model=model, base=base))


def _move_strays(seen: Examination) -> list[str]:
    paths = [stray.path for stray in seen.strays if stray.kind in _MOVABLE]
    paths += seen.links  # also one in the place of a listed file: it is never followed, the file is missing either way
    if paths:
        aside = new_removed_folder(seen.root)
        for path in paths:
            set_aside(seen.root, path, aside)
    return paths


def _drop_states(seen: Examination, store: LearnerStore) -> list[str]:
    """Give up damaged states that only a rollback would need."""
    newest = len(store.tasks) - 1
    bad = [entry for entry in store.states if entry.index in seen.bad_states and entry.index != newest]
    for entry in bad:
        store.drop_state(entry.index)
    return [entry.folder for entry in bad]
