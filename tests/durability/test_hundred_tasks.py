"""A hundred tasks in one directory, by processes that are killed at random: it stays quick to open, and small."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.durability.hundred_tasks import LAYERS, RANK, TASKS, WIDTH
from tests.durability.killing import outcomes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs a system that waits for processes by descriptor"),
]

METHODS = ("inflora", "replay")
NUMBER_BYTES = 4
# records, manifests, headers of files and the log, of one task; and the names of what is newly protected in a layer
MOST_OVERHEAD, OVERHEAD_VARIES, NAMES_OF_A_DIRECTION = 6000, 100, 300
ENTRY_BYTES = 40


def expected_bytes(task: dict[str, Any]) -> int:
    """Numbers that a task of InfLoRA adds: factors of keys and values, two head rows, newly protected directions."""
    factors = 2 * LAYERS * RANK * (WIDTH + WIDTH)
    head = 2 * (WIDTH + 1)
    return NUMBER_BYTES * (factors + head + WIDTH * task["directions"])


@pytest.fixture
def found(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What came of a hundred tasks, by method."""
    results = outcomes("tests.durability.hundred_tasks", tmp_path, *((seed, method) for method in METHODS))
    with capsys.disabled():
        for one in results:
            seconds = [task["seconds"] for task in one["tasks"]]
            print(f"\n{one['method']}: {TASKS} tasks in one directory, killed {one['kills']} times (seed {seed}),")
            busy, whole = (statistics.median(column) for column in zip(*one["opening"], strict=True))
            print(f"opens in {whole:.2f} s, {busy:.2f} s of them at work (medians of {len(one['opening'])}),")
            print(f"learning task 10 took {statistics.median(seconds[5:15]):.2f} s and task 100", end=" ")
            print(f"{statistics.median(seconds[-10:]):.2f} s (medians of ten), bytes of a task's folder:", end=" ")
            print([one["tasks"][number]["bytes"] for number in (1, 9, 49, 99)])
    return {one["method"]: one for one in results}


def test_a_hundred_tasks_with_kills(found: dict[str, dict[str, Any]]) -> None:
    for one in found.values():
        assert len(one["tasks"]) == TASKS and one["kills"] >= 5
        assert one["digests"][0] == one["digests"][1]
        assert statistics.median(busy for busy, _ in one["opening"]) < 2, "whatever else the machine does meanwhile"
        assert one["states"] == ["098", "099"], "only the newest two states are kept"
        assert "checkpoint" not in one["left over"]
        assert one["index bytes"] < 300 * TASKS + 5000
    tasks = found["inflora"]["tasks"]
    overhead = [task["bytes"] - expected_bytes(task) for task in tasks]
    assert 0 < min(overhead) and max(overhead) < MOST_OVERHEAD
    for task, extra in zip(tasks, overhead, strict=True):
        names = NAMES_OF_A_DIRECTION * task["directions"]
        assert extra - min(overhead) < OVERHEAD_VARIES + names, "what a task adds does not depend on its number"
    assert sum(task["directions"] for task in tasks[-50:]) > 0, "tasks late in the stream protect new directions, too"
    early, late = (sum(task["bytes"] for task in found["replay"]["tasks"][start : start + 10]) for start in (40, 90))
    # the record says how many rows the buffer holds of each earlier task: one short entry each
    assert 0 <= late - early < 10 * 50 * ENTRY_BYTES
