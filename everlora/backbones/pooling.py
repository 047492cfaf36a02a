"""From token features to one vector a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlora.errors import ModelError

__all__ = ["POOLINGS", "pool", "pooled_width"]

POOLINGS = ("cls", "mean", "pooler", "cls_mean")


def pooled_width(pooling: str, hidden_size: int) -> int:
    """Width of the pooled features."""
    return 2 * hidden_size if pooling == "cls_mean" else hidden_size


def pool(outputs: Any, pooling: str, *, mask: Tensor | None, num_prefix: int) -> Tensor:
    """Pool the output of a Hugging Face encoder in float32.

    Args:
        outputs: has `last_hidden_state`, `(n, tokens, d)` or, from convolutional networks, `(n, d, h, w)`; and
            `pooler_output` for pooling `"pooler"`.
        pooling: `"cls"` takes the first token; `"mean"` averages real tokens (texts) or patches (images); `"pooler"`
            takes the model's own pooled output; `"cls_mean"` puts first token and mean side by side.
        mask: `(n, tokens)`, non-zero where a token is real; `None` for images.
        num_prefix: images only: leading tokens that are no patches (class, distillation, register tokens).

    Returns:
        `(n, d)` float32, `(n, 2 d)` for `"cls_mean"`.

    Raises:
        ModelError: pooling `"pooler"` on a model that has no pooled output.
    """
    if pooling == "pooler":
        pooled: Tensor | None = outputs.pooler_output
        if pooled is None:
            raise ModelError("expected a pooled output for pooling 'pooler', found none; use pooling 'cls' or 'mean'")
        return pooled.float().flatten(1)
    hidden: Tensor = outputs.last_hidden_state.float()
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    mean = _masked_mean(hidden, mask) if mask is not None else hidden[:, num_prefix:].mean(dim=1)
    return mean if pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=1)


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
