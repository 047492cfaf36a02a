"""Rows of the comparison table: one per method, mean and deviation over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from everlora.errors import DataError, EverloraError, OptionError
from everlora.metrics import AccuracyMatrix, mean_and_deviation
from everlora.report.figures import run_figures

__all__ = [
    "FormattedTable",
    "Row",
    "Statistic",
    "format_table",
    "grouped_matrices",
    "run_values",
    "show",
    "statistic",
    "summarise",
]

FORMAT = 1
UNDEFINED = "–"  # noqa: RUF001  an en dash in a table cell: the number does not exist

Mean = Literal["tasks", "samples"]
Group = list[tuple[Mapping[str, Any], AccuracyMatrix]]


class Statistic(TypedDict):
    """Mean and sample deviation over `n` runs: `mean` is None when no run has the number, `sd` unless two have."""

    mean: float | None
    sd: float | None
    n: int


class Row(TypedDict):
    """One method.

    `metrics` are fractions named as in `AccuracyMatrix.summary`, `cost` is in seconds, bytes, counts, `figures` are
    those of `run_figures`; `exact_zeros` names the figures that are 0 in every run, without any rounding. `recognition`
    and `options` are those of the first run.
    """

    method: str
    label: str
    seeds: list[int | None]
    n: int
    metrics: dict[str, Statistic]
    cost: dict[str, Statistic]
    figures: dict[str, Statistic]
    exact_zeros: list[str]
    family: str | None
    trials: int | None
    recognition: str | None
    options: dict[str, Any]


class FormattedTable(NamedTuple):
    """Column names and, for each row, as many cells of text."""

    columns: list[str]
    rows: list[list[str]]


def grouped_matrices(results: Mapping[str, Any]) -> dict[tuple[str, str], Group]:
    """Return the runs with their accuracy matrices by (method, label), in order of first appearance.

    Args:
        results: the content of `results.json`.

    Raises:
        DataError: the format is another one, a field is missing, counts are not usable, or a method has the same seed
            twice.
    """
    if results.get("format") != FORMAT:
        raise DataError(f"results must have format {FORMAT}, found {results.get('format')!r}; run the recipe again")
    stream = _field(results, "stream", "results")
    groups: dict[tuple[str, str], Group] = {}
    for run in _field(results, "runs", "results"):
        method = str(_field(run, "method", "a run"))
        group = groups.setdefault((method, str(run.get("label") or method)), [])
        seed = run.get("seed")
        if any(other.get("seed") == seed for other, _ in group):
            raise DataError(f"method '{method}' has two runs with seed {seed}; keep one run per method and seed")
        group.append((run, _matrix(run, stream)))
    return groups


def summarise(results: Mapping[str, Any]) -> list[Row]:
    """Return one row per method with mean, sample deviation and count over its runs.

    A run in which a number is undefined does not enter that number's mean; `n` says how many did.

    Args:
        results: the content of `results.json`.

    Raises:
        DataError: as `grouped_matrices`.
    """
    rows: list[Row] = []
    values, described = run_values(results), results.get("rows") or {}
    for (method, label), group in grouped_matrices(results).items():
        figures = [values[method][run.get("seed")] for run, _ in group]
        about = described.get(method) or {}
        summaries = [matrix.summary() for _, matrix in group]
        costs = [_cost(run, matrix.num_tasks) for run, matrix in group]
        rows.append(
            Row(
                method=method,
                label=label,
                seeds=[run.get("seed") for run, _ in group],
                n=len(group),
                metrics={name: statistic([summary[name] for summary in summaries]) for name in summaries[0]},
                cost={name: statistic([cost[name] for cost in costs]) for name in costs[0]},
                figures={name: statistic([one[name] for one in figures]) for name in figures[0]},
                exact_zeros=[name for name in figures[0] if all(one[name] == 0.0 for one in figures)],
                family=about.get("family"),
                trials=about.get("trials"),
                recognition=group[0][0].get("recognition"),
                options=dict(group[0][0].get("options") or {}),
            )
        )
    return rows


def run_values(results: Mapping[str, Any]) -> dict[str, dict[int | None, dict[str, float | None]]]:
    """Return the figures of every run, by method and seed (see `run_figures`).

    Raises:
        DataError: as `grouped_matrices`.
    """
    runs = [pair for group in grouped_matrices(results).values() for pair in group]
    references = {run.get("seed"): run for run, _ in runs if run["method"] == results.get("reference")}
    values: dict[str, dict[int | None, dict[str, float | None]]] = {}
    for run, matrix in runs:
        seed = run.get("seed")
        values.setdefault(run["method"], {})[seed] = run_figures(run, matrix, references.get(seed))
    return values


def format_table(rows: Sequence[Row], *, mean: Mean = "tasks") -> FormattedTable:
    """Return the rows as text, accuracies in percent.

    Args:
        rows: from `summarise`.
        mean: weigh every task alike, or every test sample alike. A table holds one of the two, and its headings say
            which, because they can differ by more than the methods do.

    Raises:
        OptionError: `mean` is another word.
    """
    if mean not in ("tasks", "samples"):
        raise OptionError(f"mean must be 'tasks' or 'samples', found {mean!r}")
    suffix, word = ("", "task mean") if mean == "tasks" else ("_samples", "sample mean")
    columns = [
        "Method",
        f"Last % ({word})",
        f"Average % ({word})",
        "Forgetting (points)",
        f"Task-aware last % ({word})",
        "Seconds per task",
        "Trainable parameters",
        "Runs",
    ]
    cells = []
    for row in rows:
        percent = [f"last{suffix}", f"avg{suffix}", "forgetting", f"task_aware_last{suffix}"]
        cells.append(
            [
                row["label"],
                *(show(row["metrics"][name], row["n"], scale=100.0) for name in percent),
                show(row["cost"]["seconds_per_task"], row["n"], decimals=1),
                show(row["cost"]["trainable_parameters"], row["n"], decimals=0),
                str(row["n"]),
            ]
        )
    return FormattedTable(columns, cells)


def show(statistic: Statistic, runs: int, *, scale: float = 1.0, decimals: int = 2) -> str:
    """Return `mean ± sd` as text.

    Args:
        statistic: what to show.
        runs: how many runs the row has; another `n` is written behind the number.
        scale: factor on the number, 100 for percent.
        decimals: digits after the point. A deviation that rounds to nothing is left out of whole numbers.
    """
    if statistic["mean"] is None:
        return UNDEFINED
    text = _plain(scale * statistic["mean"], decimals)
    if statistic["sd"] is not None and (decimals or round(scale * statistic["sd"])):
        text += f" ± {_plain(scale * statistic['sd'], decimals)}"
    return text if statistic["n"] == runs else f"{text} (n={statistic['n']})"


def _plain(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # adding zero turns a rounded -0.0 into 0.0


def statistic(values: Sequence[float | None]) -> Statistic:
    """Mean, sample deviation and count of the values that are there."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return Statistic(mean=None, sd=None, n=0)
    mean, deviation = mean_and_deviation(numbers)
    return Statistic(mean=mean, sd=deviation, n=len(numbers))


