"""From token features to one vector a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlora.errors import ModelError

__all__ = ["POOLINGS", "pool", "pooled_width"]

POOLINGS = ("cls", "mean", "pooler", "cls_mean")


def pooled_width(pooling: str, hidden_size: int, layers: int = 1) -> int:
    """Width of the pooled features of so many layers."""
    return layers * (2 * hidden_size if pooling == "cls_mean" else hidden_size)


def pool(outputs: Any, pooling: str, *, mask: Tensor | None, num_prefix: int, layers: int = 1) -> Tensor:
    """Pool the output of a Hugging Face encoder in float32.

    Args:
        outputs: has `last_hidden_state`, `(n, tokens, d)` or, from convolutional networks, `(n, d, h, w)`; and
            `pooler_output` for pooling `"pooler"`; with more than one layer, `hidden_states` of all of them.
        pooling: `"cls"` takes the first token; `"mean"` averages real tokens (texts) or patches (images); `"pooler"`
            takes the model's own pooled output; `"cls_mean"` puts first token and mean side by side.
        mask: `(n, tokens)`, non-zero where a token is real; `None` for images.
        num_prefix: images only: leading tokens that are no patches (class, distillation, register tokens).
        layers: how many of the last layers to pool, the encoder's output among them.

    Returns:
        `(n, d)` float32, `(n, 2 d)` for `"cls_mean"`; of several layers side by side, the output last.

    Raises:
        ModelError: pooling `"pooler"` on a model that has no pooled output.
    """
    if pooling == "pooler":
        pooled: Tensor | None = outputs.pooler_output
        if pooled is None:
            raise ModelError("expected a pooled output for pooling 'pooler', found none; use pooling 'cls' or 'mean'")
        return pooled.float().flatten(1)
    # The output is not always the last hidden state: some encoders normalise that.
    below = outputs.hidden_states[-layers:-1] if layers > 1 else ()
    parts = [_pool_tokens(hidden.float(), pooling, mask, num_prefix) for hidden in (*below, outputs.last_hidden_state)]
    return parts[0] if layers == 1 else torch.cat(parts, dim=1)


def _pool_tokens(hidden: Tensor, pooling: str, mask: Tensor | None, num_prefix: int) -> Tensor:
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    mean = _masked_mean(hidden, mask) if mask is not None else hidden[:, num_prefix:].mean(dim=1)
    return mean if pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=1)


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
