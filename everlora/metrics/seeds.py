"""Numbers over several seeds: mean with deviation, and the paired comparison of two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from everlora.errors import DataError, ShapeError
from everlora.metrics.formulas import FloatArray

__all__ = ["PairedDifference", "mean_and_deviation", "paired_difference"]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two methods over the same seeds.

    Attributes:
        mean: mean of `first - second`.
        low: lower end of the bootstrap interval, None for one seed.
        high: upper end, None for one seed.
        wins: in how many seeds the first is strictly greater.
        num_seeds: how many seeds were compared.
    """

    mean: float
    low: float | None
    high: float | None
    wins: int
    num_seeds: int


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (`ddof=1`); for one value the deviation is None.

    Args:
        values: one number per run, all finite.

    Raises:
        DataError: there is no value, or one is not finite.
    """
    numbers = _finite(values, "values")
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Compare two methods that ran on the same seeds, with a percentile bootstrap over the seeds.

    Args:
        first: one number per seed.
        second: the numbers of the other method, same seeds in the same order.
        resamples: how many times the seeds are drawn with replacement.
        seed: of the draws, so that the interval is the same every time.
        level: coverage of the interval.

    Raises:
        ShapeError: the two have different lengths.
        DataError: there is no seed, or a number is not finite.

    Cost: `O(resamples * num_seeds)` time and memory.
    """
    left, right = _finite(first, "first"), _finite(second, "second")
    if left.shape != right.shape:
        raise ShapeError(f"first and second must have one value per seed each, found {len(left)} and {len(right)}")
    differences = left - right
    count = len(differences)
    low = high = None
    if count > 1:
        draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
        tail = (1.0 - level) / 2.0
        low, high = (float(end) for end in np.quantile(differences[draws].mean(axis=1), [tail, 1.0 - tail]))
    return PairedDifference(float(differences.mean()), low, high, int((differences > 0).sum()), count)


def _finite(values: Sequence[float], name: str) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise DataError(f"{name} must be at least one finite number, one per seed; leave out runs without a value")
    return numbers
