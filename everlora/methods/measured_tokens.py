"""Which tokens of a batch enter the second moments of layer inputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from everlora.errors import OptionError
from everlora.methods.base import Batch

__all__ = ["measured_tokens"]

_IGNORED = -100


def measured_tokens(
    batch: Batch, mask: Tensor | None, *, tokens: Literal["all", "loss"], excluded: tuple[int, ...]
) -> Tensor | None:
    """The mask of the tokens that are measured, `(n, T)` bool; None where all are.

    Args:
        batch: inputs with `input_ids`, `(n, T)`; for `loss` labels of the same shape, not shifted, -100 where none.
        mask: True for real tokens, `(n, T)`, or None when all are real.
        tokens: `loss` leaves only the tokens from which one with a loss is predicted.
        excluded: token ids to leave out.

    Raises:
        OptionError: a choice of tokens for inputs that have none, or `loss` where rows have no targets.

    Source: section 13 of the InfLoRA reference (decoder LLM).
    """
    if tokens == "all" and not excluded:
        return mask
    ids, labels = batch.inputs.get("input_ids"), batch.labels
    if ids is None or (tokens == "loss" and labels.shape != ids.shape):
        raise OptionError(
            "tokens=loss is for language models and exclude_tokens for models of texts; leave them out for this model."
        )
    chosen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.clone()
    if tokens == "loss":
        chosen[:, :-1] &= labels[:, 1:] != _IGNORED
        chosen[:, -1] = False
    for number in excluded:
        chosen &= ids != number
    return chosen
