"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everlora.cli import main
from everlora.store import LearnerStore
from tests.cli.fakes import learner

__all__ = ["learner"]

Call = Callable[..., tuple[int, str, str]]

JANUARY = {
    "labels": ["refund", "parcel"],
    "new_labels": ["refund", "parcel"],
    "known_labels": [],
    "num_examples": 40,
    "evaluation": {"0": {"correct": 9, "size": 10}},
    "cost": {"seconds": 3.5},
}
FEBRUARY = {
    "labels": ["parcel", "invoice"],
    "new_labels": ["invoice"],
    "known_labels": ["parcel"],
    "num_examples": 30,
    "evaluation": {"0": {"correct": 7, "size": 10}, "1": {"correct": 3, "size": 4}},
    "cost": {"seconds": 4.0},
}
HEADER = {
    "base_model": "/models/[base]",
    "base_sha256": "0" * 64,
    "method": "inflora",
    "scenario": "class_incremental",
    "options": {},
    "columns": {"text": "utterance", "label": "intent"},
}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the program with these words: exit code, standard output, standard error.

    Its clock stands still, so that a busy machine adds no progress lines.
    """
    monkeypatch.setattr("everlora.cli.progress.time", SimpleNamespace(monotonic=lambda: 0.0))

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def call_json(call: Call) -> Callable[..., Any]:
    """Run the program with `--json` added; standard output must be one JSON document and nothing else."""

    def run(*words: str | Path) -> Any:
        code, out, err = call(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    """A learner directory of two tasks without weights: enough for all that reads manifests."""
    folder = tmp_path / "intents"
    with LearnerStore.create(folder, HEADER) as store:
        for name, record in (("january", JANUARY), ("february", FEBRUARY)):
            store.write_task(name, record=record, arrays={}, documents={}, state_arrays={}, state_values={})
    return folder
