"""Geometry of the line charts: numbers in, coordinates and texts out. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Line", "LineChart", "Series", "Tick", "line_chart"]

# One chart unit is about one pixel on a phone, so text sizes in the template stay legible there.
WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 12.0, 42.0
MOST_X_TICKS = 10

Points = list[tuple[float, float]]
Place = Callable[[int, float], tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One method's curve: means and deviations per task, None where there is none."""

    label: str
    means: Sequence[float | None]
    deviations: Sequence[float | None]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve in chart coordinates: SVG path, SVG path of the band, marker points with what they say."""

    label: str
    path: str
    band: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    """All that the template needs to draw."""

    title: str
    y_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    description: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def line_chart(title: str, y_label: str, series: Sequence[Series], *, bounds: tuple[float, float]) -> LineChart | None:
    """Lay out curves over tasks, in percent.

    Args:
        title: of the chart.
        y_label: what the vertical axis shows.
        series: curves of equal length, as fractions.
        bounds: the values in percent which the vertical axis never leaves by rounding outwards.

    Returns:
        None when no curve has a point.
    """
    ends = [
        100.0 * (mean + sign * (deviation or 0.0))
        for curve in series
        for mean, deviation in zip(curve.means, curve.deviations, strict=True)
        if mean is not None
        for sign in (-1.0, 1.0)
    ]
    if not ends:
        return None
    low, high, step = _nice_range(min(ends), max(ends), bounds)
    count = len(series[0].means)

    def place(index: int, percent: float) -> tuple[float, float]:
        across = 0.5 if count == 1 else index / (count - 1)
        up = (min(max(percent, low), high) - low) / (high - low)
        inner = 8.0  # room for the markers at both ends
        x = LEFT + inner + across * (WIDTH - LEFT - RIGHT - 2 * inner)
        return round(x, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    lines = [_line(curve, place) for curve in series]
    spacing = math.ceil(count / MOST_X_TICKS)
    marked = [index for index in range(count) if index == 0 or (index + 1) % spacing == 0]
    x_ticks = [Tick(place(index, low)[0], str(index + 1)) for index in marked]
    num_steps = round((high - low) / step)
    y_ticks = [Tick(place(0, low + k * step)[1], f"{low + k * step:g}") for k in range(num_steps + 1)]
    return LineChart(title, y_label, lines, x_ticks, y_ticks, _describe(title, series))


def _line(curve: Series, place: Place) -> Line:
    path, bands = "", []
    points: list[tuple[float, float, str]] = []
    upper: Points = []
    lower: Points = []
    drawing = False
    for index, (mean, deviation) in enumerate(zip(curve.means, curve.deviations, strict=True)):
        if mean is None or deviation is None:
            bands.append(_band(upper, lower))
            upper, lower = [], []
        if mean is None:
            drawing = False
            continue
        x, y = place(index, 100.0 * mean)
        path += f"{'L' if drawing else 'M'}{x} {y}"
        drawing = True
        text = f"{curve.label}, after task {index + 1}: {100.0 * mean:.2f}"
        if deviation is not None:
            text += f" ± {100.0 * deviation:.2f}"
            upper.append(place(index, 100.0 * (mean + deviation)))
            lower.append(place(index, 100.0 * (mean - deviation)))
        points.append((x, y, text))
    bands.append(_band(upper, lower))
    return Line(curve.label, path, "".join(bands), points)


def _band(upper: Points, lower: Points) -> str:
    """Outline of the area between two lines, as an SVG path; a single point becomes a short vertical stroke."""
    if not upper:
        return ""
    outline = [*upper, *reversed(lower)]
    if len(upper) == 1:
        (x, top), (_, bottom) = outline
        outline = [(x - 1, top), (x + 1, top), (x + 1, bottom), (x - 1, bottom)]
    return "M" + "L".join(f"{x} {y}" for x, y in outline) + "Z"


def _nice_range(low: float, high: float, bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Round a range outwards to steps of 1, 2 or 5 times a power of ten, at most about six of them."""
    span = max(high - low, 1.0)
    power = 10.0 ** math.floor(math.log10(span / 6.0))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if span / (power * factor) <= 6.0)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    if last - first < step:
        last = first + step
    if first >= bounds[1]:  # every curve lies at the upper bound
        first = bounds[1] - step
    return max(first, bounds[0]), min(last, bounds[1]), step


def _describe(title: str, series: Sequence[Series]) -> str:
    """A sentence for those who do not see the chart: where each curve ends."""
    ends = []
    for curve in series:
        measured = [(index, mean) for index, mean in enumerate(curve.means) if mean is not None]
        if measured:
            index, mean = measured[-1]
            ends.append(f"{curve.label} {100.0 * mean:.2f} after task {index + 1}")
    return f"{title}, in percent. At the end: {'; '.join(ends)}."
