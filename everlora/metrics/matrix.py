"""`AccuracyMatrix`: accuracies by moment and task, and all summary numbers of a continual-learning run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from everlora.errors import OptionError
from everlora.metrics import formulas
from everlora.metrics.checks import checked_counts, checked_fractions, checked_not_below, checked_sizes, frozen
from everlora.metrics.formulas import FloatArray, Measure, mean_of, seen_mean, undefined
from everlora.metrics.printed import as_printed_by

__all__ = ["AccuracyMatrix"]

Missing = Literal["none", "skip"]
Curve = list[float | None]

NO_SIZES = "needs the sizes of the test sets"


class AccuracyMatrix:
    """Accuracy on every task after every task, and what follows from it.

    `values[i, j]` is the accuracy in [0, 1] on the test set of task `j` after task `i`; NaN means not measured. The
    diagonal and what lies below it are the usual content; cells above are zero-shot evaluations and change no number
    about the past. A whole row may be missing: a joint run fills the last row alone.

    Attributes:
        values: `(T, T)` float64, read-only.
        sizes: `(T,)` float64, test rows per task, or None.
        baseline: `(T,)` float64, accuracies before any training, or None.
        task_aware: `(T, T)` accuracies when the prediction is limited to the task's own classes, or None.
        task_recognised: `(T, T)` shares of rows whose predicted class belongs to the right task, or None.
        individual: `(T,)` accuracies of a model trained on that task alone, or None.
        joint: `(T,)` accuracies of a model trained on all tasks together, or None.
    """

    def __init__(self, values: ArrayLike, sizes: ArrayLike | None = None, baseline: ArrayLike | None = None) -> None:
        """Keep the accuracies.

        Args:
            values: `(T, T)` fractions, NaN or None for a cell that was not measured.
            sizes: `(T,)` positive whole numbers; without them every number over samples is None.
            baseline: `(T,)` fractions, accuracy on each task before the stream began; needed for `fwt`.

        Raises:
            ShapeError: a shape is not as above.
            NumericError: a number lies outside [0, 1] or is infinite.
            DataError: a test set is empty.
        """
        self.values: FloatArray = checked_fractions(values, "values", dimensions=2)
        count = len(self.values)
        self.num_tasks: int = count
        self.sizes: FloatArray | None = None if sizes is None else checked_sizes(sizes, count)
        self.baseline: FloatArray | None = _per_task(baseline, "baseline", count)
        self.task_aware: FloatArray | None = None
        self.task_recognised: FloatArray | None = None
        self.individual: FloatArray | None = None
        self.joint: FloatArray | None = None

    @classmethod
    def from_counts(
        cls,
        correct: ArrayLike,
        sizes: ArrayLike,
        task_aware: ArrayLike | None = None,
        task_correct: ArrayLike | None = None,
        individual: ArrayLike | None = None,
        joint: ArrayLike | None = None,
        baseline: ArrayLike | None = None,
    ) -> AccuracyMatrix:
        """Build the matrix from whole numbers of right answers.

        Args:
            correct: `(T, T)` right answers; NaN, None, a masked cell or a negative number means not measured.
            sizes: `(T,)` test rows per task.
            task_aware: `(T, T)` right answers when the prediction is limited to the task's own classes.
            task_correct: `(T, T)` rows whose predicted class belongs to the right task.
            individual: `(T,)` accuracies (fractions) of models trained on one task each.
            joint: `(T,)` accuracies (fractions) of the model trained on all tasks together.
            baseline: `(T,)` accuracies (fractions) before any training.

        Returns:
            The matrix; `values` is `correct / sizes`.

        Raises:
            ShapeError: a shape is not as above.
            NumericError: a count is not whole, or a fraction lies outside [0, 1].
            DataError: a count exceeds its test set, or a right class comes without a right task.
        """
        right = checked_counts(correct, sizes, "correct")
        matrix = cls(right / np.asarray(sizes, dtype=np.float64), sizes, baseline)
        matrix.task_aware = _shares(task_aware, sizes, right, "task_aware")
        matrix.task_recognised = _shares(task_correct, sizes, right, "task_correct")
        matrix.individual = _per_task(individual, "individual", matrix.num_tasks)
        matrix.joint = _per_task(joint, "joint", matrix.num_tasks)
        return matrix

    def __repr__(self) -> str:
        last = self._measures(skip=False)["last"].value
        return f"AccuracyMatrix(num_tasks={self.num_tasks}, last={'None' if last is None else format(last, '.4f')})"

    def summary(self, *, missing: Missing = "none") -> dict[str, float | None]:
        """Return every number by name, as fractions (`*_skipped` and `*_count` are counts); None where not defined.

        Args:
            missing: `"none"` makes a mean over a set with unmeasured cells None; `"skip"` averages what was measured
                and adds `<name>_count`, the number of terms used, for every defined number.

        Raises:
            OptionError: `missing` is another word.
        """
        measures = self._measures(skip=_is_skip(missing))
        result = {name: measure.value for name, measure in measures.items()}
        if missing == "skip":
            result |= {f"{name}_count": float(m.count) for name, m in measures.items() if m.value is not None}
        return result

    def reasons(self, *, missing: Missing = "none") -> dict[str, str]:
        """Return, for every number that is None in `summary`, why."""
        measures = self._measures(skip=_is_skip(missing))
        return {name: measure.reason for name, measure in measures.items() if measure.value is None}

    def notes(self, *, missing: Missing = "none") -> dict[str, str]:
        """Return, for defined numbers, what a reader must know: tasks that had to be left out."""
        return {name: measure.note for name, measure in self._measures(skip=_is_skip(missing)).items() if measure.note}

    def curves(self, *, missing: Missing = "none") -> dict[str, Curve]:
        """Return the numbers after each task: lists of length `T`, None where a number is not defined.

        `forgetting*` and `bwt` begin at the second task, so their first entry is None.
        """
        skip = _is_skip(missing)
        return {name: [measure.value for measure in steps] for name, steps in self._curves(skip).items()}

    def as_printed_by(
        self, project: str, *, classes_per_task: int | Sequence[int] | None = None
    ) -> dict[str, float | None]:
        """Return the numbers another project's code would print for this run, its flaws included.

        Args:
            project: one of `everlora.metrics.PROJECTS`; `everlora.metrics.CAVEATS` says what to beware of.
            classes_per_task: number of new classes in each task, where the project's arithmetic depends on
                class numbers.

        Returns:
            The project's own labels and units; a name that begins with `everlora ` is our number beside it, same unit.

        Raises:
            OptionError: the project is not known.
        """
        return as_printed_by(self, project, classes_per_task=classes_per_task)

    def _curves(self, skip: bool) -> dict[str, list[Measure]]:
        steps = range(self.num_tasks)
        curves = {
            "acc_step": [seen_mean(self.values, i, skip=skip) for i in steps],
            "acc_step_samples": [self._over_samples(self.values, i, skip) for i in steps],
            "forgetting": [formulas.forgetting(self.values, i, skip=skip) for i in steps],
            "forgetting_clipped": [formulas.forgetting(self.values, i, skip=skip, include_last=True) for i in steps],
            "bwt": [formulas.backward_transfer(self.values, i, skip=skip) for i in steps],
        }
        curves["forgetting_from_diag"] = [formulas.mapped(measure, -1.0) for measure in curves["bwt"]]
        aware, recognised = self.task_aware, self.task_recognised
        without_aware = undefined("needs the task-aware counts")
        curves["task_aware_step"] = [without_aware if aware is None else seen_mean(aware, i, skip=skip) for i in steps]
        curves["task_aware_step_samples"] = [
            without_aware if aware is None else self._over_samples(aware, i, skip) for i in steps
        ]
        without_tasks = undefined("needs the counts of recognised tasks; not defined where classes repeat")
        curves["task_recognition"] = [
            without_tasks if recognised is None else self._over_samples(recognised, i, skip) for i in steps
        ]
        return curves

    def _measures(self, skip: bool) -> dict[str, Measure]:
        curves = self._curves(skip)
        return (
            self._accuracy_measures(curves, skip)
            | self._task_measures(curves, skip)
            | self._reference_measures(curves, skip)
            | self._transfer_measures(curves, skip)
        )

    def _accuracy_measures(self, curves: dict[str, list[Measure]], skip: bool) -> dict[str, Measure]:
        means, over_samples = curves["acc_step"], curves["acc_step_samples"]
        return {
            "last": means[-1],
            "last_samples": over_samples[-1],
            "avg": _mean_of_steps(means, skip),
            "avg_samples": _mean_of_steps(over_samples, skip),
            "avg_without_first": _mean_of_steps(means[1:], skip) if means[1:] else undefined(formulas.ONE_TASK),
            "aulc": formulas.area_under_steps([measure.value for measure in means]),
            "learning_acc": mean_of(self.values.diagonal(), skip=skip),
            "worst_task": self._worst_task(skip),
        }

    def _task_measures(self, curves: dict[str, list[Measure]], skip: bool) -> dict[str, Measure]:
        return {
            "task_recognition": curves["task_recognition"][-1],
            "task_aware_last": curves["task_aware_step"][-1],
            "task_aware_last_samples": curves["task_aware_step_samples"][-1],
            "task_aware_avg": _mean_of_steps(curves["task_aware_step"], skip),
        }

    def _reference_measures(self, curves: dict[str, list[Measure]], skip: bool) -> dict[str, Measure]:
        intransigence = undefined("needs the accuracies of models trained on one task each (individual)")
        if self.individual is not None:
            intransigence = mean_of(self.individual - self.values.diagonal(), skip=skip)
        gap = undefined("needs the accuracies of the model trained on all tasks together (joint)")
        if self.joint is not None:
            gap = mean_of(self.joint - self.values[-1], skip=skip)
        return {"intransigence": intransigence, "joint_gap": gap}

    def _transfer_measures(self, curves: dict[str, list[Measure]], skip: bool) -> dict[str, Measure]:
        backward, count = curves["bwt"][-1], self.num_tasks
        all_rows = formulas.backward_transfer_all_rows(self.values, skip=skip)
        positive = remembering = all_rows
        if all_rows.value is not None:
            positive = Measure(max(all_rows.value, 0.0), count=all_rows.count)
            remembering = Measure(1.0 - abs(min(all_rows.value, 0.0)), count=all_rows.count)
        retention, skipped = formulas.retention(self.values, skip=skip)
        return {
            "forgetting": curves["forgetting"][-1],
            "forgetting_clipped": curves["forgetting_clipped"][-1],
            "forgetting_from_diag": curves["forgetting_from_diag"][-1],
            "bwt": backward,
            "bwt_avg": all_rows,
            "bwt_avg_positive": positive,
            "remembering": remembering,
            "bwt_trace": formulas.mapped(backward, (count - 1) / count),
            "fwt": formulas.forward_transfer(self.values, self.baseline, skip=skip),
            "fwt_avg": formulas.forward_transfer_all_rows(self.values, skip=skip),
            "retention": retention,
            "retention_skipped": skipped,
        }

    def _over_samples(self, shares: FloatArray, step: int, skip: bool) -> Measure:
        if self.sizes is None:
            return undefined(NO_SIZES)
        return seen_mean(shares, step, skip=skip, weights=self.sizes)

    def _worst_task(self, skip: bool) -> Measure:
        whole = mean_of(self.values[-1], skip=skip)
        return whole if whole.value is None else Measure(float(np.nanmin(self.values[-1])), count=whole.count)


def _mean_of_steps(steps: Sequence[Measure], skip: bool) -> Measure:
    """Average a curve; when no point of it is defined, the reason is that of its points."""
    if all(step.value is None for step in steps):
        return undefined(steps[-1].reason)
    return mean_of([np.nan if step.value is None else step.value for step in steps], skip=skip)


def _per_task(values: ArrayLike | None, name: str, count: int) -> FloatArray | None:
    return None if values is None else checked_fractions(values, name, dimensions=1, count=count)


def _shares(counts: ArrayLike | None, sizes: ArrayLike, right: FloatArray, name: str) -> FloatArray | None:
    if counts is None:
        return None
    numbers = checked_counts(counts, sizes, name)
    checked_not_below(numbers, right, name)
    return frozen(numbers / np.asarray(sizes, dtype=np.float64))


def _is_skip(missing: Any) -> bool:
    if missing not in ("none", "skip"):
        raise OptionError(f"missing must be 'none' or 'skip', found {missing!r}")
    return bool(missing == "skip")
