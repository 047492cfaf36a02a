"""`ScoreMatrix`: scores of any scale by moment and task, and the summary numbers of a language model's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from everlora.errors import NumericError, ShapeError
from everlora.metrics import formulas
from everlora.metrics.checks import _floats, frozen
from everlora.metrics.formulas import ONE_TASK, FloatArray, Measure, mean_of, seen_mean, undefined

__all__ = ["ScoreMatrix"]

Pair = tuple[float | None, float | None]
NO_BASELINE = "needs the scores of the base model (baseline)"


class ScoreMatrix:
    """Score on every task after every task, of any scale where higher is better, and what follows from it.

    `values[i, j]` is the score on task `j` after task `i`, NaN where it was not measured. Cells above the diagonal are
    scores on tasks that are still to come. Cross-entropies enter with their sign changed, see `from_cross_entropy`.

    Attributes:
        values: `(T, T)` float64, read-only.
        baseline: `(T,)` float64, scores of the base model, or None.
        abilities: score before and after the run on each set, by ability ("general", "safety") and set.

    Source: section 9 of the reference on I-LoRA.
    """

    def __init__(
        self,
        values: ArrayLike,
        baseline: ArrayLike | None = None,
        *,
        abilities: Mapping[str, Mapping[str, Pair]] | None = None,
    ) -> None:
        """Keep the scores.

        Args:
            values: `(T, T)`; NaN or None for a cell that was not measured.
            baseline: `(T,)`, score of the base model on each task; `fwt` needs it.
            abilities: by ability and set the scores before and after the run, None for one that was not measured.

        Raises:
            ShapeError: a shape is not as above.
            NumericError: a score is infinite.
        """
        self.values: FloatArray = _scores(values, "values")
        count = len(self.values)
        if self.values.shape != (count, count) or not count:
            raise ShapeError(f"values must have shape (T, T) with T >= 1, found {self.values.shape}")
        self.num_tasks: int = count
        self.baseline: FloatArray | None = None if baseline is None else _scores(baseline, "baseline")
        if self.baseline is not None and self.baseline.shape != (count,):
            raise ShapeError(f"baseline must have shape ({count},), one per task, found {self.baseline.shape}")
        self.abilities: dict[str, dict[str, Pair]] = {name: dict(sets) for name, sets in (abilities or {}).items()}
        self._deltas = {name: _delta(name, sets) for name, sets in self.abilities.items()}

    @classmethod
    def from_cross_entropy(
        cls,
        values: ArrayLike,
        baseline: ArrayLike | None = None,
        *,
        abilities: Mapping[str, Mapping[str, Pair]] | None = None,
    ) -> ScoreMatrix:
        """Build the matrix from cross-entropies, where lower is better; every score is a cross-entropy negated.

        Args:
            values: `(T, T)` nats a token, or bits a byte.
            baseline: `(T,)` those of the base model.
            abilities: as above; these are scores already, higher is better.

        Raises:
            ShapeError: a shape is not as above.
            NumericError: a number is infinite.
        """
        before = None if baseline is None else -_scores(baseline, "baseline")
        return cls(-_scores(values, "values"), before, abilities=abilities)

    def __repr__(self) -> str:
        last = self._measures()["last"].value
        return f"ScoreMatrix(num_tasks={self.num_tasks}, last={'None' if last is None else format(last, '.4f')})"

    def summary(self) -> dict[str, float | None]:
        """Return every number by name, None where it is not defined.

        `last`: mean over all tasks at the end. `avg`: mean over the moments of the mean over the tasks seen by then.
        `bwt`: mean change of the earlier tasks since they were learned, below 0 where they got worse; `bwt_trace`: the
        same sum divided by T. `fwt`: mean gain over the base model on each task right before it is learned.
        `forgetting`: mean fall of the earlier tasks from their best. `learning`: mean right after learning.
        `delta_<ability>`: mean change over the sets of an ability.
        """
        return {name: measure.value for name, measure in self._measures().items()}

    def reasons(self) -> dict[str, str]:
        """Return, for every number that is None in `summary`, why."""
        return {name: measure.reason for name, measure in self._measures().items() if measure.value is None}

    def _measures(self) -> dict[str, Measure]:
        values, last, count = self.values, self.num_tasks - 1, self.num_tasks
        backward = formulas.backward_transfer(values, last, skip=False)
        steps = [seen_mean(values, step, skip=False) for step in range(count)]
        measures = {
            "last": steps[-1],
            "avg": _mean_of_steps(steps),
            "bwt": backward,
            "bwt_trace": formulas.mapped(backward, last / count),
            "fwt": self._forward_transfer(),
            "forgetting": self._forgetting(),
            "learning": mean_of(values.diagonal(), skip=False),
        }
        return measures | {f"delta_{name}": measure for name, measure in self._deltas.items()}

    def _forward_transfer(self) -> Measure:
        # formulas.forward_transfer takes rows of zeros for a head without future classes; here 0 is a score like others
        if self.num_tasks < 2:
            return undefined(ONE_TASK)
        if self.baseline is None:
            return undefined(NO_BASELINE)
        return mean_of(self.values.diagonal(offset=1) - self.baseline[1:], skip=False)

    def _forgetting(self) -> Measure:
        # the best of some of the moments would be a lower bound, so a gap anywhere below the diagonal leaves it open
        rows, columns = np.tril_indices(self.num_tasks)
        needed = self.values[rows, columns][columns < self.num_tasks - 1]
        missing = int(np.isnan(needed).sum())
        if missing:
            return Measure(None, f"{missing} of {len(needed)} numbers it needs were not measured")
        return formulas.forgetting(self.values, self.num_tasks - 1, skip=False)


def _mean_of_steps(steps: list[Measure]) -> Measure:
    return mean_of([np.nan if step.value is None else step.value for step in steps], skip=False)


def _delta(name: str, sets: Mapping[str, Pair]) -> Measure:
    if not sets:
        return undefined(f"the ability '{name}' has no sets")
    scores = _scores([list(pair) for pair in sets.values()], f"ability '{name}'")
    if scores.shape != (len(sets), 2):
        raise ShapeError(f"each set of the ability '{name}' must have a score before and one after, found {dict(sets)}")
    return mean_of(scores[:, 1] - scores[:, 0], skip=False)


def _scores(values: Any, name: str) -> FloatArray:
    array = _floats(values, name)
    if np.isinf(array).any():
        raise NumericError(f"{name} must hold finite numbers, or NaN where nothing was measured, found an infinite one")
    return frozen(array)
