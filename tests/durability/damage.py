"""Ways to damage a learner directory, with and without mending its checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

from everlora.store.files import checksum, dump_json
from everlora.store.layout import LEARNER_FILE, STATE_FILE, TASK_FILE, _sealed


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    """Flip one bit; a negative position counts from the end."""
    position %= len(data)
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


def reseal(folder: Path) -> None:
    """Make all checksums of a learner agree with what lies there: what an attacker, or a bug, might leave."""
    index = json.loads((folder / LEARNER_FILE).read_text())
    index.pop("sha256")
    for kind, manifest in (("tasks", TASK_FILE), ("states", STATE_FILE)):
        for entry in index[kind]:
            place = folder / entry["folder"]
            content = json.loads((place / manifest).read_text())
            for name in content["files"]:
                data = (place / name).read_bytes()
                content["files"][name] = {"sha256": checksum(data), "size": len(data)}
            data = dump_json(content, manifest)
            (place / manifest).write_bytes(data)
            entry["sha256"] = checksum(data)
    (folder / LEARNER_FILE).write_bytes(_sealed(index))


def change_arrays(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a safetensors file after `change` had its arrays."""
    arrays = dict(load_file(file))
    change(arrays)
    save_file(arrays, file, metadata={"format": "pt"})
