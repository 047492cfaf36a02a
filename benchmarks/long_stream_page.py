"""The page that `long_streams.py` writes from its file of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from long_stream_rows import rows_of

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "long-streams.md"
GROWN = 1.25
MEBI, KIBI = 2**20, 2**10

_INTRODUCTION = """# A hundred tasks

Does every method finish a hundred tasks of real data, one small task after another, and does the last task cost what
the first did? The tasks are tiny, a few rows a class and one epoch, so that what a task costs beside its training is
seen best: accuracy is shown because it was measured, and says little about a method that is given enough rows.

- *s a task*: seconds of the processor, medians of tasks 2 to 11, of ten in the middle and of the last ten; every ten
  tasks in a row have as many rows and labels. Passes over the data, training, consolidation and writing are in them,
  measuring on test rows is not. *Growth* is last over first; *wall* the same of wall seconds, beside other work.
- *Memory*: how much the process's peak during a task grew from the first ten tasks to the last.
- *Disk*: of a task's folder, first and last ten tasks. *State*: what is carried on to the next task, at the end.
- *Last*, *average*: % on test rows of everything seen, at the end and the mean of five looks."""

# Why the cost of a method grows by nature; what is not named here and grows is not understood.
_REASONS = {
    "pnn": "Every column reads all earlier ones through lateral connections: time and files grow by design.",
    "sd_lora": "The magnitude of every earlier direction is trained along. `max_rank` caps the directions' number.",
    "sd_lora_rr": "As SD-LoRA, with smaller directions.",
    "sd_lora_kd": "As SD-LoRA, and a new direction is compared with all earlier ones.",
    "lwf": "The outputs of all old heads are distilled on every row, and a hundred tasks have a hundred heads.",
    "o_lora": "The orthogonality loss compares the new adapter with those of all earlier tasks.",
    "i_lora easycl": "Three tenths of the rows of every earlier task are rehearsed, as that preset has it.",
    "inflora alignment": "Realigning the heads draws features of every class seen so far.",
    "replay": "Until the buffer is full, its draws come from fewer rows; it does not grow beyond its size.",
}
_UNKNOWN = "Nothing in the method explains it: {more:.0f} ms more, measured beside other work."


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    if not results["rows"]:
        return f"{_INTRODUCTION}\n\nNothing is measured yet; `python benchmarks/long_streams.py` does it.\n"
    parts = [_INTRODUCTION, _measured(results)]
    for name, about in results.get("streams", {}).items():
        rows = [row for row in results["rows"] if row["stream"] == name]
        parts += [f"## {about['title']}", about["about"] + _options(about["options"])]
        parts += [_table(about, rows), *_refusals(rows), *_missing(name, rows)]
    parts += ["## What grows", _grown(results["rows"]), "## What `everlora status` says", _status(results["rows"])]
    return "\n\n".join(parts) + "\n"


def _measured(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    dates = sorted({row["date"] for row in results["rows"]})
    return (
        f"Measured by `{results['command']}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, on a "
        f"{results['device']} ({results['processor']}), beside other work; {versions}, Python {results['python']}. One "
        "seed. This page is written by the same command with `--page`; other options of the rows stand in their names."
    )


def _options(options: Mapping[str, Any]) -> str:
    return " Options: " + ", ".join(f"`{name}={value}`" for name, value in options.items()) + "."


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "row": lambda row: f"`{row['row']}`",
    "s a task": lambda row: " → ".join(f"{value:.2f}" for value in row["busy"]),
    "growth": lambda row: f"{growth(row):.2f}",
    "wall": lambda row: f"{row['wall'][-1] / row['wall'][0]:.2f}",
    "memory MiB": lambda row: f"{(row['peak_bytes'][-1] - row['peak_bytes'][0]) / MEBI:+.0f}",
    "disk KiB": lambda row: " → ".join(_kibi(row["disk_bytes"][place]) for place in (0, -1)),
    "state KiB": lambda row: _kibi(row["state_bytes"][-1]),
    "open s": lambda row: f"{row['open_seconds']:.1f}" if "open_seconds" in row else "-",
}


def growth(row: Mapping[str, Any]) -> float:
    """Seconds of the last tasks over those of the first."""
    return float(row["busy"][-1] / row["busy"][0])


def _kibi(size: float) -> str:
    return f"{size / KIBI:,.0f}"


def _table(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    found = [row for row in rows if "num_tasks" in row]
    is_language = about["scenario"] == "language"
    headings = [*_COLUMNS, *(("last nats", "average nats") if is_language else ("last", "average"))]

    def figures(row: Mapping[str, Any]) -> list[str]:
        return [f"{row[key]:.3f}" if is_language else f"{100 * row[key]:.1f}" for key in ("last", "avg")]

    return markdown(headings, [[*(cell(row) for cell in _COLUMNS.values()), *figures(row)] for row in found])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, with all columns but the first set to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _refusals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sentences of rows that did not come to the end, each with the rows that got it."""
    told: dict[str, list[str]] = {}
    for row in rows:
        for kind in ("refused", "failed"):
            if kind in row:
                told.setdefault(f"{kind}: {row[kind]}", []).append(f"`{row['row']}`")
    if not told:
        return []
    return ["\n".join(f"- {', '.join(names)} {sentence}" for sentence, names in told.items())]


def _missing(stream: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {row["row"] for row in rows}
    missing = [f"`{row.label}`" for row in rows_of(stream) if row.label not in found]
    return [f"Not measured yet: {', '.join(missing)}."] if missing else []


def _grown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows whose last tasks cost more than the first, and why."""
    grown = sorted((row for row in rows if "num_tasks" in row and row["num_tasks"] > 1), key=growth, reverse=True)
    flat = [row for row in grown if growth(row) <= GROWN]
    shown = [row for row in grown if growth(row) > GROWN]
    table = markdown(
        ["row", "stream", "growth", "why"],
        [[f"`{row['row']}`", row["stream"], f"{growth(row):.2f}", _reason(row)] for row in shown],
    )
    said = f"{len(flat)} of {len(grown)} rows grow by no more than a factor of {GROWN} in processor seconds."
    return f"{said} The others:\n\n{table}" if shown else said


def _reason(row: Mapping[str, Any]) -> str:
    more = 1000 * (row["busy"][-1] - row["busy"][0])
    return _REASONS.get(row["row"]) or _REASONS.get(row["method"]) or _UNKNOWN.format(more=more)


def _status(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [row for row in rows if "status_lines_80" in row and row["num_tasks"] > 1]
    if not found:
        return "Not measured yet."
    most = {key: max(row[key] for row in found) for key in found[0] if key.startswith("status_")}
    return (
        f"Of {max(row['num_tasks'] for row in found)} tasks it shows the first three and the last ten, and those "
        f"between in one line of sums and means: at most {most['status_lines_80']} lines in a terminal of 80 columns "
        f"and {most['status_lines_120']} in one of 120, whatever the method. `--all` shows each task "
        f"({most['status_all_lines']} lines at 120 columns), and `--json` always has all of them, at most "
        f"{most['status_json_bytes'] / KIBI:,.0f} KiB. Reading them takes at most {most['status_seconds']:.2f} s of "
        "the processor."
    )
