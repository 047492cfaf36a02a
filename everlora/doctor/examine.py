"""Examining a learner directory: every file that it lists, and everything else that lies in it."""

from __future__ import annotations

from pathlib import Path

from everlora.doctor.base_model import examine_base, examine_settings
from everlora.doctor.contents import examine_checkpoints, examine_state, examine_task
from everlora.doctor.examination import Examination
from everlora.doctor.findings import Finding, Severity, broken, note, warning
from everlora.doctor.folders import REMOVED, entries, is_locked, leads_outside, strays
from everlora.errors import StoreError
from everlora.store import FORMAT_VERSION, LearnerStore
from everlora.store.forgetting import PENDING
from everlora.store.layout import LEARNER_FILE, read_versioned_index

__all__ = ["examine", "look_at"]

_ORDER: tuple[Severity, ...] = ("broken", "warning", "note")


def examine(path: str | Path, *, model: str | Path | None = None, base: bool = True) -> list[Finding]:
    """Check every file of a learner directory; nothing in it is changed.

    Args:
        path: the directory.
        model: where the base model lies now, if it moved.
        base: also hash the base model anew and check the method's options, which takes a while.

    Returns:
        What was found, what is broken first; empty, or notes only, for a learner in order.

    Raises:
        StoreError: there is no learner, nor what is left of one.
    """
    return sorted(look_at(Path(path), model=model, base=base).findings, key=lambda one: _ORDER.index(one.severity))


def look_at(root: Path, *, model: str | Path | None = None, base: bool = True) -> Examination:
    """Do what `examine` does, and keep what a repair needs to know."""
    if not (root / LEARNER_FILE).exists() and not any((root / name).is_dir() for name in ("tasks", "state")):
        raise StoreError(f"no learner in {root}: {LEARNER_FILE} is not there; create one with `everlora init {root}`")
    seen = Examination(root)
    locked = is_locked(root)
    if locked:
        what = "is being written to by another process, so that findings may be of a moment in between"
        seen.findings.append(note(".", what, "wait until it is done and look again"))
    _examine_links(seen)
    store = _examine_index(seen)
    if store is None:
        return seen
    for task in store.tasks:
        examine_task(seen, store, task)
    for state in store.states:
        examine_state(seen, state)
    _examine_order(seen, store)
    _examine_strays(seen, store, locked=locked)
    examine_checkpoints(seen)
    if base:
        seen.findings += examine_settings(store.header)
        seen.findings += examine_base(store.header, seen.shapes, model)
    if (way := seen.way_back) is not None:
        what = f"is damaged, and was whole after its first {way} task{'s' if way > 1 else ''}"
        seen.findings.append(note(".", what, "`everlora doctor --repair --go-back` goes back to there"))
    return seen


def _examine_index(seen: Examination) -> LearnerStore | None:
    path = seen.root / LEARNER_FILE
    try:
        _, version = read_versioned_index(seen.root)
        seen.store = LearnerStore.open(seen.root)
    except StoreError as error:
        missing = not path.exists()
        found = broken(LEARNER_FILE, "is missing") if missing else seen.tell(error, LEARNER_FILE)
        seen.findings.append(found)
        return None
    if version != FORMAT_VERSION:
        what = f"has format version {version}, which is brought up to {FORMAT_VERSION} when a task is next learned"
        seen.findings.append(note(LEARNER_FILE, what, "nothing needs to be done"))
    return seen.store


def _examine_order(seen: Examination, store: LearnerStore) -> None:
    """States must be in order, the last of them that of the newest task."""
    numbers, count = [entry.index for entry in store.states], len(store.tasks)
    if numbers != sorted(set(numbers)) or (numbers[-1] if numbers else -1) != count - 1:
        seen.findings.append(broken(LEARNER_FILE, f"lists the states {numbers} for {count} tasks"))
        seen.bad_states.add(count - 1)
    wanted = range(count) if store.keep_states == "all" else range(max(count - 2, 0), count)
    lacking = [str(number + 1) for number in wanted if number not in numbers]
    if lacking:
        what = f"keeps no state after {', '.join(lacking)} tasks, so that one cannot go back to there"
        seen.findings.append(note("state", what, "nothing needs to be done"))


def _examine_links(seen: Examination) -> None:
    for path in entries(seen.root):
        if leads_outside(seen.root, path):
            seen.links.append(path)
            what = "is a link that leaves the folder, or leads nowhere, and is not followed"
            seen.findings.append(broken(path, what, "put the real file in its place"))


def _examine_strays(seen: Examination, store: LearnerStore, *, locked: bool) -> None:
    folders = {task.folder for task in store.tasks} | {state.folder for state in store.states}
    seen.strays = [stray for stray in strays(seen.root, folders, seen.listed) if stray.path not in seen.links]
    aside = "move it away, or let --repair do it"
    pending = {str(path) for path in store.header.get(PENDING) or ()}
    for path in sorted(pending):
        what = "holds what was to be forgotten, and is not deleted yet"
        seen.findings.append(warning(path, what, "it goes when the learner is next opened for writing"))
    seen.strays = [stray for stray in seen.strays if not _is_below(stray.path, pending)]  # to be deleted, not kept
    for stray in seen.strays:
        if stray.kind == "leftover" and locked:
            found = note(stray.path, "is being written now", "wait")
        elif stray.kind == "leftover":
            found = warning(stray.path, "was left by a program that did not finish", aside)
        elif stray.kind == "foreign":
            found = note(stray.path, "is none of everlora's files and is left alone", "keep it or move it")
        elif stray.kind == "special":
            found = broken(stray.path, "is neither a file nor a folder", aside)
        else:
            found = broken(stray.path, "is listed nowhere, and other programs might read it", aside)
        seen.findings.append(found)
    if (seen.root / REMOVED).is_dir() and any((seen.root / REMOVED).iterdir()):
        what = "keeps what was rolled back or left over; it is never read"
        seen.findings.append(note(REMOVED, what, "delete it once nothing in it is missed"))


def _is_below(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
