"""Rows of a comparison: the runs of one method under the same conditions, over their seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from everlora.comparison.runs import SeedRun
from everlora.report.table import Statistic, statistic

__all__ = ["ComparedRow", "comparable_rows"]


@dataclass
class ComparedRow:
    """One line of a table.

    Attributes:
        key: a name that no other row of the table has.
        method: the recipe's row.
        label: what the table calls it.
        runs: one for each seed.
        repeated_in: names of folders that hold some of these runs again, with the same numbers.
    """

    key: str
    method: str
    label: str
    runs: list[SeedRun]
    repeated_in: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int | None]:
        """Its seeds, in order."""
        return [run.seed for run in self.runs]

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.runs)

    @property
    def folders(self) -> list[str]:
        """Names of the folders its runs come from."""
        return list(dict.fromkeys(run.folder.name for run in self.runs))

    def statistic(self, name: str) -> Statistic:
        """Mean, sample deviation and count of one number."""
        return statistic([run.values.get(name) for run in self.runs])

    def numbers(self, name: str) -> dict[int | None, float]:
        """One number by seed, where it is defined."""
        return {run.seed: value for run in self.runs if (value := run.values.get(name)) is not None}


def comparable_rows(runs: Sequence[SeedRun]) -> list[ComparedRow]:
    """Put runs together that differ in nothing but the seed; of others each is a row, named by what differs.

    A run that another folder repeats to the last digit counts once; one that another folder repeats with other numbers
    keeps the two folders apart.

    Args:
        runs: of one stream, from one or more folders.

    Returns:
        The rows in order of first appearance.
    """
    rows: list[list[SeedRun]] = []
    repeated: list[list[str]] = []
    for part in _by_folder_and_row(runs):
        place = next((place for place, row in enumerate(rows) if _joins(part, row)), None)
        if place is None:
            rows.append(part)
            repeated.append([])
            continue
        new = [run for run in part if all(run.seed != other.seed for other in rows[place])]
        rows[place] += new
        if len(new) < len(part):
            repeated[place].append(part[0].folder.name)
    by_method: dict[str, list[list[SeedRun]]] = {}
    for row in rows:
        by_method.setdefault(row[0].method, []).append(row)
    everywhere = _differing([row[0] for row in rows], ("model", "recipe", "setting"))
    made = [_row(row, by_method[row[0].method], everywhere) for row in rows]
    for one, names in zip(made, repeated, strict=True):
        one.repeated_in = names
        one.runs.sort(key=lambda run: (run.seed is None, run.seed or 0))
    return _distinct(made)


def _by_folder_and_row(runs: Sequence[SeedRun]) -> list[list[SeedRun]]:
    """The runs of each row of each folder."""
    parts: dict[tuple[str, str, str, str], list[SeedRun]] = {}
    for run in runs:
        conditions = json.dumps(run.conditions, sort_keys=True)
        parts.setdefault((run.folder.name, run.method, run.label, conditions), []).append(run)
    return list(parts.values())


def _joins(part: Sequence[SeedRun], row: Sequence[SeedRun]) -> bool:
    """Whether the runs of another folder are further seeds of a row: a seed that both have must agree."""
    first, known = part[0], {run.seed: run for run in row}
    if (first.method, first.label) != (row[0].method, row[0].label) or first.conditions != row[0].conditions:
        return False
    return all(run.seed not in known or run.learned == known[run.seed].learned for run in part)


def _differing(runs: Sequence[SeedRun], names: Sequence[str] | None = None) -> list[str]:
    """The conditions in which not all of these runs agree."""
    conditions = [run.conditions for run in runs]
    known = names or list(dict.fromkeys(name for one in conditions for name in one))
    return [name for name in known if len({one.get(name) for one in conditions}) > 1]


def _row(runs: list[SeedRun], others: Sequence[Sequence[SeedRun]], everywhere: Sequence[str]) -> ComparedRow:
    """Name a row by its label and by what tells it from others of its method, and from all in its surroundings."""
    first = runs[0]
    differing = list(dict.fromkeys([*everywhere, *_differing([other[0] for other in others])]))
    words = [_condition(name, first.conditions.get(name)) for name in differing]
    alike = sum(_told(other[0], differing) == _told(first, differing) for other in others)
    if alike > 1:
        words.append(f"in {', '.join(dict.fromkeys(run.folder.name for run in runs))}")
    suffix = f" ({', '.join(words)})" if words else ""
    return ComparedRow(f"{first.method}{suffix}", first.method, f"{first.label}{suffix}", runs)


def _told(run: SeedRun, names: Sequence[str]) -> list[str | None]:
    return [run.conditions.get(name) for name in names]


def _condition(name: str, value: str | None) -> str:
    if value is None:
        return f"{name} by default"
    return f"{name}={value.strip(chr(34))}"


def _distinct(rows: list[ComparedRow]) -> list[ComparedRow]:
    """Two methods may share a label: then the method's name stands behind it."""
    labels = [row.label for row in rows]
    for row, label in zip(rows, labels, strict=True):
        if labels.count(label) > 1:
            row.label = f"{label} [{row.key}]"
    return rows
