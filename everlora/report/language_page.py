"""What the page of a run of language models shows: curves by domain, weights compared, what is kept and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from everlora.metrics import mean_and_deviation
from everlora.report.charts import Across, LineChart, Scale, Series, line_chart
from everlora.report.costs import cost_figures
from everlora.report.language import LanguageRow, LanguageRun, language_rows
from everlora.report.language_tables import Weights, domains_of, pairs_of_weights
from everlora.report.layouts import tables
from everlora.report.panels import Panel, mean_lists, panels
from everlora.report.table import UNDEFINED, FormattedTable, statistic

__all__ = ["language_context"]

ENOUGH_SEEDS = 3
_NATS = Scale(unit=1.0, spec=".3f", bounds=(0.0, math.inf), least=0.1, words=", in nats a token")
_DIFFERENCE = Scale(unit=1.0, spec="+.3f", bounds=(-math.inf, math.inf), least=0.02, words=", in nats a token")
_Curve = Callable[[LanguageRun], list[float | None]]


def language_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template of language models needs beside what all pages have.

    Raises:
        DataError: as `language_rows`.
    """
    rows = language_rows(results)
    domains = domains_of(results)
    moments = ["pretrained", *(f"after {name}" for name in domains)]
    shown = [row for row in rows if not row.is_ablation]
    curves: list[tuple[str, _Curve]] = [("Mean of all domains", lambda run: run.curve(None))]
    curves += [(f"Domain {task + 1}: {name}", _domain(task)) for task, name in enumerate(domains)]
    own: _Curve = lambda run: run.retention()  # noqa: E731
    numbered = [*curves, ("Own texts, above the pretrained model", own)]
    return {
        "tables": tables(results) if rows else [],
        "few_seeds": any(row.n < ENOUGH_SEEDS for row in rows),
        "run_columns": ["Method", "Seed", "Mean", *domains, "Own texts"],
        "runs": [_run_cells(run, len(domains)) for row in rows for run in row.runs],
        "charts": _charts(curves, shown, domains),
        "moments": moments,
        "curve_tables": [{"title": name, "rows": _curve_rows(rows, curve)} for name, curve in numbered] if rows else [],
        "weights": _weights(pairs_of_weights(shown), domains),
        "retention": line_chart("Own texts", "nats a token", _series(shown, own), scale=_NATS, across=_across(domains)),
        "buffers": _buffers(rows, domains),
        "costs": cost_figures(_usual_runs(shown), len(domains), styles=_styles(shown)),
        "samples": [entry for row in rows if (entry := _samples(row, moments)) is not None],
        "sample_seed": rows[0].runs[0].seed if rows else None,
        "panels": [(row.runs[0].run["label"], found) for row in rows if (found := _panels(row))],
        "tasks": _domains(results, rows),
    }


def _domain(task: int) -> _Curve:
    return lambda run: run.curve(task)


def _across(domains: Sequence[str]) -> Across:
    """The moments: the pretrained model and after each task."""
    places = range(len(domains) + 1)
    return Across(
        values=places,
        ticks=[(place, str(place)) for place in places],
        label="after task",
        words=["pretrained", *(f"after {name}" for name in domains)],
    )


def _charts(
    curves: Sequence[tuple[str, _Curve]], rows: Sequence[LanguageRow], domains: Sequence[str]
) -> list[LineChart]:
    across = _across(domains)
    found = [
        line_chart(title, "nats a token", _series(rows, curve), scale=_NATS, across=across) for title, curve in curves
    ]
    return [chart for chart in found if chart is not None]


def _series(rows: Sequence[LanguageRow], curve: _Curve) -> list[Series]:
    """Mean and deviation over seeds at each moment; a row that was measured once leaves out the pretrained model."""
    return [_with_band(row.label, [_seen(curve(run)) for run in row.runs]) for row in rows]


def _seen(curve: list[float | None]) -> list[float | None]:
    """A line from the start to the end would say that something was measured in between."""
    return curve if all(value is not None for value in curve) else [None, *curve[1:]]


def _with_band(label: str, curves: Sequence[Sequence[float | None]], style: int | None = None) -> Series:
    points = [[value for value in point if value is not None] for point in zip(*curves, strict=True)]
    found = [mean_and_deviation(values) if values else (None, None) for values in points]
    return Series(label, [mean for mean, _ in found], [deviation for _, deviation in found], style)


def _weights(pairs: Sequence[Weights], domains: Sequence[str]) -> list[LineChart]:
    """For each pair one chart, with a line for each domain."""
    charts = []
    for pair in pairs:
        second = {run.seed: run for run in pair.second.runs}
        both = [(run, second[run.seed]) for run in pair.first.runs if run.seed in second]
        series = [
            _with_band(name, [_less(a.curve(task), b.curve(task)) for a, b in both])
            for task, name in enumerate(domains)
            if both
        ]
        chart = line_chart(pair.label, "nats a token", series, scale=_DIFFERENCE, across=_across(domains))
        charts += [] if chart is None else [chart]
    return charts


