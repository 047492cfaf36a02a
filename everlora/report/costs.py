"""What each task cost and how the parameters grew, over the tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everlora.metrics import mean_and_deviation
from everlora.report.charts import Across, LineChart, Scale, Series, line_chart, over_tasks
from everlora.report.table import UNDEFINED, FormattedTable, show, statistic

__all__ = ["Costs", "cost_figures"]

Run = Mapping[str, Any]
MEGA = 1e-6


@dataclass(frozen=True)
class Costs:
    """Charts over the tasks, and their numbers: caption and table of each."""

    charts: list[LineChart]
    tables: list[tuple[str, FormattedTable]]


@dataclass(frozen=True)
class _Kind:
    """One cost: its name in a run's record, what it is called, and how it is printed."""

    name: str
    title: str
    unit: str
    scale: float = 1.0
    decimals: int = 0
    reaches: float | None = None
    is_drawn: bool = True


_GROWTH = _Kind("growth", "Parameters added to the pretrained network", "percent", 100.0, 2, 0.0)
_STORED = _Kind("stored_parameters", "Parameters stored", "millions", MEGA, 3)
_EACH = (
    _Kind("seconds", "Seconds for each task", "seconds", 1.0, 1, 0.0),
    _Kind("peak_memory_bytes", "Peak memory while learning", "MB", MEGA),
    _Kind("stored_parameters", "Parameters stored", "number", is_drawn=False),
    _Kind("trainable_parameters", "Parameters trained for each task", "number", is_drawn=False),
)


def cost_figures(
    groups: Mapping[str, Sequence[Run]], num_tasks: int, *, styles: Mapping[str, int] | None = None
) -> Costs | None:
    """Return parameters, seconds and peak memory over the tasks; None where nothing was recorded.

    Args:
        groups: runs by the name of their row.
        num_tasks: length of the stream.
        styles: number of the colour and marker that each row has elsewhere on the page; their order when left out.
    """
    runs = [run for group in groups.values() for run in group]
    knows_start = bool(runs) and all(run.get("reference_parameters") for run in runs)
    words = [f"task {task + 1}" for task in range(num_tasks)]
    across = replace(over_tasks(num_tasks), label="task", words=words)
    costs = Costs([], [])
    for kind in (_GROWTH if knows_start else _STORED, *_EACH):
        values = {label: [_values(run, kind.name, num_tasks) for run in group] for label, group in groups.items()}
        chart = _chart(kind, values, across, styles or {})
        if chart is not None:
            costs.charts.extend([chart] if kind.is_drawn else [])
            costs.tables.append(_table(kind, values, num_tasks))
    return costs if costs.charts else None


def _values(run: Run, name: str, num_tasks: int) -> list[float | None]:
    """The cost of each task; a row that learns all at once has one, at the last place."""
    values: list[float | None] = [None] * num_tasks
    for entry in run.get("cost") or []:
        if name == "growth":
            stored = entry.get("stored_parameters")
            value = None if stored is None else stored / run["reference_parameters"] - 1.0
        else:
            value = entry.get(name)
        values[int(entry["task"])] = None if value is None else float(value)
    return values


def _chart(
    kind: _Kind, values: Mapping[str, Sequence[Sequence[float | None]]], across: Across, styles: Mapping[str, int]
) -> LineChart | None:
    series = []
    for label, runs in values.items():
        points = [[value for value in column if value is not None] for column in zip(*runs, strict=True)]
        found = [mean_and_deviation(known) if known else (None, None) for known in points]
        means, deviations = [mean for mean, _ in found], [deviation for _, deviation in found]
        series.append(Series(label, means, deviations, styles.get(label)))
    scale = Scale(
        unit=kind.scale,
        spec=f",.{kind.decimals}f",
        bounds=(-100.0 if kind is _GROWTH else 0.0, math.inf),
        least=10.0 ** -max(kind.decimals - 1, 0),
        words=f", in {kind.unit}",
        reaches=kind.reaches,
    )
    return line_chart(kind.title, kind.unit, series, scale=scale, across=across)


def _table(
    kind: _Kind, values: Mapping[str, Sequence[Sequence[float | None]]], num_tasks: int
) -> tuple[str, FormattedTable]:
    rows = []
    for label, runs in values.items():
        columns = [statistic(list(column)) for column in zip(*runs, strict=True)]
        cells = [
            UNDEFINED if one["mean"] is None else show(one, len(runs), scale=kind.scale, decimals=kind.decimals)
            for one in columns
        ]
        rows.append([label, *cells])
    caption = f"{kind.title}, in {kind.unit}".removesuffix(", in number")
    return caption, FormattedTable(["Method", *(str(task + 1) for task in range(num_tasks))], rows)
