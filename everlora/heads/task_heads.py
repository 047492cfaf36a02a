"""One linear head per task; their logits stand side by side in task order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from everlora.errors import DataError

__all__ = ["HeadRows", "TaskHeads"]

# Squares of the bounds of a new head's weights and biases, times the features: torch's own start, zeros, and the
# uniform start of variance 1 / features over zero biases.
_STARTS = {"uniform": (1.0, 1.0), "zeros": (0.0, 0.0), "kaiming": (3.0, 0.0)}
_COSINE_SCALE = 16.0


@dataclass(frozen=True)
class HeadRows:
    """A classifier as plain rows: the score of a class is the maximum over its rows.

    Attributes:
        weight: `(rows, features)` float32.
        bias: `(rows,)` float32.
        classes: class index of each row.
        normalize: True when features are scaled to length 1 before the rows are applied.
        projection: P, `(k, features)` float32, where the rows apply to `relu(P f)`, of width k, in place of f.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[int, ...]
    normalize: bool = False
    projection: Tensor | None = None

    def of_known_classes(self) -> HeadRows:
        """Without the rows of bias `-inf`: nothing is known of their classes any more, so they never win.

        Raises:
            DataError: no other row is there.
        """
        known = self.bias > -torch.inf
        if not bool(known.any()):
            raise DataError("every class was forgotten on request; learn one anew.")
        classes = tuple(c for c, stays in zip(self.classes, known.tolist(), strict=True) if stays)
        return dataclasses.replace(self, weight=self.weight[known], bias=self.bias[known], classes=classes)


