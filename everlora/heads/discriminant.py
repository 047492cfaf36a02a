"""Linear discriminant analysis from sums over features: one normal distribution a class, all of one covariance.

The same Gram matrix and class sums as a ridge regression needs give the covariance within classes,
`S = (G - sum_k n_k m_k m_k^T) / (n - K)`. Classes then compete at equal odds, however many rows each has.

Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3; regularised towards a
multiple of the identity as in its section 4.3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlora.errors import NumericError
from everlora.heads.statistics import FeatureStatistics

__all__ = ["PENALTIES", "DiscriminantFit", "fit_discriminant"]

PENALTIES: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-12, 5))
"""Regularisations that are tried, in units of the mean eigenvalue of the covariance; less is lost in float32 scores."""

_DEAD = 1e-9  # of the mean eigenvalue: a direction in which nothing varies, such as the one layer norms take out


@dataclass(frozen=True)
class DiscriminantFit:
    """A fitted discriminant analysis.

    Attributes:
        weight: `(classes, dim)` float64.
        bias: `(classes,)`; the score `weight f + bias` is the log posterior of a class up to a constant. `-inf` for a
            class without rows.
        penalty: what was added to the covariance, in units of its mean eigenvalue.
        errors: minus twice the mean log likelihood of the rows held out, up to a constant, for each of the penalties;
            empty where none was to be chosen.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    errors: tuple[float, ...] = ()


def fit_discriminant(
    statistics: FeatureStatistics, held_out: FeatureStatistics, *, penalty: float | None = None
) -> DiscriminantFit:
    """Fit class means and one covariance, `(S + penalty * tr(S) / dim * 1) / (1 + penalty)`.

    The likelihood of rows held out under what was fitted to the others is computed from their sums alone, so that rows
    of all tasks choose the penalty, and none is kept.

    Args:
        statistics: of the rows to fit.
        held_out: of rows that choose the penalty; they are fitted, too, once it is chosen. There may be none.
        penalty: use this one and choose none; without it and without rows held out, 1e-3.

    Raises:
        NumericError: there is no Gram matrix, or it is not finite.
    """
    errors: tuple[float, ...] = ()
    if penalty is None and held_out.count and statistics.count:
        errors = _errors(statistics, held_out)
        penalty = PENALTIES[min(range(len(errors)), key=lambda index: errors[index])]
    penalty = 1e-3 if penalty is None else penalty
    whole = statistics.copy()
    whole.merge(held_out)
    means = whole.means()
    values, vectors = _spectrum(_within(whole))
    turned = means @ vectors
    weight = (turned / _shrunk(values, penalty)) @ vectors.T
    bias = torch.where(whole.counts > 0, -(means * weight).sum(dim=1) / 2, -torch.inf)
    return DiscriminantFit(weight, bias, penalty, errors)


def _within(statistics: FeatureStatistics) -> Tensor:
    """Covariance within classes `(dim, dim)`."""
    if statistics.gram is None:
        raise NumericError("a discriminant analysis needs the Gram matrix of the features, which was not kept.")
    if not bool(torch.isfinite(statistics.gram).all()):
        raise NumericError("the Gram matrix of the features is not finite; check the rows and the model.")
    between = statistics.sums.T @ statistics.means()
    return (statistics.gram - between) / max(statistics.freedom, 1)


def _spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below 0, and eigenvectors; where all are 0, as with one row a class, those of the identity."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values = values.clamp(min=0)
    return (values if float(values.sum()) > 0 else torch.ones_like(values)), vectors


def _shrunk(values: Tensor, penalty: float) -> Tensor:
    shrunk: Tensor = (values + penalty * values.mean()) / (1 + penalty)
    return shrunk


def _errors(statistics: FeatureStatistics, held_out: FeatureStatistics) -> tuple[float, ...]:
    """Minus twice the mean log likelihood of held-out rows, without its constant, for each of the penalties.

    Rows scatter about the fitted mean of their class by `1 + 1 / n_k` times the covariance, as that mean is itself
    uncertain. Classes that only the held-out rows have scatter about their own mean.
    """
    fitted, judged = statistics.copy(), held_out.copy()
    classes = max(len(fitted.counts), len(judged.counts))
    fitted.grow(classes)
    judged.grow(classes)
    known = (fitted.counts > 0)[:, None]
    means = torch.where(known, fitted.means(), judged.means())
    assert judged.gram is not None
    cross = judged.sums.T @ means
    scatter = judged.gram - cross - cross.T + (means * judged.counts[:, None]).T @ means
    spread = 1 + torch.where(known[:, 0], 1 / fitted.counts.clamp(min=1), 0.0)
    scatter = scatter / (float((spread * judged.counts).sum()) + judged.forgotten)
    values, vectors = _spectrum(_within(fitted))
    along = (vectors * (scatter @ vectors)).sum(dim=0)
    alive = values + along > _DEAD * values.mean()  # the rest would only reward the smallest penalty
    found = (_shrunk(values, penalty)[alive] for penalty in PENALTIES)
    return tuple(float((along[alive] / shrunk).sum() + shrunk.log().sum()) for shrunk in found)
