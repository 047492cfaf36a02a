"""Which tables a run prints: the recipe names a layout, and each layout says its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from everlora.report.language import is_language
from everlora.report.language_tables import language_tables
from everlora.report.table import UNDEFINED, FormattedTable, Row, Statistic, format_table, show, summarise

__all__ = ["DEFAULT_LAYOUT", "CaptionedTable", "tables"]

DEFAULT_LAYOUT = "accuracy"

# Where no rule is named, the task follows from the class with the highest score.
_BY_CLASS = "best class"
_MEGABYTE = 1e6


class CaptionedTable(NamedTuple):
    """A table and what stands above it."""

    caption: str
    table: FormattedTable


class _Column(NamedTuple):
    """A heading and what stands below it for a row."""

    heading: str
    cell: Callable[[Row], str]


def tables(results: Mapping[str, Any], rows: Sequence[Row] | None = None) -> list[CaptionedTable]:
    """Return the tables of a run, in the layout its recipe names.

    Args:
        results: the content of `results.json`.
        rows: from `summarise`, where they are at hand; of no use for language models.

    Raises:
        DataError: as `summarise` and `language_rows`.
    """
    if is_language(results):
        return [CaptionedTable(caption, table) for caption, table in language_tables(results)]
    layout = _LAYOUTS.get(str(results.get("table") or DEFAULT_LAYOUT), _accuracy)
    return layout(summarise(results) if rows is None else rows)


def _accuracy(rows: Sequence[Row]) -> list[CaptionedTable]:
    return [CaptionedTable("Mean ± sample deviation over runs; every task weighs the same", format_table(rows))]


def _head_to_head(rows: Sequence[Row]) -> list[CaptionedTable]:
    return [
        CaptionedTable("Accuracy, in percent; forgetting and transfer, in points", _filled(rows, _ACCURACY)),
        CaptionedTable("What is stored", _filled(rows, _SIZE)),
        CaptionedTable("How fast it is learned, and what a step costs", _filled(rows, _SPEED)),
    ]


def _filled(rows: Sequence[Row], columns: Sequence[_Column]) -> FormattedTable:
    return FormattedTable(
        ["Method", *(column.heading for column in columns)],
        [[row["label"], *(column.cell(row) for column in columns)] for row in rows],
    )


def _figure(name: str, heading: str, *, scale: float = 1.0, decimals: int = 2) -> _Column:
    """A figure as mean and deviation; a plain 0 says that it is 0 in every run without rounding."""

    def cell(row: Row) -> str:
        if name in row["exact_zeros"]:
            return "0"
        return show(row["figures"][name], row["n"], scale=scale, decimals=decimals)

    return _Column(heading, cell)


def _percent(name: str, heading: str) -> _Column:
    return _figure(name, heading, scale=100.0, decimals=1)


def _arrival(row: Row) -> str:
    """Epochs to the reference's 95 %, and in what share of tasks they sufficed where they did not always."""
    text = show(row["figures"]["e95_ref"], row["n"], decimals=1)
    reached: Statistic = row["figures"]["e95_reached"]
    if reached["mean"] is None or reached["mean"] == 1.0:
        return text
    return f"{text} ({100.0 * reached['mean']:.0f} % reached)"


def _rate(row: Row) -> str:
    """The learning rate of a row that trains."""
    rate = row["options"].get("lr")
    return f"{rate:g}" if rate is not None and row["figures"]["sec_step"]["mean"] is not None else UNDEFINED


_ACCURACY = (
    _Column("Family", lambda row: row["family"] or UNDEFINED),
    _percent("til", "TIL"),
    _percent("cil", "CIL"),
    _percent("learning_acc", "When learned (TIL)"),
    _percent("forgetting_til", "Forgetting TIL"),
    _percent("bwt_til", "BWT TIL"),
    _percent("forgetting_cil", "Forgetting CIL"),
    _percent("bwt_cil", "BWT CIL"),
    _percent("task_recognition", "Task recognised"),
    _Column("by", lambda row: row["recognition"] or _BY_CLASS),
    _Column("Runs", lambda row: str(row["n"])),
)

_SIZE = (
    _percent("params_growth", "Growth %"),
    _figure("growth_per_task", "Growth per task %", scale=100.0, decimals=2),
    _Column("Stored parameters", lambda row: show(row["cost"]["stored_parameters"], row["n"], decimals=0)),
    _figure("params_trainable", "Trained parameters", decimals=0),
    _figure("state_bytes", "On disk, MB", scale=1 / _MEGABYTE, decimals=2),
    _figure("peak_mem", "Peak memory, MB", scale=1 / _MEGABYTE, decimals=0),
)

_SPEED = (
    _figure("e95_own", "Epochs to 95 % of own best", decimals=1),
    _Column("Epochs to 95 % of reference", _arrival),
    _figure("s95_ref", "Seconds to 95 % of reference", decimals=1),
    _percent("aulc", "Mean over epochs %"),
    _figure("sec_step", "ms per step", scale=1000.0, decimals=0),
    _figure("sec_task", "s per task", decimals=1),
    _Column("Learning rate", _rate),
    _Column("Trials", lambda row: UNDEFINED if row["trials"] is None else str(row["trials"])),
)

_LAYOUTS: dict[str, Callable[[Sequence[Row]], list[CaptionedTable]]] = {
    DEFAULT_LAYOUT: _accuracy,
    "head_to_head": _head_to_head,
}