def _cost(run: Mapping[str, Any], num_tasks: int) -> dict[str, float | None]:
    """Sum or maximum of each cost over the tasks; None where nothing was recorded."""
    columns = ("seconds", "steps", "peak_memory_bytes", "trainable_parameters", "stored_parameters")
    entries = run.get("cost") or []
    recorded = {name: [float(entry[name]) for entry in entries if entry.get(name) is not None] for name in columns}
    total = {name: sum(recorded[name]) if recorded[name] else None for name in ("seconds", "steps")}
    greatest = {name: max(recorded[name], default=None) for name in columns[2:]}
    seconds = total["seconds"]
    return total | greatest | {"seconds_per_task": None if seconds is None else seconds / num_tasks}


def _matrix(run: Mapping[str, Any], stream: Mapping[str, Any]) -> AccuracyMatrix:
    where = f"run '{run['method']}' with seed {run.get('seed')}"
    sizes = run.get("sizes") or _field(stream, "sizes", "stream")
    try:
        if "accuracy" in run:
            matrix = AccuracyMatrix(run["accuracy"], sizes)
        else:
            right = _field(run, "correct", where)
            matrix = AccuracyMatrix.from_counts(right, sizes, run.get("task_aware"), run.get("task_correct"))
    except EverloraError as error:
        raise DataError(f"{where}: {error}") from error
    expected = stream.get("num_tasks", matrix.num_tasks)
    if matrix.num_tasks != expected:
        raise DataError(f"{where} has {matrix.num_tasks} tasks but its stream has {expected}; run it again")
    return matrix


def _field(mapping: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in mapping:
        raise DataError(f"{where} must have the field '{name}', found {sorted(mapping)}; write the file again")
    return mapping[name]
