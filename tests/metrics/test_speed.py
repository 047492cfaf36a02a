"""Speed of learning, on curves whose numbers can be read off."""

from __future__ import annotations

import pytest

from everlora.errors import DataError
from everlora.metrics.speed import Arrival, area_over_epochs, arrival, best_accuracy, epochs_to_own_share


def curve(*accuracies: float) -> list[tuple[float, float]]:
    """Two seconds an epoch."""
    return [(accuracy, 2.0 * epoch) for epoch, accuracy in enumerate(accuracies)]


def test_the_first_epoch_at_95_percent_of_the_best() -> None:
    assert epochs_to_own_share(curve(0.1, 0.5, 0.9, 0.95, 1.0)) == 3
    assert epochs_to_own_share(curve(0.1, 0.5, 0.94, 0.94, 1.0)) == 4
    assert epochs_to_own_share(curve(0.3, 0.3, 0.3)) == 0
    assert epochs_to_own_share(curve(0.6, 0.5, 0.4)) == 0, "the best may be where training began"
    assert epochs_to_own_share(curve(0.1, 0.8, 0.2), share=0.5) == 1


def test_counts_that_reach_the_target_exactly_are_not_lost_to_rounding() -> None:
    assert epochs_to_own_share(curve(0.0, 19 / 30, 20 / 30)) == 1
    assert arrival(curve(0.0, 0.7 * 0.95), 0.95 * 0.7).reached


def test_a_target_that_is_never_reached_costs_one_more_epoch() -> None:
    slow = curve(0.1, 0.2, 0.3)
    assert arrival(slow, 0.3) == Arrival(2, 4.0, True)
    assert arrival(slow, 0.31) == Arrival(3, 6.0, False)
    assert arrival(slow, 0.05) == Arrival(0, 0.0, True)


def test_the_area_leaves_the_start_out() -> None:
    assert area_over_epochs(curve(0.9, 0.2, 0.4)) == pytest.approx(0.3)
    assert best_accuracy(curve(0.1, 0.7, 0.4)) == 0.7


@pytest.mark.parametrize("function", [best_accuracy, epochs_to_own_share, area_over_epochs, lambda c: arrival(c, 0.5)])
@pytest.mark.parametrize("points", [[], [(0.5, 0.0)]])
def test_a_curve_without_epochs_is_refused(function, points) -> None:
    with pytest.raises(DataError, match="at least one epoch"):
        function(points)
