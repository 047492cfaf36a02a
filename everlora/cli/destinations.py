"""Where commands write: a place is tried before the work that would be lost, and a refusal is one sentence."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everlora.errors import DataError

__all__ = ["check_file", "check_folder", "writing"]


def check_file(path: Path, option: str = "--out") -> None:
    """Refuse a file that could not be written later; nothing is left behind by the attempt.

    Args:
        path: the file, whether it exists or not.
        option: which option it was given for, for the message.

    Raises:
        DataError: it is a folder, or nothing can be written where it lies.
    """
    with writing(path, option):
        if path.is_dir():
            raise DataError(f"{path} is a folder; give the name of a file to {option}.")
        if not path.exists() or path.is_file():  # nothing is put beside a device or a pipe such as /dev/stdout
            _try(path.absolute().parent)


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder in which nothing could be written later; it is not made here.

    Args:
        path: the folder, whether it exists or not.
        option: which option it was given for, for the message.

    Raises:
        DataError: nothing can be written there, or it is a file.
    """
    with writing(path, option):
        _try(path.absolute())


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turn a failure of the disk (full, read-only, no permission) into one sentence about `path`.

    Raises:
        DataError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; give write permission or another {option}.") from error


def _try(folder: Path) -> None:
    """Write a file without a name to the folder, or to the nearest one above it that exists.

    An attempt, because permission bits say nothing about disks that are mounted read-only or over a network.
    """
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file and no folder")
    with tempfile.TemporaryFile(dir=folder):
        pass
