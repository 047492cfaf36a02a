"""What the scenarios have in common: rows come in, labels are kept account of, scores and predictions come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from everlora.backbones import Backbone
from everlora.errors import UnsupportedError
from everlora.export import ExportReport
from everlora.methods import MethodSpec
from everlora.methods.base import Method
from everlora.rejection import Rejection
from everlora.results import Counts, Evaluation, LanguageEvaluation, LanguageScore, Prediction
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer

__all__ = ["Scenario"]

_MODELS = {"image": "models of images", "text": "encoders of texts", "language": "causal language models"}

Score = TypeVar("Score", Counts, LanguageScore)
Result = TypeVar("Result", Evaluation, LanguageEvaluation)


class Scenario(ABC, Generic[Score, Result]):
    """The kind of rows that a learner takes, and how it is measured on them.

    Args:
        name: of the scenario.
        backbone: the learner's model.
        columns: names of the data's columns, as the learner was made with.

    Attributes:
        classes: label names in the order of their class indices.
        labels: labels of each learned task.
    """

    def __init__(self, name: str, *, backbone: Backbone, columns: Mapping[str, str]) -> None:
        self.check_columns(columns)
        self.name = name
        self.backbone = backbone
        self.columns = dict(columns)
        self.classes: list[str] = []
        self.labels: list[tuple[str, ...]] = []

    def check_method(self, spec: MethodSpec) -> None:
        """Refuse a method that cannot train a model of this kind (UnsupportedError)."""
        suits, found = spec.method_class.suits, self.backbone.modality
        if found not in suits:
            raise UnsupportedError(
                f"method '{spec.name}' is for {' and '.join(_MODELS[one] for one in sorted(suits))}, not for "
                f"{_MODELS[found]}; choose another of `everlora methods`, or another scenario"
            )

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take account of the tasks learned so far, from what was recorded of them."""
        self.labels = [tuple(record["labels"]) for record in records]
        self.classes = list(dict.fromkeys(label for labels in self.labels for label in labels))

    def add_task(self, examples: Examples) -> tuple[str, ...]:
        """Take account of one more task; return its labels."""
        self.labels.append(examples.classes)
        self.classes += [label for label in examples.classes if label not in set(self.classes)]
        return examples.classes

    def encode(self, examples: Examples) -> TaskData:
        """Encode rows whose labels are all known by now."""
        return TaskData.of(self.backbone, examples, {label: number for number, label in enumerate(self.classes)})

    @staticmethod
    @abstractmethod
    def check_columns(columns: Mapping[str, str | None]) -> None:
        """Refuse kinds of columns that do not exist (OptionError)."""

    @abstractmethod
    def load(self, dataset: Any, columns: Mapping[str, str | None] | None, *, labelled: bool = True) -> Examples:
        """Read rows to learn from or to be measured on (DataError where they cannot be used).

        `labelled=False` takes rows without labels, too: rows that are only to be recognised. Answers are part of a row.
        """

    @abstractmethod
    def read_inputs(self, inputs: Any) -> Examples:
        """Read what is to be answered (DataError where it cannot be)."""

    @abstractmethod
    def hold_out(self, examples: Examples, *, maximum: int, seed: int) -> tuple[Examples, Examples]:
        """Split rows into those to train on and at most `maximum`, of each label, to measure on."""

    @abstractmethod
    def score(self, trainer: TaskTrainer, rows: Examples, task: int | None) -> Score:
        """Measure on rows of one task; `task` is its number, None where the rows are of all or of none learned."""

    @abstractmethod
    def summary(self, scores: Mapping[str, Score]) -> Result:
        """Put the scores of several tasks, by name, together."""

    @abstractmethod
    def evaluate(self, trainer: TaskTrainer, rows: Examples, names: Sequence[str]) -> Result:
        """Measure on rows of any tasks; `names` are those of the learned ones."""

    @abstractmethod
    def predict(
        self, trainer: TaskTrainer, inputs: Examples, task: int | None, rejection: Rejection | None = None
    ) -> list[Prediction]:
        """Answer inputs; some with *none of these*, by a rule."""

    @abstractmethod
    def scores_of_known(self, trainer: TaskTrainer, kept: Mapping[int, Examples], task: int | None) -> list[Tensor]:
        """Scores `(n, classes)` of the rows that each task kept (OptionError where there are no classes)."""

    @staticmethod
    @abstractmethod
    def figure(score: Score) -> float:
        """The number that stands for a score where there is room for one."""

    @staticmethod
    @abstractmethod
    def plain(score: Score) -> dict[str, float]:
        """What a task's record keeps of a score."""

    @abstractmethod
    def export(
        self,
        method: Method,
        path: str | Path,
        *,
        format: str,
        card: Mapping[str, Any],
        max_rank: int | None,
        variant: str | None,
    ) -> ExportReport:
        """Write the network in place for plain tools, see `Learner.export`."""
