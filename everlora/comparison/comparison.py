"""`compare`: rows of several runs side by side, and the comparison in each of its forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from everlora.comparison.formats import to_csv, to_latex, to_markdown
from everlora.comparison.layout import notes_of, text_tables
from everlora.comparison.page import to_html
from everlora.comparison.reading import read_runs
from everlora.comparison.significance import TestName
from everlora.comparison.tables import Choices, StreamTable, stream_tables
from everlora.errors import DataError, OptionError, nearest
from everlora.metrics import CAVEATS, STANDING_WARNING
from everlora.report import CaptionedTable
from everlora.report.page import write_text

__all__ = ["FORMATS", "Comparison", "Format", "compare", "format_of"]

Format = Literal["markdown", "latex", "csv", "json", "html"]
FORMATS: Mapping[str, str] = {"markdown": ".md", "latex": ".tex", "csv": ".csv", "json": ".json", "html": ".html"}

JSON_FORMAT = 1


def compare(
    folders: str | Path | Sequence[str | Path],
    *,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    sort: str | None = None,
    printed_as: str | None = None,
    test: TestName = "t",
) -> Comparison:
    """Set the rows of several runs side by side, a table for each stream.

    Args:
        folders: folders that `everlora.run` wrote.
        baseline: row that the others are tested against, by key, label or method; None takes the first of each table.
        metrics: numbers to show, by their names in `AccuracyMatrix.summary` or the figures of the report; None takes
            the usual ones.
        sort: number by which rows are ordered, best first.
        printed_as: also compute what this project would print; see `everlora.metrics.PROJECTS`.
        test: `t` for the paired t-test over common seeds, `wilcoxon` for the exact signed-rank test.

    Returns:
        The comparison, which renders itself.

    Raises:
        DataError: a folder is missing or its results are damaged, or the runs have nothing in common.
        OptionError: a number, row, project or test is not known.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    choices = Choices(
        baseline=baseline,
        metrics=None if metrics is None else tuple(metrics),
        sort=None if sort is None else sort.strip().lower().replace("-", "_"),
        printed_as=printed_as,
        test=test,
    )
    return Comparison(stream_tables(read_runs(paths), choices), choices)


@dataclass(frozen=True)
class Comparison:
    """Rows of several runs side by side.

    Attributes:
        tables: one for each stream.
        choices: what was asked for.
    """

    tables: list[StreamTable]
    choices: Choices

    def sections(self) -> list[tuple[str, list[CaptionedTable], list[str]]]:
        """Title, tables and notes of each stream, as text."""
        return [
            (
                table.title,
                text_tables(table, test=self.choices.test, printed_as=self._project),
                notes_of(table, printed_as=self._project),
            )
            for table in self.tables
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, numbers in stored units; None where one does not exist."""
        project = self._project
        values: dict[str, Any] = {
            "format": JSON_FORMAT,
            "test": self.choices.test,
            "printed_as": project,
            "tables": [_plain_table(table) for table in self.tables],
        }
        if project is not None:
            values["caveat"] = f"{CAVEATS[project]} {STANDING_WARNING}"
        return values

    def render(self, form: Format) -> str:
        """Return the comparison as text of one of `FORMATS`.

        Raises:
            OptionError: there is no such format.
        """
        test, project = self.choices.test, self._project
        forms: dict[str, Callable[[], str]] = {
            "markdown": lambda: to_markdown(self.tables, test=test, printed_as=project),
            "latex": lambda: to_latex(self.tables, test=test, printed_as=project),
            "csv": lambda: to_csv(self.tables, printed_as=project),
            "json": lambda: json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "html": lambda: to_html(self.tables, test=test, printed_as=project),
        }
        if form not in forms:
            raise OptionError(f"there is no format '{form}'; {nearest(form, FORMATS)}")
        return forms[form]()

    def write(self, path: str | Path, form: Format | None = None) -> Path:
        """Write the comparison to a file in one step; the format follows from the suffix unless it is given.

        Raises:
            OptionError: the suffix says no format, or there is no such format.
            DataError: the folder of the file does not exist, the path is one, or it cannot be written.
        """
        path = Path(path)
        text = self.render(format_of(path) if form is None else form)
        if not path.absolute().parent.is_dir():
            raise DataError(f"{path}: its folder does not exist; make it, or write to another place.")
        write_text(path, text)
        return path

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.render("markdown")

    @property
    def _project(self) -> str | None:
        name = self.choices.printed_as
        return None if name is None else name.lower().replace("-", "").replace("_", "")


def format_of(path: Path) -> Format:
    """Return the format that a file's suffix stands for.

    Raises:
        OptionError: it stands for none.
    """
    by_suffix: dict[str, Format] = {
        ".md": "markdown",
        ".tex": "latex",
        ".csv": "csv",
        ".json": "json",
        ".html": "html",
    }
    suffix = path.suffix.lower()
    if suffix not in by_suffix:
        known = ", ".join(by_suffix)
        raise OptionError(f"{path}: no format has the suffix '{suffix}'; end the name in one of {known}.")
    return by_suffix[suffix]


def _plain_table(table: StreamTable) -> dict[str, Any]:
    names = [one.name for one in table.measures]
    rows = []
    for row in table.rows:
        entry: dict[str, Any] = {
            "row": row.key,
            "label": row.label,
            "method": row.method,
            "folders": row.folders,
            "seeds": row.seeds,
            "n": row.n,
            "metrics": {name: dict(row.statistic(name)) for name in names},
            "by_seed": [{"seed": run.seed} | {name: run.values.get(name) for name in names} for run in row.runs],
            "against_baseline": {
                name: asdict(table.tests[name][row.key]) for name in names if row.key in table.tests.get(name, {})
            },
        }
        if row.key in table.printed:
            entry["printed"] = {name: dict(found) for name, found in table.printed[row.key].items()}
        rows.append(entry)
    return {
        "stream": table.title,
        "stream_id": table.stream.get("id"),
        "folders": [folder.name for folder in table.folders],
        "metrics": [asdict(one) for one in table.measures],
        "baseline": table.baseline,
        "rows": rows,
        "published": [
            asdict(line) | {"differences": {mean: line.difference(mean) for mean in line.ours}}
            for line in table.published
        ],
        "claims": [
            {"folder": folder.name} | {name: claim.get(name) for name in ("id", "claim", "verdict", "published")}
            for folder in table.folders
            for claim in folder.results.get("claims") or []
            if table.claims and claim.get("published")
        ],
        "notes": table.notes,
    }
