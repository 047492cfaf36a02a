"""The runs of a folder, each with all its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everlora.comparison.reading import RunFolder
from everlora.errors import DataError, EverloraError
from everlora.metrics import AccuracyMatrix
from everlora.report.language import LanguageRun, is_language, language_runs, language_values
from everlora.report.table import grouped_matrices, run_values

__all__ = ["SeedRun", "seed_runs"]

Values = Mapping[str, float | None]

# What the run itself decides, not the person who made it.
_NOT_CHOSEN = ("seed", "total_tasks")
# What the machine decides: a run made twice has the same numbers but for these.
_OF_THE_MACHINE = ("sec_task", "sec_step", "s95_ref", "peak_mem", "state_bytes")


@dataclass(frozen=True)
class SeedRun:
    """One method with one seed.

    Attributes:
        folder: where it comes from.
        method: the recipe's row, with its weights where there is a choice, as in `i_lora/stable`.
        label: what the run calls the row.
        seed: its seed.
        values: every number by name, None where it is not defined.
        matrix: its accuracies; for language models those of counted answers, None where none were counted.
        curve: what a chart shows after each task: accuracies, or cross-entropies.
        reasons: why a number is None.
        options: as the run recorded them, without the seed.
    """

    folder: RunFolder
    method: str
    label: str
    seed: int | None
    values: Values
    matrix: AccuracyMatrix | None
    curve: Sequence[float | None]
    reasons: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def conditions(self) -> dict[str, str]:
        """Whatever must be equal for two runs to be seeds of one row, as texts, what matters most first."""
        results = self.folder.results
        options = {name: json.dumps(value, sort_keys=True) for name, value in sorted(self.options.items())}
        return {
            "model": self.folder.model,
            "recipe": self.folder.recipe,
            "setting": self.folder.setting,
            **options,
            "everlora": str((results.get("versions") or {}).get("everlora") or ""),
        }

    @property
    def learned(self) -> tuple[Any, ...]:
        """All that is measured but time and memory."""
        values = {name: value for name, value in self.values.items() if name not in _OF_THE_MACHINE}
        return values, list(self.curve)


def seed_runs(folder: RunFolder) -> list[SeedRun]:
    """Return every run of a folder with its numbers.

    Raises:
        DataError: a field is missing or has another type, or a row has two runs with one seed.
    """
    file = folder.path / "results.json"
    try:
        found = _of_language(folder) if is_language(folder.results) else _of_classifiers(folder)
        if odd := [run.seed for run in found if not isinstance(run.seed, int | None)]:
            raise TypeError(f"a seed is {odd[0]!r}")
    except EverloraError as error:
        raise DataError(f"{file}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is damaged ({what}); run the recipe again with --out {folder.path}.") from error
    twice = [run for place, run in enumerate(found) if any(_same_run(run, other) for other in found[:place])]
    if twice:
        raise DataError(f"{file} has two runs of '{twice[0].method}' with seed {twice[0].seed}; keep one of them.")
    return found


def _same_run(one: SeedRun, other: SeedRun) -> bool:
    return (one.method, one.seed) == (other.method, other.seed)


def _of_classifiers(folder: RunFolder) -> list[SeedRun]:
    figures = run_values(folder.results)
    found = []
    for (method, label), group in grouped_matrices(folder.results).items():
        for run, matrix in group:
            seed = run.get("seed")
            more = {_renamed(name): value for name, value in figures[method][seed].items()}
            found.append(
                SeedRun(
                    folder=folder,
                    method=method,
                    label=label,
                    seed=seed,
                    values=more | matrix.summary(),
                    matrix=matrix,
                    curve=matrix.curves()["acc_step"],
                    reasons=matrix.reasons(),
                    options=_options(run),
                )
            )
    return found


def _renamed(figure: str) -> str:
    """Accuracy when learned means the task given among the figures, and not given in the matrix."""
    return "learning_til" if figure == "learning_acc" else figure


def _of_language(folder: RunFolder) -> list[SeedRun]:
    values = language_values(folder.results)
    return [
        SeedRun(
            folder=folder,
            method=run.key,
            label=run.label,
            seed=run.seed,
            values={**values[run.key][run.seed], "ce_tokens": _over_tokens(run)},
            matrix=_answers(run),
            curve=run.curve(None)[1:],
            reasons={},
            options=_options(run.run),
        )
        for run in language_runs(folder.results)
    ]


def _over_tokens(run: LanguageRun) -> float | None:
    """Cross-entropy after the last task over all tokens of all domains, each token weighing the same."""
    cells = [cell for cell in run.tests[-1] if cell is not None and cell["tokens"]]
    if len(cells) < run.num_tasks:
        return None
    return float(sum(cell["nll"] for cell in cells) / sum(cell["tokens"] for cell in cells))


def _answers(run: LanguageRun) -> AccuracyMatrix | None:
    """Right answers as an accuracy matrix; None unless they were counted on every domain."""
    rows = [[_counted(cell) for cell in cells] for cells in run.tests[1:]]
    last = rows[-1]
    if any(cell is None for cell in last):
        return None
    sizes = [cell[1] for cell in last if cell is not None]
    correct = np.array([[math.nan if cell is None else cell[0] for cell in row] for row in rows])
    return AccuracyMatrix.from_counts(correct, sizes)


def _counted(cell: Mapping[str, Any] | None) -> tuple[int, int] | None:
    return (cell["correct"], cell["answers"]) if cell and cell.get("answers") and cell["correct"] is not None else None


def _options(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (run.get("options") or {}).items() if name not in _NOT_CHOSEN}
