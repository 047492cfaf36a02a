"""Durable files: what is written here is on the disk, whole, before its name becomes visible.

Nothing in this module knows what a learner is. JSON is canonical (sorted keys, no NaN) so that equal values give equal
bytes; arrays travel as safetensors, never as pickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from everlora.errors import StoreError

__all__ = [
    "MAX_JSON_BYTES",
    "checksum",
    "dump_arrays",
    "dump_json",
    "inside",
    "is_temporary",
    "load_arrays",
    "load_json",
    "move",
    "read_bytes",
    "replace_file",
    "sync_folder",
    "temporary_name",
    "write_file",
    "writing",
]

MAX_JSON_BYTES = 64 * 2**20  # a task file is a few kB; anything near this is damage or an attack, not a learner

_SAFE_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def checksum(data: bytes) -> str:
    """Return the sha256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def dump_json(value: Mapping[str, Any], name: str) -> bytes:
    """Return `value` as canonical JSON: sorted keys, two spaces of indent, no NaN, a final newline.

    Args:
        value: a mapping of plain values (str, int, float, bool, None, lists and mappings of them).
        name: what the bytes will be called, for the error message.

    Raises:
        StoreError: a value is not plain JSON, is NaN or infinite, or the text would be too large to be read back.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{name} can hold plain JSON values only, and one of its values is not ({error}); "
            "convert arrays to lists and NaN to None before saving"
        ) from error
    data = (text + "\n").encode("ascii")
    if len(data) > MAX_JSON_BYTES:
        raise StoreError(
            f"{name} would take {len(data)} bytes of JSON, above the limit of {MAX_JSON_BYTES}; "
            "keep large values as arrays"
        )
    return data


def load_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse `data`, the content of `path`, as one JSON object.

    Raises:
        StoreError: the text is empty, cut short, nested too deeply, holds NaN or infinity, or is not an object.
    """

    def refuse_constant(word: str) -> Any:
        raise ValueError(f"{word} is not allowed")

    def finite(word: str) -> float:
        number = float(word)  # 1e999 would become infinity without a word
        return number if math.isfinite(number) else refuse_constant(word)

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}): it was cut short or damaged; restore it from a backup"
        ) from error
    if not isinstance(value, dict):
        raise StoreError(
            f"{path} holds a JSON {type(value).__name__} where an object is expected; restore it from a backup"
        )
    return value


def dump_arrays(arrays: Mapping[str, np.ndarray], name: str) -> bytes:
    """Return named arrays as the bytes of a safetensors file.

    Args:
        arrays: any shapes; dtypes that safetensors has (float16/32/64, integers, bool). Names in any order.
        name: what the file will be called, for the error message.

    Raises:
        StoreError: a value is not a NumPy array or has a dtype that cannot be stored (object, str).
    """
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise StoreError(f"array '{key}' of {name} is {found}; expected a NumPy array of numbers or booleans")
    # PEFT and transformers look for this one metadata entry in weight files.
    ordered = {key: np.ascontiguousarray(arrays[key]).reshape(arrays[key].shape) for key in sorted(arrays)}
    try:
        return bytes(safetensors.save(ordered, metadata={"format": "pt"}))
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"the arrays of {name} cannot be stored as safetensors: {error}") from error


def load_arrays(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in `data`, the content of the safetensors file `path`.

    Raises:
        StoreError: the bytes are not a whole safetensors file.
    """
    try:
        return dict(safetensors.load(data))
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is not a whole safetensors file ({error}); restore it from a backup") from error


def inside(root: Path, relative: str) -> Path:
    """Return the path of `relative` below `root`, after checking that it stays there.

    Args:
        root: a folder.
        relative: parts of letters, digits, `.`, `_` and `-`, joined by `/`; none starts with a dot.

    Raises:
        StoreError: the path is absolute, climbs out, has an unusual part, or a link on the way leads outside.
    """
    if not isinstance(relative, str) or not all(_SAFE_PART.match(part) for part in relative.split("/")):
        raise StoreError(
            f"{root} names the path {relative!r}, which leaves the folder or has characters that everlora never "
            "writes; the folder was changed by hand, so restore it from a backup"
        )
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise StoreError(f"{path} is a link that leaves the folder {root}; put the real file in its place")
    return path


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """Return the whole content of `path`.

    Args:
        path: the file.
        limit: refuse files above this many bytes without reading them.

    Raises:
        StoreError: the file is missing, too large, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise StoreError(
                    f"{path} has {size} bytes, above the limit of {limit}: this is not a file of a learner"
                )
            return file.read()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing; restore it from a backup") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure of the disk (full, read-only, no permission) into one sentence about `folder`."""
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise StoreError(
            f"writing to {place} failed: {error.strerror or error}; the learner is as it was before, so make room or "
            "give write permission and run the same command again"
        ) from error


def temporary_name(name: str) -> str:
    """Return a hidden, unused name for something that will be called `name` once it is complete."""
    return f".{name}.tmp-{secrets.token_hex(4)}"


def is_temporary(entry: str, name: str) -> bool:
    """Whether a file's name is one that `temporary_name` gave to what was to become `name`."""
    return entry.startswith(f".{name}.tmp-")


def write_file(path: Path, data: bytes) -> None:
    """Create `path` with `data` and wait until the bytes are on the disk; parents are created.

    Raises:
        OSError: the file exists, or the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk (a file's own fsync does not cover its name)."""
    if sys.platform == "win32":  # folders cannot be opened there, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder within one disk, durably; `target` must not exist."""
    if target.exists():
        raise FileExistsError(17, "the target of a rename exists already", str(target))
    os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` the content `data` in one step: readers see the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk
        raise
    sync_folder(path.parent)
