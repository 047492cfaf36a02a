"""The one step that makes a change visible: replacing learner.json; and what may fail after it without harm."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from everlora.store.changes import new_removed_folder, sweep
from everlora.store.files import move, replace_file, sync_folder, write_file
from everlora.store.layout import LEARNER_FILE, Index

__all__ = ["commit", "commit_first", "keep_former", "set_aside", "tidy"]

logger = logging.getLogger("everlora.store")


def commit(root: Path, index: Index) -> None:
    """Replace learner.json, or leave it as it was.

    Where the new file is in place and only the wait for the disk failed, nobody knows which of the two would be there
    after a loss of power, so the old one is put back. If that fails as well, what readers see is what counts.

    Raises:
        OSError: the disk refuses; readers see the old learner.json.
    """
    path, data = root / LEARNER_FILE, index.dump()
    before = path.read_bytes()
    try:
        replace_file(path, data)
    except OSError as error:
        with contextlib.suppress(OSError):
            if path.read_bytes() == data:
                replace_file(path, before)
        if not _is_there(path, data, error):
            raise


def commit_first(root: Path, data: bytes) -> None:
    """Write the learner.json of a new learner, or leave none; see `commit`.

    Raises:
        OSError: the disk refuses; there is no learner.
    """
    path = root / LEARNER_FILE
    try:
        replace_file(path, data)
        sync_folder(root.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if not _is_there(path, data, error):
            raise


def _is_there(path: Path, data: bytes, error: OSError) -> bool:
    try:
        found = path.read_bytes() == data
    except OSError:
        return False
    if found:
        logger.warning("%s is written, but the disk did not confirm it: %s", path, error.strerror or error)
    return found


def tidy(root: Path, index: Index, aside: Path | None = None) -> None:
    """Put leftovers aside after a commit; where the disk refuses, the next writer does it: the change is made."""
    try:
        sweep(root, index, aside)
    except OSError as error:
        logger.warning("leftovers in %s stay until it is next written to: %s", root, error.strerror or error)


def keep_former(root: Path, data: bytes) -> Path:
    """Put a copy of learner.json as it was into a new folder of `removed/`, and return the folder.

    Raises:
        OSError: the disk refuses.
    """
    aside = new_removed_folder(root)
    write_file(aside / LEARNER_FILE, data)
    sync_folder(aside)
    return aside


def set_aside(root: Path, relative: str, aside: Path) -> None:
    """Move one file or folder of the learner to `aside`, a folder in `removed/`, where it gets the same path.

    Raises:
        OSError: the disk refuses.
    """
    target = aside / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    move(root / relative, target)
    sync_folder(aside)
