"""One table for each stream: rows, numbers, paired tests and what others published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from everlora.comparison.measures import CLASSIFIER_DEFAULTS, LANGUAGE_DEFAULTS, Measure, measure
from everlora.comparison.printed import checked_project, printed_rows
from everlora.comparison.published import PublishedLine, claim_tables, published_lines
from everlora.comparison.reading import RunFolder
from everlora.comparison.rows import ComparedRow, comparable_rows
from everlora.comparison.runs import seed_runs
from everlora.comparison.significance import TESTS, PairedTest, TestName, paired_tests
from everlora.comparison.streams import StreamRuns, by_stream
from everlora.errors import DataError, OptionError, nearest
from everlora.report import CaptionedTable
from everlora.report.language import is_language
from everlora.report.table import Statistic

__all__ = ["Choices", "StreamTable", "stream_tables"]


@dataclass(frozen=True)
class Choices:
    """What the caller wants to see.

    Attributes:
        baseline: row that the others are tested against; None takes the first of each table.
        metrics: numbers to show; None takes the usual ones.
        sort: number by which rows are ordered, best first; None keeps their order.
        printed_as: project whose way of printing is wanted.
        test: the paired test.
    """

    baseline: str | None = None
    metrics: tuple[str, ...] | None = None
    sort: str | None = None
    printed_as: str | None = None
    test: TestName = "t"


@dataclass
class StreamTable:
    """All that is known of one stream.

    Attributes:
        title: of the stream.
        stream: as the results describe it.
        is_language: whether the numbers are those of language models.
        folders: the folders that share it.
        rows: in the order they are shown.
        measures: the numbers that are shown.
        baseline: key of the row that others are tested against; None where there is nothing to test.
        tests: by number and row; the baseline has none.
        published: figures of others.
        claims: of each folder the claims of which their source says something, with what was found.
        printed: what a project would print, by row and label.
        notes: sentences for the reader.
    """

    title: str
    stream: dict[str, Any]
    is_language: bool
    folders: list[RunFolder]
    rows: list[ComparedRow]
    measures: list[Measure]
    baseline: str | None = None
    tests: dict[str, dict[str, PairedTest]] = field(default_factory=dict)
    published: list[PublishedLine] = field(default_factory=list)
    claims: list[CaptionedTable] = field(default_factory=list)
    printed: dict[str, dict[str, Statistic]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, key: str) -> ComparedRow:
        """The row of that key."""
        return next(row for row in self.rows if row.key == key)


def stream_tables(folders: Sequence[RunFolder], choices: Choices) -> list[StreamTable]:
    """Divide the folders by stream and make the table of each.

    Raises:
        OptionError: a number, row, project or test is not known.
        DataError: results are damaged, or there are several folders and no two rows to compare.
    """
    if choices.test not in TESTS:
        raise OptionError(f"there is no paired test '{choices.test}'; known: {', '.join(TESTS)}")
    project = None if choices.printed_as is None else checked_project(choices.printed_as)
    tables = [_table(group) for group in by_stream(folders)]
    if len(tables) > 1 and all(len(table.rows) == 1 for table in tables):
        titles = "; ".join(table.title for table in tables)
        raise DataError(
            f"these {len(folders)} runs have nothing in common: each is of another stream with one row ({titles}); "
            "give runs of one stream."
        )
    _choose_measures(tables, choices)
    _choose_baselines(tables, choices.baseline)
    for table in tables:
        _add_tests(table, choices.test)
        table.notes += _notes(table)
        table.published = published_lines(table.folders, table.rows)
        table.claims = claim_tables(table.folders)
    if project is not None:
        _add_printed(tables, project)
    if choices.sort is not None:
        _sort(tables, choices.sort)
    return tables


def _table(group: StreamRuns) -> StreamTable:
    runs = [run for folder in group.folders for run in seed_runs(folder)]
    return StreamTable(
        title=group.title,
        stream=dict(group.stream),
        is_language=is_language(group.folders[0].results),
        folders=group.folders,
        rows=comparable_rows(runs),
        measures=[],
        notes=list(group.notes),
    )


def _domains(table: StreamTable) -> list[str]:
    return [str(name) for name in table.stream.get("task_names") or []]


def _measure(table: StreamTable, name: str) -> Measure:
    return measure(name, is_language=table.is_language, domains=_domains(table))


def _known(table: StreamTable) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for run in row.runs for name in run.values))


def _has(table: StreamTable, name: str) -> bool:
    return any(row.statistic(name)["n"] for row in table.rows)


def _choose_measures(tables: Sequence[StreamTable], choices: Choices) -> None:
    """The wanted numbers where a table knows any of them, else the usual ones that are defined."""
    everywhere = {name for table in tables for name in _known(table)}
    wanted = dict.fromkeys(name.strip().lower().replace("-", "_") for name in choices.metrics or ())
    sort = [] if choices.sort is None else [choices.sort]
    for name in (*wanted, *sort):
        if name not in everywhere:
            raise OptionError(f"these runs have no number called '{name}'; {nearest(name, everywhere)}")
    for table in tables:
        usual = LANGUAGE_DEFAULTS if table.is_language else CLASSIFIER_DEFAULTS
        known = set(_known(table))
        here = [name for name in wanted if name in known]
        missing = [name for name in wanted if name not in known]
        if missing:
            table.notes.append(f"Runs of this stream have no number called {', '.join(missing)}.")
        names = here or [name for name in usual if _has(table, name)] or list(usual[:1])
        table.measures = [_measure(table, name) for name in names]


def _choose_baselines(tables: Sequence[StreamTable], wanted: str | None) -> None:
    found = [_matching(table, wanted) if wanted is not None else table.rows[:1] for table in tables]
    if not any(found):
        keys = [row.key for table in tables for row in table.rows]
        raise OptionError(f"no row is called '{wanted}'; {nearest(str(wanted), keys)}")
    for table, rows in zip(tables, found, strict=True):
        if len(rows) > 1:
            named = " or ".join(f"'{row.key}'" for row in rows)
            raise OptionError(f"'{wanted}' may be one of {len(rows)} rows; name one as {named}")
        if rows and len(table.rows) > 1:
            table.baseline = rows[0].key
        elif not rows:
            table.notes.append(f"This stream has no row '{wanted}', so nothing is tested here.")


def _matching(table: StreamTable, wanted: str) -> list[ComparedRow]:
    """Rows of that key or label, else of that method; `-` and `_` are alike, and so are cases."""
    name = _plain(wanted)
    exact = [row for row in table.rows if name in (_plain(row.key), _plain(row.label))]
    if exact:
        return exact
    # Of a method with several weights the row's name stands for those it usually predicts with, which come first.
    by_method = [row for row in table.rows if _plain(row.method) == name]
    return by_method or [row for row in table.rows if _plain(row.method.partition("/")[0]) == name][:1]


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _add_tests(table: StreamTable, test: TestName) -> None:
    if table.baseline is None:
        return
    base = table.row(table.baseline)
    others = [row for row in table.rows if row is not base]
    for one in table.measures:
        numbers = {row.key: row.numbers(one.name) for row in others}
        table.tests[one.name] = paired_tests(numbers, base.numbers(one.name), test=test)


def _notes(table: StreamTable) -> list[str]:
    """What a reader must know of the rows: other seeds, several folders, numbers that do not exist."""
    notes = []
    if len({tuple(sorted(map(str, row.seeds))) for row in table.rows}) > 1:
        notes.append("Rows have different seeds: means are over each row's own, paired differences over common ones.")
    for row in table.rows:
        if len(row.folders) > 1:
            parts = [
                f"{', '.join(str(run.seed) for run in row.runs if run.folder.name == name)} from {name}"
                for name in row.folders
            ]
            notes.append(f"{row.label}: seeds {'; '.join(parts)}.")
    repeats: dict[str, list[str]] = {}
    for row in table.rows:
        for name in row.repeated_in:
            repeats.setdefault(name, []).append(row.label)
    for name, labels in repeats.items():
        notes.append(f"{name} repeats runs of {'; '.join(labels)} with the same numbers; they count once.")
    notes += _differing(table)
    for one in table.measures:
        reasons = {run.reasons[one.name] for row in table.rows for run in row.runs if one.name in run.reasons}
        if not _has(table, one.name) and reasons:
            notes.append(f"{one.heading}: {sorted(reasons)[0]}.")
    return notes


def _differing(table: StreamTable) -> list[str]:
    """What of the folders is not alike and stands in no row's label."""
    found = []
    for what, name in (("Data", "data"), ("Devices", "device")):
        values = list(dict.fromkeys(str(folder.results.get(name)) for folder in table.folders))
        if len(values) > 1:
            found.append(f"{what} are not the same in all folders: {'; '.join(values)}.")
    texts = {(folder.recipe, (folder.results.get("recipe") or {}).get("text")) for folder in table.folders}
    if len(texts) > len({name for name, _ in texts}):
        found.append("The text of the recipe is not the same in all folders.")
    return found


def _add_printed(tables: Sequence[StreamTable], project: str) -> None:
    for table in tables:
        table.printed, warnings = printed_rows(table.rows, project)
        table.notes += warnings
        if not table.printed:
            table.notes.append(f"{project} prints accuracies, and these runs have none: nothing is printed here.")
    if not any(table.printed for table in tables):
        raise OptionError(
            f"{project} prints accuracies, and none of these runs has any; leave out --as, or count answers in the "
            "recipe."
        )


def _sort(tables: Sequence[StreamTable], name: str) -> None:
    for table in tables:
        lower = _measure(table, name).lower_is_better
        sign = 1.0 if lower else -1.0

        def place(row: ComparedRow, sign: float = sign) -> tuple[bool, float]:
            mean = row.statistic(name)["mean"]
            return mean is None, sign * (mean or 0.0)

        table.rows.sort(key=place)
