"""Folders with a `results.json` of invented counts on two tasks of unequal size, whose numbers can be done by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES = [100, 50]

# Method -> seed -> right answers on the first task when learned, and on both tasks at the end.
Counts = Mapping[str, Mapping[int, Sequence[int]]]

COUNTS: Counts = {
    "ours": {1: (90, 80, 45), 2: (92, 82, 46), 3: (94, 84, 47)},
    "naive": {1: (90, 60, 45), 2: (92, 61, 47), 3: (94, 61, 49)},
}


CLAIM = {
    "id": "C1",
    "claim": "Ours keeps more",
    "published": "They say 91 % against 80 %.",
    "row": "ours",
    "against": "naive",
    "verdict": "reproduced",
    "reason": "",
    "left_out": [],
    "findings": [
        {
            "figure": "cil",
            "other": "naive",
            "decides": True,
            "n": 3,
            "row": {"mean": 0.87, "sd": 0.02},
            "against": {"mean": 0.773, "sd": 0.02},
            "difference": 0.097,
            "low": 0.095,
            "high": 0.1,
            "margin": 0.0,
            "ratio": 1.1,
            "verdict": "reproduced",
        }
    ],
}


def run(method: str, seed: int, counts: Sequence[int], **more: Any) -> dict[str, Any]:
    """One run; its label is the method's name in capitals."""
    first, end_first, end_second = counts
    return {
        "method": method,
        "label": method.upper(),
        "seed": seed,
        "correct": [[first, None], [end_first, end_second]],
        "task_aware": [[first + 2, None], [end_first + 2, end_second + 1]],
        "task_correct": [[first, None], [end_first + 1, end_second]],
        "sizes": SIZES,
        "cost": [{"task": task, "seconds": 3.0 + task, "trainable_parameters": 10} for task in range(2)],
        "panels": {},
        "options": {"lr": 0.1, "seed": seed},
    } | more


def stream(seed: int | None = None) -> dict[str, Any]:
    """The stream as `results.json` describes it."""
    return {
        "id": "pets/class_incremental/tasks=2/2-1/abc",
        "name": "pets",
        "scenario": "class_incremental",
        "num_tasks": 2,
        "task_names": ["task-1", "task-2"],
        "task_labels": [["cat", "dog"], ["fox"]],
        "order_hash": f"order-{seed}",
        "train_sizes": [500, 200],
        "test_sizes": SIZES,
        "sizes": [2, 1],
        "subsample": {},
    }


def results(counts: Counts = COUNTS, **more: Any) -> dict[str, Any]:
    """The content of a `results.json`."""
    seeds = sorted({seed for by_seed in counts.values() for seed in by_seed})
    return {
        "format": 1,
        "recipe": {"name": "pets", "title": "Pets", "text": ""},
        "stream": stream(seeds[0]),
        "streams": {str(seed): stream(seed) for seed in seeds},
        "data": "builtin: pets",
        "model": "tiny",
        "created": "2025-01-01T00:00:00+00:00",
        "versions": {"everlora": "0.1.0"},
        "device": "cpu",
        "threads": 1,
        "seeds": seeds,
        "settings": {"setting": "standard", "options": {}},
        "runs": [run(method, seed, one) for method, by_seed in counts.items() for seed, one in by_seed.items()],
        "published": [],
        "claims": [CLAIM],
        "notes": "",
    } | more


def folder(path: Path, content: Mapping[str, Any] | None = None) -> Path:
    """Write a folder as `run` leaves it."""
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results() if content is None else content), encoding="utf-8")
    return path
