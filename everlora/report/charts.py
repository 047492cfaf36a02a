"""Geometry of the line charts: numbers in, coordinates and texts out. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Across",
    "Line",
    "LineChart",
    "Mark",
    "Scale",
    "Series",
    "Tick",
    "line_chart",
    "nice_range",
    "over_tasks",
]

# One chart unit is about one pixel on a phone, so text sizes in the template stay legible there.
WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 12.0, 42.0
CHARACTER = 9.0  # width of a digit in the ticks
MOST_X_TICKS = 10

NUM_COLOURS = 7

Points = list[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A value beside a curve, drawn as an open marker; with `stem`, joined to that value by a vertical line."""

    at: float
    value: float
    text: str
    stem: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve: means and deviations at the places across, None where there is none.

    Attributes:
        label: its name.
        means: values.
        deviations: half widths of the band.
        style: number of its colour and marker, beyond the colours dashed; None takes its place among the curves.
        marks: values beside the curve.
    """

    label: str
    means: Sequence[float | None]
    deviations: Sequence[float | None]
    style: int | None = None
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Across:
    """The horizontal axis: places, what is written under some of them, its name, and the words for each place."""

    values: Sequence[float]
    ticks: Sequence[tuple[float, str]]
    label: str
    words: Sequence[str]


@dataclass(frozen=True)
class Scale:
    """The vertical axis.

    Attributes:
        unit: what values are multiplied by; 100 turns fractions into percent.
        spec: format of a value after that.
        bounds: ends that rounding outwards never passes.
        least: smallest span that is drawn.
        words: how the title goes on in words, such as "in percent".
        reaches: a value that the axis always shows, such as 0 where heights are compared; None for none.
    """

    unit: float = 100.0
    spec: str = ".2f"
    bounds: tuple[float, float] = (0.0, 100.0)
    least: float = 1.0
    words: str = ", in percent"
    reaches: float | None = None

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return format(self.unit * value, self.spec)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve in chart coordinates: SVG path, SVG path of the band, marker points with what they say.

    `marks` are open markers: x, y, y of the stem's other end or None, text.
    """

    label: str
    path: str
    band: str
    points: list[tuple[float, float, str]]
    marks: list[tuple[float, float, float | None, str]]
    style: int


