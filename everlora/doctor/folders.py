"""What lies in a learner directory beside what learner.json and the manifests name."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from everlora.store.layout import LEARNER_FILE

__all__ = ["LOCK_FILE", "REMOVED", "Stray", "entries", "is_locked", "leads_outside", "strays"]

LOCK_FILE, REMOVED, CHECKPOINT = ".lock", "removed", "checkpoint"
_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}\Z")
_OWN_FOLDERS = ("tasks", "state")


class Stray:
    """Something that nobody lists.

    Attributes:
        path: below the learner's folder.
        kind: `leftover`, of an interrupted program; `unlisted`, in a folder of a task or state; `foreign`, outside
            everlora's folders; `special`, neither a file, a folder nor a link.
    """

    def __init__(self, path: str, kind: str) -> None:
        self.path = path
        self.kind = kind


def is_locked(root: Path) -> bool:
    """Whether a process is writing to the learner; False where that cannot be told."""
    if not (root / LOCK_FILE).is_file():
        return False
    lock = FileLock(root / LOCK_FILE, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def entries(root: Path) -> Iterator[str]:
    """Yield the paths below `root` of files, links (not followed) and empty folders, `removed/` left out; sorted."""
    for folder, names, files in os.walk(root):
        names.sort()
        if Path(folder) == root and REMOVED in names:
            names.remove(REMOVED)
        linked = [name for name in names if (Path(folder) / name).is_symlink()]
        for name in linked:
            names.remove(name)
        if not names and not files and not linked and Path(folder).parent != root and Path(folder) != root:
            yield Path(folder).relative_to(root).as_posix()
        for name in sorted([*files, *linked]):
            yield (Path(folder) / name).relative_to(root).as_posix()


def leads_outside(root: Path, relative: str) -> bool:
    """Whether a link leads out of the learner, or nowhere."""
    path = root / relative
    return path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(root.resolve()))


def strays(root: Path, folders: set[str], files: set[str]) -> list[Stray]:
    """Find what is not listed.

    Args:
        root: the learner's folder.
        folders: the task and state folders that learner.json lists.
        files: paths of all files that it and the manifests list.

    Returns:
        One entry for each; a whole folder of an interrupted writer, or without any listed file, counts as one.
    """
    found: dict[str, str] = {}
    for path in entries(root):
        if path in files or path in (LEARNER_FILE, LOCK_FILE) or path.startswith(f"{CHECKPOINT}/"):
            continue
        place, kind = _judge(root, path, folders)
        found.setdefault(place, kind)
    return [Stray(path, kind) for path, kind in found.items()]


def _judge(root: Path, path: str, folders: set[str]) -> tuple[str, str]:
    parts = path.split("/")
    if not _is_plain(root / path):
        return path, "special"
    if parts[0] not in _OWN_FOLDERS:
        return path, "leftover" if _TEMPORARY.match(parts[0]) else "foreign"
    if len(parts) == 1:  # a file or link in the place of the folder itself
        return path, "foreign"
    whole = "/".join(parts[:2])
    if whole not in folders:
        number = parts[1].lstrip(".")[:3].isdigit()
        return whole, "leftover" if number or _TEMPORARY.match(parts[1]) else "unlisted"
    return path, "leftover" if _TEMPORARY.match(parts[-1]) else "unlisted"


def _is_plain(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)
