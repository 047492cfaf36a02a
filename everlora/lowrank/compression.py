"""Bounding the total rank: sums of scaled directions are replaced by one direction of chosen rank and known error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlora.errors import NumericError, OptionError, ShapeError, nearest
from everlora.lowrank.factors import Direction, prepare, thin_svd
from everlora.lowrank.precision import normal_mode

__all__ = ["Compression", "DirectionSum", "MergePlan", "allocate_ranks", "compress", "plan_merge"]

_ALLOCATIONS = ("uniform", "energy")
_ROUNDING = 1e-13  # norm of a sum, relative to its terms, up to which it holds nothing but rounding


@dataclass(frozen=True)
class Compression:
    """The best approximation of a sum of directions by one of a given rank.

    Attributes:
        direction: `down (rank, in)` and `up (out, rank)` in float64, with equal shares of the singular values.
        norm: `|up @ down|_F`.
        error_abs: exact Frobenius norm of what was cut off.
        error_rel: `error_abs` over the norm of the whole sum; 0 when the sum is zero.
    """

    direction: Direction
    norm: float
    error_abs: float
    error_rel: float


class DirectionSum:
    """The sum `sum_k scale_k * up_k @ down_k` of directions of one layer, decomposed without forming it.

    Decomposed once, it answers what each rank would cost and is cut to any of them.

    Args:
        directions: of one layer; the ranks may differ, empty ones add nothing. At least one.
        scales: one finite multiplier each; all 1 by default. With `s = coefficient / norm` the sum is the part of
            the weight that these directions make up now.

    Attributes:
        singular_values: `(m,)` float64, descending, `m = min(R, in, out)` for ranks summing to `R`.

    Raises:
        OptionError: there is no direction, or another number of scales.
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in factors or scales, or values beyond float64.

    Source: section 7 of the method page of SD-LoRA; the optimum is that of Eckart and Young.
    Cost: `O(R^2 (in + out) + R^3)` time, `R (in + out)` float64.
    """

    def __init__(self, directions: Sequence[Direction], scales: Tensor | Sequence[float] | None = None) -> None:
        if not directions:
            raise OptionError("a sum of directions needs at least one, got none; pass the directions to merge")
        with normal_mode():
            ready = prepare(directions)
            multipliers = _multipliers(scales, len(ready))
            sizes = [item.factors * scale for item, scale in zip(ready, multipliers, strict=True)]
            largest = max(abs(size) for size in sizes)
            if not all(math.isfinite(size) for size in sizes):
                raise NumericError("the scales of the directions hold NaN or infinity; check the magnitudes")
            # The decomposition runs at a size near 1, so that it can neither overflow nor vanish.
            unit = largest or 1.0
            up = torch.cat([item.up * (size / unit) for item, size in zip(ready, sizes, strict=True)], dim=1)
            left, values, right = thin_svd(torch.cat([item.down for item in ready]), up)
            if float(values.norm()) <= _ROUNDING * sum(abs(size / unit) for size in sizes):
                values = torch.zeros_like(values)  # what is left of directions that cancel is rounding
            # From the smallest up, so that small tails keep their digits; tail 0 is the whole sum.
            squares = torch.cat([values.square(), values.new_zeros(1)])
            self._tails = (squares.flip(0).cumsum(0).flip(0).sqrt() * unit).tolist()
            self._left, self._right = left, right
            self.singular_values: Tensor = values * unit

    @property
    def norm(self) -> float:
        """Frobenius norm of the sum."""
        return float(self._tails[0])

    def error(self, rank: int) -> float:
        """Return the relative Frobenius error of the best approximation of `rank`; 0 for a zero sum.

        Raises:
            OptionError: `rank` is not a positive integer.
        """
        return self._tail(rank) / self.norm if self.norm > 0.0 else 0.0

    def rank_within(self, max_error: float) -> int:
        """Return the smallest rank whose relative error is at most `max_error`, at least 1.

        Raises:
            OptionError: `max_error` is negative or NaN.
        """
        if isinstance(max_error, bool) or not max_error >= 0.0:
            raise OptionError(f"max_error must be a fraction of at least 0, got {max_error!r}; the usual value is 0.05")
        ranks = range(1, len(self._tails))
        return next((rank for rank in ranks if self.error(rank) <= max_error), 1)

    def truncate(self, rank: int) -> Compression:
        """Cut to a rank.

        Args:
            rank: wanted; where the sum has fewer singular values the result has their number and no error.

        Raises:
            OptionError: `rank` is not a positive integer.
        """
        error_abs = self._tail(rank)
        with normal_mode():
            values = self.singular_values[:rank]
            root = values.sqrt()
            direction = Direction(root[:, None] * self._right[:rank], self._left[:, :rank] * root)
            return Compression(direction, float(values.norm()), error_abs, self.error(rank))

    def _tail(self, rank: int) -> float:
        return float(self._tails[min(_positive("rank", rank), len(self._tails) - 1)])


def compress(directions: Sequence[Direction], scales: Tensor | Sequence[float] | None, rank: int) -> Compression:
    """Replace a sum of scaled directions by the nearest one of a given rank.

    Args:
        directions: `K` directions of one layer, at least one.
        scales: `(K,)` finite multipliers, or None for all 1.
        rank: of the result; smaller where the sum has fewer singular values, `min(R, in, out)`.

    Returns:
        The direction with its norm and exact error. Storing its factors in float32 adds rounding of about 1e-7.

    Raises:
        OptionError: there is no direction, another number of scales, or a rank that is not a positive integer.
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in factors or scales.

    Source: section 7 of the method page of SD-LoRA.
    Cost: `O(R^2 (in + out) + R^3)` for ranks summing to `R`.
    """
    _positive("rank", rank)
    return DirectionSum(directions, scales).truncate(rank)


def allocate_ranks(
    singular_values: Sequence[Tensor], rank: int, *, allocation: str = "uniform", minimum: int = 1
) -> list[int]:
    """Share out ranks over layers, at most `rank` per layer on average.

    Args:
        singular_values: per layer `(m_i,)`, descending, as `DirectionSum.singular_values`.
        rank: average per layer.
        allocation: `"uniform"` gives each layer `rank`; `"energy"` keeps the largest singular values of all layers
            together, which minimises the sum of the squared absolute errors, and none that is zero.
        minimum: `"energy"` gives no layer fewer than this.

    Returns:
        A rank per layer, never above `m_i`; their sum never exceeds `rank * num_layers`.

    Raises:
        OptionError: `allocation` is unknown, or a rank is not a positive integer, or `minimum` exceeds `rank`.
        ShapeError: singular values that are not one-dimensional and descending.

    Source: `rank_alloc` in section 7 of the method page of SD-LoRA.
    """
    _positive("rank", rank)
    if allocation not in _ALLOCATIONS:
        raise OptionError(f"unknown allocation {allocation!r}; {nearest(str(allocation), _ALLOCATIONS)}")
    if _positive("minimum", minimum) > rank:
        raise OptionError(f"minimum {minimum} exceeds the average rank {rank}; use at most {rank}")
    values = [_descending(index, layer) for index, layer in enumerate(singular_values)]
    if allocation == "uniform":
        return [min(rank, len(layer)) for layer in values]
    ranks = [min(minimum, len(layer)) for layer in values]
    # Within a layer the values descend, so the largest of all are always the next ones of their layers.
    rest = [(-value, i, j) for i, layer in enumerate(values) for j, value in enumerate(layer) if j >= ranks[i]]
    for negative, i, _ in sorted(rest)[: rank * len(values) - sum(ranks)]:
        ranks[i] += 1 if negative < 0.0 else 0
    return ranks


class MergePlan(NamedTuple):
    """Merge the oldest `num_blocks` blocks into one of rank `rank`."""

    num_blocks: int
    rank: int


def plan_merge(ranks: Sequence[int], new_rank: int, max_rank: int, *, keep_last: int = 2) -> MergePlan | None:
    """Decide which sealed blocks are merged so that a new one fits under a cap on the total rank.

    Args:
        ranks: of the sealed blocks, oldest first.
        new_rank: of the block to be added.
        max_rank: cap on the total, at least `2 * new_rank`.
        keep_last: how many of the newest blocks stay as they are. Fewer stay where the merged block would otherwise
            get a rank below `new_rank`.

    Returns:
        The plan, after which merged, kept and new ranks sum to exactly `max_rank`; None when all fits as it is.

    Raises:
        OptionError: a rank is not a positive integer, `max_rank` is below `2 * new_rank`, or `keep_last` is negative.

    Source: section 7 of the method page of SD-LoRA.
    """
    _positive("new_rank", new_rank)
    for rank in ranks:
        _positive("a sealed rank", rank)
    if _positive("max_rank", max_rank) < 2 * new_rank:
        raise OptionError(
            f"max_rank {max_rank} leaves no room for the past beside a block of rank {new_rank}; use at "
            f"least {2 * new_rank}"
        )
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 0:
        raise OptionError(f"keep_last must be an integer of at least 0, got {keep_last!r}; the usual value is 2")
    if sum(ranks) + new_rank <= max_rank:
        return None
    # Keeping none always works: max_rank - new_rank >= new_rank.
    for kept in range(min(keep_last, len(ranks) - 1), -1, -1):
        num_blocks = len(ranks) - kept
        rank = max_rank - new_rank - sum(ranks[num_blocks:])
        if rank >= new_rank:
            break
    return MergePlan(num_blocks, rank)


def _multipliers(scales: Tensor | Sequence[float] | None, count: int) -> list[float]:
    if scales is None:
        return [1.0] * count
    values = scales.detach().flatten().tolist() if isinstance(scales, Tensor) else list(scales)
    if len(values) != count:
        raise OptionError(f"expected {count} scales, one per direction, got {len(values)}")
    return [float(value) for value in values]


def _descending(index: int, values: Tensor) -> list[float]:
    if values.ndim != 1 or not bool((values[1:] <= values[:-1]).all()) or not bool((values >= 0).all()):
        raise ShapeError(
            f"layer {index}: expected singular values (m,), descending and not negative, got {tuple(values.shape)}"
        )
    return [float(value) for value in values]


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a positive integer, got {value!r}; the usual rank is 10")
    return value
