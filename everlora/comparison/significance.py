"""Paired tests over the seeds that two rows have in common, and Holm's correction over the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtr

from everlora.errors import OptionError
from everlora.metrics import mean_and_deviation, paired_difference

__all__ = ["MIN_SEEDS", "TESTS", "PairedTest", "TestName", "holm", "paired_test", "paired_tests", "t_test", "wilcoxon"]

MIN_SEEDS = 3
TOO_SMALL = "n too small"
NOT_COMMON = "no common seed has it"

TestName = Literal["t", "wilcoxon"]
TESTS: tuple[TestName, ...] = ("t", "wilcoxon")

Numbers = Mapping[int | None, float]
Outcome = tuple[float | None, float | None, str]


@dataclass(frozen=True)
class PairedTest:
    """One number of a row less that of the baseline, seed by seed.

    Attributes:
        seeds: the seeds that both have.
        difference: mean difference, None where no seed is common.
        sd: sample deviation of the differences, None for fewer than two.
        low: lower end of the 95 % bootstrap interval of the mean difference, None for too few seeds.
        high: its upper end.
        wins: in how many seeds the row has the greater number.
        statistic: t, or the smaller sum of signed ranks; None where there is no test.
        p: two-sided, before any correction.
        p_holm: corrected for the number of rows that are tested in this table.
        reason: why there is no p, else empty.
    """

    seeds: tuple[int | None, ...]
    difference: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    wins: int = 0
    statistic: float | None = None
    p: float | None = None
    p_holm: float | None = None
    reason: str = ""


def paired_tests(rows: Mapping[str, Numbers], baseline: Numbers, *, test: TestName = "t") -> dict[str, PairedTest]:
    """Test each row against the baseline; the p-values are corrected together.

    Args:
        rows: numbers by seed of each row to test.
        baseline: those of the row they are compared with.
        test: `t` for the paired t-test, `wilcoxon` for the exact signed-rank test.

    Raises:
        OptionError: `test` is another word.
    """
    found = {name: paired_test(numbers, baseline, test=test) for name, numbers in rows.items()}
    tested = [name for name, one in found.items() if one.p is not None]
    corrected = holm([found[name].p or 0.0 for name in tested])
    return found | {name: replace(found[name], p_holm=p) for name, p in zip(tested, corrected, strict=True)}


def paired_test(first: Numbers, second: Numbers, *, test: TestName = "t") -> PairedTest:
    """Compare two rows over the seeds that both have; below three of them nothing is tested.

    Raises:
        OptionError: `test` is another word.
    """
    if test not in TESTS:
        raise OptionError(f"test must be one of {', '.join(TESTS)}, found '{test}'")
    seeds = tuple(seed for seed in first if seed in second)
    if not seeds:
        return PairedTest(seeds, reason=NOT_COMMON)
    left, right = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    differences = [a - b for a, b in zip(left, right, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    interval = paired_difference(left, right)
    known = PairedTest(seeds, difference=mean, sd=deviation, wins=interval.wins)
    if len(seeds) < MIN_SEEDS:
        return replace(known, reason=TOO_SMALL)
    statistic, p, reason = t_test(differences) if test == "t" else wilcoxon(_rounded(differences, left + right))
    return replace(known, low=interval.low, high=interval.high, statistic=statistic, p=p, reason=reason)


def _rounded(differences: Sequence[float], numbers: Sequence[float]) -> list[float]:
    """Differences without the rounding of their numbers: .52 - .50 and .32 - .30 are equal, and so tie."""
    greatest = max(abs(number) for number in numbers)
    places = 12 - math.ceil(math.log10(greatest)) if greatest > 0 else 0
    return [round(value, places) for value in differences]


def t_test(differences: Sequence[float]) -> Outcome:
    """Return t and the two-sided p of paired differences, at least two; both None with a reason where t is undefined.

    Differences that are all 0 have p = 1: nothing speaks against equality.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    count, mean = len(numbers), float(numbers.mean())
    deviation = float(numbers.std(ddof=1))
    if not numbers.any():
        return None, 1.0, ""
    if deviation <= 1e-12 * float(np.abs(numbers).max()):  # equal but for rounding
        return None, None, "no spread"
    t = mean / (deviation / math.sqrt(count))
    return t, float(2.0 * stdtr(count - 1, -abs(t))), ""


def wilcoxon(differences: Sequence[float]) -> Outcome:
    """Return the smaller sum of signed ranks and its exact two-sided p.

    Differences of 0 are left out, equal ones share their mean rank, and every pattern of signs is counted, so that p
    is exact with ties too. The smallest p that n seeds can give is `2 / 2 ** n`.

    Cost: `O(n ** 3)` time.
    """
    numbers = np.asarray([value for value in differences if value != 0.0], dtype=np.float64)
    if not len(numbers):
        return None, 1.0, ""
    sizes = np.abs(numbers)
    # Twice the mean rank is a whole number, so the sums can be counted.
    doubled = [int((sizes < size).sum() * 2 + (sizes == size).sum() + 1) for size in sizes]
    positive = sum(rank for rank, value in zip(doubled, numbers, strict=True) if value > 0)
    smaller = min(positive, sum(doubled) - positive)
    ways = [1] + [0] * sum(doubled)
    for rank in doubled:
        ways = [count + (ways[place - rank] if place >= rank else 0) for place, count in enumerate(ways)]
    tail = sum(ways[: smaller + 1])
    return smaller / 2.0, min(1.0, 2.0 * tail / 2.0 ** len(numbers)), ""


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected by Holm's step-down procedure, in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = greatest
    return corrected
