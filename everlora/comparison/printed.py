"""What other projects would print for the runs of a row, over its seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from everlora.comparison.rows import ComparedRow
from everlora.comparison.runs import SeedRun
from everlora.errors import OptionError, nearest
from everlora.metrics import PROJECTS
from everlora.report.table import Statistic, statistic

__all__ = ["checked_project", "printed_rows"]


def checked_project(name: str) -> str:
    """Return the project's name as `everlora.metrics` has it, `-` and `_` in it left out.

    Raises:
        OptionError: there is no such way of printing.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in PROJECTS:
        raise OptionError(f"there is no way of printing called '{name}'; {nearest(key, PROJECTS)}")
    return key


def printed_rows(rows: Sequence[ComparedRow], project: str) -> tuple[dict[str, dict[str, Statistic]], list[str]]:
    """Return the printed numbers of each row by label, mean and deviation over its seeds.

    A row without accuracies, as of a language model whose answers were not counted, is left out.

    Args:
        rows: of one stream.
        project: one of `everlora.metrics.PROJECTS`.

    Returns:
        By row and label the numbers, our own last; and what there was to warn of, a sentence for each warning.
    """
    found = {}
    warned: dict[str, list[str]] = {}
    for row in rows:
        with _collected_warnings() as messages:
            by_seed = [_printed(run, project) for run in row.runs if run.matrix is not None]
        for message in dict.fromkeys(messages):
            warned.setdefault(message, []).append(row.label)
        names = sorted(dict.fromkeys(name for one in by_seed for name in one), key=_is_ours)
        if names:
            found[row.key] = {name: statistic([one.get(name) for one in by_seed]) for name in names}
    return found, [f"{'; '.join(labels)}: {message}." for message, labels in warned.items()]


def _is_ours(label: str) -> bool:
    return label.startswith("everlora ")


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Keep what the metrics warn of: once for each row beside its numbers, instead of once a seed in the log."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    metrics = logging.getLogger("everlora.metrics")
    metrics.addFilter(keep)
    try:
        yield messages
    finally:
        metrics.removeFilter(keep)


def _printed(run: SeedRun, project: str) -> dict[str, float | None]:
    assert run.matrix is not None  # left out above
    return run.matrix.as_printed_by(project, classes_per_task=_classes_per_task(run))


def _classes_per_task(run: SeedRun) -> list[int] | None:
    """Number of classes of each task, from the stream of the run's seed; None where tasks have no labels."""
    results = run.folder.results
    stream = (results.get("streams") or {}).get(str(run.seed)) or results["stream"]
    counts = [len(labels) for labels in stream.get("task_labels") or []]
    return counts if run.matrix is not None and len(counts) == run.matrix.num_tasks and all(counts) else None
