"""Figures that a method recorded after each task: as a table of shaded cells, and as curves where they are few."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everlora.report.charts import NUM_COLOURS, LineChart, Scale, Series, line_chart

__all__ = ["HeatRows", "Panel", "mean_lists", "panels"]

HeatRows = list[tuple[str, list[float | None]]]
MOST_LINES = 2 * NUM_COLOURS  # each colour once solid and once dashed

HEADINGS = {
    "occupied_rank": "Occupied dimensions per layer",
    "free_rank": "Free dimensions per layer",
    "total_rank": "Total rank per layer",
    "magnitude": "Magnitude of each task's direction",
    "true_magnitude": "Weight norm that each task's direction adds",
    "rho": "Share of the new direction outside the span of the old ones (rho)",
    "compress_error": "Sum of the relative errors of merging",
}
_TASKS = re.compile(r"tasks? (\d+)(?: to (\d+))?")
_Task = tuple[int, int]


@dataclass(frozen=True)
class Panel:
    """One kind of figure of one method.

    Attributes:
        title: what it shows, and of which method.
        corner: heading of the first column.
        columns: headings of the others.
        rows: name and cells, None where there is nothing.
        range: ends of the colour scale.
        spec: format of a cell.
        chart: the same as curves over tasks; None where they are too many, or there is one task only.
    """

    title: str
    corner: str
    columns: list[str]
    rows: HeatRows
    range: tuple[float, float]
    spec: str
    chart: LineChart | None


def panels(label: str, runs: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return the panels of one method, averaged over its runs, in order of first appearance.

    A panel whose names are all of tasks (`task 3`, `tasks 0 to 3`) becomes a table with a row for each moment and a
    column for each of those tasks; any other has a row for each name, or one for all if they agree, and a column for
    each moment.
    """
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.get("panels") or {}):
        recorded = [run["panels"][name] for run in runs if name in (run.get("panels") or {})]
        curves = {
            entry: mean_lists([panel[entry] for panel in recorded if entry in panel])
            for entry in dict.fromkeys(entry for panel in recorded for entry in panel)
        }
        count = max(map(len, curves.values()), default=0)
        if count:
            padded = {entry: [*curve, *[None] * (count - len(curve))] for entry, curve in curves.items()}
            found.append(_panel(name, label, padded, count))
    return found


def mean_lists(lists: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean of each place over the lists that have a number there."""
    columns = [[numbers[i] for numbers in lists if i < len(numbers)] for i in range(max(map(len, lists), default=0))]
    measured = [[float(value) for value in column if value is not None] for column in columns]
    return [sum(values) / len(values) if values else None for values in measured]


def _panel(name: str, label: str, curves: Mapping[str, list[float | None]], count: int) -> Panel:
    title = HEADINGS.get(name, name.replace("_", " ").capitalize())
    numbers = [cell for curve in curves.values() for cell in curve if cell is not None]
    spec = _spec(numbers)
    moments = [str(index + 1) for index in range(count)]
    tasks = _tasks(curves)
    if tasks is None:
        named = _named(curves)
        corner, columns, rows = "after task", moments, list(named.items())
    else:
        order = sorted(curves, key=lambda entry: tasks[entry])
        named = {f"task {_words(tasks[entry])}": curves[entry] for entry in order}
        corner, columns = "of task", [_words(tasks[entry]) for entry in order]
        rows = [(f"after {moment}", [curves[entry][i] for entry in order]) for i, moment in enumerate(moments)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return Panel(
        title=f"{title}: {label}",
        corner=corner,
        columns=columns,
        rows=rows,
        range=(min(low, 0.0), high if high > min(low, 0.0) else min(low, 0.0) + 1.0),
        spec=spec,
        chart=_chart(title, named, spec, max(abs(low), abs(high))) if count > 1 else None,
    )


def _named(curves: Mapping[str, list[float | None]]) -> dict[str, list[float | None]]:
    """The curves under short names, or as one curve where all are the same."""
    same = list(curves.values())
    if len(same) > 1 and all(curve == same[0] for curve in same):
        return {f"each of {len(same)}": same[0]}
    return dict(zip(_short(list(curves)), same, strict=True))


def _chart(title: str, curves: Mapping[str, list[float | None]], spec: str, size: float) -> LineChart | None:
    if len(curves) > MOST_LINES:
        return None
    series = [Series(name, curve, [None] * len(curve)) for name, curve in curves.items()]
    least = 0.1 * size or 1.0
    scale = Scale(unit=1.0, spec=spec, bounds=(-math.inf, math.inf), least=least, words="")
    return line_chart(title, "", series, scale=scale)


def _spec(numbers: Sequence[float]) -> str:
    """Whole numbers as such; others with three digits of the largest, as a power of ten where they are tiny."""
    if all(number == round(number) for number in numbers):
        return ".0f"
    decimals = 2 - math.floor(math.log10(max(map(abs, numbers))))
    return f".{max(decimals, 0)}f" if decimals <= 5 else ".1e"


def _tasks(names: Mapping[str, object]) -> dict[str, _Task] | None:
    """First and last task that each name stands for, or None when some name is of something else."""
    found: dict[str, _Task] = {}
    for name in names:
        match = _TASKS.fullmatch(name)
        if match is None:
            return None
        found[name] = (int(match[1]), int(match[2] or match[1]))
    return found


def _words(task: _Task) -> str:
    """Tasks count from 1 on the page."""
    first, last = task
    return str(first + 1) if first == last else f"{first + 1} to {last + 1}"


def _short(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that they all share, so that they leave room for the numbers."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return list(names)
    differing = [index for index, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [".".join(part[index] for index in differing) for part in parts]
