"""A comparison as one HTML page that loads nothing, in the dress of the reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

import everlora.report
from everlora import __version__
from everlora.comparison.layout import TEST_NAMES, full_tests, notes_of, seed_table, text_tables
from everlora.comparison.tables import StreamTable
from everlora.report.charts import LineChart, Scale, Series, line_chart
from everlora.report.table import UNDEFINED, statistic

__all__ = ["to_html"]

TEMPLATE = "comparison.html.jinja"
MOST_CURVES = 14  # seven colours, each plain and dashed
_NATS = Scale(unit=1.0, spec=".3f", bounds=(0.0, math.inf), least=0.1, words=", in nats a token")


def to_html(tables: Sequence[StreamTable], *, test: str, printed_as: str | None) -> str:
    """Return the page. Everything from the results is escaped, and a policy in the page forbids loading anything."""
    folders = [Path(__file__).parent, Path(everlora.report.__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(table, test, printed_as) for table in tables]
    runs = [line for table in tables for line in _run_lines(table)]
    return environment.get_template(TEMPLATE).render(
        title=_title(tables),
        facts=_facts(tables, test, printed_as),
        sections=sections,
        run_columns=["Folder", "Recipe", "Setting", "Model", "Data", "Seeds", "Device", "everlora", "Created"],
        run_lines=runs,
        undefined=UNDEFINED,
        # What the pages of single runs have, and this one has not.
        published=[],
        notes="",
        settings=[],
        versions=[],
        recipe_text="",
    )


def _title(tables: Sequence[StreamTable]) -> str:
    rows = sum(len(table.rows) for table in tables)
    names = list(dict.fromkeys(str(table.stream.get("name") or "a stream") for table in tables))
    return f"Comparison of {rows} rows on {', '.join(names)}" if rows > 1 else f"One row on {names[0]}"


def _facts(tables: Sequence[StreamTable], test: str, printed_as: str | None) -> list[tuple[str, str]]:
    baselines = [table.row(table.baseline).label for table in tables if table.baseline is not None]
    facts = [("Folders", ", ".join(folder.name for table in tables for folder in table.folders))]
    if printed_as is not None:
        facts.append(("Printed as", printed_as))
    elif baselines:
        facts += [("Baseline", ", ".join(dict.fromkeys(baselines))), ("Test", TEST_NAMES[test])]
    return [*facts, ("everlora", __version__)]


def _section(table: StreamTable, test: str, printed_as: str | None) -> dict[str, Any]:
    return {
        "title": table.title,
        "tables": text_tables(table, test=test, printed_as=printed_as),
        "notes": notes_of(table, printed_as=printed_as),
        "charts": _charts(table),
        "curves_shown": min(len(table.rows), MOST_CURVES),
        "num_rows": len(table.rows),
        "tests": full_tests(table) if table.baseline is not None and printed_as is None else None,
        "seeds": seed_table(table),
        "is_language": table.is_language,
        "few_seeds": any(row.n < 3 for row in table.rows),
    }


def _charts(table: StreamTable) -> list[LineChart]:
    """Curves over the tasks, means over seeds with bands; the first rows where there are too many to tell apart."""
    curves = [[run.curve for run in row.runs] for row in table.rows[:MOST_CURVES]]
    if table.is_language:
        charts = [line_chart("Cross-entropy over all domains", "nats a token", _series(table, curves), scale=_NATS)]
    else:
        lost = [
            [run.matrix.curves()["forgetting"] for run in row.runs if run.matrix] for row in table.rows[:MOST_CURVES]
        ]
        points = Scale(bounds=(-100.0, 100.0))
        charts = [
            line_chart("Accuracy over the tasks seen so far", "accuracy %", _series(table, curves), scale=Scale()),
            line_chart("Forgetting of earlier tasks", "forgetting, points", _series(table, lost), scale=points),
        ]
    return [chart for chart in charts if chart is not None]


def _series(table: StreamTable, curves: Sequence[Sequence[Sequence[float | None]]]) -> list[Series]:
    series = []
    for row, of_seeds in zip(table.rows, curves, strict=False):
        found = [statistic(point) for point in zip(*of_seeds, strict=True)]
        series.append(Series(row.label, [one["mean"] for one in found], [one["sd"] for one in found]))
    return series


def _run_lines(table: StreamTable) -> list[list[str]]:
    lines = []
    for folder in table.folders:
        results = folder.results
        versions = results.get("versions") or {}
        seeds = ", ".join(str(seed) for seed in results.get("seeds") or [])
        values = [folder.name, folder.recipe, folder.setting, folder.model, results.get("data"), seeds]
        more = [results.get("device"), versions.get("everlora"), results.get("created")]
        lines.append([UNDEFINED if value in (None, "") else str(value) for value in (*values, *more)])
    return lines
