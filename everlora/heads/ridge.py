"""Ridge regression from the labels' indicators on features, in closed form from statistics alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everlora.errors import NumericError
from everlora.heads.statistics import FeatureStatistics

__all__ = ["PENALTIES", "RidgeFit", "RidgePath", "fit_ridge"]

PENALTIES: tuple[float, ...] = tuple(10.0**power for power in range(-8, 3))
"""Regularisations that are tried, in units of the mean eigenvalue of the Gram matrix."""


@dataclass(frozen=True)
class RidgeFit:
    """A fitted ridge regression.

    Attributes:
        weight: `(classes, dim)` float64; the score of a class is its row times the features.
        penalty: what was chosen, in units of the mean eigenvalue of the Gram matrix.
        errors: for each of the penalties the mean squared error on the rows held out, or where these cannot judge, what
            generalised cross-validation expects; empty where none was to be chosen.
    """

    weight: Tensor
    penalty: float
    errors: tuple[float, ...] = ()


def fit_ridge(
    statistics: FeatureStatistics,
    held_out: FeatureStatistics | None = None,
    *,
    penalty: float | None = None,
) -> RidgeFit:
    """Minimise `sum |W f - y|^2 + penalty * tr(G) / dim * |W|^2`, y being the indicator of the label.

    The error on rows held out is computed from their statistics alone, so that rows of all tasks judge, and none is
    kept: `sum |W f - y|^2 = tr(W G_h W^T) - 2 tr(W S_h^T) + n_h`.

    Args:
        statistics: of the rows to fit.
        held_out: of rows that choose the penalty; they are fitted, too, once it is chosen. Where there are none, or
            most are of classes that no other row has, generalised cross-validation over all rows chooses it.
        penalty: use this one and choose none; without it and without rows, 1e-3.

    Source of generalised cross-validation: Golub, Heath and Wahba, Technometrics 21 (1979).

    Raises:
        NumericError: there is no Gram matrix, or it is not finite.
    """
    if statistics.gram is None:
        raise NumericError("a ridge regression needs the Gram matrix of the features, which was not kept.")
    if not bool(torch.isfinite(statistics.gram).all()):
        raise NumericError("the Gram matrix of the features is not finite; check the rows and the model.")
    errors: tuple[float, ...] = ()
    held_out = FeatureStatistics(statistics.dim) if held_out is None else held_out
    whole = statistics.copy()
    whole.merge(held_out)
    if penalty is None and whole.count:
        errors = _errors(statistics, held_out) if _judges(held_out, statistics) else _expected_errors(whole)
        penalty = PENALTIES[min(range(len(errors)), key=lambda index: errors[index])]
    penalty = 1e-3 if penalty is None else penalty
    return RidgeFit(_solve(whole, penalty), penalty, errors)


class RidgePath:
    """Solutions of `min sum |W f - y|^2` for many penalties, from sums over rows and one decomposition.

    Args:
        gram: sum of `f f^T`, `(dim, dim)` float64.
        sums: sum of `y f^T`, `(outputs, dim)`.
    """

    def __init__(self, gram: Tensor, sums: Tensor) -> None:
        self._values, self._vectors = torch.linalg.eigh(gram)
        self._turned, self._unit = sums @ self._vectors, _unit(gram)

    def errors(self, gram: Tensor, sums: Tensor, penalties: Sequence[float]) -> list[float]:
        """Squared error of each solution on other rows, less the sum of their `|y|^2`, from their own sums."""
        gram, sums = self._vectors.T @ gram @ self._vectors, sums @ self._vectors
        weights = (self._rotated(penalty) for penalty in penalties)
        return [float((weight @ gram * weight).sum() - 2 * (weight * sums).sum()) for weight in weights]

    def freedom(self, penalty: float) -> float:
        """Degrees of freedom of a solution: the trace of what turns targets into their fit."""
        values = self._values.clamp(min=0)
        return float((values / (values + penalty * self._unit)).sum())

    def solution(self, penalty: float) -> Tensor:
        """W, `(outputs, dim)`."""
        weight: Tensor = self._rotated(penalty) @ self._vectors.T
        return weight

    def _rotated(self, penalty: float) -> Tensor:
        weight: Tensor = self._turned / (self._values.clamp(min=0) + penalty * self._unit)
        return weight


def _unit(gram: Tensor) -> float:
    """Mean eigenvalue, above 0."""
    return max(float(gram.diagonal().mean()), 1e-300)


def _solve(statistics: FeatureStatistics, penalty: float) -> Tensor:
    """Weights `(classes, dim)`, by Cholesky; the penalty grows tenfold while the matrix is singular to rounding."""
    gram = statistics.gram
    assert gram is not None
    identity = torch.eye(len(gram), dtype=gram.dtype)
    for step in range(8):
        factor, info = torch.linalg.cholesky_ex(gram + penalty * 10.0**step * _unit(gram) * identity)
        if int(info) == 0:
            return torch.cholesky_solve(statistics.sums.T, factor).T
    raise NumericError("the Gram matrix of the features is singular whatever is added; check the rows and the model.")


def _errors(statistics: FeatureStatistics, held_out: FeatureStatistics) -> tuple[float, ...]:
    """Mean squared error on the held-out rows for each of the penalties."""
    assert statistics.gram is not None and held_out.gram is not None
    classes = max(len(statistics.counts), len(held_out.counts))
    fitted, judged = statistics.copy(), held_out.copy()
    fitted.grow(classes)
    judged.grow(classes)
    errors = RidgePath(statistics.gram, fitted.sums).errors(held_out.gram, judged.sums, PENALTIES)
    return tuple((error + judged.count) / judged.count for error in errors)


def _judges(held_out: FeatureStatistics, statistics: FeatureStatistics) -> bool:
    """Whether most rows held out are of classes that have rows to fit.

    Labels that take turns in a fixed order (five classes, and every fifth row held out) can leave a class no row to
    fit. Nothing is learned of its indicator then, and the largest penalty would seem best.
    """
    shared = min(len(held_out.counts), len(statistics.counts))
    with_rows = held_out.counts[:shared][statistics.counts[:shared] > 0]
    return 2 * int(with_rows.sum()) > held_out.count


def _expected_errors(statistics: FeatureStatistics) -> tuple[float, ...]:
    """What generalised cross-validation expects for each of the penalties; infinite where rows are merely repeated."""
    assert statistics.gram is not None
    path, count = RidgePath(statistics.gram, statistics.sums), statistics.count
    left = [count - path.freedom(penalty) for penalty in PENALTIES]
    errors = path.errors(statistics.gram, statistics.sums, PENALTIES)
    return tuple(
        count * (error + count) / free**2 if free > 1e-6 * count else float("inf")
        for error, free in zip(errors, left, strict=True)
    )
