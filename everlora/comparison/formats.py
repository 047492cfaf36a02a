"""A comparison as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everlora.comparison.layout import is_number_column, notes_of, text_tables
from everlora.comparison.tables import StreamTable
from everlora.report import CaptionedTable
from everlora.report.table import UNDEFINED, Statistic

__all__ = ["to_csv", "to_latex", "to_markdown"]

CSV_COLUMNS = (
    "kind",
    "stream",
    "row",
    "label",
    "number",
    "unit",
    "mean",
    "sd",
    "n",
    "seeds",
    "baseline",
    "common_seeds",
    "difference",
    "interval_low",
    "interval_high",
    "statistic",
    "p",
    "p_holm",
    "reason",
    "source",
    "differs",
)

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    UNDEFINED: "--",
}
_SIGNED = re.compile(r"-(?=[\d.])")


def to_markdown(tables: Sequence[StreamTable], *, test: str, printed_as: str | None) -> str:
    """Return the comparison as GitHub-flavoured Markdown, a section for each stream."""
    parts = []
    for table in tables:
        parts.append(f"## {_markdown_text(table.title)}")
        for shown in text_tables(table, test=test, printed_as=printed_as):
            parts += [f"{_markdown_text(shown.caption)}:", _markdown_table(shown)]
        parts += ["\n".join(f"- {_markdown_text(note)}" for note in notes_of(table, printed_as=printed_as))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(shown: CaptionedTable) -> str:
    columns, rows = shown.table
    numeric = [is_number_column([row[place] for row in rows]) for place in range(len(columns))]
    lines = [columns, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(_markdown_text(cell) for cell in line)} |" for line in lines)


def _markdown_text(text: str) -> str:
    """Characters that would become markup, links between cells or HTML are written as themselves."""
    escaped = re.sub(r"([\\|*`\[\]])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_latex(tables: Sequence[StreamTable], *, test: str, printed_as: str | None) -> str:
    r"""Return the comparison as LaTeX tables for a document with `\usepackage{booktabs}`."""
    parts = ["% Needs \\usepackage{booktabs} in the preamble."]
    for table in tables:
        notes = notes_of(table, printed_as=printed_as)
        for place, shown in enumerate(text_tables(table, test=test, printed_as=printed_as)):
            parts.append(_latex_table(shown, table.title, notes if place == 0 else []))
    return "\n\n".join(parts) + "\n"


def _latex_table(shown: CaptionedTable, title: str, notes: Iterable[str]) -> str:
    columns, rows = shown.table
    numeric = [is_number_column([row[place] for row in rows]) for place in range(len(columns))]
    caption = ". ".join([title, shown.caption]) + "." + "".join(f" {note}" for note in notes)
    return "\n".join(
        [
            r"\begin{table}[ht]",
            r"\centering",
            rf"\caption{{{_latex_text(caption)}}}",
            rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
            r"\toprule",
            _latex_line(columns),
            r"\midrule",
            *(_latex_line(row) for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(_latex_cell(cell) for cell in cells)} \\\\"


def _latex_cell(cell: str) -> str:
    """A cell: the minus of a number is no hyphen, and a bracket cannot be taken for the option of the line before."""
    text = _latex_text(cell)
    if is_number_column([cell]):
        text = _SIGNED.sub("$-$", text)
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def to_csv(tables: Sequence[StreamTable], *, printed_as: str | None) -> str:
    """Return one line for each row and number, in stored units and with every digit; what does not exist is empty.

    `kind` is `measured`, `published` (mean and sd as fractions, difference ours less the published one by task mean) or
    `printed` (in the unit of the project).
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for table in tables:
        lines = [*_measured(table), *_published(table)]
        if printed_as is not None:
            lines += _printed(table, printed_as)
        writer.writerows({"stream": table.title, **line} for line in lines)
    return file.getvalue()


def _measured(table: StreamTable) -> Iterable[Mapping[str, Any]]:
    for row in table.rows:
        for one in table.measures:
            test = table.tests.get(one.name, {}).get(row.key)
            line = {
                "kind": "measured",
                "row": row.key,
                "label": row.label,
                "number": one.name,
                "unit": one.unit,
                **row.statistic(one.name),
                "seeds": _seeds(row.seeds),
            }
            if test is not None:
                line |= {
                    "baseline": table.baseline,
                    "common_seeds": _seeds(test.seeds),
                    "difference": test.difference,
                    "interval_low": test.low,
                    "interval_high": test.high,
                    "statistic": test.statistic,
                    "p": test.p,
                    "p_holm": test.p_holm,
                    "reason": test.reason,
                }
            yield line


def _seeds(seeds: Iterable[int | None]) -> str:
    return " ".join(str(seed) for seed in seeds)


def _published(table: StreamTable) -> Iterable[Mapping[str, Any]]:
    for line in table.published:
        difference = line.difference("tasks")
        yield {
            "kind": "published",
            "row": line.row,
            "label": line.label,
            "number": line.figure,
            "unit": "fraction",
            "mean": line.published / 100.0,
            "sd": None if line.sd is None else line.sd / 100.0,
            "difference": None if difference is None else difference / 100.0,
            "source": line.source,
            "differs": "; ".join(line.differs),
        }


def _printed(table: StreamTable, project: str) -> Iterable[Mapping[str, Any]]:
    for row in table.rows:
        known: Mapping[str, Statistic] = table.printed.get(row.key, {})
        for name, found in known.items():
            base = {"kind": "printed", "row": row.key, "label": row.label, "number": name, "unit": f"as {project}"}
            yield {**base, **found, "seeds": _seeds(row.seeds)}
