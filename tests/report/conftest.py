"""Results as `results.json` holds them, from invented counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def sample_run(method: str, seed: int, num_tasks: int, *, fall: int = 3, only_last: bool = False) -> dict[str, Any]:
    """Counts of one run: each task starts near its size and loses `fall` hits a task; sizes are 40, 50, 60, ..."""
    sizes = [40 + 10 * task for task in range(num_tasks)]
    noise = np.random.default_rng(seed)
    correct: list[list[int | None]] = []
    for step in range(num_tasks):
        row: list[int | None] = [None] * num_tasks
        if not only_last or step == num_tasks - 1:
            for task in range(step + 1):
                row[task] = int(max(sizes[task] - 5 - fall * (step - task) - noise.integers(0, 3), 0))
        correct.append(row)
    more = [[None if cell is None else min(cell + 2, sizes[task]) for task, cell in enumerate(row)] for row in correct]
    return {
        "method": method,
        "label": method.capitalize(),
        "seed": seed,
        "correct": correct,
        "task_aware": more,
        "task_correct": more,
        "sizes": sizes,
        "cost": [
            {
                "task": task,
                "seconds": 2.0 + task,
                "steps": 10,
                "peak_memory_bytes": 1000 + task,
                "trainable_parameters": 1234 + task,
                "stored_parameters": 9000,
            }
            for task in range(num_tasks)
        ],
        "panels": {},
    }


def sample_results(num_tasks: int = 3, seeds: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Two methods that fill the lower triangle and one that fills only the last row."""
    runs = []
    for seed in seeds:
        falling = sample_run("falling", seed, num_tasks)
        falling["panels"] = {"occupied_rank": {"layer.0": [4 * (task + 1) for task in range(num_tasks)]}}
        runs += [
            falling,
            sample_run("steady", seed, num_tasks, fall=1),
            sample_run("together", seed, num_tasks, only_last=True),
        ]
    return {
        "format": 1,
        "recipe": {"name": "sample", "title": "Sample <run>", "text": "# from https://example.org/page\nrank: 4\n"},
        "stream": {
            "name": "sample/class_incremental",
            "num_tasks": num_tasks,
            "task_names": [f"task-{task}" for task in range(num_tasks)],
            "task_labels": [["cat", "dog & fox"]] * num_tasks,
            "sizes": [40 + 10 * task for task in range(num_tasks)],
            "order_seed": 1993,
        },
        "created": "2025-01-01T00:00:00+00:00",
        "versions": {"numpy": "2.0"},
        "device": "cpu",
        "threads": 2,
        "seeds": list(seeds),
        "settings": {"epochs": 3, "targets": ["key", "value"]},
        "runs": runs,
        "published": [{"source": "A paper", "setting": "other data", "last": 86.51, "avg": None, "note": "one order"}],
        "notes": "Invented.",
    }


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    return sample_results


@pytest.fixture
def results() -> dict[str, Any]:
    return sample_results()
