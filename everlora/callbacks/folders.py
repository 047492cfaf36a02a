"""Folders of tensors and settings with the sha256 of each file: what is carried from one task's script to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
from safetensors import SafetensorError
from torch import Tensor

from everlora.errors import StoreError
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from everlora.store.files import (
    MAX_JSON_BYTES,
    checksum,
    dump_json,
    inside,
    load_json,
    move,
    read_bytes,
    temporary_name,
    write_file,
    writing,
)

__all__ = ["adapter_files", "dump_tensors", "load_tensors", "read_record", "write_folder"]


def dump_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as the bytes of a safetensors file; any dtype, half precision included."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return bytes(safetensors.save(ordered, metadata={"format": "pt"}))


def load_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in `data`, the content of the safetensors file `path`.

    Raises:
        StoreError: the bytes are not a whole safetensors file.
    """
    try:
        return dict(safetensors.load(data))
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is not a whole safetensors file ({error}); restore it from a backup") from error


def adapter_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the two files of a PEFT folder."""
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    return {ADAPTER_WEIGHTS: dump_tensors(tensors), ADAPTER_CONFIG: text}


def write_folder(folder: Path, files: Mapping[str, bytes], record: tuple[str, Mapping[str, Any]] | None = None) -> None:
    """Write a new folder: it appears with all its files, or not at all.

    Args:
        folder: must not exist, or be empty.
        files: path below the folder to content.
        record: name and content of a JSON file that is written along, with the sha256 of each file and its own.

    Raises:
        StoreError: the folder holds something, or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"expected {folder} to be a new or empty folder, found one with content; choose another")
    written = dict(files)
    if record is not None:
        name, content = record
        body = {**content, "files": {path: checksum(data) for path, data in files.items()}}
        own = checksum(dump_json(body, name))
        written[name] = dump_json({**body, "sha256": own}, name)
    temporary = folder.with_name(temporary_name(folder.name))
    with writing(folder):
        try:
            for path, data in written.items():
                write_file(inside(temporary, path), data)
            if folder.exists():
                folder.rmdir()
            move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_record(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read what `write_folder` wrote along with a record, and check every checksum.

    Returns:
        The record, and the content of each file it names.

    Raises:
        StoreError: a file is missing, damaged or was changed.
    """
    path = folder / name
    record = load_json(read_bytes(path, limit=MAX_JSON_BYTES), path)
    own = record.pop("sha256", None)
    if own != checksum(dump_json(record, name)):
        raise StoreError(f"{path} was changed after it was written: its sha256 differs; restore it from a backup")
    contents = {}
    for relative, expected in record.get("files", {}).items():
        data = read_bytes(inside(folder, relative))
        if checksum(data) != expected:
            raise StoreError(
                f"{folder / relative} was changed after it was written: its sha256 differs from the one in {name}; "
                "restore it from a backup"
            )
        contents[relative] = data
    return record, contents
