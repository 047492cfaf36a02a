"""The HTML page of a run: one file that loads nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from everlora.errors import DataError
from everlora.metrics import mean_and_deviation
from everlora.report.charts import LineChart, Scale, Series, line_chart
from everlora.report.claims import claims_caption, format_claims
from everlora.report.costs import cost_figures
from everlora.report.growth import growth
from everlora.report.language import is_language
from everlora.report.language_page import language_context
from everlora.report.layouts import DEFAULT_LAYOUT, tables
from everlora.report.panels import HeatRows, panels
from everlora.report.paths import paths
from everlora.report.per_task import confusions, forgetting_by_task
from everlora.report.setup_tables import commit_rows, resolved_options
from everlora.report.table import UNDEFINED, Group, format_table, grouped_matrices, summarise
from everlora.store.files import replace_file

__all__ = ["render_report", "with_contents", "write_report", "write_text"]

TEMPLATE, LANGUAGE_TEMPLATE = "page.html.jinja", "language.html.jinja"
ENOUGH_SEEDS = 3
_ENOUGH_SECTIONS = 3
_HEADING = re.compile(r'<h2 id="([^"]+)">([^<]+)</h2>')
_PUBLISHED = {
    "source": "Source",
    "label": "Row",
    "setting": "Setting",
    "last": "Last",
    "avg": "Average",
    "learning": "When learned (TIL)",
    "growth": "Growth per task",
    "note": "Note",
}
_ALWAYS = ("source", "setting", "last", "avg", "note")


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page of `results` to `path`; parent folders are made.

    Args:
        results: the content of `results.json`.
        path: the file to write; an existing one is replaced.

    Raises:
        DataError: as `summarise`, or the page cannot be written.
    """
    write_text(path, render_report(results), make_folders=True)


def write_text(path: Path, text: str, *, make_folders: bool = False) -> None:
    """Write a file in one step, so that a reader never sees half of it.

    Args:
        path: the file; an existing one is replaced, and a device such as `/dev/null` is written to.
        text: its content.
        make_folders: whether parent folders are made.

    Raises:
        DataError: the path is a folder, or the disk refuses.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a file.")
    write = replace_file if path.is_file() or not path.exists() else Path.write_bytes
    try:
        if make_folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text.encode("utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path} cannot be written: {reason}; give write permission there, or the name of another place."
        ) from error


def render_report(results: Mapping[str, Any]) -> str:
    """Return the page of `results` as HTML.

    The numbers are those of `summarise` and `format_table`. Everything from the results is escaped, and a content
    security policy in the page forbids loading anything.

    Raises:
        DataError: as `summarise`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if is_language(results):
        own, template = language_context(results), LANGUAGE_TEMPLATE
        count = int(results["stream"].get("num_tasks") or 0)
    else:
        own, template = _context(results), TEMPLATE
        count = own["num_tasks"]
    return with_contents(environment.get_template(template).render(_shared(results, count) | own))


def with_contents(page: str) -> str:
    """Put links to all sections below the header of a page that has several."""
    headings = _HEADING.findall(page)
    if len(headings) < _ENOUGH_SECTIONS:
        return page
    links = "\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in headings)
    return page.replace("</header>", f'<nav aria-label="Sections"><ul>\n{links}\n</ul></nav>\n</header>', 1)


def _shared(results: Mapping[str, Any], num_tasks: int) -> dict[str, Any]:
    """What every page has: its title, the claims, figures of others and how it was run."""
    stream, recipe = results["stream"], results.get("recipe") or {}
    same, differing = resolved_options(results.get("runs") or [])
    return {
        "title": recipe.get("title") or recipe.get("name") or stream.get("name") or "Continual learning run",
        "facts": _facts(results, num_tasks),
        "claims": format_claims(results, separator="\n") if results.get("claims") else None,
        "claims_caption": claims_caption(results) if results.get("claims") else "",
        "published": _published(results.get("published") or []),
        "notes": _reflowed(results.get("notes") or ""),
        "recipe_text": recipe.get("text") or "",
        "versions": [*_pairs(results.get("versions")), *commit_rows(results)],
        "same_options": same,
        "options": differing,
        "settings": _pairs(results.get("settings")),
        "undefined": UNDEFINED,
    }


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    rows, groups = summarise(results), grouped_matrices(results)
    stream = results["stream"]
    by_label = {_distinct(key, groups): group for key, group in groups.items()}
    matrices = [(label, lines) for label, group in by_label.items() if (lines := _mean_matrix(group))]
    num_tasks = max((matrix.num_tasks for group in by_label.values() for _, matrix in group), default=0)
    return {
        "num_tasks": num_tasks,
        "tables": tables(results, rows) if rows else [],
        "more_tables": results.get("table", DEFAULT_LAYOUT) != DEFAULT_LAYOUT,
        "table": format_table(rows),
        "samples_table": format_table(rows, mean="samples"),
        "few_seeds": any(row["n"] < ENOUGH_SEEDS for row in rows),
        "growth": growth(rows),
        "charts": _charts(by_label),
        "curve_tables": [_curve_table(by_label, name) for name in ("acc_step", "forgetting")] if rows else [],
        "runs": _run_rows(by_label),
        "matrices": matrices,
        "heat_range": _heat_range(matrices),
        "forgotten": forgetting_by_task(by_label),
        "confusions": confusions(by_label),
        "costs": cost_figures({label: [run for run, _ in group] for label, group in by_label.items()}, num_tasks),
        "panels": [panel for label, group in by_label.items() for panel in panels(label, [run for run, _ in group])],
        "paths": [found for label, group in by_label.items() if (found := paths(label, group)) is not None],
        "tasks": _tasks(stream),
    }