@dataclass(frozen=True)
class LineChart:
    """All that the template needs to draw."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    description: str
    rules: list[float] = field(default_factory=list)
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def over_tasks(count: int) -> Across:
    """The axis of the moments after each of `count` tasks."""
    spacing = math.ceil(count / MOST_X_TICKS)
    marked = [index for index in range(count) if index == 0 or (index + 1) % spacing == 0]
    return Across(
        values=range(count),
        ticks=[(index, str(index + 1)) for index in marked],
        label="after task",
        words=[f"after task {index + 1}" for index in range(count)],
    )


def line_chart(
    title: str,
    y_label: str,
    series: Sequence[Series],
    *,
    scale: Scale,
    across: Across | None = None,
    rules: Sequence[float] = (),
) -> LineChart | None:
    """Lay out curves.

    Args:
        title: of the chart.
        y_label: what the vertical axis shows.
        series: curves of equal length.
        scale: the vertical axis.
        across: the horizontal axis; None for the moments after each task.
        rules: places at which a vertical rule is drawn.

    Returns:
        None when no curve has a point.
    """
    ends = [scale.unit * value for curve in series for value in _ends(curve)]
    if not ends:
        return None
    ends += [] if scale.reaches is None else [scale.reaches]
    across = across or over_tasks(len(series[0].means))
    low, high, step = nice_range(min(ends), max(ends), scale)
    y_values = [round(low / step + k, 6) * step for k in range(round((high - low) / step) + 1)]
    texts = [f"{value + 0.0:g}" for value in y_values]
    margin = max(LEFT, 12.0 + CHARACTER * max(map(len, texts)) + (14.0 if y_label else 0.0))
    first, last = across.values[0], across.values[-1]

    def place(at: float, value: float) -> tuple[float, float]:
        along = 0.5 if first == last else (at - first) / (last - first)
        up = (min(max(scale.unit * value, low), high) - low) / (high - low)
        inner = 8.0  # room for the markers at both ends
        x = margin + inner + along * (WIDTH - margin - RIGHT - 2 * inner)
        return round(x, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    return LineChart(
        title=title,
        x_label=across.label,
        y_label=y_label,
        lines=[_line(index, curve, place, across, scale) for index, curve in enumerate(series)],
        x_ticks=[Tick(place(at, 0.0)[0], text) for at, text in across.ticks],
        y_ticks=[Tick(place(first, v / scale.unit)[1], text) for v, text in zip(y_values, texts, strict=True)],
        description=_describe(title, series, across, scale),
        rules=[place(at, 0.0)[0] for at in rules],
        left=round(margin, 1),
    )


def _ends(curve: Series) -> list[float]:
    """Every value that the chart must have room for."""
    band = [
        mean + sign * (deviation or 0.0)
        for mean, deviation in zip(curve.means, curve.deviations, strict=True)
        if mean is not None
        for sign in (-1.0, 1.0)
    ]
    stems = [mark.stem for mark in curve.marks if mark.stem is not None]
    return band + stems + [mark.value for mark in curve.marks]


def _line(number: int, curve: Series, place: Place, across: Across, scale: Scale) -> Line:
    path, bands = "", []
    points: list[tuple[float, float, str]] = []
    upper: Points = []
    lower: Points = []
    drawing = False
    for at, words, mean, deviation in zip(across.values, across.words, curve.means, curve.deviations, strict=True):
        if mean is None or deviation is None:
            bands.append(_band(upper, lower))
            upper, lower = [], []
        if mean is None:
            drawing = False
            continue
        x, y = place(at, mean)
        path += f"{'L' if drawing else 'M'}{x} {y}"
        drawing = True
        text = f"{curve.label}, {words}: {scale.text(mean)}"
        if deviation is not None:
            text += f" ± {scale.text(deviation)}"
            upper.append(place(at, mean + deviation))
            lower.append(place(at, mean - deviation))
        points.append((x, y, text))
    bands.append(_band(upper, lower))
    style = number if curve.style is None else curve.style
    marks = [_mark(mark, place) for mark in curve.marks]
    return Line(curve.label, path, "".join(bands), points, marks, style)


def _mark(mark: Mark, place: Place) -> tuple[float, float, float | None, str]:
    end = None if mark.stem is None else place(mark.at, mark.stem)[1]
    return *place(mark.at, mark.value), end, mark.text


def _band(upper: Points, lower: Points) -> str:
    """Outline of the area between two lines, as an SVG path; a single point becomes a short vertical stroke."""
    if not upper:
        return ""
    outline = [*upper, *reversed(lower)]
    if len(upper) == 1:
        (x, top), (_, bottom) = outline
        outline = [(x - 1, top), (x + 1, top), (x + 1, bottom), (x - 1, bottom)]
    return "M" + "L".join(f"{x} {y}" for x, y in outline) + "Z"


def nice_range(low: float, high: float, scale: Scale) -> tuple[float, float, float]:
    """Round a range outwards to steps of 1, 2 or 5 times a power of ten, at most about six of them."""
    bounds = scale.bounds
    span = max(high - low, scale.least)
    power = 10.0 ** math.floor(math.log10(span / 6.0))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if span / (power * factor) <= 6.0)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    if last - first < step:
        last = first + step
    if first >= bounds[1]:  # every curve lies at the upper bound
        first = bounds[1] - step
    return max(first, bounds[0]), min(last, bounds[1]), step


def _describe(title: str, series: Sequence[Series], across: Across, scale: Scale) -> str:
    """A sentence for those who do not see the chart: where each curve ends."""
    ends = []
    for curve in series:
        measured = [(words, mean) for words, mean in zip(across.words, curve.means, strict=True) if mean is not None]
        if measured:
            words, mean = measured[-1]
            ends.append(f"{curve.label} {scale.text(mean)} {words}")
    return f"{title}{scale.words}. At the end: {'; '.join(ends)}."
