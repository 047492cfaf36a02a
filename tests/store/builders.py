"""Small learner directories made in a few milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from everlora.store import KeepStates, LearnerStore, TaskEntry

HEADER = {"base_model": "/models/base", "base_sha256": "0" * 64, "method": "some_method", "options": {"rank": 2}}


def add_task(store: LearnerStore, name: str, *, seconds: float = 1.0) -> TaskEntry:
    """Append a task with every kind of file a learner writes; its numbers depend on its position only."""
    number = len(store.tasks)
    factors = np.arange(6, dtype=np.float32).reshape(2, 3) + number
    return store.write_task(
        name,
        record={
            "labels": [f"label-{number}"],
            "cost": {"seconds": seconds},
            "evaluation": {str(task): {"correct": 8 - (number - task), "size": 10} for task in range(number + 1)},
        },
        arrays={"adapter_model.safetensors": {"down": factors}, "stable/added.safetensors": {"bias": np.ones(2)}},
        documents={"adapter_config.json": {"r": 2}},
        state_arrays={"magnitudes": np.full(number + 1, 0.5, dtype=np.float32)},
        state_values={"num_seen": number + 1},
        log=[{"step": 1, "loss": 0.5, "seconds": seconds}],
    )


def make_learner(folder: Path, names: tuple[str, ...] = ("january",), keep_states: KeepStates = "newest") -> Path:
    """Create a learner with one task per name and close it; return its folder."""
    with LearnerStore.create(folder, HEADER, keep_states=keep_states) as store:
        for name in names:
            add_task(store, name)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file a reader may look at, to compare two moments."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
