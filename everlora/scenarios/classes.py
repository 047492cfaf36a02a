"""Classes: rows have labels, new ones come with the tasks, and an answer is one of those seen so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from everlora.errors import DataError
from everlora.evaluation import Evaluator
from everlora.export import ExportHead, ExportReport, export_merged, export_peft
from everlora.methods.base import Method
from everlora.rejection import Rejection
from everlora.results import Counts, Evaluation, Prediction
from everlora.scenarios.base import Scenario
from everlora.streams import Columns, Examples, hold_out, load_examples
from everlora.training import TaskTrainer

__all__ = ["ClassScenario"]


class ClassScenario(Scenario[Counts, Evaluation]):
    """Class-, domain- and task-incremental learning: see `Scenario`."""

    _label_kind: str | None = None

    @property
    def _has_task(self) -> bool:
        """Whether every row comes with its task, so that only the task's classes compete."""
        return self.name == "task_incremental"

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take account of the tasks learned so far, from what was recorded of them."""
        super().restore(records)
        self._label_kind = next((record["label_kind"] for record in records if record["label_kind"]), None)

    def add_task(self, examples: Examples) -> tuple[str, ...]:
        """Take account of one more task; return its labels."""
        self._label_kind = self._label_kind or examples.label_kind
        return super().add_task(examples)

    @staticmethod
    def check_columns(columns: Mapping[str, str | None]) -> None:
        """Refuse kinds of columns that do not exist."""
        Columns.from_mapping(columns)

    def load(self, dataset: Any, columns: Mapping[str, str | None] | None, *, labelled: bool = True) -> Examples:
        """Read rows; labels must be of one kind throughout, where their source has kinds: a CSV has names."""
        named = {**self.columns, **{key: value for key, value in (columns or {}).items() if value}}
        options = {**self._options(), "require_labels": labelled}
        examples = load_examples(dataset, columns=Columns.from_mapping(named), **options)
        if examples.labels is None:
            return examples
        is_same_kind = None in (self._label_kind, examples.label_kind) or self._label_kind == examples.label_kind
        if not is_same_kind and not set(examples.classes) <= set(self.classes):
            raise DataError(
                f"the labels of this data are of kind '{examples.label_kind}' (such as '{examples.classes[0]}'), those "
                f"learned before of kind '{self._label_kind}' (such as '{self.classes[0]}'); use one naming for all."
            )
        return examples

    def read_inputs(self, inputs: Any) -> Examples:
        """Read texts, images, files or rows."""
        if isinstance(inputs, Examples):
            return inputs
        if isinstance(inputs, str | Path) or not isinstance(inputs, Sequence):
            inputs = [inputs]
        options = {**self._options(), "require_labels": False}
        if inputs and isinstance(inputs[0], Mapping):
            return load_examples(list(inputs), columns=Columns.from_mapping(self.columns), **options)
        column = self.backbone.modality
        rows = [{column: item} for item in inputs]
        return load_examples(rows, columns=Columns.from_mapping({column: column}), **options)

    def hold_out(self, examples: Examples, *, maximum: int, seed: int) -> tuple[Examples, Examples]:
        """Hold out at most `maximum` rows of each class, and never more than half of them."""
        return hold_out(examples, fraction=0.5, seed=seed, maximum=maximum)

    def score(self, trainer: TaskTrainer, rows: Examples, task: int | None) -> Counts:
        """Count correct rows."""
        return Evaluator(trainer, self.classes).count(
            rows,
            rows.classes if task is None else self.labels[task],
            self.labels,
            task=task,
            given=self._has_task,
        )

    def summary(self, scores: Mapping[str, Counts]) -> Evaluation:
        """Put counts of several tasks together."""
        return Evaluator.summary(scores)

    def evaluate(self, trainer: TaskTrainer, rows: Examples, names: Sequence[str]) -> Evaluation:
        """Accuracy on labelled rows, split by the task that taught each label first."""
        return Evaluator(trainer, self.classes).evaluate(rows, names, self.labels, given=self._has_task)

    def predict(
        self, trainer: TaskTrainer, inputs: Examples, task: int | None, rejection: Rejection | None = None
    ) -> list[Prediction]:
        """Classify rows."""
        return Evaluator(trainer, self.classes).predict(inputs, task, rejection)

    def scores_of_known(self, trainer: TaskTrainer, kept: Mapping[int, Examples], task: int | None) -> list[Tensor]:
        """Scores of kept rows; with the task given, of those whose class is among its own."""
        evaluator = Evaluator(trainer, self.classes)
        if task is not None:
            own = np.array(self.labels[task], dtype=object)
            kept = {i: rows.select(np.isin(np.asarray(rows.labels), own)) for i, rows in kept.items()}
        data = {rows.fingerprint: self.encode(rows) for rows in kept.values() if len(rows)}
        return [evaluator.logits(part, key, task) for key, part in data.items()]

    @staticmethod
    def figure(score: Counts) -> float:
        """Accuracy."""
        return score.accuracy

    @staticmethod
    def plain(score: Counts) -> dict[str, float]:
        """Correct rows and rows."""
        return {"correct": score.correct, "size": score.size}

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
        """Write the network in place with its classifier."""
        rows = method.head_rows().of_known_classes()
        labels = tuple(self.classes[c] for c in rows.classes)
        projection = None if rows.projection is None else rows.projection.numpy()
        head = ExportHead(rows.weight.numpy(), rows.bias.numpy(), labels, rows.normalize, projection)
        with method.predicting(variant):
            if format == "merged":
                return export_merged(self.backbone, method.layers(), head, path, card=card)
            return export_peft(self.backbone, method.layers(), head, path, card=card, max_rank=max_rank)

    def _options(self) -> dict[str, Any]:
        return {"modality": self.backbone.modality, "image_size": self.backbone.image_size}
