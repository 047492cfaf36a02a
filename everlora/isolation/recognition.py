"""Which task an input belongs to, when nobody says: rules that compare tasks, and the little they have to remember.

Some rules look at reference features, of a network that never changes; the others compare the logits of all tasks.
Source: section 8 of the reference on convolutional networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from everlora.errors import DataError

__all__ = ["RULES", "Recogniser", "Rule", "fit_temperature"]

Rule: TypeAlias = Literal["max_softmax", "entropy", "energy", "prototype", "mahalanobis", "concat"]
RULES: tuple[Rule, ...] = ("max_softmax", "entropy", "energy", "prototype", "mahalanobis", "concat")

_BY_REFERENCE = ("prototype", "mahalanobis")
_SHRINKAGE = 1e-4
_LOG_TEMPERATURES = (-3.0, 3.0)
_SECTIONS = 40


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature that minimises the negative log-likelihood, by golden section on its logarithm.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)` columns of the right classes.

    Returns:
        A number between exp(-3) and exp(3); 1 without rows.
    """
    if not len(labels):
        return 1.0
    rows = logits.double()

    def cost(position: float) -> float:
        return float(functional.cross_entropy(rows / math.exp(position), labels))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = _LOG_TEMPERATURES
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(_SECTIONS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = cost(right)
    return math.exp((low + high) / 2)


class Recogniser:
    """Finds the task of each row, by features of a network that never changes or by the logits of all tasks.

    `prototype` compares directions with the mean direction of each class; `mahalanobis` distances to class means under
    one covariance within classes that all tasks share; `max_softmax`, `entropy` and `energy` compare how sure the
    tasks are; `concat` puts the log-probabilities of all tasks side by side and decides for no task first.

    Args:
        rule: one of `RULES`.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._tasks: list[dict[str, Any]] = []
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)
        self._rows = 0
        self._fitted: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def by_reference(self) -> bool:
        """Whether the rule reads reference features and not the logits of every task."""
        return self.rule in _BY_REFERENCE

    @property
    def wants_mean(self) -> bool:
        """Whether the rule needs logits of the task's rows even when none were kept for validation."""
        return self.rule == "energy"

    def observe_features(self, features: Mapping[int, Tensor]) -> None:
        """Take the reference features `(n, d)` of each class of the newest finished task."""
        self._fitted = None
        if self.rule == "prototype":
            means = [functional.normalize(rows.double(), dim=1).mean(dim=0) for rows in features.values()]
            self._tasks.append({"means": functional.normalize(torch.stack(means), dim=1).float()})
            return
        means = []
        for rows in features.values():
            means.append(rows.double().mean(dim=0))
            centred = rows.double() - means[-1]
            scatter = centred.T @ centred
            self._scatter = scatter if self._rows == 0 else self._scatter + scatter
            self._rows += len(rows)
        self._tasks.append({"means": torch.stack(means)})

    def observe_logits(self, logits: Tensor, labels: Tensor, fallback: Tensor | None = None) -> None:
        """Take the own logits of the newest finished task.

        Args:
            logits: `(n, classes)` on its validation rows; n may be 0.
            labels: `(n,)` columns of the right classes.
            fallback: `(m, classes)` on its training rows, for the mean energy where n is 0.
        """
        entry: dict[str, Any] = {"temperature": fit_temperature(logits, labels)}
        if self.rule == "energy":
            rows = logits if len(logits) or fallback is None else fallback
            entry["mean_energy"] = float(self._energy(rows.double(), entry["temperature"]).mean()) if len(rows) else 0.0
        self._tasks.append(entry)

    def choose(self, features: Tensor) -> Tensor:
        """Return the number of the task of each row, `(n,)`, from reference features `(n, d)`; ties to the lowest."""
        vectors, offsets, owners = (tensor.to(features.device) for tensor in self._classifier())
        rows = features.double()
        if self.rule == "prototype":
            rows = functional.normalize(rows, dim=1)
        # Equal classes of two tasks would differ by the rounding of a product; in float32 they are a tie again.
        scores = (rows @ vectors.T + offsets).float()
        chosen: Tensor = owners[scores.argmax(dim=1)]
        return chosen

    def choose_by_logits(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the number of the task of each row, `(n,)`, from every task's own logits; ties to the lowest."""
        sure = [self._confidence(rows.double(), entry) for rows, entry in zip(logits, self._tasks, strict=True)]
        return torch.stack(sure, dim=1).argmax(dim=1)

    def log_probabilities(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return every task's log-probabilities at its temperature, for `concat`."""
        return [
            (rows / entry["temperature"]).log_softmax(dim=1) for rows, entry in zip(logits, self._tasks, strict=True)
        ]

    def state(self, task: int) -> dict[str, Any]:
        """What was learned about a task, tensors and plain values."""
        return dict(self._tasks[task])

    def carried(self) -> dict[str, Any]:
        """What all tasks share, tensors and plain values."""
        return {"scatter": self._scatter, "rows": self._rows} if self.rule == "mahalanobis" and self._tasks else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned, task after task."""
        self._fitted = None
        self._tasks.append(dict(state))

    def load_carried(self, state: Mapping[str, Any]) -> None:
        """Put back what `carried` returned."""
        if state:
            self._fitted, self._scatter, self._rows = None, state["scatter"], int(state["rows"])

    def _classifier(self) -> tuple[Tensor, Tensor, Tensor]:
        """One linear score a class: vectors `(classes, d)`, offsets `(classes,)` and the task of each, `(classes,)`."""
        if self._fitted is None:
            means = torch.cat([entry["means"] for entry in self._tasks]).double()
            counts = [len(entry["means"]) for entry in self._tasks]
            owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            kept = torch.isfinite(means).all(dim=1)  # a class that was forgotten on request has no numbers here
            means, owners = means[kept], owners[kept]
            if not len(means):
                raise DataError("every class was forgotten on request, so no task can be recognised; learn a task anew")
            if self.rule == "prototype":
                self._fitted = means, means.new_zeros(len(means)), owners
            else:
                identity = torch.eye(means.shape[1], dtype=torch.float64)
                covariance = self._scatter / max(self._rows, 1)
                vectors = torch.linalg.solve((1 - _SHRINKAGE) * covariance + _SHRINKAGE * identity, means.T).T
                self._fitted = vectors, -0.5 * (vectors * means).sum(dim=1), owners
        return self._fitted

    def _confidence(self, rows: Tensor, entry: Mapping[str, Any]) -> Tensor:
        temperature, classes = entry["temperature"], rows.shape[1]
        if self.rule == "energy":
            energy: Tensor = self._energy(rows, temperature) - entry["mean_energy"]
            return energy
        logs = (rows / temperature).log_softmax(dim=1)
        if self.rule == "entropy":
            negative: Tensor = (logs.exp() * logs).sum(dim=1) / math.log(classes)
            return negative
        corrected: Tensor = (logs.amax(dim=1).exp() - 1 / classes) / (1 - 1 / classes)
        return corrected

    @staticmethod
    def _energy(rows: Tensor, temperature: float) -> Tensor:
        return temperature * (rows / temperature).logsumexp(dim=1)
