"""Maths on low-rank directions given as factors; no `(out, in)` matrix is ever formed.

A direction is the product `up @ down` of one pair of factors. Everything here costs products with the thin factors
and decompositions of matrices as small as the sum of the ranks, runs in float64 and changes nothing it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlora.errors import NumericError, OptionError, ShapeError, nearest
from everlora.lowrank.precision import normal_mode

__all__ = ["Direction", "DirectionFit", "cosines", "direction_norm", "fit_direction", "gram", "kappa", "prepare"]

_NORMS = ("fro", "factors")
_ALIGNED = 1e-2  # kappa under which products of the factors cancel; such a direction gets other factors first
_ROUNDING = 1e-13  # kappa under which a product holds nothing but the rounding of its factors
_RCOND = 1e-10  # eigenvalues of the correlation matrix below this fraction of the largest count as zero
_CANCELLED = 1e-6  # squared residual, relative to its terms, under which their difference loses digits


class Direction(NamedTuple):
    """A low-rank direction `up @ down`. `down`: `(rank, in)`; `up`: `(out, rank)`; rank 0 is allowed and is zero."""

    down: Tensor
    up: Tensor


class Prepared(NamedTuple):
    """A checked direction: float64 factors without cancellation, and the two norms of the factors given."""

    down: Tensor
    up: Tensor
    fro: float
    factors: float

    def is_empty(self, floor: float) -> bool:
        """Return True when the product is zero, at most `floor`, or only the rounding of its factors."""
        return self.fro <= max(floor, _ROUNDING * self.factors)


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


def direction_norm(direction: Direction, norm: str = "fro") -> float:
    """Return the norm by which a direction is divided.

    Args:
        direction: factors of any float dtype.
        norm: `"fro"` for `|up @ down|_F = sqrt(sum((up^T up) * (down down^T)))`, `"factors"` for
            `|up|_F * |down|_F`, which is larger by `1 / kappa`.

    Returns:
        The norm in float64, 0 for a zero direction.

    Raises:
        OptionError: `norm` is unknown.
        ShapeError: the factors do not fit each other or are not of a float dtype.
        NumericError: NaN or infinity in the factors, or a norm beyond float64.

    Source: section 2 of the method page of SD-LoRA. Where the factors cancel (kappa below 0.01) the identity alone
    would lose digits; there it is applied to the singular factors of the same product.
    Cost: `O(rank^2 (in + out))`.
    """
    kind = _known_norm(norm)
    with normal_mode():
        (ready,) = prepare([direction])
    return ready.fro if kind == "fro" else ready.factors


def kappa(direction: Direction) -> float:
    """Return `|up @ down|_F / (|up|_F |down|_F)`: in (0, 1], 1 for rank 1, and 0 for a zero direction.

    Raises:
        ShapeError: the factors do not fit each other or are not of a float dtype.
        NumericError: NaN or infinity in the factors.

    Source: section 2 of the method page of SD-LoRA; about `1 / sqrt(rank)` for unstructured factors.
    """
    with normal_mode():
        (ready,) = prepare([direction])
    return _ratio(ready)


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
        if others is not None:
            return _products(ready[:count], ready[count:])
        inner = _products(ready, ready)
        return (inner + inner.T) / 2


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
        result = torch.zeros(len(ready), len(ready), dtype=torch.float64, device=_device(ready))
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
    kind, floor = _known_norm(norm), _known_floor(floor)
    with normal_mode():
        target, *ready = prepare([new, *old])
        used = tuple(not item.is_empty(floor) for item in ready)
        beta = torch.zeros(len(ready), dtype=torch.float64, device=target.up.device)
        known = None if old_gram is None else _known_gram(old_gram, len(ready)).to(beta.device)
        if target.is_empty(floor):
            return DirectionFit(beta, 0.0, 0.0, used, 0)
        length = 1.0 if kind == "fro" else _ratio(target)
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
            coefficients = coefficients * length / coefficients.new_tensor([_ratio(item) for item in chosen])
        beta[index] = coefficients
        return DirectionFit(beta, rho, length, used, rank)


def prepare(directions: Sequence[Direction]) -> list[Prepared]:
    """Check directions of one layer and bring them to float64 on the device of the first (CPU without float64).

    Raises:
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in the factors, or a norm beyond float64.
    """
    if not directions:
        return []
    first = directions[0].up.device
    device = torch.device("cpu") if first.type == "mps" else first
    ready = []
    for index, (down, up) in enumerate(directions):
        _require_pair(index, down, up)
        if (down.shape[1], up.shape[0]) != (directions[0].down.shape[1], directions[0].up.shape[0]):
            raise ShapeError(
                f"direction {index} maps {down.shape[1]} inputs to {up.shape[0]} outputs, direction 0 "
                f"{directions[0].down.shape[1]} to {directions[0].up.shape[0]}; pass directions of one layer"
            )
        # Moved first and widened then: the device it comes from may have no float64.
        wide = [factor.detach().to(device).to(torch.float64) for factor in (down, up)]
        ready.append(_measured(index, *wide))
    return ready


def _require_pair(index: int, down: Tensor, up: Tensor) -> None:
    fits = down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1]
    if not fits or not (down.is_floating_point() and up.is_floating_point()):
        raise ShapeError(
            f"direction {index}: expected real factors down (rank, in) and up (out, rank), got {tuple(down.shape)} of "
            f"{down.dtype} and {tuple(up.shape)} of {up.dtype}"
        )


def _measured(index: int, down: Tensor, up: Tensor) -> Prepared:
    """Compute the norms, and replace factors whose products cancel."""
    factors = float(down.norm() * up.norm())
    if not math.isfinite(factors):
        raise NumericError(f"direction {index} holds NaN, infinity or values too large for float64; check the training")
    fro = _hadamard(down, up)
    if 0.0 < factors and fro < _ALIGNED * factors:
        down, up = singular_factors(down, up)
        fro = _hadamard(down, up)
    return Prepared(down, up, min(fro, factors), factors)


def _hadamard(down: Tensor, up: Tensor) -> float:
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
