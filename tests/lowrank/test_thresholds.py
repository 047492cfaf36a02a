from __future__ import annotations

import itertools

import pytest

from everlora.errors import OptionError, TaskCountError
from everlora.lowrank import ConstantThreshold, GeometricThreshold, LinearThreshold


def test_linear_follows_the_official_formula():
    schedule = LinearThreshold(0.95, 1.0, 10)
    assert schedule(0) == 0.95
    assert schedule(9) == pytest.approx(1.0 - 0.05 / 10, abs=1e-15)
    assert schedule(1) == pytest.approx(0.955, abs=1e-15)


def test_linear_refuses_a_task_beyond_the_declared_number():
    with pytest.raises(TaskCountError, match="10 tasks"):
        LinearThreshold(0.95, 1.0, 10)(10)


def test_geometric_meets_linear_at_both_ends_and_never_reaches_one():
    schedule, linear = GeometricThreshold(0.95, horizon=10), LinearThreshold(0.95, 1.0, 10)
    assert schedule(0) == pytest.approx(linear(0), abs=1e-15)
    assert schedule(9) == pytest.approx(linear(9), abs=1e-15)
    values = [schedule(t) for t in range(100)]
    assert all(a < b < 1.0 for a, b in itertools.pairwise(values))
    assert schedule(100_000) < 1.0


def test_constant_is_constant():
    assert {ConstantThreshold(0.9)(t) for t in (0, 7, 10_000)} == {0.9}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearThreshold(0.0, 1.0, 10),
        lambda: LinearThreshold(1.0, 1.0, 10),
        lambda: LinearThreshold(0.95, 0.9, 10),
        lambda: LinearThreshold(0.95, 1.1, 10),
        lambda: LinearThreshold(0.95, 1.0, 0),
        lambda: LinearThreshold(float("nan"), 1.0, 10),
        lambda: ConstantThreshold(0.0),
        lambda: ConstantThreshold(1.5),
        lambda: GeometricThreshold(0.95, horizon=1),
        lambda: GeometricThreshold(1.0),
        lambda: ConstantThreshold(0.9)(-1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(OptionError):
        make()
