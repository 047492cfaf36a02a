"""Classifier alignment: retrain the heads on features sampled from one Gaussian per class (no stored data)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everlora.errors import NumericError
from everlora.heads.task_heads import TaskHeads

__all__ = ["Aligner", "AlignmentOptions", "ClassStatistics", "align_heads"]

_JITTER = 1e-4


@dataclass(frozen=True)
class AlignmentOptions:
    """How heads are realigned after each task (section 11 of the InfLoRA reference).

    Attributes:
        epochs: passes over the sampled features.
        samples: features drawn per class and epoch; also the batch size.
        lr: learning rate of SGD with momentum .9 and weight decay 5e-4, cosine-annealed to 0.
        shrink: how much the mean of the oldest class is shrunk towards 0; 0.1 gives factors from 0.9 to 1.
        logit_norm: divisor of the normalised logits, or None for plain cross-entropy.
        covariance: keep the full covariance of a class, or its diagonal.
    """

    epochs: int = 5
    samples: int = 256
    lr: float = 0.01
    shrink: float = 0.1
    logit_norm: float | None = 0.1
    covariance: str = "full"


@dataclass(frozen=True)
class ClassStatistics:
    """Mean `(d,)` and covariance `(d, d)` or its diagonal `(d,)` of a class's features, float64; and its task."""

    mean: Tensor
    covariance: Tensor
    task: int

    @classmethod
    def of(cls, features: Tensor, task: int, covariance: str = "full") -> ClassStatistics:
        """Measure `(n, d)` features of one class; 1e-4 is added to the diagonal, so one sample suffices."""
        rows = features.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        scale = 1 / max(len(rows) - 1, 1)
        if covariance == "diag":
            return cls(mean, scale * centred.square().sum(dim=0) + _JITTER, task)
        matrix = scale * centred.T @ centred
        return cls(mean, matrix + _JITTER * torch.eye(len(mean), dtype=matrix.dtype, device=matrix.device), task)

    def root(self) -> Tensor:
        """Lower Cholesky factor of the covariance (or the diagonal's square root), with growing jitter up to 1e-1."""
        if self.covariance.ndim == 1:
            return self.covariance.sqrt()
        eye = torch.eye(len(self.mean), dtype=self.covariance.dtype, device=self.covariance.device)
        factor: Tensor
        for extra in (0.0, 1e-3, 1e-2, 1e-1):
            factor, info = torch.linalg.cholesky_ex(self.covariance + extra * eye)
            if int(info) == 0:
                return factor
        raise NumericError(
            "a class covariance is not positive definite even with 0.1 added to its diagonal; "
            "set alignment_covariance=diag or look for constant or non-finite features."
        )


class Aligner:
    """Keeps one Gaussian per class and realigns the heads after each task.

    Args:
        options: how heads are realigned.
    """

    def __init__(self, options: AlignmentOptions) -> None:
        self.options = options
        self.statistics: dict[int, ClassStatistics] = {}

    def end_task(
        self, heads: TaskHeads, task: int, features: Mapping[int, Tensor], generator: torch.Generator
    ) -> float | None:
        """Measure the classes of a finished task; from the second task on, realign all heads.

        Args:
            heads: changed in place from the second task on.
            task: index of the finished task.
            features: class index -> `(n, d)` features of its training rows.
            generator: source of the samples.

        Returns:
            The mean loss of the last epoch, or None at the first task.
        """
        for c, rows in features.items():
            self.statistics[c] = ClassStatistics.of(rows, task, self.options.covariance)
        return align_heads(heads, self.statistics, self.options, generator) if task > 0 else None

    def state(self) -> dict[str, Tensor]:
        """Means and covariances as `tasks/000/statistics/<class>/mean` and `.../covariance`."""
        state = {}
        for c, entry in self.statistics.items():
            prefix = f"tasks/{entry.task:03d}/statistics/{c}/"
            state[prefix + "mean"], state[prefix + "covariance"] = entry.mean, entry.covariance
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned; a class that was measured again keeps its newest Gaussian."""
        means = sorted(key for key in state if "/statistics/" in key and key.endswith("/mean"))
        for key in means:
            _, task, _, c, _ = key.split("/")
            covariance = state[key.removesuffix("mean") + "covariance"]
            self.statistics[int(c)] = ClassStatistics(state[key], covariance, int(task))


def align_heads(
    heads: TaskHeads,
    statistics: Mapping[int, ClassStatistics],
    options: AlignmentOptions,
    generator: torch.Generator,
) -> float:
    """Retrain all heads on samples of all classes, so that rows of different tasks become comparable.

    Args:
        heads: changed in place; frozen again at the end.
        statistics: class index -> Gaussian of its features, measured at that class's task.
        options: see `AlignmentOptions`.
        generator: source of the samples and of their order.

    Returns:
        The mean loss of the last epoch.

    Source: section 11 of the InfLoRA reference (the "CA" variant).
    """
    classes = sorted(statistics)
    current = max(statistics[c].task for c in classes)
    roots = {c: statistics[c].root() for c in classes}
    heads.requires_grad_(True)
    optimizer = torch.optim.SGD(heads.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    mean_loss = math.nan
    for epoch in range(options.epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * options.lr * (1 + math.cos(math.pi * epoch / options.epochs))
        features, labels = _sample(statistics, roots, current, options, generator)
        order = torch.randperm(len(labels), generator=generator)
        losses = []
        for batch in torch.split(order, options.samples):
            loss = _alignment_loss(heads, features[batch], labels[batch], options.logit_norm)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        mean_loss = sum(losses) / len(losses)
    heads.freeze()
    return mean_loss


def _sample(
    statistics: Mapping[int, ClassStatistics],
    roots: Mapping[int, Tensor],
    current: int,
    options: AlignmentOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for c in sorted(statistics):
        entry, root = statistics[c], roots[c]
        factor = 1 - options.shrink + options.shrink * (entry.task + 1) / (current + 1)
        noise = torch.randn(options.samples, len(entry.mean), dtype=torch.float64, generator=generator)
        spread = noise * root if root.ndim == 1 else noise @ root.T
        features.append((factor * entry.mean + spread).float())
        labels.append(torch.full((options.samples,), c))
    return torch.cat(features), torch.cat(labels)


def _alignment_loss(heads: TaskHeads, features: Tensor, labels: Tensor, logit_norm: float | None) -> Tensor:
    """Cross-entropy over all classes, on logits divided by their mean per-task norm when `logit_norm` is set.

    Cosines are of one scale in all tasks as they are.
    """
    device = next(heads.parameters()).device
    features, labels = features.to(device), labels.to(device)
    blocks = [heads.row_logits(features, task) for task in range(len(heads.heads))]
    logits = torch.cat(blocks, dim=1)
    if logit_norm is not None and not heads.cosine:
        norms = torch.stack([block.norm(dim=1, keepdim=True) for block in blocks])
        logits = logits / (norms.mean(dim=0) + 1e-7) / logit_norm
    return nn.functional.cross_entropy(heads.best_rows(logits), labels)
