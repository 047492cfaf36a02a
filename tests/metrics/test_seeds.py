"""Mean, deviation and the paired comparison over seeds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.errors import DataError, ShapeError
from everlora.metrics import mean_and_deviation, paired_difference


def test_deviation_is_that_of_a_sample() -> None:
    mean, deviation = mean_and_deviation([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert deviation == pytest.approx((14 / 3) ** 0.5)  # 4 + 1 + 0 + 9 over n - 1


def test_one_seed_has_no_deviation() -> None:
    assert mean_and_deviation([0.7]) == (0.7, None)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_only_finite_numbers(values: list[float]) -> None:
    with pytest.raises(DataError, match="finite"):
        mean_and_deviation(values)


def test_paired_difference_is_repeatable_and_counts_wins() -> None:
    first, second = [0.80, 0.82, 0.79, 0.81, 0.70], [0.78, 0.79, 0.79, 0.80, 0.72]
    result = paired_difference(first, second)
    assert result == paired_difference(first, second)
    assert result.mean == pytest.approx(0.008)
    assert result.wins == 3
    assert result.num_seeds == 5
    assert result.low is not None
    assert result.high is not None
    assert -0.02 <= result.low < 0 < result.high <= 0.03


def test_equal_differences_have_an_interval_of_no_width() -> None:
    result = paired_difference([0.75, 0.5], [0.5, 0.25])
    assert (result.low, result.high) == (0.25, 0.25)


def test_one_seed_has_no_interval() -> None:
    result = paired_difference([0.8], [0.7])
    assert (result.low, result.high, result.wins) == (None, None, 1)


def test_seeds_must_match() -> None:
    with pytest.raises(ShapeError, match="per seed"):
        paired_difference([0.8], [0.7, 0.6])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_interval_lies_within_the_differences(values: list[float]) -> None:
    result = paired_difference(values, [0.5] * len(values), resamples=200)
    differences = [value - 0.5 for value in values]
    assert result.low is not None
    assert result.high is not None
    assert min(differences) - 1e-12 <= result.low <= result.high <= max(differences) + 1e-12
