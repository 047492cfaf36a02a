"""The page of a sweep: a table of all settings, and the value over each option with the best one marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from everlora.report.charts import Across, LineChart, Mark, Scale, Series, line_chart
from everlora.report.page import write_text
from everlora.report.table import UNDEFINED

__all__ = ["best_lines", "markdown_table", "sweep_columns", "sweep_rows", "write_sweep_report"]

TEMPLATE = "sweep.html.jinja"
BEST_STYLE = 1  # second colour and marker, a square
_LOG_RATIO = 8.0
_MOST_TICKS = 8

Trial = Mapping[str, Any]


def write_sweep_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page of a sweep, which loads nothing; an existing one is replaced.

    Args:
        results: the content of `sweep.json`.
        path: the file to write.

    Raises:
        DataError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(TEMPLATE).render(_context(results)))


def sweep_columns(results: Mapping[str, Any]) -> list[str]:
    """Headings of the table: row, the options that were tried, value, seeds, seconds."""
    return ["Row", *_keys(results["trials"]), _value_name(results), "Seeds", "Seconds"]


def sweep_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The settings, those of a row together, the best first; those without a value stand last, with the reason."""
    keys, sign = _keys(results["trials"]), 1.0 if results["is_lower_better"] else -1.0
    order = {row: index for index, row in enumerate(dict.fromkeys(trial["row"] for trial in results["trials"]))}

    def place(trial: Trial) -> tuple[int, float]:
        return order[trial["row"]], math.inf if trial["mean"] is None else sign * trial["mean"]

    rows = []
    for trial in sorted(results["trials"], key=place):
        options = [_text(trial["options"][key]) if key in trial["options"] else UNDEFINED for key in keys]
        best = results["best"].get(trial["row"], {}).get("trial") == trial["name"]
        label = f"{trial['label']} (best)" if best else trial["label"]
        rows.append([label, *options, _value(trial, results), str(len(trial["values"])), f"{trial['seconds']:.1f}"])
    return rows


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table as Markdown, with the best settings below it."""
    columns = sweep_columns(results)
    lines = [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    lines += [_markdown_row(row) for row in sweep_rows(results)]
    lines += ["", *(f"- {words}" for words in best_lines(results))]
    return "\n".join(lines) + "\n"


def best_lines(results: Mapping[str, Any]) -> list[str]:
    """One sentence or more on the best setting of each row, ties and edges included."""
    lines = []
    for best in results["best"].values():
        value = _number(best["mean"], results)
        words = best["set"] or "nothing to set"
        lines.append(f"{best['label']}: {words} ({_value_name(results)} {value})")
        if best["ties"]:
            others = f"{len(best['ties'])} other setting{'s' if len(best['ties']) > 1 else ''}"
            more = "; the whole stream (--validation 0.2) may tell them apart" if results["first_task"] else ""
            lines.append(f"{best['label']}: {others} did exactly as well, the first that was tried is named{more}")
        lines += [f"{best['label']}: {words}" for words in best["edges"]]
    failed = [trial for trial in results["trials"] if trial["error"]]
    lines += [f"{trial['label']}, {_setting(trial)}: no value, because {trial['error']}" for trial in failed]
    return lines


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    judged = (
        f"{results['fraction']:.0%} of the training rows of {'the first' if results['first_task'] else 'each'} task"
    )
    facts = {
        "Setting": results["setting"],
        "Judged by": judged,
        "Learned": results["rows_judged_by"],
        "Tried": f"{len(results['trials'])} settings",
        "Seeds": ", ".join(str(seed) for seed in results["seeds"]),
        "Model": results["model"],
        "Data": results["data"],
        "Created": results["created"],
    }
    return {
        "title": f"Sweep: {results['recipe']['title']}",
        "facts": [(name, str(value)) for name, value in facts.items()],
        "columns": sweep_columns(results),
        "rows": sweep_rows(results),
        "best": best_lines(results),
        "groups": _groups(results),
        "lower": results["is_lower_better"],
        "published": [],
        "notes": "",
        "settings": [(key, _text(value)) for key, value in {**results["options"], **_tried(results)}.items()],
        "versions": [(name, str(value)) for name, value in results["versions"].items()],
        "recipe_text": results["recipe"]["text"],
    }


def _tried(results: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tried: {key}": values for key, values in results["space"].items()}


def _groups(results: Mapping[str, Any]) -> list[tuple[str, list[LineChart]]]:
    """The charts of each row: one for each option of which several values have been tried."""
    groups = []
    for row, best in results["best"].items():
        trials = [trial for trial in results["trials"] if trial["row"] == row and trial["mean"] is not None]
        charts = [chart for key in _keys(trials) if (chart := _chart(key, trials, best, results)) is not None]
        if charts:
            groups.append((best["label"], charts))
    return groups


def _chart(key: str, trials: Sequence[Trial], best: Mapping[str, Any], results: Mapping[str, Any]) -> LineChart | None:
    """Every setting as an open marker, the best one filled; a line joins the best of each value of a grid."""
    trials = [trial for trial in trials if key in trial["options"]]
    values = _ordered({json.dumps(trial["options"][key]): trial["options"][key] for trial in trials})
    if len(values) < 2:
        return None
    places = _places(values)
    at = {json.dumps(value): place for value, place in zip(values, places, strict=True)}
    by_value = {word: [trial for trial in trials if json.dumps(trial["options"][key]) == word] for word in at}
    chosen = min if results["is_lower_better"] else max
    leaders = [chosen(found, key=lambda trial: float(trial["mean"])) for found in by_value.values()]
    is_listed = results["random"] is None
    marks = [
        Mark(at[word], trial["mean"], f"{_setting(trial)}: {_value(trial, results)}")
        for word, found in by_value.items()
        for trial in found
        if trial["name"] != best["trial"]
    ]
    means = [leader["mean"] if is_listed else None for leader in leaders]
    deviations = [leader["deviation"] if is_listed else None for leader in leaders]
    others = Series("settings tried" if not is_listed else "best setting of each value", means, deviations, 0, marks)
    is_best = [json.dumps(best["options"].get(key)) == word for word in at]
    winner = Series("best of all", [best["mean"] if found else None for found in is_best], [None] * len(at), BEST_STYLE)
    across = Across(places, _ticks(values, places), key, [f"{key}={_text(value)}" for value in values])
    return line_chart(f"{key}", _value_name(results), [others, winner], scale=_scale(results), across=across)


def _ordered(values: Mapping[str, Any]) -> list[Any]:
    """Numbers by size, other values as they come."""
    found = list(values.values())
    return sorted(found) if all(_is_number(value) for value in found) else found


def _places(values: Sequence[Any]) -> list[float]:
    """Where values stand: numbers by size, or by its logarithm where they span much, other values side by side."""
    if not all(_is_number(value) for value in values):
        return [float(index) for index in range(len(values))]
    if min(values) > 0 and max(values) / min(values) >= _LOG_RATIO:
        return [math.log10(value) for value in values]
    return [float(value) for value in values]


def _ticks(values: Sequence[Any], places: Sequence[float]) -> list[tuple[float, str]]:
    """What is written under some of the values, so that no two words overlap."""
    span = places[-1] - places[0]
    chosen: list[tuple[float, str]] = []
    for value, place in zip(values, places, strict=True):
        if not chosen or place - chosen[-1][0] >= span / _MOST_TICKS:
            chosen.append((place, _text(value)))
    return chosen


def _scale(results: Mapping[str, Any]) -> Scale:
    if results["is_lower_better"]:
        return Scale(unit=1.0, spec=".4f", bounds=(0.0, math.inf), least=0.01, words=", in nats a token")
    return Scale()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keys(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial["options"]))


def _setting(trial: Trial) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in trial["options"].items()) or "as in the recipe"


def _value_name(results: Mapping[str, Any]) -> str:
    names = {"last": "accuracy %", "avg": "average accuracy %"}
    return names.get(results["metric"], str(results["metric"]))


def _number(value: float | None, results: Mapping[str, Any]) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.4f}" if results["is_lower_better"] else f"{100.0 * value:.2f}"


def _value(trial: Trial, results: Mapping[str, Any]) -> str:
    text = _number(trial["mean"], results)
    return text if trial["deviation"] is None else f"{text} ± {_number(trial['deviation'], results)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
