"""A stand-in for `everlora.learner`, so that the verbs are tested without a model."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everlora.errors import DataError
from everlora.results import Counts, Evaluation, Prediction, TaskResult

SCORES = {"refund": 0.75, "parcel": 0.25}


@dataclass(frozen=True)
class Report:
    """What `Learner.export` returns, as far as the command line looks at it."""

    folder: Path
    max_difference: float
    truncation: dict[str, float] = field(default_factory=dict)


class FakeLearner:
    """Remembers every call, and answers with fixed results."""

    calls: list[tuple[str, Any]]
    data_sha256: tuple[str, ...] = ("1" * 64, "2" * 64)
    """Of the rows of each task after a call of `learn`."""

    def __init__(self) -> None:
        self.path = Path("unused")
        self.backbone = types.SimpleNamespace(modality="text", image_size=None)

    @classmethod
    def create(cls, path: Path, **options: Any) -> FakeLearner:
        cls.calls.append(("create", (path, options)))
        return cls()

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> FakeLearner:
        cls.calls.append(("open", (path, model)))
        learner = cls()
        learner.path = path
        return learner

    def learn(
        self,
        data: str,
        *,
        name: str | None,
        validation: str | None,
        columns: dict[str, str] | None,
        progress: Callable[..., None],
        **training: Any,
    ) -> TaskResult:
        self.calls.append(("learn", (data, name, validation, columns, training)))
        progress("train", 1, 1)
        return TaskResult(
            index=1,
            name=name or "february",
            labels=("refund", "parcel"),
            new_labels=("parcel",),
            known_labels=("refund",),
            num_examples=30,
            num_validation=4,
            seconds=65.2,
            steps=12,
            metrics={"january": 0.5, "february": 1.0},
            num_truncated=2,
        )

    def card(self) -> dict[str, Any]:
        names = ("january", "february")
        pairs = zip(names, self.data_sha256, strict=True)
        return {"tasks": [{"name": name, "data_sha256": data} for name, data in pairs]}

    def predict(
        self,
        inputs: list[str],
        task: str | None,
        variant: str | None = None,
        none_of_these: float | None = None,
    ) -> list[Prediction]:
        """With `none_of_these`, whatever is not a refund is refused."""
        self.calls.append(("predict", (list(inputs), task)))
        known = [none_of_these is None or "refund" in str(text) for text in inputs]
        return [Prediction("refund" if is_known else None, 0.75, SCORES) for is_known in known]

    def evaluate(self, data: str | None, columns: dict[str, str] | None = None) -> Evaluation:
        self.calls.append(("evaluate", (data, columns)))
        if data == "missing.csv":
            raise DataError("missing.csv does not exist; give a file.")
        return Evaluation(0.8, {"january": 0.8}, {"january": Counts(8, 10)})

    def export(self, path: Path, format: str, **options: Any) -> Any:
        self.calls.append(("export", (path, format, *options.items())))
        return Report(path, 2e-7, {"layer": 0.125} if "max_rank" in options else {})

    def rollback(self, to_task: int) -> tuple[Any, ...]:
        self.calls.append(("rollback", to_task))
        return (types.SimpleNamespace(name="february"),)


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> type[FakeLearner]:
    """The fake in the place of `Learner`; its `calls` start empty."""
    FakeLearner.calls = []
    module = types.ModuleType("everlora.learner")
    module.Learner = FakeLearner  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "everlora.learner", module)
    return FakeLearner
