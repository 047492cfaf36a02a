"""The steps a writer takes: lock, write a folder whole, put leftovers aside. Each step may be the last one it makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from everlora.errors import LockedError, StoreError
from everlora.store.checkpoints import CHECKPOINT_FOLDER, tidy_checkpoints
from everlora.store.files import checksum, dump_json, inside, move, sync_folder, temporary_name, write_file, writing
from everlora.store.layout import LEARNER_FILE, Index

__all__ = ["discard_checkpoints", "new_removed_folder", "refuse_occupied", "sweep", "take_lock", "write_folder"]


def take_lock(root: Path) -> FileLock:
    """Take the writer's lock of the learner in `root`, at once or not at all.

    The system gives the lock back when the process ends, however it ends.

    Raises:
        LockedError: another writer holds it, in this process or another.
        StoreError: the folder cannot be written.
    """
    # Not tied to a thread: a notebook may open a learner in one thread and close it in another.
    lock = FileLock(root / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(
            f"{root} is being written to by another process; wait until it is done and try again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{root} cannot be opened for writing: {reason}; give write permission, or copy it") from error
    return lock


def refuse_occupied(root: Path) -> None:
    """Refuse a folder where a learner is, or was: without learner.json its tasks would be taken for leftovers.

    Raises:
        StoreError: there is a learner.json, or a folder of tasks or states that is not empty.
    """
    if (root / LEARNER_FILE).exists():
        raise StoreError(f"{root} holds a learner already; open it, or choose another folder for a new one")
    for name in ("tasks", "state"):
        if (root / name).is_dir() and any((root / name).iterdir()):
            raise StoreError(f"{root} has a folder '{name}' but no {LEARNER_FILE}; choose another folder")


def write_folder(
    root: Path, folder: str, files: Mapping[str, bytes], *, manifest: str, about: Mapping[str, Any]
) -> str:
    """Write a whole folder under a hidden name, wait until it is on the disk, and rename it.

    Args:
        root: the learner's directory.
        folder: where the folder goes below it, such as `tasks/000-january`.
        files: file name, perhaps with a sub-folder -> content.
        manifest: name of the JSON file that lists size and sha256 of all the others.
        about: what else the manifest holds.

    Returns:
        the sha256 of the manifest.

    Raises:
        StoreError: a file name that leaves the folder, or `about` is not plain JSON.
        OSError: the disk refuses.
    """
    final = root / folder
    listed = {name: {"sha256": checksum(data), "size": len(data)} for name, data in files.items()}
    content = dump_json({**about, "files": listed}, f"{folder}/{manifest}")
    working = final.with_name(temporary_name(final.name))
    for name in files:  # all names are checked before the first byte is written
        inside(working, name)
    folders = {working}
    for name, data in {**files, manifest: content}.items():
        path = working / name
        write_file(path, data)
        folders.add(path.parent)
    for part in sorted(folders, reverse=True):
        sync_folder(part)
    move(working, final)
    sync_folder(root)  # tasks/ or state/ may itself be new
    return checksum(content)


def sweep(root: Path, index: Index, aside: Path | None = None) -> None:
    """Delete superseded states and checkpoints of finished tasks; move every other leftover to `removed/`.

    Args:
        root: the learner's directory, locked by the caller.
        index: its learner.json as it stands on the disk.
        aside: an existing folder in `removed/` to use instead of a new one.
    """
    oldest_state = min((entry.index for entry in index.states), default=0)
    for path in list(_leftovers(root, index)):
        number = path.name.partition("-")[0]
        if path.parent.name == "state" and number.isdigit() and int(number) < oldest_state:
            # A newer state has replaced it for good: keeping each would make the disk grow with every task.
            shutil.rmtree(path)
            continue
        aside = aside or new_removed_folder(root)
        target = aside / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        move(path, target)
        sync_folder(aside)


def new_removed_folder(root: Path) -> Path:
    """Make and return the next free `removed/NNNN` of a learner that the caller has locked."""
    parent = root / "removed"
    parent.mkdir(exist_ok=True)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
    folder = parent / f"{max(numbers, default=-1) + 1:04d}"
    folder.mkdir()
    sync_folder(parent)
    sync_folder(root)
    return folder


def discard_checkpoints(root: Path) -> Path | None:
    """Move the checkpoints of an unfinished task to `removed/`, in a learner that the caller has locked.

    Returns:
        Where they are now; None where there were none.
    """
    folder = root / CHECKPOINT_FOLDER
    if not folder.is_dir():
        return None
    with writing(root):
        target = new_removed_folder(root) / CHECKPOINT_FOLDER
        move(folder, target)
    return target


def _leftovers(root: Path, index: Index) -> Iterator[Path]:
    """Yield what lies in the directory under everlora's own names without being listed in learner.json."""
    listed = {entry.folder for entry in index.tasks} | {entry.folder for entry in index.states}
    for parent in ("tasks", "state"):
        folder = root / parent
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.lstrip(".")[:3].isdigit() and f"{parent}/{path.name}" not in listed:
                yield path
    yield from sorted(root.glob(f".{LEARNER_FILE}.tmp-*"))
    checkpoints = tidy_checkpoints(root, len(index.tasks))
    if checkpoints is not None:
        yield checkpoints
