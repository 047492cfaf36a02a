"""Writing a folder so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from everlora.errors import EverloraError, StoreError

__all__ = ["new_folder", "write_json"]


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    After a failure nothing is left of it, nor of parents that were made for it.

    Raises:
        StoreError: `target` is a file or a folder with something in it, or it cannot be written: the disk is full,
            say, or may not be written to.
    """
    final = Path(target)
    with _in_one_sentence(final):
        if final.is_file() or (final.is_dir() and any(final.iterdir())):
            raise StoreError(f"expected a new or empty folder for the export, found {final} in use; name another")
        made = [folder for folder in (final, *final.parents) if not folder.exists()]
        unfinished: Path | None = None
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
            yield unfinished
            os.chmod(unfinished, 0o777 & ~_umask())
            if final.is_dir():
                final.rmdir()
            os.replace(unfinished, final)
        except BaseException:
            _clear(final, unfinished, made)
            raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that looks the same on every run."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _in_one_sentence(final: Path) -> Iterator[None]:
    """Turn what the system, or a library that writes files without Python, says of a failed write into a StoreError."""
    try:
        yield
    except EverloraError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise StoreError(
            f"the export to {final} failed and nothing of it is left: {reason}; make room, give write permission, or "
            "name another folder"
        ) from error


def _clear(final: Path, unfinished: Path | None, made: Sequence[Path]) -> None:
    """Remove what a failed export wrote; where the disk refuses even that, the first failure is what counts."""
    if unfinished is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
        if final not in made:
            final.mkdir(exist_ok=True)


def _umask() -> int:
    # The only way to read it is to set it.
    current = os.umask(0o022)
    os.umask(current)
    return current
