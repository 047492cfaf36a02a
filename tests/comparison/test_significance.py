from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.comparison.significance import holm, paired_test, paired_tests, t_test, wilcoxon
from everlora.errors import OptionError


def test_t_by_hand() -> None:
    t, p, reason = t_test([1.0, 2.0, 3.0])
    assert t == pytest.approx(2 * math.sqrt(3), rel=1e-12)
    # with two degrees of freedom the distribution has a closed form
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12) and p == pytest.approx(0.07417990, abs=1e-8)
    assert reason == ""


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=9).filter(lambda values: np.std(values) > 1e-3))
def test_t_is_that_of_scipy(values: list[float]) -> None:
    theirs = scipy.stats.ttest_1samp(values, 0.0)
    assert t_test(values)[:2] == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)


def test_differences_without_spread_have_no_t() -> None:
    assert t_test([0.0, 0.0, 0.0]) == (None, 1.0, "")
    assert t_test([0.3 - 0.1, 0.4 - 0.2, 0.5 - 0.3]) == (None, None, "no spread")


@pytest.mark.parametrize(
    ("differences", "smaller", "p"),
    [
        ([1.0, 2.0, 3.0], 0.0, 2 / 8),
        ([1.0, 2.0, 3.0, 4.0, -5.0], 5.0, 2 * 10 / 32),  # 10 subsets of 1..5 have a sum of 5 or less
        ([1.0, 1.0, -1.0], 2.0, 1.0),
        ([0.0, 2.0, 0.0], 0.0, 1.0),
    ],
)
def test_signed_ranks_by_hand(differences: list[float], smaller: float, p: float) -> None:
    assert wilcoxon(differences)[:2] == (smaller, pytest.approx(p, rel=1e-12))


def test_signed_ranks_with_ties_count_every_pattern_of_signs() -> None:
    values = [0.5, -0.5, 1.0, 1.0, 2.0, -3.0]
    ranks = scipy.stats.rankdata(np.abs(values))
    observed = min(sum(r for r, v in zip(ranks, values, strict=True) if s * v > 0) for s in (1, -1))
    patterns = itertools.product((0, 1), repeat=len(values))
    extreme = sum(min(total := float(np.dot(signs, ranks)), ranks.sum() - total) <= observed for signs in patterns)
    assert wilcoxon(values)[1] == pytest.approx(extreme / 2 ** len(values))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_only_common_seeds_count_and_fewer_than_three_are_not_tested() -> None:
    first, second = {1: 0.5, 2: 0.7, 9: 0.1}, {2: 0.6, 1: 0.2, 3: 0.9}
    found = paired_test(first, second)
    assert (found.seeds, found.p, found.low, found.reason) == ((1, 2), None, None, "n too small")
    assert found.difference == pytest.approx(0.2) and found.wins == 2
    assert paired_test({1: 0.5}, {2: 0.5}).reason == "no common seed has it"
    with pytest.raises(OptionError, match="found 'z'"):
        paired_test(first, second, test="z")  # type: ignore[arg-type]


def test_rows_without_a_p_do_not_weigh_on_the_correction() -> None:
    base = dict(enumerate([0.0, 0.0, 0.0, 0.0]))
    rows = {
        "a": dict(enumerate([1.0, 2.0, 3.0, 2.5])),
        "b": dict(enumerate([1.0, -1.0, 2.0, 0.5])),
        "short": {0: 1.0},
    }
    found = paired_tests(rows, base)
    assert found["a"].p_holm == pytest.approx(2 * found["a"].p) and found["b"].p_holm == found["b"].p
    assert found["short"].p_holm is None


@pytest.mark.parametrize("scale", [0.01, 1e6])
def test_differences_that_differ_by_rounding_alone_tie(scale: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        first = generator.integers(40, 60, 5)
        second = first + generator.integers(-2, 3, 5)
        whole = [dict(enumerate(values.tolist())) for values in (first, second)]
        scaled = [{seed: value * scale for seed, value in numbers.items()} for numbers in whole]
        assert paired_test(*scaled, test="wilcoxon").p == paired_test(*whole, test="wilcoxon").p
