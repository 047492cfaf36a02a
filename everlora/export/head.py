"""The classifier of an export: plain rows, possibly several for one class."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from everlora.errors import NumericError, ShapeError

__all__ = ["ExportHead", "HEAD_INFO", "HEAD_WEIGHTS"]

HEAD_WEIGHTS = "head.safetensors"
HEAD_INFO = "head.json"
_FORMAT = 1


@dataclass(frozen=True)
class ExportHead:
    """A classifier of plain rows; the score of a class is the maximum over its rows.

    Attributes:
        weight: `(rows, features)` float32.
        bias: `(rows,)` float32.
        labels: label name of each row; a name may come several times.
        normalize: features are scaled to length 1 first.
        projection: P, `(k, d)` float32, where the rows apply to `relu(P f)`, of width k, in place of features f.

    Raises:
        ShapeError: rows, biases, labels and projection do not fit each other.
        NumericError: a weight is NaN or infinite.
    """

    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    labels: tuple[str, ...]
    normalize: bool = False
    projection: np.ndarray[Any, Any] | None = None

    def __post_init__(self) -> None:
        rows = len(self.labels)
        if self.weight.ndim != 2 or len(self.weight) != rows or self.bias.shape != (rows,) or rows == 0:
            raise ShapeError(
                f"expected one weight row, one bias and one label for each row of the head, found weight "
                f"{self.weight.shape}, bias {self.bias.shape}, {rows} labels; pass the rows of all tasks together"
            )
        if self.projection is not None and len(self.projection) != self.weight.shape[1]:
            raise ShapeError(
                f"expected rows as wide as the {len(self.projection)} random features of the head, found width "
                f"{self.weight.shape[1]}; pass the projection that the rows were fitted on"
            )
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise NumericError("expected finite head weights, found NaN or infinity; the training diverged")

    @property
    def num_features(self) -> int:
        """Width of the features that it scores."""
        return int((self.weight if self.projection is None else self.projection).shape[1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Distinct labels in the order of their first row: the columns of `logits`."""
        return tuple(dict.fromkeys(self.labels))

    @property
    def row_classes(self) -> tuple[int, ...]:
        """Class number of each row."""
        index = {label: number for number, label in enumerate(self.classes)}
        return tuple(index[label] for label in self.labels)

    @property
    def has_single_rows(self) -> bool:
        """Whether each class has exactly one row."""
        return len(self.classes) == len(self.labels)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are the rows themselves, with features used as they are."""
        return self.has_single_rows and not self.normalize and self.projection is None

    def logits(self, features: Tensor) -> Tensor:
        """Score features: `(n, features)` to `(n, classes)`, both float32."""
        if self.normalize:
            features = torch.nn.functional.normalize(features, dim=1)
        if self.projection is not None:
            features = torch.relu(features.float() @ torch.as_tensor(self.projection).to(features.device).T)
        weight, bias = (tensor.to(features.device) for tensor in self.tensors())
        rows = features.float() @ weight.T + bias
        owner = torch.tensor(self.row_classes, device=rows.device)
        return torch.stack([rows[:, owner == number].amax(dim=1) for number in range(len(self.classes))], dim=1)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as new float32 tensors on the CPU."""
        return torch.tensor(self.weight, dtype=torch.float32), torch.tensor(self.bias, dtype=torch.float32)

    def save(self, folder: Path) -> None:
        """Write `head.safetensors` and `head.json`."""
        weight, bias = self.tensors()
        projection = {} if self.projection is None else {"projection": torch.tensor(self.projection)}
        save_file({"weight": weight, "bias": bias, **projection}, folder / HEAD_WEIGHTS)
        info = {
            "format": _FORMAT,
            "classes": list(self.classes),
            "row_classes": list(self.row_classes),
            "normalize": self.normalize,
        }
        (folder / HEAD_INFO).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
