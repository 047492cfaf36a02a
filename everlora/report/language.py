"""What a run of a language model amounts to: cross-entropies by stage and domain, and the figures made of them.

Rows are a method with one of the weights it may predict with. Cross-entropy is in nats a token, lower is better;
transfer and forgetting are those of its negative, so that they mean what they mean for accuracies.

Source: sections 9 and 13 of the reference on I-LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everlora.errors import DataError
from everlora.metrics.formulas import FloatArray
from everlora.metrics.language import ScoreMatrix
from everlora.report.figures import costs, sizes
from everlora.report.table import Statistic, statistic

__all__ = [
    "LanguageRow",
    "LanguageRun",
    "bits_per_byte",
    "cross_entropy",
    "is_language",
    "language_rows",
    "language_runs",
    "language_values",
    "run_figures",
]

Cell = Mapping[str, Any]
Figures = dict[str, float | None]
FORMAT = 1


@dataclass(frozen=True)
class LanguageRun:
    """One row of a recipe with one seed, seen with one of its weights.

    Attributes:
        row: the recipe's row.
        variant: which weights; None where the method has but one choice.
        is_usual: whether these are the weights it predicts with unless told otherwise.
        label: what the row is called.
        run: the entry of `runs` in `results.json`.
        tests: `(T + 1, T)` scores: the pretrained model first, then after each task; None where nothing was measured.
        stages: what else was measured at those `T + 1` moments, None where nothing was.
    """

    row: str
    variant: str | None
    is_usual: bool
    label: str
    run: Mapping[str, Any]
    tests: list[list[Cell | None]]
    stages: list[Mapping[str, Any] | None]

    @property
    def key(self) -> str:
        """The row's name, with that of the weights where there is a choice."""
        return self.row if self.variant is None else f"{self.row}/{self.variant}"

    @property
    def seed(self) -> int | None:
        """Its seed."""
        return self.run.get("seed")

    @property
    def num_tasks(self) -> int:
        """Number of domains."""
        return len(self.tests) - 1

    def curve(self, task: int | None) -> list[float | None]:
        """Cross-entropy of one domain, or mean over all, at each of the `T + 1` moments."""
        return [_of_row(cells, task, cross_entropy) for cells in self.tests]

    def retention(self) -> list[float | None]:
        """Cross-entropy of the pretrained model's own texts at each moment, less that of the pretrained model."""
        scores = [None if stage is None else cross_entropy(stage.get("retention")) for stage in self.stages]
        first = scores[0]
        return [None if score is None or first is None else score - first for score in scores]

    def matrix(self) -> FloatArray:
        """Cross-entropies `(T, T)` after each task, NaN where nothing was measured."""
        rows = [[_or_nan(cross_entropy(cell)) for cell in cells] for cells in self.tests[1:]]
        return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class LanguageRow:
    """The runs of one row over its seeds, with mean, deviation and count of each figure."""

    key: str
    row: str
    variant: str | None
    label: str
    runs: list[LanguageRun]
    figures: dict[str, Statistic]
    is_ablation: bool
    trials: int | None

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.runs)


def is_language(results: Mapping[str, Any]) -> bool:
    """Whether results are of language models."""
    return bool((results.get("stream") or {}).get("scenario") == "language")


def cross_entropy(cell: Cell | None) -> float | None:
    """Nats a token of a stored score."""
    return cell["nll"] / cell["tokens"] if cell and cell["tokens"] else None


def bits_per_byte(cell: Cell | None) -> float | None:
    """Bits a byte of a stored score."""
    return cell["nll"] / (math.log(2) * cell["num_bytes"]) if cell and cell["num_bytes"] else None


def language_runs(results: Mapping[str, Any]) -> list[LanguageRun]:
    """Return every run with each of the weights that were measured.

    Raises:
        DataError: the format is another one, or a run was not measured as a language model.
    """
    if results.get("format") != FORMAT:
        raise DataError(f"results must have format {FORMAT}, found {results.get('format')!r}; run the recipe again")
    found = []
    for run in results.get("runs") or []:
        known = run.get("language")
        if not known:
            raise DataError(f"run '{run.get('method')}' has no figures of language; run the recipe again")
        stages = {stage["task"]: stage["measured"] for stage in known["stages"]}
        variants = [one["variant"] for one in next(iter(stages.values()))] if stages else [None]
        found += [_run(run, known, stages, place, variant) for place, variant in enumerate(variants)]
    return found


def language_rows(results: Mapping[str, Any]) -> list[LanguageRow]:
    """Return one row for each method and weights, in order of first appearance.

    Raises:
        DataError: as `language_runs`, or a row has two runs with one seed.
    """
    groups: dict[str, list[LanguageRun]] = {}
    for run in language_runs(results):
        groups.setdefault(run.key, []).append(run)
    described = results.get("rows") or {}
    rows = []
    for key, runs in groups.items():
        if len({run.seed for run in runs}) < len(runs):
            raise DataError(f"row '{key}' has two runs with one seed; keep one run per row and seed")
        figures = [run_figures(run) for run in runs]
        first, about = runs[0], described.get(runs[0].row) or {}
        rows.append(
            LanguageRow(
                key=key,
                row=first.row,
                variant=first.variant,
                label=first.label,
                runs=runs,
                figures={name: statistic([one[name] for one in figures]) for name in figures[0]},
                is_ablation=bool(about.get("ablation")),
                trials=about.get("trials"),
            )
        )
    return rows


