"""The tables of a run of language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from everlora.metrics import paired_difference
from everlora.report.language import LanguageRow, cross_entropy, language_rows
from everlora.report.table import UNDEFINED, FormattedTable, Statistic, show, statistic

__all__ = ["BASE", "Weights", "domains_of", "language_tables", "paired", "pairs_of_weights"]

BASE = "Pretrained model"
_KILOBYTE, _MEGABYTE = 1e3, 1e6
_Cell = Callable[[LanguageRow], str]


class Weights(NamedTuple):
    """The usual weights of a method and others it may predict with, from the same runs."""

    label: str
    first: LanguageRow
    second: LanguageRow


def language_tables(
    results: Mapping[str, Any], rows: Sequence[LanguageRow] | None = None
) -> list[tuple[str, FormattedTable]]:
    """Return caption and content of each table.

    Args:
        results: the content of `results.json`.
        rows: from `language_rows`, where they are at hand.

    Raises:
        DataError: as `language_rows`.
    """
    rows = language_rows(results) if rows is None else rows
    domains = domains_of(results)
    tables = [
        ("Cross-entropy after the last task, nats a token", _ends(rows, domains)),
        ("Learning, transfer and forgetting, nats a token", _transfers(rows)),
        ("Bits per byte after the last task", _bits(rows, domains)),
        ("What it costs", _costs(rows)),
    ]
    pairs = pairs_of_weights(rows)
    if pairs:
        tables.insert(
            2, ("Cross-entropy of the usual weights less that of the others, same runs", _pairs(pairs, domains))
        )
    if any(row.figures["answer_acc"]["mean"] is not None for row in rows):
        tables.insert(2, ("Right answers after the last task, in percent", _answers(rows, domains)))
    return tables


def domains_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the domains, in the order they are learned."""
    runs = results.get("runs") or []
    return list(runs[0]["language"]["domains"]) if runs else []


def pairs_of_weights(rows: Sequence[LanguageRow]) -> list[Weights]:
    """Return each method's usual weights with each of the others."""
    found = []
    for first in rows:
        others = [row for row in rows if row.row == first.row and row is not first]
        if first.runs[0].is_usual:
            found += [Weights(_pair_label(first, second), first, second) for second in others]
    return found


def paired(pair: Weights, value: Callable[[Any], float | None]) -> tuple[Statistic, float | None, float | None]:
    """Difference of the usual weights and the others seed by seed, and the ends of its 95 % interval."""
    second = {run.seed: run for run in pair.second.runs}
    both = [(value(run), value(second[run.seed])) for run in pair.first.runs if run.seed in second]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    found = statistic([a - b for a, b in known])
    if len(known) < 2:
        return found, None, None
    interval = paired_difference([a for a, _ in known], [b for _, b in known])
    return found, interval.low, interval.high


def _pair_label(first: LanguageRow, second: LanguageRow) -> str:
    name = first.label.removesuffix(f" {first.variant}")
    return f"{name}: {first.variant} less {second.variant}"


def _ends(rows: Sequence[LanguageRow], domains: Sequence[str]) -> FormattedTable:
    columns: dict[str, _Cell] = {"Mean of domains": _figure("ce")}
    columns |= {name: _figure(f"ce:{task}") for task, name in enumerate(domains)}
    columns |= {"Own texts, above pretrained": _figure("retention"), "Runs": lambda row: str(row.n)}
    table = _filled(rows, columns)
    return FormattedTable(table.columns, [_base_row(rows, domains, table.columns), *table.rows]) if rows else table


def _transfers(rows: Sequence[LanguageRow]) -> FormattedTable:
    columns: dict[str, _Cell] = {
        "When learned": _figure("learning_ce"),
        "BWT": _figure("bwt_ce"),
        "Forgetting": _figure("forgetting_ce"),
        "FWT": _figure("fwt_ce"),
        "General abilities": _figure("general_delta"),
    }
    return _filled(rows, columns)


