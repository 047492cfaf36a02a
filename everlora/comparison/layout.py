"""The tables of a stream as text, the same for the terminal, Markdown, LaTeX and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from everlora.comparison.measures import Measure
from everlora.comparison.published import FIGURES, PublishedLine
from everlora.comparison.rows import ComparedRow
from everlora.comparison.significance import PairedTest
from everlora.comparison.tables import StreamTable
from everlora.metrics import CAVEATS, STANDING_WARNING
from everlora.report import CaptionedTable, FormattedTable
from everlora.report.table import UNDEFINED, Statistic, show

__all__ = ["TEST_NAMES", "full_tests", "is_number_column", "notes_of", "seed_table", "text_tables"]

NOT_PRINTED = "-"
TEST_NAMES: Mapping[str, str] = {"t": "paired t-test", "wilcoxon": "exact Wilcoxon signed-rank test"}
_LEAST_P = 0.001
# Projects that print fractions, and labels that are fractions where the rest of a project's are percent.
_FRACTIONS = ("avalanche", "easycl")
_FRACTION_LABEL = "CNN top1 task curve"


def text_tables(table: StreamTable, *, test: str, printed_as: str | None) -> list[CaptionedTable]:
    """Return what is shown of a stream: our numbers or a project's, the paired differences, published figures.

    Args:
        table: the stream.
        test: name of the paired test.
        printed_as: project whose numbers take the place of ours.
    """
    found = []
    if printed_as is not None and table.printed:
        found.append(_printed(table, printed_as))
    elif printed_as is None:
        found.append(_main(table))
        if table.baseline is not None:
            found.append(_differences(table, table.row(table.baseline), test))
    if table.published:
        found.append(_published(table.published))
    return found + table.claims


def notes_of(table: StreamTable, *, printed_as: str | None) -> list[str]:
    """Sentences below the tables of a stream; those of a project's way of printing come first."""
    printed = [f"{CAVEATS[printed_as]} {STANDING_WARNING}"] if printed_as is not None and table.printed else []
    return [*printed, *table.notes]


def _main(table: StreamTable) -> CaptionedTable:
    same_n = len({row.n for row in table.rows}) == 1
    runs = f" over {_counted(table.rows[0].n, 'seed')}" if same_n else " over seeds"
    deviation = "" if all(row.n == 1 for row in table.rows) else " ± sample deviation"
    lines = [[row.label, *(_cell(row, one) for one in table.measures), str(row.n)] for row in table.rows]
    columns = ["Method", *(one.heading for one in table.measures), "Seeds"]
    return CaptionedTable(f"Mean{deviation}{runs}", FormattedTable(columns, lines))


def _cell(row: ComparedRow, one: Measure) -> str:
    return show(row.statistic(one.name), row.n, scale=one.scale, decimals=one.decimals)


def _differences(table: StreamTable, base: ComparedRow, test: str) -> CaptionedTable:
    rows = [row for row in table.rows if row is not base]
    lines = []
    for row in rows:
        common = [seed for seed in row.seeds if seed in base.seeds]
        cells = [_difference(table.tests[one.name][row.key], one) for one in table.measures]
        lines.append([row.label, *cells, str(len(common))])
    caption = f"Less {base.label}, over common seeds; p of the {TEST_NAMES[test]}"
    if len(rows) > 1:
        caption += ", corrected for the rows (Holm)"
    columns = ["Method", *(one.heading for one in table.measures), "Common seeds"]
    return CaptionedTable(caption, FormattedTable(columns, lines))


def _difference(found: PairedTest, one: Measure) -> str:
    if found.difference is None:
        return UNDEFINED
    text = _signed(one.scale * found.difference, one.decimals)
    return f"{text} ({_p_value(found)})"


def _p_value(found: PairedTest) -> str:
    if found.p_holm is None:
        return found.reason
    return f"p<{_LEAST_P}" if found.p_holm < _LEAST_P else f"p={found.p_holm:.3f}"


def _signed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:+,.{decimals}f}"  # adding zero turns a rounded -0.0 into 0.0


