"""What one run amounts to, as plain numbers: accuracy with and without the task given, growth, speed and cost.

Source: section 12 of the reference on convolutional networks; accuracies and forgetting as `AccuracyMatrix` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everlora.metrics import AccuracyMatrix
from everlora.metrics.speed import SHARE, area_over_epochs, arrival, best_accuracy, epochs_to_own_share

__all__ = ["costs", "run_figures", "sizes"]

Figures = dict[str, float | None]


def run_figures(run: Mapping[str, Any], matrix: AccuracyMatrix, reference: Mapping[str, Any] | None) -> Figures:
    """Return the figures of one run, None where a number is not defined or was not recorded.

    Args:
        run: an entry of `runs` in `results.json`.
        matrix: its accuracies.
        reference: the run of the reference row with the same seed, by whose best accuracies speed is measured.

    Returns:
        `til` and `cil`: mean accuracy over the tasks at the end, the task given and not; `learning_acc`: right after
        each task, the task given; `forgetting_*` and `bwt_*`; `task_recognition`; `params_growth` and
        `growth_per_task`: shares of the parameters at the start, with `relative_size` their ratio; `e95_own`,
        `e95_ref`, `e95_reached`, `s95_ref`, `aulc`: means over tasks, for runs that learned one task after the other;
        `sec_step`, `sec_task`, `peak_mem`, `state_bytes`, `params_trainable`.
    """
    entries: Sequence[Mapping[str, Any]] = run.get("cost") or []
    return {
        **_accuracies(matrix),
        **sizes(run, entries, matrix.num_tasks),
        **_speed(_curves(run, matrix.num_tasks), _curves(reference, matrix.num_tasks)),
        **costs(entries, matrix.num_tasks),
    }


def _accuracies(matrix: AccuracyMatrix) -> Figures:
    free = matrix.summary()
    given: Figures = dict.fromkeys(free)
    if matrix.task_aware is not None:
        given = AccuracyMatrix(matrix.task_aware, matrix.sizes).summary()
    return {
        "til": given["last"],
        "cil": free["last"],
        "learning_acc": given["learning_acc"],
        "forgetting_til": given["forgetting"],
        "bwt_til": given["bwt"],
        "forgetting_cil": free["forgetting"],
        "bwt_cil": free["bwt"],
        "task_recognition": free["task_recognition"],
    }


def sizes(run: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], num_tasks: int) -> Figures:
    """Growth of a run, and its size over that at the start; None where sizes were not recorded."""
    start = run.get("reference_parameters")
    stored = [int(count) for entry in entries if (count := entry.get("stored_parameters")) is not None]
    if not start or not stored or len(stored) < len(entries):
        return dict.fromkeys(("params_growth", "growth_per_task", "relative_size"))
    one_by_one = len(stored) == num_tasks > 1
    return {
        "params_growth": stored[-1] / start - 1.0,
        "growth_per_task": (stored[-1] - stored[0]) / ((num_tasks - 1) * start) if one_by_one else None,
        "relative_size": stored[-1] / start,
    }


def _curves(run: Mapping[str, Any] | None, num_tasks: int) -> list[Sequence[Sequence[float]]] | None:
    """Validation curves of all tasks; None unless every task was learned by itself and has one."""
    if run is None:
        return None
    curves = [entry.get("curve") or [] for entry in run.get("cost") or []]
    return curves if len(curves) == num_tasks and all(len(curve) > 1 for curve in curves) else None


def _speed(
    curves: list[Sequence[Sequence[float]]] | None, references: list[Sequence[Sequence[float]]] | None
) -> Figures:
    if curves is None:
        return dict.fromkeys(("e95_own", "e95_ref", "e95_reached", "s95_ref", "aulc"))
    figures: Figures = {
        "e95_own": _mean([epochs_to_own_share(curve) for curve in curves]),
        "aulc": _mean([area_over_epochs(curve) for curve in curves]),
    }
    if references is None:
        return figures | dict.fromkeys(("e95_ref", "e95_reached", "s95_ref"))
    pairs = zip(curves, references, strict=True)
    arrivals = [arrival(curve, SHARE * best_accuracy(reference)) for curve, reference in pairs]
    return figures | {
        "e95_ref": _mean([one.epochs for one in arrivals]),
        "e95_reached": _mean([one.reached for one in arrivals]),
        "s95_ref": _mean([one.seconds for one in arrivals]),
    }


def costs(entries: Sequence[Mapping[str, Any]], num_tasks: int) -> Figures:
    """Time of a step and of a task, peak memory, bytes kept at the end and parameters trained."""

    def recorded(name: str) -> list[float]:
        return [float(entry[name]) for entry in entries if entry.get(name) is not None]

    # A row that trains nothing takes no steps, and its step has no length.
    steps = [value for value in recorded("step_seconds") if value > 0]
    seconds, kept = recorded("seconds"), recorded("state_bytes")
    return {
        "sec_step": _mean(steps) if steps else None,
        "sec_task": sum(seconds) / num_tasks if seconds else None,
        "peak_mem": max(recorded("peak_memory_bytes"), default=None),
        "state_bytes": kept[-1] if kept else None,
        "params_trainable": max(recorded("trainable_parameters"), default=None),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