def _base_row(rows: Sequence[LanguageRow], domains: Sequence[str], columns: Sequence[str]) -> list[str]:
    scores = [cross_entropy(cell) for cell in rows[0].runs[0].tests[0]]
    cells = dict(zip(domains, (UNDEFINED if score is None else f"{score:.3f}" for score in scores), strict=True))
    known = [score for score in scores if score is not None]
    if len(known) == len(scores):
        cells["Mean of domains"] = f"{sum(known) / len(known):.3f}"
    own = rows[0].runs[0].retention()[0]
    if own is not None:
        cells["Own texts, above pretrained"] = f"{own:.3f}"
    return [BASE, *(cells.get(column, UNDEFINED) for column in columns[1:])]


def _bits(rows: Sequence[LanguageRow], domains: Sequence[str]) -> FormattedTable:
    columns: dict[str, _Cell] = {"Mean of domains": _figure("bits_per_byte")}
    return _filled(rows, columns | {name: _figure(f"bits_per_byte:{task}") for task, name in enumerate(domains)})


def _answers(rows: Sequence[LanguageRow], domains: Sequence[str]) -> FormattedTable:
    columns: dict[str, _Cell] = {"Mean of tasks": _figure("answer_acc", scale=100.0, decimals=1)}
    for task, name in enumerate(domains):
        columns[name] = _figure(f"answer_acc:{task}", scale=100.0, decimals=1)
    return _filled(rows, columns | {"ROUGE-L": _figure("rouge_l", scale=100.0, decimals=1)})


def _costs(rows: Sequence[LanguageRow]) -> FormattedTable:
    columns: dict[str, _Cell] = {
        "s per task": _figure("sec_task", decimals=1),
        "ms per step": _figure("sec_step", scale=1000.0, decimals=0),
        "Trained parameters": _figure("params_trainable", decimals=0),
        "Buffer, kB": _figure("buffer_bytes", scale=1 / _KILOBYTE, decimals=1),
        "On disk, MB": _figure("state_bytes", scale=1 / _MEGABYTE, decimals=2),
        "Peak memory, MB": _figure("peak_mem", scale=1 / _MEGABYTE, decimals=0),
        "Learning rate": _rate,
        "Trials": lambda row: UNDEFINED if row.trials is None else str(row.trials),
    }
    # One training makes all weights of a method.
    return _filled([row for row in rows if row.runs[0].is_usual], columns, label=_method)


def _pairs(pairs: Sequence[Weights], domains: Sequence[str]) -> FormattedTable:
    columns: dict[str, Callable[[Any], float | None]] = {"Mean of domains": lambda run: run.curve(None)[-1]}
    for task, name in enumerate(domains):
        columns[name] = lambda run, task=task: run.curve(task)[-1]  # type: ignore[misc]
    columns["Own texts"] = lambda run: run.retention()[-1]
    cells = [[pair.label, *(_interval(pair, value) for value in columns.values())] for pair in pairs]
    return FormattedTable(["Weights", *columns], cells)


def _interval(pair: Weights, value: Callable[[Any], float | None]) -> str:
    found, low, high = paired(pair, value)
    if found["mean"] is None:
        return UNDEFINED
    text = f"{found['mean'] + 0.0:+.3f}"
    return text if low is None or high is None else f"{text} [{low:+.3f}, {high:+.3f}]"


def _filled(rows: Sequence[LanguageRow], columns: Mapping[str, _Cell], label: _Cell | None = None) -> FormattedTable:
    """The columns in which some row has something."""
    name = label or (lambda row: row.label)
    filled = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    shown = {heading: cells for heading, cells in filled.items() if any(cell != UNDEFINED for cell in cells)}
    lines = [[name(row), *(cells[place] for cells in shown.values())] for place, row in enumerate(rows)]
    return FormattedTable(["Method", *shown], lines)


def _figure(name: str, *, scale: float = 1.0, decimals: int = 3) -> _Cell:
    return lambda row: show(row.figures[name], row.n, scale=scale, decimals=decimals)


def _method(row: LanguageRow) -> str:
    return row.label if row.variant is None else row.label.removesuffix(f" {row.variant}")


def _rate(row: LanguageRow) -> str:
    rate = row.runs[0].run.get("options", {}).get("lr")
    return UNDEFINED if rate is None else f"{rate:g}"
