"""Angles between low-rank directions, and least squares of a new one on old ones, without an `(out, in)` matrix.

A direction is the product `up @ down` of one pair of factors. Everything here costs products with the thin factors
and decompositions of matrices as small as the sum of the ranks, runs in float64 and changes nothing it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everlora.errors import NumericError, OptionError, ShapeError
from everlora.lowrank.factors import Direction, Prepared, known_norm, prepare, thin_frobenius
from everlora.lowrank.precision import normal_mode

__all__ = ["DirectionFit", "cosines", "fit_direction", "gram"]

_RCOND = 1e-10  # eigenvalues of the correlation matrix below this fraction of the largest count as zero
_CANCELLED = 1e-6  # squared residual, relative to its terms, under which their difference loses digits


@dataclass(frozen=True)
class DirectionFit:
    """How well old directions express a new one: `D_new ~ sum_i beta_i D_i`, with `D = up @ down / n`.

    Attributes:
        beta: `(num_old,)` float64, on the device of the new direction; exactly 0 for excluded directions.
        rho: the relative residual in [0, 1], the sine of the angle between the new direction and the span. It does
            not depend on the kind of norm. 1 when there is nothing to express it by, 0 when the new one is empty.
        length: `|D_new|_F`: 1 with norm `"fro"`, kappa of the new direction with `"factors"`, 0 when it is empty.
        used: which old directions took part; the others are empty.
        num_independent: rank of the system, the number of old directions that are independent of each other.
    """

    beta: Tensor
    rho: float
    length: float
    used: tuple[bool, ...]
    num_independent: int

    @property
    def residual_squared(self) -> float:
        """`|D_new - sum_i beta_i D_i|_F^2`, absolute: what a criterion on the squared residual compares."""
        return (self.rho * self.length) ** 2

    def offsets(self, weight: float) -> Tensor:
        """Return what to add to the coefficients of the old directions so that the new one can be dropped.

        With `weight` the coefficient of `D_new` in force, replacing `weight * D_new` by these changes the layer's
        weight by exactly `change(weight)`.

        Args:
            weight: coefficient of the normalised new direction (its multiplier times its norm).

        Returns:
            `(num_old,)` float64, `weight * beta`.

        Raises:
            NumericError: `weight` is not finite.

        Source: section 6 of the method page of SD-LoRA; public code adds `beta` alone, which changes the function.
        """
        return _finite(weight, "the weight of an absorbed direction") * self.beta

    def change(self, weight: float) -> float:
        """Return the Frobenius norm of the change that absorption makes, `|weight| * rho * length`."""
        return abs(_finite(weight, "the weight of an absorbed direction")) * self.rho * self.length


def gram(directions: Sequence[Direction], others: Sequence[Direction] | None = None) -> Tensor:
    """Return the Frobenius inner products `<up_i down_i, up_j down_j>`, not normalised.

    Args:
        directions: `n` directions of one layer; the ranks may differ.
        others: `m` directions of the same layer; by default `directions` again.

    Returns:
        `(n, m)` float64 on the device of the first direction; exactly symmetric without `others`.

    Raises:
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in the factors.

    Source: section 6 of the method page of SD-LoRA, `H = (up^T up) * (down down^T)` summed over blocks.
    Cost: `O(R_n R_m (in + out))` with `R` the sums of ranks; `O(R_n R_m)` memory.
    """
    count = len(directions)
    with normal_mode():
        ready = prepare([*directions, *(others or ())])
        rows, columns = ready[:count], ready if others is None else ready[count:]
        inner = _products(rows, columns) * _sizes(rows)[:, None] * _sizes(columns)
        return (inner + inner.T) / 2 if others is None else inner


def cosines(directions: Sequence[Direction], floor: float = 0.0) -> Tensor:
    """Return the cosines of the angles between directions, `(n, n)` float64; rows and columns of empty ones are 0.

    Args:
        directions: `n` directions of one layer.
        floor: Frobenius norm up to which a direction counts as empty.

    Raises:
        OptionError: `floor` is negative or not finite.
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in the factors.
    """
    floor = _known_floor(floor)
    with normal_mode():
        ready = prepare(directions)
        live = [i for i, item in enumerate(ready) if not item.is_empty(floor)]
        units = [_unit(ready[i]) for i in live]
        result = torch.zeros(len(ready), len(ready), dtype=torch.float64, device=_place(ready))
        if live:
            index = torch.tensor(live, device=result.device)
            result[index[:, None], index] = _correlations(units)
        return result


def fit_direction(
    new: Direction,
    old: Sequence[Direction],
    *,
    norm: str = "fro",
    floor: float = 0.0,
    old_gram: Tensor | None = None,
) -> DirectionFit:
    """Express a new direction by old ones in the least-squares sense, through their Gram matrix.

    Args:
        new: the direction to express.
        old: directions of the same layer; empty ones take no part.
        norm: of the directions that the coefficients refer to, `"fro"` or `"factors"`.
        floor: Frobenius norm up to which a direction counts as empty, usually 1e-12 of that of the base weight.
        old_gram: `gram(old)`, if known; then only the products with the new direction are computed.

    Returns:
        Coefficients and relative residual. Old directions that depend on each other share the coefficients in the
        solution of least norm. An eigenvalue of their correlation matrix below 1e-10 of the largest counts as
        zero, so a direction that lies in the span only through the tiny difference of two almost equal old ones
        is reported as outside: the error made is on the side of keeping it.

    Raises:
        OptionError: `norm` is unknown, or `floor` is negative or not finite.
        ShapeError: factors that do not fit each other, directions of different layers, or a Gram matrix of another
            size.
        NumericError: NaN or infinity in the factors or in the Gram matrix.

    Source: section 6 of the method page of SD-LoRA. There the residual is `sqrt(1 - g . beta)`, which resolves about
    1e-8; below 1e-3 the norm of the factored difference is computed instead, which resolves about 1e-15.
    Cost: `O(R^2 (in + out) + n^3)` for `n` old directions with ranks summing to `R`; with `old_gram` linear in `R`
    unless the residual is below 1e-3.
    """
    kind, floor = known_norm(norm), _known_floor(floor)
    with normal_mode():
        target, *ready = prepare([new, *old])
        used = tuple(not item.is_empty(floor) for item in ready)
        beta = torch.zeros(len(ready), dtype=torch.float64, device=target.up.device)
        known = None if old_gram is None else _known_gram(old_gram, len(ready)).to(beta.device)
        if target.is_empty(floor):
            return DirectionFit(beta, 0.0, 0.0, used, 0)
        length = 1.0 if kind == "fro" else target.kappa
        live = [i for i, takes_part in enumerate(used) if takes_part]
        if not live:
            return DirectionFit(beta, 1.0, length, used, 0)
        chosen, unit = [ready[i] for i in live], _unit(target)
        basis = [_unit(item) for item in chosen]
        index = torch.tensor(live, device=beta.device)
        inner = _correlations(basis) if known is None else _rescaled(known[index[:, None], index], chosen)
        right = _products(basis, [unit])[:, 0]
        coefficients, rank = _solve(inner, right)
        rho = _relative_residual(unit, basis, coefficients, right)
        if kind == "factors":
            # The unit directions are D / kappa in this norm.
            coefficients = coefficients * length / coefficients.new_tensor([item.kappa for item in chosen])
        beta[index] = coefficients
        return DirectionFit(beta, rho, length, used, rank)


def _products(first: Sequence[Prepared], second: Sequence[Prepared]) -> Tensor:
    """Inner products of the prepared factors, `(n, m)`, without the sizes that `Prepared.factors` holds."""
    if not first or not second:
        device = _place([*first, *second])
        return torch.zeros(len(first), len(second), dtype=torch.float64, device=device)
    ups = [torch.cat([item.up for item in group], dim=1) for group in (first, second)]
    downs = [torch.cat([item.down for item in group]) for group in (first, second)]
    hadamard = (ups[0].T @ ups[1]) * (downs[0] @ downs[1].T)
    return _membership(first).T @ hadamard @ _membership(second)


def _membership(group: Sequence[Prepared]) -> Tensor:
    """`(R, n)`: which rank belongs to which direction; a product with it sums blocks in a fixed order."""
    device = _place(group)
    ranks = torch.tensor([item.up.shape[1] for item in group], device=device)
    owners = torch.repeat_interleave(torch.arange(len(group), device=device), ranks)
    return torch.nn.functional.one_hot(owners, len(group)).to(torch.float64)


def _sizes(group: Sequence[Prepared]) -> Tensor:
    return torch.tensor([item.factors for item in group], dtype=torch.float64, device=_place(group))


def _place(group: Sequence[Prepared]) -> torch.device:
    return group[0].up.device if group else torch.device("cpu")


def _unit(item: Prepared) -> Prepared:
    return Prepared(item.down, item.up / item.kappa, 1.0, 1.0)


def _correlations(units: Sequence[Prepared]) -> Tensor:
    inner = _products(units, units)
    return _with_unit_diagonal((inner + inner.T) / 2)


def _rescaled(inner: Tensor, chosen: Sequence[Prepared]) -> Tensor:
    scale = inner.new_tensor([item.fro for item in chosen])
    return _with_unit_diagonal(inner / scale / scale[:, None])


def _with_unit_diagonal(inner: Tensor) -> Tensor:
    inner.fill_diagonal_(1.0)
    return inner


def _solve(inner: Tensor, right: Tensor) -> tuple[Tensor, int]:
    """Solution of least norm of `inner @ x = right`, and the rank used.

    An eigen-decomposition rather than Cholesky, which may succeed on a matrix that is singular to rounding and then
    gives huge coefficients.
    """
    values, vectors = torch.linalg.eigh(inner)
    kept = values > _RCOND * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values), int(kept.sum())


def _relative_residual(unit: Prepared, basis: Sequence[Prepared], coefficients: Tensor, right: Tensor) -> float:
    """`|unit - sum_i c_i basis_i|_F`, from the Gram system where that is exact enough, else from the factors."""
    squared = 1.0 - float(coefficients @ right)
    terms = 1.0 + float(coefficients.abs().sum())
    if squared > _CANCELLED * terms**2:
        return math.sqrt(min(squared, 1.0))
    ups = [item.up * -c for item, c in zip(basis, coefficients, strict=True)]
    downs = [item.down for item in basis]
    return min(thin_frobenius(torch.cat([unit.down, *downs]), torch.cat([unit.up, *ups], dim=1)), 1.0)


def _known_gram(matrix: Tensor, count: int) -> Tensor:
    if tuple(matrix.shape) != (count, count) or matrix.dtype != torch.float64:
        raise ShapeError(
            f"expected the float64 Gram matrix of {count} old directions, got {tuple(matrix.shape)} of "
            f"{matrix.dtype}; pass what gram(old) gave"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise NumericError("the Gram matrix of the old directions holds NaN or infinity; compute it again")
    return matrix


def _known_floor(floor: float) -> float:
    if isinstance(floor, bool) or not 0.0 <= floor < math.inf:
        raise OptionError(f"floor must be a finite norm of at least 0, got {floor!r}; usual is 1e-12 of the base's")
    return float(floor)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise NumericError(f"{name} must be finite, got {value!r}; check the magnitudes")
    return float(value)