def full_tests(table: StreamTable) -> FormattedTable:
    """Every paired test with its interval and both p-values, a line for each row and number."""
    columns = ["Method", "Number", "Difference", "95 % interval", "Greater in", "Statistic", "p", "p (Holm)"]
    lines: list[list[str]] = []
    for one in table.measures:
        tests = table.tests.get(one.name, {})
        rows = [row for row in table.rows if row.key in tests]
        lines += [[row.label, one.heading, *_test_cells(tests[row.key], one)] for row in rows]
    return FormattedTable(columns, lines)


def _test_cells(found: PairedTest, one: Measure) -> list[str]:
    if found.difference is None:
        return [UNDEFINED] * 4 + [found.reason, UNDEFINED]
    interval = UNDEFINED
    if found.low is not None and found.high is not None:
        low, high = (_signed(one.scale * end, one.decimals) for end in (found.low, found.high))
        interval = f"{low} to {high}"
    numbers = [found.statistic, found.p, found.p_holm]
    texts = [UNDEFINED if value is None else f"{value:.4g}" for value in numbers]
    if found.p is None:
        texts[1] = found.reason
    difference = _signed(one.scale * found.difference, one.decimals)
    return [difference, interval, f"{found.wins} of {len(found.seeds)}", *texts]


def seed_table(table: StreamTable) -> FormattedTable:
    """Every run by itself."""
    lines = []
    for row in table.rows:
        for run in row.runs:
            cells = [_one(run.values.get(one.name), one) for one in table.measures]
            lines.append([row.label, UNDEFINED if run.seed is None else str(run.seed), *cells])
    return FormattedTable(["Method", "Seed", *(one.heading for one in table.measures)], lines)


def _one(value: float | None, one: Measure) -> str:
    return show(Statistic(mean=value, sd=None, n=1), 1, scale=one.scale, decimals=one.decimals)


def _printed(table: StreamTable, project: str) -> CaptionedTable:
    rows = [row for row in table.rows if row.key in table.printed]
    names = list(dict.fromkeys(name for row in rows for name in table.printed[row.key]))
    lines = [[name, *(_printed_cell(table.printed[row.key], name, row.n, project) for row in rows)] for name in names]
    caption = f"As {project} prints it, mean over seeds; lines called everlora are ours, in the same unit"
    return CaptionedTable(caption, FormattedTable(["Printed", *(row.label for row in rows)], lines))


def _printed_cell(printed: Mapping[str, Statistic], name: str, runs: int, project: str) -> str:
    found = printed.get(name)
    if found is None or found["mean"] is None:
        return NOT_PRINTED
    is_fraction = project in _FRACTIONS or name.startswith(_FRACTION_LABEL)
    return show(found, runs, decimals=4 if is_fraction else 2)


def _published(lines: Sequence[PublishedLine]) -> CaptionedTable:
    """Two columns of ours, one for each mean, because what is published seldom says which it took."""
    columns = [
        "Method",
        "Figure",
        "Published",
        "Ours % (task mean)",
        "Difference",
        "Ours % (sample mean)",
        "Difference",
    ]
    cells = [
        [
            line.label,
            FIGURES[line.figure],
            f"{line.published:.2f}" if line.sd is None else f"{line.published:.2f} ± {line.sd:.2f}",
            *_beside(line, "tasks"),
            *_beside(line, "samples"),
            line.source,
            "; ".join(line.differs) or ("nothing known" if line.row else "not run"),
            line.note or UNDEFINED,
        ]
        for line in lines
    ]
    caption = "Published figures in percent beside ours; a difference is ours less the published one, in points"
    return CaptionedTable(caption, FormattedTable([*columns, "Source", "Ours differs in", "Note"], cells))


def _beside(line: PublishedLine, mean: str) -> list[str]:
    ours, difference = line.ours.get(mean), line.difference(mean)
    if ours is None or difference is None:
        return [UNDEFINED, UNDEFINED]
    return [show(ours, ours["n"], scale=100.0), _signed(difference, 2)]


def is_number_column(cells: Sequence[str]) -> bool:
    """Whether a column is set to the right: each of its cells begins like a number or says that there is none."""
    known = [cell for cell in cells if cell not in (UNDEFINED, NOT_PRINTED, "")]
    return bool(known) and all(cell.lstrip("+-")[:1].isdigit() for cell in known)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
