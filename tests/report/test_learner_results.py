"""A learner directory as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everlora.errors import StoreError
from everlora.report import learner_results, render_report
from everlora.store import LearnerStore
from tests.report.test_page import Page

COST = {"seconds": {"total": 3.5, "train": 3.0}, "stored_parameters": 100, "trainable_parameters": 10}


def learner(folder: Path, scenario: str, evaluations: list[dict[str, Any]]) -> Path:
    header = {
        "base_model": "/models/[base]",
        "base_sha256": "0" * 64,
        "method": "inflora",
        "scenario": scenario,
        "options": {"method": {"rank": 4}, "training": {"seed": 7, "lr": 0.5}},
        "columns": {},
        "versions": {"torch": "2.9"},
        "created": "2026-01-01",
    }
    with LearnerStore.create(folder, header) as store:
        for number, evaluation in enumerate(evaluations):
            record = {
                "labels": ["<a>"] if scenario != "language" else [],
                "num_examples": 40 + number,
                "num_validation": 10,
                "evaluation": evaluation,
                "cost": COST,
                "panels": {"occupied_rank": {"layer.0": 4.0 * (number + 1)}} if number else {},
            }
            store.write_task(f"part{number}", record=record, arrays={}, documents={}, state_arrays={}, state_values={})
    return folder


def test_accuracies_are_those_of_the_kept_rows(tmp_path: Path) -> None:
    cells = [{"0": {"correct": 9, "size": 10}}, {"0": {"correct": 7, "size": 10}, "1": {"correct": 3, "size": 4}}]
    page = Page(render_report(learner_results(learner(tmp_path / "mine", "class_incremental", cells))))
    assert page.tables["inflora"] == [["task", "1", "2"], ["after 1", "90.0", ""], ["after 2", "70.0", "75.0"]]
    assert page.tables["Occupied dimensions per layer: inflora"][1] == ["layer.0", "", "8"]
    assert page.tables["Seconds for each task, in seconds"][1] == ["inflora", "3.5", "3.5"]
    assert ["method.rank", "4"] in page.tables["Of the first run of each row"]
    assert "Learner mine" in page.text and "/models" not in page.text and "[base]" in page.text


def test_after_rows_were_forgotten_each_accuracy_is_of_the_rows_of_its_time(tmp_path: Path) -> None:
    cells = [{"0": {"correct": 4, "size": 10}}, {"0": {"correct": 1, "size": 2}, "1": {"correct": 3, "size": 4}}]
    page = Page(render_report(learner_results(learner(tmp_path / "mine", "class_incremental", cells))))
    assert page.tables["inflora"] == [["task", "1", "2"], ["after 1", "40.0", ""], ["after 2", "50.0", "75.0"]]


def test_a_learner_that_keeps_no_rows_has_its_costs_and_tasks(tmp_path: Path) -> None:
    page = Page(render_report(learner_results(learner(tmp_path / "mine", "class_incremental", [{}, {}]))))
    assert page.tables[_tasks(page)][1][0] == "part0"
    assert "Points below the task's best accuracy, after the last task" not in page.tables
    assert "Where none were kept, there is no accuracy" in page.text


def _tasks(page: Page) -> str:
    return next(caption for caption in page.tables if caption.startswith("In the order"))


def test_a_learner_of_language(tmp_path: Path) -> None:
    def cell(nll: float) -> dict[str, Any]:
        return {"nll": nll, "tokens": 100, "num_bytes": 200, "rows": 5, "correct": None, "answers": 0, "rouge_l": None}

    scores = [{"0": cell(300.0)}, {"0": cell(350.0), "1": cell(250.0)}]
    page = Page(render_report(learner_results(learner(tmp_path / "mine", "language", scores))))
    table = page.tables["Cross-entropy after the last task, nats a token"]
    assert table[-1][:4] == [
        "inflora",
        "3.000",
        "3.500",
        "2.500",
    ]


@pytest.mark.parametrize("scenario", ["class_incremental", "language"])
def test_a_learner_without_a_task_has_a_page(tmp_path: Path, scenario: str) -> None:
    assert "No run has been recorded" in render_report(learner_results(learner(tmp_path / "mine", scenario, [])))


def test_a_folder_without_a_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        learner_results(tmp_path)