def language_values(results: Mapping[str, Any]) -> dict[str, dict[int | None, Figures]]:
    """Return the figures of every run by row and seed; a row's name alone stands for the weights it usually has."""
    values: dict[str, dict[int | None, Figures]] = {}
    for run in language_runs(results):
        figures = run_figures(run)
        for name in (run.key, run.row) if run.is_usual else (run.key,):
            values.setdefault(name, {})[run.seed] = figures
    return values


def run_figures(run: LanguageRun) -> Figures:
    """Return the figures of one run, None where a number is not defined or was not recorded.

    Returns:
        At the end, means over domains: `ce` (nats a token), `bits_per_byte`, `answer_acc`, `rouge_l`; `ce_first`,
        `ce_last` and `ce_earlier`, of the first domain, the last and all but the last; `ce:0`, ... and
        `bits_per_byte:0`, ... of each domain, `answer_acc:0`, ... likewise. `learning_ce`: of each domain right after
        it was learned. `bwt_ce`, `fwt_ce`, `forgetting_ce`: in nats. `retention`: of the pretrained model's own texts,
        less the pretrained model's. `general_delta`: change on general abilities, of the share of right answers, or of
        the negative cross-entropy where answers were not counted. `buffer_bytes`; and sizes and costs as for
        classifiers.
    """
    entries: Sequence[Mapping[str, Any]] = run.run.get("cost") or []
    return {
        **_ends(run),
        **_transfers(run),
        "retention": run.retention()[-1],
        "buffer_bytes": _buffer_bytes(run.run),
        **sizes(run.run, entries, run.num_tasks),
        **costs(entries, run.num_tasks),
    }


def _run(
    run: Mapping[str, Any], known: Mapping[str, Any], stages: Mapping[int, Any], place: int, variant: str | None
) -> LanguageRun:
    count = len(known["domains"])
    measured = [stages[task][place] if task in stages else None for task in range(count)]
    label = str(run.get("label") or run["method"])
    return LanguageRun(
        row=str(run["method"]),
        variant=variant,
        is_usual=place == 0,
        label=label if variant is None else f"{label} {variant}",
        run=run,
        tests=[[None] * count if stage is None else list(stage["tests"]) for stage in [known["base"], *measured]],
        stages=[known["base"], *measured],
    )


def _ends(run: LanguageRun) -> Figures:
    last = run.tests[-1]
    kinds = {"ce": cross_entropy, "bits_per_byte": bits_per_byte, "answer_acc": _accuracy, "rouge_l": _rouge}
    figures: Figures = {}
    for name, kind in kinds.items():
        figures[name] = _of_row(last, None, kind)
        figures |= {f"{name}:{task}": kind(cell) for task, cell in enumerate(last)}
    earlier = [cross_entropy(cell) for cell in last[:-1]]
    return figures | {
        "ce_first": cross_entropy(last[0]),
        "ce_last": cross_entropy(last[-1]),
        "ce_earlier": _mean(earlier) if earlier else None,
    }


def _transfers(run: LanguageRun) -> Figures:
    base = np.array([_or_nan(cross_entropy(cell)) for cell in run.tests[0]])
    found = ScoreMatrix.from_cross_entropy(run.matrix(), base, abilities={"general": _general(run)}).summary()
    names = {"bwt_ce": "bwt", "forgetting_ce": "forgetting", "fwt_ce": "fwt", "general_delta": "delta_general"}
    learned = found["learning"]
    return {name: found[other] for name, other in names.items()} | {
        "learning_ce": None if learned is None else -learned
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _general(run: LanguageRun) -> dict[str, tuple[float | None, float | None]]:
    """Score of each set of general abilities before and after: right answers, or else the negative cross-entropy."""
    first, last = ((stage or {}).get("general") or [] for stage in (run.stages[0], run.stages[-1]))
    pairs = zip(run.run["language"]["general_sets"], first, last, strict=False)
    return {name: (_ability(before), _ability(after)) for name, before, after in pairs}


def _ability(cell: Cell) -> float | None:
    accuracy, nats = _accuracy(cell), cross_entropy(cell)
    return accuracy if accuracy is not None or nats is None else -nats


def _buffer_bytes(run: Mapping[str, Any]) -> float | None:
    curves = (run.get("panels") or {}).get("buffer_bytes") or {}
    ends = [curve[-1] for curve in curves.values() if curve and curve[-1] is not None]
    return float(sum(ends)) if ends else None


def _accuracy(cell: Cell | None) -> float | None:
    return cell["correct"] / cell["answers"] if cell and cell.get("answers") and cell["correct"] is not None else None


def _rouge(cell: Cell | None) -> float | None:
    return cell.get("rouge_l") if cell else None


def _of_row(cells: Sequence[Cell | None], task: int | None, kind: Any) -> float | None:
    return kind(cells[task]) if task is not None else _mean([kind(cell) for cell in cells])


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of all, None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
