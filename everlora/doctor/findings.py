"""What an examination finds: one line each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everlora.errors import EverloraError

__all__ = ["RESTORE", "Finding", "Severity", "broken", "note", "told", "warning"]

Severity = Literal["broken", "warning", "note"]
RESTORE = "restore it from a backup"


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: `broken` is wrong and must be mended; a `warning` does no harm, such as what an interrupted program
            left; a `note` is good to know.
        file: path below the learner's folder; `.` for the folder itself.
        what: what is wrong with it.
        mend: what to do about it.
    """

    severity: Severity
    file: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.file} {self.what}; {self.mend}"


def broken(file: str, what: str, mend: str = RESTORE) -> Finding:
    """Something that must be mended."""
    return Finding("broken", file, what, mend)


def warning(file: str, what: str, mend: str) -> Finding:
    """Something that does no harm."""
    return Finding("warning", file, what, mend)


def note(file: str, what: str, mend: str) -> Finding:
    """Something that is good to know."""
    return Finding("note", file, what, mend)


def told(error: EverloraError, root: Path, file: str) -> Finding:
    """Make a finding of an error about `file`: its sentence says what is wrong and, after the last semicolon, the mend.

    Args:
        error: raised while the file was read.
        root: the learner's folder.
        file: path below it.
    """
    what, _, mend = str(error).rpartition("; ")
    if not what:
        what, mend = mend, RESTORE
    return broken(file, what.removeprefix(f"{root / file} "), mend.rstrip("."))
