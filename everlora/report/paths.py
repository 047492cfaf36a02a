"""Accuracy along the straight line between the weights after one task and after the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everlora.metrics import mean_and_deviation
from everlora.report.charts import NUM_COLOURS, Across, LineChart, Mark, Scale, Series, line_chart
from everlora.report.panels import HeatRows
from everlora.report.table import Group

__all__ = ["PathChart", "Paths", "paths"]

PERCENT = Scale()
HEADINGS = {"before": "0, old classes only", "start": "0, where training began"}
_Places = dict[Any, Mapping[str, Any]]
_Measured = list[tuple[Mapping[str, Any], _Places]]


@dataclass(frozen=True)
class PathChart:
    """One pair of tasks: a chart, and its numbers for every task in percent."""

    title: str
    chart: LineChart
    columns: list[str]
    rows: HeatRows


@dataclass(frozen=True)
class Paths:
    """All pairs of one method.

    Attributes:
        label: of the method.
        charts: one for each pair of tasks.
        missing: why there is none for some pairs.
        has_before: whether accuracy among the old classes is marked.
        has_start: whether training went on from other weights than those that were evaluated.
    """

    label: str
    charts: list[PathChart]
    missing: list[str]
    has_before: bool
    has_start: bool


def paths(label: str, group: Group) -> Paths | None:
    """Return what the runs of one method recorded, averaged over runs; None if there is nothing.

    Runs that measured a pair at other places than the rest get a chart of their own.
    """
    pairs: dict[tuple[int, tuple[float, ...]], _Measured] = {}
    missing = []
    for run, _ in group:
        for entry in run.get("paths") or []:
            if "places" not in entry:
                missing.append(f"Seed {run.get('seed')}, {_title(entry['first']).lower()}: {entry['reason']}")
                continue
            places = {place["at"]: place for place in entry["places"]}
            positions = tuple(at for at in places if not isinstance(at, str))
            pairs.setdefault((entry["first"], positions), []).append((run, places))
    charts = [_chart(first, positions, pairs[first, positions]) for first, positions in sorted(pairs)]
    if not charts and not missing:
        return None
    known = {at for measured in pairs.values() for _, places in measured for at in places if isinstance(at, str)}
    return Paths(label, charts, missing, "before" in known, "start" in known)


def _title(first: int) -> str:
    return f"From task {first + 1} to task {first + 2}"


def _chart(first: int, positions: tuple[float, ...], measured: _Measured) -> PathChart:
    second = first + 1
    old = "task 1" if first == 0 else f"tasks 1 to {first + 1}"
    groups = [(old, range(second), 0), (f"task {second + 1}", range(second, second + 1), 1)]
    series = []
    for kind, words in _kinds(measured).items():
        for name, tasks, style in groups:
            curve = [_mean(measured, at, kind, tasks) for at in positions]
            label = name + words
            marks = _marks(measured, kind, tasks, label)
            dashes = NUM_COLOURS if kind == "task_aware" else 0
            series.append(Series(label, [mean for mean, _ in curve], [sd for _, sd in curve], style + dashes, marks))
    across = Across(
        values=positions,
        ticks=[(at, f"{at:g}") for at in (-0.5, 0.0, 0.5, 1.0, 1.5) if positions[0] <= at <= positions[-1]],
        label=f"weights: 0 after task {first + 1}, 1 after task {second + 1}",
        words=[f"at {at:g}" for at in positions],
    )
    chart = line_chart(_title(first), "accuracy %", series, scale=PERCENT, across=across, rules=(0.0, 1.0))
    assert chart is not None, "every position was measured"
    columns, rows = _numbers(measured, positions, second)
    return PathChart(_title(first), chart, columns, rows)


def _kinds(measured: _Measured) -> dict[str, str]:
    """Which counts there are, and the words for them; the second only where it differs from the first."""
    places = [place for _, known in measured for place in known.values()]
    kinds = {"correct": ""}
    if all("task_aware" in place for place in places) and any(p["task_aware"] != p["correct"] for p in places):
        kinds["task_aware"] = ", own classes only"
    return kinds


def _mean(measured: _Measured, at: float | str, kind: str, tasks: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean and deviation over runs of the accuracy at a place, in which every task weighs the same."""
    values = []
    for run, places in measured:
        counts = places[at][kind] if at in places else []
        if tasks[-1] < len(counts):
            values.append(sum(counts[task] / run["sizes"][task] for task in tasks) / len(tasks))
    return mean_and_deviation(values) if values else (None, None)


def _marks(measured: _Measured, kind: str, tasks: Sequence[int], label: str) -> list[Mark]:
    """What lies beside the curve at position 0."""
    marks = []
    before, _ = _mean(measured, "before", kind, tasks)
    if before is not None and kind == "correct":
        text = f"{label}, at 0 among the classes known then: {PERCENT.text(before)}"
        marks.append(Mark(0.0, before, text))
    start, _ = _mean(measured, "start", kind, tasks)
    if start is not None:
        text = f"{label}, at 0 where training began: {PERCENT.text(start)}"
        marks.append(Mark(0.0, start, text, stem=_mean(measured, 0.0, kind, tasks)[0]))
    return marks


def _numbers(measured: _Measured, positions: Sequence[float], second: int) -> tuple[list[str], HeatRows]:
    """Percent of every task at every place."""
    named: list[str] = [at for at in HEADINGS if any(at in places for _, places in measured)]
    columns = [*(HEADINGS[at] for at in named), *(f"{at:g}" for at in positions)]
    places: list[float | str] = [*named, *positions]
    rows: HeatRows = []
    for kind, words in _kinds(measured).items():
        for task in range(second + 1):
            cells = [_mean(measured, at, kind, [task])[0] for at in places]
            rows.append((f"task {task + 1}{words}", [None if cell is None else 100.0 * cell for cell in cells]))
    return columns, rows