class TaskHeads(nn.Module):
    """Linear heads, one per task, each trained while its task is learned and frozen afterwards.

    A class that returns in a later task gets one more row there; its score is the maximum over its rows.

    Attributes:
        cosine: score by the cosine of features and rows, times 16, without a bias; to be set before the first task.

    Source: section 7 of the InfLoRA reference (heads, inference without task identity).
    """

    _place: Tensor

    def __init__(self, feature_dim: int, init: str = "uniform") -> None:
        """Make an empty set of heads; new ones start `uniform`, as torch draws them, from `zeros` or by `kaiming`."""
        super().__init__()
        self.init = init
        self.cosine = False
        self.feature_dim = feature_dim
        self.heads = nn.ModuleList()
        self.classes: list[tuple[int, ...]] = []
        self.register_buffer("_place", torch.empty(0), persistent=False)  # knows the device before there is a head

    def add_task(self, classes: Sequence[int], generator: torch.Generator | None = None) -> nn.Linear:
        """Append a trainable head and freeze the earlier ones.

        Args:
            classes: class index of each row of the new head, distinct.
            generator: source of the initial rows; not used when the heads start from zeros.

        Returns:
            The new head, `(len(classes), features)`.
        """
        self.freeze()
        head = nn.Linear(self.feature_dim, len(classes))
        rows, bias = (math.sqrt(square / self.feature_dim) for square in _STARTS[self.init])
        with torch.no_grad():
            head.weight.uniform_(-rows, rows, generator=generator)
            head.bias.uniform_(-bias, bias, generator=generator)
        self.heads.append(head.to(self._device()))
        self.classes.append(tuple(int(c) for c in classes))
        return head

    def imprint(self, directions: Tensor) -> None:
        """Let the newest head start from directions `(rows, features)` of any length, in the order of its classes."""
        weight = self.linears[-1].weight
        with torch.no_grad():
            weight.copy_(nn.functional.normalize(directions, dim=1))

    def load_task(self, classes: Sequence[int], weight: Tensor, bias: Tensor) -> None:
        """Append a frozen head with given rows, `weight (rows, features)` and `bias (rows,)`."""
        head = self.add_task(classes).to(weight.dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        self.freeze()

    @property
    def linears(self) -> list[nn.Linear]:
        """The heads in task order."""
        return [head for head in self.heads if isinstance(head, nn.Linear)]

    def freeze(self) -> None:
        """Stop training every head."""
        self.requires_grad_(False)

    def train_all(self) -> None:
        """Let every head go on training."""
        self.requires_grad_(True)

    def trained(self) -> list[nn.Parameter]:
        """Parameters in training."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def first(self, count: int) -> TaskHeads:
        """The heads of the first tasks alone; they are shared, not copied."""
        part = TaskHeads(self.feature_dim, self.init)
        part.cosine = self.cosine
        part.heads, part.classes = self.heads[:count], self.classes[:count]
        return part

    def task_rows(self, index: int) -> dict[str, Tensor]:
        """`weight` and `bias` of one head, detached copies on the CPU."""
        head = self.heads[index]  # not out of a list of all: this is asked for each
        assert isinstance(head, nn.Linear)
        return {"weight": head.weight.detach().cpu().clone(), "bias": head.bias.detach().cpu().clone()}

    def num_classes(self) -> int:
        """Number of distinct classes, assuming indices are dense from 0."""
        return 1 + max((c for classes in self.classes for c in classes), default=-1)

    def row_logits(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits of all rows in task order, or of one task's rows: `(n, features) -> (n, rows)`."""
        chosen = self.linears if task is None else [self.linears[task]]
        if self.cosine:
            unit = nn.functional.normalize(features, dim=1)
            return torch.cat([unit @ self._directions(head).T for head in chosen], dim=1)
        return torch.cat([head(features) for head in chosen], dim=1)

    @staticmethod
    def _directions(head: nn.Linear) -> Tensor:
        return _COSINE_SCALE * nn.functional.normalize(head.weight, dim=1)

    def class_logits(self, features: Tensor, task: int | None = None) -> Tensor:
        """Score of every class, the maximum over its rows; `-inf` for classes without a row in `task`.

        Args:
            features: `(n, features)`.
            task: restrict to the rows of this task (task identity given), or None for all rows.

        Returns:
            `(n, classes)` float32.
        """
        return self.best_rows(self.row_logits(features, task).float(), task)

    def best_rows(self, rows: Tensor, task: int | None = None) -> Tensor:
        """Take the maximum over each class's rows: `(n, rows) -> (n, classes)`, `-inf` for classes without a row."""
        classes = self._row_classes(rows.device, task)
        scores = rows.new_full((len(rows), self.num_classes()), -torch.inf)
        return scores.scatter_reduce(1, classes.expand(len(rows), -1), rows, reduce="amax", include_self=True)

    def loss(self, features: Tensor, labels: Tensor, over: str = "local") -> Tensor:
        """Cross-entropy of the newest task.

        Args:
            features: `(n, features)`.
            labels: `(n,)` class indices, all of the newest task.
            over: `"local"`, over the rows of the newest task only (InfLoRA, section 7), or `"seen"`, over all rows.

        Returns:
            A scalar: the mean over the batch.
        """
        task = len(self.heads) - 1
        return self.rows_loss(self.row_logits(features, task if over == "local" else None), labels)

    def rows_loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the newest task, from rows of logits `(n, rows)` of which its own come last."""
        own = torch.tensor(self.classes[-1], device=labels.device)
        matches = labels[:, None] == own[None, :]
        if not bool(matches.any(dim=1).all()):
            raise DataError(
                "a label of the batch does not belong to the task being learned; pass each task's own rows."
            )
        offset = rows.shape[1] - len(own)
        return nn.functional.cross_entropy(rows.float(), matches.int().argmax(dim=1) + offset)

    def joint_loss(self, features: Tensor, labels: Tensor, tasks: Tensor, over: str = "seen") -> Tensor:
        """Cross-entropy of rows of several tasks.

        Args:
            features: `(n, features)`.
            labels: `(n,)` class indices.
            tasks: `(n,)` number of the task each row was learned with.
            over: `"seen"`, over all classes, or `"local"`, for each row over the rows of its own task's head.

        Raises:
            DataError: a label that the head of its task does not have.
        """
        if over == "seen":
            return nn.functional.cross_entropy(self.class_logits(features), labels)
        rows = self.row_logits(features).float()
        owners = [(c, index) for index, classes in enumerate(self.classes) for c in classes]
        row_class, row_task = torch.tensor(owners, device=rows.device).T
        own = row_task == tasks[:, None]
        right = own & (row_class == labels[:, None])
        if not bool(right.any(dim=1).all()):
            raise DataError("a label does not belong to the task it is said to be of; pass each task's own rows.")
        return nn.functional.cross_entropy(rows.masked_fill(~own, -torch.inf), right.int().argmax(dim=1))

    def outputs(self, features: Tensor, labels: Tensor, count: int) -> list[Tensor]:
        """What distillation keeps: logits `(n, rows)` float32 of each of the first `count` heads."""
        return [self.row_logits(features, index).float() for index in range(count)]

    def rows(self) -> HeadRows:
        """All rows in task order, detached and on the CPU."""
        weights = [self._directions(head) if self.cosine else head.weight for head in self.linears]
        weight = torch.cat([rows.detach().float().cpu() for rows in weights])
        bias = torch.cat([head.bias.detach().float().cpu() for head in self.linears])
        bias = torch.zeros_like(bias) if self.cosine else bias
        classes = tuple(c for classes in self.classes for c in classes)
        return HeadRows(weight, bias, classes, normalize=self.cosine)

    def _row_classes(self, device: torch.device, task: int | None) -> Tensor:
        chosen = self.classes if task is None else [self.classes[task]]
        return torch.tensor([c for classes in chosen for c in classes], device=device)

    def _device(self) -> torch.device:
        return self._place.device
