"""Which commit the code was at, where it lies in a git repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commits"]

_SECONDS = 10


def commits(package: Path, work: Path) -> dict[str, str]:
    """Return the commits that a result was made with, by what they are of.

    Args:
        package: folder of the package; it counts only where its repository tracks it, which an environment inside
            somebody's repository does not.
        work: the working folder.

    Returns:
        `everlora` and `working folder`, as hexadecimal names, with `, with changes` behind one whose tracked files
        differ from it; without an entry where there is no repository, no commit or no git, and the working folder is
        left out where it is the package's repository.
    """
    found = {}
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        found["everlora"] = (_git(package, "rev-parse", "--show-toplevel"), _state(package))
    found["working folder"] = (_git(work, "rev-parse", "--show-toplevel"), _state(work))
    if found["working folder"][0] == found.get("everlora", (None, None))[0]:
        del found["working folder"]
    return {name: state for name, (_, state) in found.items() if state is not None}


def _state(folder: Path) -> str | None:
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, with changes" if changed else commit


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None where it fails or is not there."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
