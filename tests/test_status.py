from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everlora.errors import StoreError
from everlora.status import read_status
from everlora.store import LearnerStore
from tests.store.builders import HEADER, make_learner

JANUARY: dict[str, Any] = {
    "labels": ["a", "b"],
    "new_labels": ["a", "b"],
    "known_labels": [],
    "num_examples": 40,
    "evaluation": {"0": {"correct": 9, "size": 10}},
    "cost": {"seconds": {"total": 3.5, "train": 3.0}, "steps": 12, "stored_parameters": 100},
}
FEBRUARY: dict[str, Any] = {
    "labels": ["b", "c"],
    "new_labels": ["c"],
    "known_labels": ["b"],
    "num_examples": 30,
    "evaluation": {"0": {"correct": 7, "size": 10}, "1": {"correct": 3, "size": 4}},
    "cost": {"seconds": 4, "steps": 10},
}


def _write(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    with LearnerStore.create(folder, {**HEADER, "scenario": "class_incremental"}) as store:
        for name, record in records.items():
            store.write_task(name, record=record, arrays={}, documents={}, state_arrays={}, state_values={})


def test_status_of_two_tasks_worked_by_hand(tmp_path: Path) -> None:
    _write(tmp_path / "learner", {"january": JANUARY, "february": FEBRUARY})
    status = read_status(tmp_path / "learner")
    assert (status["method"], status["scenario"], status["model"]) == (
        "some_method",
        "class_incremental",
        "/models/base",
    )
    assert status["labels"] == ["a", "b", "c"] and status["num_tasks"] == 2
    assert status["digest"] == LearnerStore.open(tmp_path / "learner").digest
    first, second = status["tasks"]
    assert (first["name"], first["new_labels"], first["num_examples"]) == ("january", ["a", "b"], 40)
    assert (first["seconds"], first["steps"], first["stored_parameters"]) == (3.5, 12, 100)
    assert (first["accuracy_when_learned"], first["accuracy_now"]) == (0.9, 0.7)
    assert first["change"] == pytest.approx(-0.2) and first["validation_size"] == 10
    assert (second["known_labels"], second["seconds"], second["peak_memory_bytes"]) == (["b"], 4.0, None)
    assert (second["accuracy_when_learned"], second["accuracy_now"], second["change"]) == (0.75, 0.75, 0.0)
    assert status["accuracy_now"] == pytest.approx(0.725)
    assert status["accuracy_when_learned"] == pytest.approx(0.825)
    assert status["change"] == pytest.approx(-0.2)
    assert json.loads(json.dumps(status)) == status


def test_what_was_measured_on_rows_forgotten_since_is_not_said_to_be_true_now(tmp_path: Path) -> None:
    _write(tmp_path / "learner", {"january": {**JANUARY, "num_validation": 9}, "february": FEBRUARY})
    status = read_status(tmp_path / "learner")
    first = status["tasks"][0]
    assert (first["accuracy_when_learned"], first["accuracy_now"], first["change"]) == (0.9, None, None)
    assert status["accuracy_now"] == 0.75


def test_nothing_kept_back_gives_none_and_not_zero(tmp_path: Path) -> None:
    _write(tmp_path / "learner", {"january": {**JANUARY, "evaluation": {}}})
    status = read_status(tmp_path / "learner")
    assert {status[key] for key in ("accuracy_now", "accuracy_when_learned", "change")} == {None}
    assert {status["tasks"][0][key] for key in ("accuracy_now", "accuracy_when_learned", "change")} == {None}


def test_a_learner_without_tasks(tmp_path: Path) -> None:
    _write(tmp_path / "learner", {})
    status = read_status(tmp_path / "learner")
    assert status["tasks"] == [] and status["labels"] == [] and status["accuracy_now"] is None


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    path = folder / "tasks" / "000-january" / "task.json"
    path.write_text(path.read_text().replace('"correct": 8', '"correct": 9'))
    with pytest.raises(StoreError, match=r"task\.json has a wrong checksum"):
        read_status(folder)
