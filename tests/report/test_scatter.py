"""The picture of accuracy against growth: axes, and labels that can be read."""

from __future__ import annotations

import itertools

import pytest

from everlora.report import scatter
from everlora.report.charts import Scale
from everlora.report.scatter import LETTER, LINE, Box, PlacedSpot, ScatterChart, Spot, scatter_chart

SIZES = [2.0, 9.0, 10.9, 10.0, 1.02, 1.02, 1.02, 0.998, 1.02, 1.02, 1.02, 1.07, 1.54, 2.95]
NAMES = [
    *["ConvLoRA", "SenaCNN", "PNN", "Independent", "Joint", "Sequential", "Head only"],
    *["Class means", "Replay", "LwF", "EWC", "PackNet", "ConvLoRA r=2", "ConvLoRA r=8"],
]


def chart(sizes: list[float], values: list[float], names: list[str] | None = None) -> ScatterChart:
    names = names or [f"row {index}" for index in range(len(sizes))]
    spots = [Spot(name, size, value, 0.01, 0) for name, size, value in zip(names, sizes, values, strict=True)]
    made = scatter_chart("Accuracy", "accuracy %", spots, scale=Scale())
    assert made is not None
    return made


def box(spot: PlacedSpot) -> Box:
    width = LETTER * len(spot.label)
    left = spot.label_x - {"start": 0.0, "middle": width / 2, "end": width}[spot.anchor]
    middle = spot.label_y - 4.0
    return Box(left, middle - LINE / 2, left + width, middle + LINE / 2)


@pytest.mark.parametrize("spread", [0.5, *(pytest.param(small, marks=pytest.mark.slow) for small in (0.15, 0.03))])
def test_labels_do_not_cover_one_another_and_stay_inside(spread: float) -> None:
    values = [0.5 + spread * ((7 * index) % 14) / 14 for index in range(14)]
    placed = chart(SIZES, values, NAMES).spots
    for first, second in itertools.combinations(map(box, placed), 2):
        assert first.overlap(second) < 0.15 * LETTER * LINE * 8, "a fringe at most"
    assert all(one.left >= scatter.LEFT - 1 and one.right <= scatter.WIDTH for one in map(box, placed))


def test_a_label_far_from_its_marker_is_led_to_it() -> None:
    placed = chart([1.0, 1.0, 1.0, 1.0, 2.0], [0.5, 0.501, 0.502, 0.503, 0.6]).spots
    leaders = [spot for spot in placed if spot.leader]
    assert leaders
    assert placed[-1].leader is None, "alone, its label stands beside it"


@pytest.mark.slow
def test_a_wide_range_is_logarithmic_and_a_narrow_one_is_not() -> None:
    wide = chart(SIZES, [0.5] * 14)
    assert wide.x_label.endswith("logarithmic")
    assert {"+0 %", "+100 %", "+900 %"} <= {tick.text for tick in wide.x_ticks}
    narrow = chart([1.0, 1.2, 1.5], [0.4, 0.5, 0.6])
    assert not narrow.x_label.endswith("logarithmic")
    steps = [b.position - a.position for a, b in itertools.pairwise(narrow.x_ticks)]
    assert len(steps) >= 2 and max(steps) - min(steps) < 0.3
    xs = [spot.x for spot in narrow.spots]
    assert xs == sorted(xs) and (xs[2] - xs[1]) / (xs[1] - xs[0]) == pytest.approx(1.5, abs=0.02)


def test_higher_is_better_and_bars_reach_one_deviation() -> None:
    low, high = chart([1.0, 2.0], [0.4, 0.8]).spots
    assert high.y < low.y
    assert low.top < low.y < low.bottom
    assert low.y - low.top == pytest.approx(low.bottom - low.y, abs=0.2)
    assert high.text == "row 1: 80.00 ± 1.00 at a growth of +100.0 %"


def test_there_is_nothing_to_draw_when_all_are_of_one_size() -> None:
    assert scatter_chart("t", "y", [Spot("a", 1.0, 0.5, None, 0), Spot("b", 1.0, 0.6, None, 0)], scale=Scale()) is None
    assert scatter_chart("t", "y", [], scale=Scale()) is None


@pytest.mark.slow
def test_the_same_picture_every_time() -> None:
    values = [0.5 + 0.01 * index for index in range(14)]
    assert chart(SIZES, values, NAMES) == chart(SIZES, values, NAMES)
