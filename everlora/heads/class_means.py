"""Nearest class means as rows of a linear classifier, and which classes may win."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everlora.errors import DataError

__all__ = ["competing", "rows_of_means"]


def rows_of_means(means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose scores `2 m.f - |m|^2` order classes as the distance from f to their means m does.

    Args:
        means: `(classes, d)`.
        counts: rows of each class, `(classes,)`; one without any can never win.

    Returns:
        Weight `(classes, d)` and bias `(classes,)`, float32.
    """
    bias = torch.where(counts > 0, -means.square().sum(dim=1), -torch.inf)
    return (2 * means).float(), bias.float()


def competing(scores: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Let only these classes compete, None for all: `(n, classes)`, `-inf` for the others.

    Raises:
        DataError: every class that could be the answer was forgotten.
    """
    if classes is not None:
        outside = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        outside[list(classes)] = False
        scores = scores.masked_fill(outside, -torch.inf)
    if len(scores) and not bool(torch.isfinite(scores[0]).any()):
        raise DataError("every class that could be the answer was forgotten on request; learn one anew.")
    return scores
