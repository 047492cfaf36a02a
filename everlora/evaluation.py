"""Counting correct predictions, and turning scores into predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from everlora.errors import DataError
from everlora.methods.base import Batch, Method
from everlora.rejection import Rejection
from everlora.results import Counts, Evaluation, Prediction
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer

__all__ = ["Evaluator"]

_FIXED_FEATURES: WeakKeyDictionary[Method, dict[str, Tensor]] = WeakKeyDictionary()


class Evaluator:
    """Predicts with a method as it is now.

    Args:
        trainer: the pipeline of the method (rows to batches to features).
        classes: label names by class index.
    """

    def __init__(self, trainer: TaskTrainer, classes: Sequence[str]) -> None:
        self.trainer = trainer
        self.classes = list(classes)
        self.numbers = {label: number for number, label in enumerate(classes)}

    def logits(self, data: TaskData, rows_key: str | None, task: int | None) -> Tensor:
        """Scores of all classes for all rows, `(n, classes)` float32 on the CPU."""
        method = self.trainer.method
        if method.isolated:  # which network runs is for the method to say, so it gets the inputs
            result = torch.zeros(len(data), len(self.classes))
            with self.trainer.processes.together(), torch.no_grad():
                for rows, batch in self.trainer.batches(data, "predict"):
                    result[rows] = method.logits(batch, task).float().cpu()
            return self.trainer.processes.sum(result)  # each process scored rows of its own
        features = self._features(data, rows_key)
        parts = []
        with torch.no_grad():
            for part in torch.split(features, 4096):
                labels = torch.zeros(len(part), dtype=torch.long, device=part.device)
                parts.append(method.logits(Batch({}, labels, part), task).float().cpu())
        return torch.cat(parts)

    def count(
        self,
        examples: Examples,
        labels: Sequence[str],
        tasks: Sequence[Sequence[str]],
        *,
        task: int | None = None,
        given: bool = False,
    ) -> Counts:
        """Count correct rows of one task's examples.

        Args:
            examples: labelled rows.
            labels: all labels of the task they belong to.
            tasks: labels of every learned task.
            task: number of that task; None where no single one taught these labels.
            given: whether predictions are made with the task given (task-incremental).

        Raises:
            DataError: an unknown label.
        """
        data = TaskData.of(self.trainer.backbone, examples, self.numbers)
        own = torch.zeros(len(self.classes), dtype=torch.bool)
        own[[self.numbers[label] for label in labels]] = True
        logits = None if given and task is not None else self.logits(data, examples.fingerprint, None)
        if logits is None or (self.trainer.method.isolated and task is not None):
            restricted = self.logits(data, examples.fingerprint, task)
        else:
            restricted = logits.masked_fill(~own, -torch.inf)
        aware = int((restricted.argmax(dim=1) == data.labels).sum())
        if given or logits is None:
            return Counts(correct=aware, size=len(data), task_aware=aware)
        predicted = logits.argmax(dim=1)
        repeated = len({label for group in tasks for label in group}) < sum(len(group) for group in tasks)
        return Counts(
            correct=int((predicted == data.labels).sum()),
            size=len(data),
            task_aware=None if repeated else aware,
            task_correct=None if repeated else int(own[predicted].sum()),
            predicted=self._tally(predicted),
        )

    def evaluate(
        self, examples: Examples, names: Sequence[str], tasks: Sequence[Sequence[str]], *, given: bool = False
    ) -> Evaluation:
        """Accuracy on labelled rows, split by the task that taught each label first; see `count` for `given`."""
        if examples.labels is None:
            raise DataError("the rows carry no labels; name the label column.")
        first: dict[str, int] = {}
        for index, labels in enumerate(tasks):
            for label in labels:
                first.setdefault(label, index)
        unknown = sorted(set(examples.classes) - set(first))
        if unknown:
            raise DataError(
                f"label '{unknown[0]}' ({len(unknown)} in all) was never learned; known: {', '.join(list(first)[:8])}"
            )
        counts = {}
        owners = [first[str(label)] for label in examples.labels]
        for index in sorted(set(owners)):
            rows = examples.select([i for i, owner in enumerate(owners) if owner == index])
            counts[names[index]] = self.count(rows, tasks[index], tasks, task=index, given=given)
        return self.summary(counts)

    def predict(self, examples: Examples, task: int | None, rejection: Rejection | None = None) -> list[Prediction]:
        """Classify rows; only the classes that compete are among the scores, best first."""
        encoded = self.trainer.backbone.encode(examples.inputs, examples.ids)
        none = torch.zeros(len(examples), dtype=torch.long)
        data = TaskData(encoded, none, torch.as_tensor(examples.ids))
        logits = self.logits(data, None, task)
        refused = [False] * len(examples) if rejection is None else rejection.refuses(logits)
        predictions = []
        for row, is_refused in zip(logits.softmax(dim=1), refused, strict=True):
            order = row.argsort(descending=True, stable=True).tolist()
            scores = {self.classes[c]: float(row[c]) for c in order if row[c] > 0}
            label = None if is_refused else self.classes[order[0]]
            predictions.append(Prediction(label, float(row[order[0]]), scores))
        return predictions

    @staticmethod
    def summary(counts: Mapping[str, Counts]) -> Evaluation:
        """Put counts of several tasks together."""
        correct = sum(entry.correct for entry in counts.values())
        size = sum(entry.size for entry in counts.values())
        return Evaluation(correct / size, {name: entry.accuracy for name, entry in counts.items()}, dict(counts))

    def _tally(self, predicted: Tensor) -> dict[str, int]:
        """How often each class was predicted, without those that never were."""
        numbers = torch.bincount(predicted, minlength=len(self.classes)).tolist()
        return {label: count for label, count in zip(self.classes, numbers, strict=True) if count}

    def _features(self, data: TaskData, rows_key: str | None) -> Tensor:
        if not self.trainer.method.fixed_features or rows_key is None:
            return self.trainer.features(data, "predict")
        kept = _FIXED_FEATURES.setdefault(self.trainer.method, {})
        if rows_key not in kept:
            kept[rows_key] = self.trainer.features(data, "predict")
        return kept[rows_key]
