"""Rows of one task as the training loop takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones import Backbone
from everlora.errors import DataError
from everlora.streams import Examples

__all__ = ["TaskData"]


@dataclass(frozen=True)
class TaskData:
    """Rows of one task, encoded once.

    Attributes:
        encoded: what `Backbone.encode` returned.
        labels: `(n,)` class indices.
        ids: `(n,)` int64, keys of all per-row randomness.
    """

    encoded: Any
    labels: Tensor
    ids: Tensor

    @classmethod
    def of(cls, backbone: Backbone, examples: Examples, class_index: dict[str, int]) -> TaskData:
        """Encode examples; `class_index` maps every label name to its class index.

        Raises:
            DataError: no rows, or a label that has no index.
        """
        if len(examples) == 0:
            raise DataError("the data set has no rows; give at least one row a class.")
        names = [] if examples.labels is None else [str(name) for name in examples.labels]
        unknown = sorted({name for name in names if name not in class_index})
        if unknown:
            raise DataError(
                f"label '{unknown[0]}' ({len(unknown)} in all) is unknown to the learner; known: "
                + ", ".join(list(class_index)[:8])
            )
        labels = torch.tensor([class_index[name] for name in names], dtype=torch.long)
        ids = torch.as_tensor(np.ascontiguousarray(examples.ids), dtype=torch.long)
        return cls(backbone.encode(examples.inputs, examples.ids), labels, ids)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)
