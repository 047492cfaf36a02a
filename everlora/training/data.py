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
        labels: `(n,)` class indices; zeros for a language model, whose labels are its tokens.
        ids: `(n,)` int64, keys of all per-row randomness.
    """

    encoded: Any
    labels: Tensor
    ids: Tensor

    @classmethod
    def of(cls, backbone: Backbone, examples: Examples, class_index: dict[str, int]) -> TaskData:
        """Encode examples; `class_index` maps every label name to its class index.

        For a language model there may be fewer encoded rows than examples, or more: rows without a token to learn are
        dropped, and texts are cut in blocks.

        Raises:
            DataError: no rows, rows without labels where those are needed, or a label that has no index.
        """
        if len(examples) == 0:
            raise DataError("the data set has no rows; give at least one row a class.")
        if backbone.modality == "language":
            return cls._of_language(backbone, examples)
        if examples.labels is None:
            raise DataError("the rows carry no labels; name the label column.")
        names = [str(name) for name in examples.labels]
        unknown = sorted({name for name in names if name not in class_index})
        if unknown:
            raise DataError(
                f"label '{unknown[0]}' ({len(unknown)} in all) is unknown to the learner; known: "
                + ", ".join(list(class_index)[:8])
            )
        labels = torch.tensor([class_index[name] for name in names], dtype=torch.long)
        ids = torch.as_tensor(np.ascontiguousarray(examples.ids), dtype=torch.long)
        return cls(backbone.encode(examples.inputs, examples.ids), labels, ids)

    @classmethod
    def _of_language(cls, backbone: Backbone, examples: Examples) -> TaskData:
        encoded = backbone.encode(examples.inputs, examples.ids)
        if not len(encoded):
            raise DataError(
                f"none of the {len(examples)} rows has a token to learn from; give rows with an answer or some text, "
                "or a larger max_length."
            )
        ids = torch.as_tensor(np.ascontiguousarray(encoded.ids), dtype=torch.long)
        return cls(encoded, torch.zeros(len(encoded), dtype=torch.long), ids)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)