def _distinct(key: tuple[str, str], groups: Mapping[tuple[str, str], Group]) -> str:
    """The label, with the method's name behind it where two methods share a label."""
    method, label = key
    shared = sum(other == label for _, other in groups) > 1
    return f"{label} ({method})" if shared else label


def _facts(results: Mapping[str, Any], num_tasks: int) -> list[tuple[str, str]]:
    stream = results["stream"]
    seeds = results.get("seeds") or []
    facts = {
        "Stream": stream.get("name"),
        "Tasks": stream.get("num_tasks", num_tasks),
        "Class order seed": stream.get("order_seed"),
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Data": results.get("data"),
        "Model": results.get("model"),
        "Device": results.get("device"),
        "Threads": results.get("threads"),
        "Created": results.get("created"),
    }
    return [(name, _text(value)) for name, value in facts.items() if value not in (None, "")]


def _charts(groups: Mapping[str, Group]) -> list[LineChart]:
    accuracy = line_chart(
        "Accuracy over the tasks seen so far", "accuracy %", _series(groups, "acc_step"), scale=Scale()
    )
    points = Scale(bounds=(-100.0, 100.0))
    forgetting = line_chart(
        "Forgetting of earlier tasks", "forgetting, points", _series(groups, "forgetting"), scale=points
    )
    return [chart for chart in (accuracy, forgetting) if chart is not None]


def _series(groups: Mapping[str, Group], name: str) -> list[Series]:
    """Mean and deviation over seeds of one curve, per method; a point is there when any seed has it."""
    series = []
    for label, group in groups.items():
        points = zip(*(matrix.curves()[name] for _, matrix in group), strict=True)
        measured = [[value for value in point if value is not None] for point in points]
        statistics = [mean_and_deviation(values) if values else (None, None) for values in measured]
        series.append(Series(label, [mean for mean, _ in statistics], [deviation for _, deviation in statistics]))
    return series


def _curve_table(groups: Mapping[str, Group], name: str) -> dict[str, Any]:
    """The chart's numbers as text, for those who want to read or copy them."""
    rows = []
    for curve in _series(groups, name):
        cells = []
        for mean, deviation in zip(curve.means, curve.deviations, strict=True):
            text = UNDEFINED if mean is None else f"{100.0 * mean:.2f}"
            cells.append(text if deviation is None else f"{text} ± {100.0 * deviation:.2f}")
        rows.append((curve.label, cells))
    titles = {
        "acc_step": "Accuracy % after each task (task mean)",
        "forgetting": "Forgetting in points after each task",
    }
    return {"title": titles[name], "rows": rows}


def _run_rows(groups: Mapping[str, Group]) -> list[list[str]]:
    names = ("last", "last_samples", "avg", "avg_samples", "forgetting")
    rows = []
    for label, group in groups.items():
        for run, matrix in group:
            summary = matrix.summary()
            rows.append([label, _text(run.get("seed")), *(_percent(summary[name]) for name in names)])
    return rows


def _heat_range(matrices: Sequence[tuple[str, HeatRows]]) -> tuple[float, float]:
    """Ends of the colour scale that all matrices share, so that equal colours are equal numbers."""
    cells = [cell for _, rows in matrices for _, row in rows for cell in row if cell is not None]
    low = 10.0 * math.floor(min(cells, default=0.0) / 10.0 - 0.5)
    return max(low, 0.0), 100.0


def _mean_matrix(group: Group) -> HeatRows:
    """Cell means in percent over the seeds that measured the cell; rows in which nothing was measured are left out."""
    stack = np.stack([matrix.values for _, matrix in group])
    measured = ~np.isnan(stack)
    counts = measured.sum(axis=0)
    sums = np.where(measured, stack, 0.0).sum(axis=0)
    rows = [
        [100.0 * float(total) / int(count) if count else None for total, count in zip(*pair, strict=True)]
        for pair in zip(sums, counts, strict=True)
    ]
    return [(f"after {i + 1}", row) for i, row in enumerate(rows) if any(cell is not None for cell in row)]


def _tasks(stream: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = stream.get("task_names") or []
    labels = stream.get("task_labels") or [[] for _ in names]
    sizes = stream.get("sizes") or [None for _ in names]
    return [
        (str(name), ", ".join(str(word) for word in words), _text(size))
        for name, words, size in zip(names, labels, sizes, strict=False)
    ]


def _published(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings and published rows; their numbers are percentages and stay as their source gives them."""
    named = {name: heading for name, heading in _PUBLISHED.items() if name in _ALWAYS or _any_has(entries, name)}
    rows = [[_text(entry.get(name)) for name in named] for entry in entries]
    return [list(named.values()), *rows] if rows else []


def _any_has(entries: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(entry.get(name) is not None for entry in entries)


def _reflowed(text: str) -> str:
    """Join the lines of each paragraph, which the page breaks by its own width; lists and indented lines stay."""
    joined = re.sub(r"(?<=\S)\n(?=[^\s\-*|])", " ", text.strip())
    return re.sub(r"\n{3,}", "\n\n", joined)


def _pairs(mapping: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(str(name), _text(value)) for name, value in (mapping or {}).items()]


def _percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{100.0 * value:.2f}"


def _text(value: Any) -> str:
    if value is None:
        return UNDEFINED
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
