"""Geometry of the picture of accuracy against growth: labelled points, with labels moved out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from everlora.report.charts import Scale, Tick, nice_range

__all__ = ["Box", "PlacedSpot", "ScatterChart", "Spot", "scatter_chart"]

WIDTH, HEIGHT = 460.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 14.0, 44.0
LETTER, LINE = 7.6, 13.0  # width and height of the labels' text
REACH = 4.5  # of a marker, to each side
GAPS = (8.0, 24.0, 44.0, 70.0)  # between marker and label
NEAR = 9.5  # a label further away gets a line to its marker

WIDE = 3.0  # from this ratio on, the horizontal axis is logarithmic
COARSE = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
FINE = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
ENOUGH_TICKS = 3
SWEEPS = 6


Point = tuple[float, float]
Segment = tuple[Point, Point]


class Box(NamedTuple):
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)


@dataclass(frozen=True)
class Spot:
    """One row: its parameters over those at the start, its accuracy with deviation, and the number of its style."""

    label: str
    size: float
    value: float
    deviation: float | None
    style: int


@dataclass(frozen=True)
class PlacedSpot:
    """A spot in chart coordinates: marker, ends of its upright line, where its label stands and how it is anchored."""

    label: str
    x: float
    y: float
    top: float
    bottom: float
    label_x: float
    label_y: float
    anchor: str
    leader: tuple[float, float] | None
    style: int
    text: str


@dataclass(frozen=True)
class ScatterChart:
    """All that the template needs to draw."""

    title: str
    x_label: str
    y_label: str
    spots: list[PlacedSpot]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    description: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def scatter_chart(title: str, y_label: str, spots: Sequence[Spot], *, scale: Scale) -> ScatterChart | None:
    """Lay out accuracy over growth.

    Args:
        title: of the chart.
        y_label: what the vertical axis shows.
        spots: the rows; sizes are positive.
        scale: the vertical axis.

    Returns:
        None for fewer than two spots, or when all stand at one size: there is nothing to set against anything.
    """
    if len({round(spot.size, 6) for spot in spots}) < 2:
        return None
    across, x_ticks, words = _across([spot.size for spot in spots])
    ends = [scale.unit * (s.value + sign * (s.deviation or 0.0)) for s in spots for sign in (-1.0, 1.0)]
    low, high, step = nice_range(min(ends), max(ends), scale)

    def up(value: float) -> float:
        share = (min(max(scale.unit * value, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - 6.0 - share * (HEIGHT - TOP - BOTTOM - 12.0)

    points = [(across(spot.size), up(spot.value)) for spot in spots]
    ends_of_bars = [[up(spot.value + sign * (spot.deviation or 0.0)) for sign in (1.0, -1.0)] for spot in spots]
    bars = [Box(x - 1.0, top, x + 1.0, low) for (x, _), (top, low) in zip(points, ends_of_bars, strict=True)]
    boxes = _place([spot.label for spot in spots], points, bars)
    placed = [_spot(*given, up=up, scale=scale) for given in zip(spots, points, boxes, strict=True)]
    y_values = [round(low / step + k, 6) * step for k in range(round((high - low) / step) + 1)]
    return ScatterChart(
        title=title,
        x_label=f"growth of the parameters{words}",
        y_label=y_label,
        spots=placed,
        x_ticks=x_ticks,
        y_ticks=[Tick(round(up(value / scale.unit), 1), f"{value:g}") for value in y_values],
        description=f"{title}{scale.words}. {'; '.join(spot.text for spot in placed)}.",
    )


def _across(sizes: Sequence[float]) -> tuple[Callable[[float], float], list[Tick], str]:
    """The horizontal axis: its scale, its ticks and what to say of it."""
    low, high = min(sizes), max(sizes)
    logarithmic = high / low >= WIDE
    change = math.log if logarithmic else float
    first, last = change(low), change(high)
    margin = 0.07 * (last - first)
    first, last = first - margin, last + margin

    def across(size: float) -> float:
        return LEFT + (change(size) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    if logarithmic:
        chosen = next(
            (kept for values in (COARSE, FINE) if len(kept := _within(values, change, first, last)) >= ENOUGH_TICKS),
            [low, high],
        )
    else:
        bottom, top, step = nice_range(100.0 * (low - 1.0), 100.0 * (high - 1.0), Scale(bounds=(-100.0, math.inf)))
        marks = [1.0 + (bottom + k * step) / 100.0 for k in range(round((top - bottom) / step) + 1)]
        chosen = _within(marks, change, first, last)
    ticks = [Tick(round(across(size), 1), f"{100.0 * (size - 1.0):+.3g} %") for size in chosen]
    return across, ticks, ", logarithmic" if logarithmic else ""


def _within(values: Sequence[float], change: Callable[[float], float], first: float, last: float) -> list[float]:
    return [value for value in values if first <= change(value) <= last]


def _spot(
    spot: Spot,
    point: tuple[float, float],
    box: Box,
    *,
    up: Callable[[float], float],
    scale: Scale,
) -> PlacedSpot:
    x, y = point
    middle = (box.top + box.bottom) / 2.0
    left = box.right < x
    centred = box.left < x < box.right
    anchor = "middle" if centred else ("end" if left else "start")
    label_x = (box.left + box.right) / 2.0 if centred else (box.right if left else box.left)
    edge = _nearest(box, point)
    deviation = spot.deviation or 0.0
    text = f"{spot.label}: {scale.text(spot.value)}"
    text += "" if spot.deviation is None else f" ± {scale.text(spot.deviation)}"
    return PlacedSpot(
        label=spot.label,
        x=round(x, 1),
        y=round(y, 1),
        top=round(up(spot.value + deviation), 1),
        bottom=round(up(spot.value - deviation), 1),
        label_x=round(label_x, 1),
        label_y=round(middle + 4.0, 1),
        anchor=anchor,
        leader=(round(edge[0], 1), round(edge[1], 1)) if math.dist(point, edge) > NEAR else None,
        style=spot.style,
        text=f"{text} at a growth of {100.0 * (spot.size - 1.0):+.1f} %",
    )


def _place(labels: Sequence[str], points: Sequence[Point], bars: Sequence[Box]) -> list[Box]:
    """Choose a box for each label: near its point, off other labels, markers and bars, inside the chart."""
    markers = [Box(x - REACH, y - REACH, x + REACH, y + REACH) for x, y in points]
    obstacles = [*3 * markers, *bars]  # a hidden marker is worse than a hidden bar
    options = [_candidates(label, point) for label, point in zip(labels, points, strict=True)]
    chosen = [boxes[0] for boxes in options]
    for _ in range(SWEEPS):
        before = list(chosen)
        for index, boxes in enumerate(options):
            others = [
                (point, box) for place, (point, box) in enumerate(zip(points, chosen, strict=True)) if place != index
            ]
            costs = [_cost(points[index], box, others, obstacles) for box in boxes]
            chosen[index] = boxes[costs.index(min(costs))]
        if chosen == before:
            break
    return chosen


def _candidates(label: str, point: Point) -> list[Box]:
    """Places around a point, the nearest first."""
    x, y = point
    width = LETTER * len(label) + 2.0
    boxes = []
    for down in (0.0, *(sign * LINE / 2 * k for k in range(1, 19) for sign in (-1.0, 1.0))):
        starts = [start for gap in GAPS for start in (x + gap, x - gap - width)]
        starts += [x - width / 2] if abs(down) >= LINE else []
        boxes += [Box(start, y + down - LINE / 2, start + width, y + down + LINE / 2) for start in starts]
    return boxes


def _cost(point: Point, box: Box, others: Sequence[tuple[Point, Box]], obstacles: Sequence[Box]) -> float:
    """What is wrong with a place for a label; the unit is one of length."""
    inside = Box(LEFT, TOP - 6.0, WIDTH - 2.0, HEIGHT - BOTTOM)
    area = (box.right - box.left) * (box.bottom - box.top)
    outside = area - box.overlap(inside)
    covered = sum(box.overlap(other) for _, other in others)
    hidden = sum(box.overlap(obstacle) for obstacle in obstacles)
    line = (point, _nearest(box, point))
    tangled = sum(_cross(line, (other, _nearest(label, other))) + _passes(line, label) for other, label in others)
    return 10.0 * outside + 6.0 * covered + hidden + 40.0 * tangled + math.dist(*line)


def _nearest(box: Box, point: Point) -> Point:
    """Place on a box that is closest to a point."""
    return min(max(point[0], box.left), box.right), min(max(point[1], box.top + 2.0), box.bottom - 2.0)


def _cross(first: Segment, second: Segment) -> bool:
    """Whether two lines cross between their ends."""
    (a, b), (c, d) = first, second
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _side(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _passes(line: Segment, box: Box) -> bool:
    """Whether a line runs through a box; looked at in a few of its points."""
    (x, y), (to_x, to_y) = line
    points = [(x + share * (to_x - x), y + share * (to_y - y)) for share in (0.2, 0.4, 0.6, 0.8)]
    return any(box.left < px < box.right and box.top < py < box.bottom for px, py in points)
