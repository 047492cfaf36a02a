"""Names of what a method remembers, and generators seeded by names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["keyed_generator", "task_key", "tasks_in"]


def keyed_generator(*keys: object) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `keys`, the same whatever ran before."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def task_key(index: int, name: str) -> str:
    """Name of a state entry that belongs to one task for ever."""
    return f"tasks/{index:03d}/{name}"


def tasks_in(state: Mapping[str, Any], name: str) -> int:
    """Count the tasks, from 0 on, that have an entry `name` in a state."""
    count = 0
    while task_key(count, name) in state:
        count += 1
    return count
