"""Writing a folder so that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everlora.errors import StoreError

__all__ = ["new_folder", "write_json"]


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    Raises:
        StoreError: `target` is a file or a folder with something in it, or cannot be written.
    """
    final = Path(target)
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise StoreError(f"expected a new or empty folder for the export, found {final} in use; name another")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise StoreError(
            f"expected to write the export to {final}, found {error.strerror}; name another folder"
        ) from error
    try:
        yield unfinished
        os.chmod(unfinished, 0o777 & ~_umask())
        if final.is_dir():
            final.rmdir()
        os.replace(unfinished, final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that looks the same on every run."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _umask() -> int:
    # The only way to read it is to set it.
    current = os.umask(0o022)
    os.umask(current)
    return current