def _less(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]


def _curve_rows(rows: Sequence[LanguageRow], curve: _Curve) -> list[list[str]]:
    lines = []
    for row in rows:
        points = [statistic(list(point)) for point in zip(*(curve(run) for run in row.runs), strict=True)]
        cells = [UNDEFINED if p["mean"] is None else _NATS.text(p["mean"]) + _deviation(p["sd"]) for p in points]
        lines.append([row.label, *cells])
    return lines


def _deviation(value: float | None) -> str:
    return "" if value is None else f" ± {_NATS.text(value)}"


def _run_cells(run: LanguageRun, count: int) -> list[str]:
    values = [run.curve(None)[-1], *(run.curve(task)[-1] for task in range(count)), run.retention()[-1]]
    return [run.label, str(run.seed), *(UNDEFINED if value is None else _NATS.text(value) for value in values)]


def _buffers(rows: Sequence[LanguageRow], domains: Sequence[str]) -> FormattedTable | None:
    """Rows of each domain in the buffer and the bytes of all, of methods that keep any."""
    lines = []
    for row in rows:
        recorded = [run.run.get("panels") or {} for run in row.runs]
        sizes = [next(iter(panel["buffer_bytes"].values())) for panel in recorded if panel.get("buffer_bytes")]
        if not row.runs[0].is_usual or not sizes:
            continue
        names = [f"task {task}" for task in range(len(domains))]
        counts = [mean_lists([panel.get("buffer_rows", {}).get(name, []) for panel in recorded]) for name in names]
        kept = [UNDEFINED if not curve or curve[-1] is None else f"{curve[-1]:.0f}" for curve in counts]
        grown = [UNDEFINED if value is None else f"{value:,.0f}" for value in mean_lists(sizes)]
        grown += [UNDEFINED] * (len(domains) - len(grown))
        lines.append([str(row.runs[0].run["label"]), *kept, *grown])
    columns = ["Method", *(f"Rows of {name}" for name in domains), *(f"Bytes after {name}" for name in domains)]
    return FormattedTable(columns, lines) if lines else None


def _styles(rows: Sequence[LanguageRow]) -> dict[str, int]:
    """The colours that the curves have, by the label of a run."""
    return {_label(row): place for place, row in enumerate(rows) if row.runs[0].is_usual}


def _label(row: LanguageRow) -> str:
    return str(row.runs[0].run.get("label") or row.row)


def _usual_runs(rows: Sequence[LanguageRow]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs by label; one training makes all weights of a method."""
    usual = [row for row in rows if row.runs[0].is_usual]
    return {_label(row): [run.run for run in row.runs] for row in usual}


def _samples(row: LanguageRow, moments: Sequence[str]) -> dict[str, Any] | None:
    """What the first run wrote at each stage."""
    run = row.runs[0]
    written = [None if stage is None else stage.get("samples") for stage in run.stages]
    prompts = run.run["language"]["prompts"]
    if not prompts or not any(written):
        return None
    return {
        "label": row.label,
        "prompts": [
            {
                "text": _words(prompt),
                "rows": [(m, _visible(texts[place])) for m, texts in zip(moments, written, strict=True) if texts],
            }
            for place, prompt in enumerate(prompts)
        ],
    }


def _visible(text: str) -> str:
    """A text whose line ends can be seen, and which is not empty."""
    return text.replace("\n", " \u21b5 ").strip() or "(nothing)"


def _words(prompt: Mapping[str, str]) -> str:
    return " / ".join(text for text in prompt.values() if text)


def _panels(row: LanguageRow) -> list[Panel]:
    """Figures of the method itself, but for the buffer, which has a table of its own."""
    if not row.runs[0].is_usual:
        return []
    kept = [
        {"panels": {name: panel for name, panel in (run.run.get("panels") or {}).items() if "buffer" not in name}}
        for run in row.runs
    ]
    return panels(str(row.runs[0].run["label"]), kept)


def _domains(results: Mapping[str, Any], rows: Sequence[LanguageRow]) -> list[list[str]]:
    stream = results["stream"]
    cells = rows[0].runs[0].tests[0] if rows else []
    trained, tested = stream.get("train_sizes") or [], stream.get("test_sizes") or []
    return [
        [name, str(train), str(test), *(f"{cell[key]:,}" if cell else UNDEFINED for key in ("tokens", "num_bytes"))]
        for name, train, test, cell in zip(domains_of(results), trained, tested, cells, strict=False)
    ]
