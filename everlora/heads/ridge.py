"""Ridge regression from the labels' indicators on features, in closed form from statistics alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlora.errors import NumericError
from everlora.heads.statistics import FeatureStatistics

__all__ = ["PENALTIES", "RidgeFit", "fit_ridge"]

PENALTIES: tuple[float, ...] = tuple(10.0**power for power in range(-8, 3))
"""Regularisations that are tried, in units of the mean eigenvalue of the Gram matrix."""


@dataclass(frozen=True)
class RidgeFit:
    """A fitted ridge regression.

    Attributes:
        weight: `(classes, dim)` float64; the score of a class is its row times the features.
        penalty: what was chosen, in units of the mean eigenvalue of the Gram matrix.
        errors: mean squared error on the rows held out, for each of the penalties; empty where none was to be chosen.
    """

    weight: Tensor
    penalty: float
    errors: tuple[float, ...] = ()


def fit_ridge(
    statistics: FeatureStatistics,
    held_out: FeatureStatistics | None = None,
    *,
    penalty: float | None = None,
    refit: bool = True,
) -> RidgeFit:
    """Minimise `sum |W f - y|^2 + penalty * tr(G) / dim * |W|^2`, y being the indicator of the label.

    The error on rows held out is computed from their statistics alone, so that rows of all tasks judge, and none is
    kept: `sum |W f - y|^2 = tr(W G_h W^T) - 2 tr(W S_h^T) + n_h`.

    Args:
        statistics: of the rows to fit.
        held_out: of rows that choose the penalty; with `refit` they are fitted, too, once it is chosen.
        penalty: use this one and choose none; without it and without rows held out, 1e-3.
        refit: see `held_out`; False where they are validation rows, which only choose.

    Raises:
        NumericError: there is no Gram matrix, or it is not finite.
    """
    if statistics.gram is None:
        raise NumericError("a ridge regression needs the Gram matrix of the features, which was not kept.")
    if not bool(torch.isfinite(statistics.gram).all()):
        raise NumericError("the Gram matrix of the features is not finite; check the rows and the model.")
    errors: tuple[float, ...] = ()
    if penalty is None and held_out is not None and held_out.count:
        errors = _errors(statistics, held_out)
        penalty = PENALTIES[min(range(len(errors)), key=lambda index: errors[index])]
    penalty = 1e-3 if penalty is None else penalty
    whole = statistics
    if refit and held_out is not None and held_out.count:
        whole = statistics.copy()
        whole.merge(held_out)
    return RidgeFit(_solve(whole, penalty), penalty, errors)


def _unit(gram: Tensor) -> float:
    return float(gram.diagonal().mean())


def _solve(statistics: FeatureStatistics, penalty: float) -> Tensor:
    """Weights `(classes, dim)`, by Cholesky; the penalty grows tenfold while the matrix is singular to rounding."""
    gram = statistics.gram
    assert gram is not None
    identity = torch.eye(len(gram), dtype=gram.dtype)
    for step in range(8):
        factor, info = torch.linalg.cholesky_ex(gram + penalty * 10.0**step * max(_unit(gram), 1e-300) * identity)
        if int(info) == 0:
            return torch.cholesky_solve(statistics.sums.T, factor).T
    raise NumericError("the Gram matrix of the features is singular whatever is added; check the rows and the model.")


def _errors(statistics: FeatureStatistics, held_out: FeatureStatistics) -> tuple[float, ...]:
    """Mean squared error on the held-out rows for each of the penalties, by one decomposition."""
    assert statistics.gram is not None and held_out.gram is not None
    classes = max(len(statistics.counts), len(held_out.counts))
    fitted, judged = statistics.copy(), held_out.copy()
    fitted.grow(classes)
    judged.grow(classes)
    values, vectors = torch.linalg.eigh(statistics.gram)
    turned, gram = fitted.sums @ vectors, vectors.T @ held_out.gram @ vectors
    sums = judged.sums @ vectors
    errors = []
    for penalty in PENALTIES:
        weight = turned / (values.clamp(min=0) + penalty * max(_unit(statistics.gram), 1e-300))
        error = (weight @ gram * weight).sum() - 2 * (weight * sums).sum() + judged.count
        errors.append(float(error) / max(judged.count, 1))
    return tuple(errors)
