"""`everlora status` of many tasks stays a screenful, in a narrow terminal, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everlora.store import LearnerStore
from tests.cli.conftest import HEADER

TASKS = 30
LABELS = [f"a-label-of-some-length-{number:03d}" for number in range(TASKS)]
_PARTS = ("arrays", "documents", "state_arrays", "state_values")


def _record(index: int, scenario: str) -> dict[str, Any]:
    counts = (lambda j: {"nll": 30.0 + index - j, "tokens": 10}) if scenario == "language" else _counts(index)
    return {
        "labels": LABELS[max(0, index - index % 5) : index + 1],
        "new_labels": [LABELS[index]],
        "known_labels": LABELS[index - index % 5 : index],
        "num_examples": 4,
        "evaluation": {str(j): counts(j) for j in range(index + 1)},
        "cost": {"seconds": 2.0},
    }


def _counts(index: int) -> Any:
    return lambda j: {"correct": 9 if index == j else 6, "size": 10}


@pytest.fixture(params=["class_incremental", "language"])
def many(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    with LearnerStore.create(folder, {**HEADER, "scenario": request.param}) as store:
        for index in range(TASKS):
            record = _record(index, request.param)
            nothing: dict[str, Any] = {key: {} for key in _PARTS}
            store.write_task(f"data-of-week-{index + 1:03d}", record=record, **nothing)
    return folder


def test_many_tasks_are_a_screenful(many: Path, call: Any, call_json: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        _, out, _ = call("status", many)
        lines = out.splitlines()
        head, tasks = lines[0], [line for line in lines[1:] if "week" in line or "between" in line]
        assert len(lines) <= 24 and max(len(line) for line in lines if line != head) <= width
        assert [line.split()[0] for line in tasks] == ["1", "2", "3", "4-20", *map(str, range(21, 31))]
        assert all(line.split()[1].startswith("data-of-week-") for line in tasks if "between" not in line)
        between = next(line for line in tasks if "between" in line).split()
        assert between[:5] == ["4-20", "between", "68", "34.0", "s"]
        if "class_incremental" in head:
            # weeks 4 to 20 bring 17 new labels and, in fives, 0 to 4 known ones: 3 + 4 and three fives of 10
            assert between[5:7] == ["17", "37"] and between[-2:] == ["60.00", "-30.00"]
        else:
            assert between[-2:] == ["3.0000", "4.8000"]
        assert "All 30 tasks: 120 rows, 1 min 00 s." in out and "--all shows each" in out
        _, out, _ = call("status", many, "--all")
        assert sum("data-of-week-" in line for line in out.splitlines()) == TASKS and "--all" not in out
    assert [task["name"][-3:] for task in call_json("status", many)["tasks"]] == [f"{n:03d}" for n in range(1, 31)]
