"""The numbers as other projects print them, from the same matrix.

Each function follows the arithmetic that project publishes, including what is wrong with it, so that a reader can set
our runs beside its tables. Labels are the project's; a curve's points are `"<label> [1]"`, `"<label> [2]"`, ...
Our own number stands beside it under `"everlora <name>"`, in the same unit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from everlora.errors import OptionError, ShapeError, nearest
from everlora.metrics.class_groups import class_groups, forgetting_by_column, forgetting_by_sorted_label
from everlora.metrics.formulas import FloatArray

__all__ = ["CAVEATS", "PROJECTS", "STANDING_WARNING", "as_printed_by"]

logger = logging.getLogger("everlora.metrics")

Printed = dict[str, float | None]

STANDING_WARNING = (
    "Published numbers of different projects differ in the mean (over tasks or over samples), in the maximum used for "
    "forgetting and in the divisor."
)

CAVEATS: Mapping[str, str] = {
    "pilot": "Means over samples, rounded to two decimals first; forgetting lets the last row compete for the maximum.",
    "inflora": "Curves over samples in percent, task recognition as a fraction; readers average the curves themselves.",
    "sdlora": "As pilot, but groups are sorted as text, so with more than 100 classes forgetting mixes up tasks.",
    "libcontinual": "Forgetting and backward transfer leave out the newest old task; 0 before the third task.",
    "mammoth": "Means over tasks; forgetting lets the last row compete; forward transfer is 0 by construction.",
    "avalanche": "Stream accuracy covers future tasks too; forgetting is first minus last, not best minus last.",
    "trace": "Scale 0 to 100; backward transfer divides by T instead of T - 1.",
    "easycl": "Cells that were not measured count as 0, which can look like great forgetting.",
}


class _Matrix(Protocol):
    """What a printing mode reads: kept apart from the class so that the two modules do not import each other."""

    values: FloatArray
    sizes: FloatArray | None
    baseline: FloatArray | None
    task_aware: FloatArray | None
    task_recognised: FloatArray | None
    num_tasks: int

    def summary(self) -> dict[str, float | None]: ...

    def curves(self) -> dict[str, list[float | None]]: ...


def as_printed_by(
    matrix: _Matrix, project: str, *, classes_per_task: int | Sequence[int] | None = None
) -> dict[str, float | None]:
    """Return the numbers `project` would print; see `AccuracyMatrix.as_printed_by`.

    Raises:
        OptionError: the project is not known.
        ShapeError: `classes_per_task` does not have one positive number per task.
    """
    key = project.lower().replace("-", "").replace("_", "")
    if key not in _MODES:
        raise OptionError(f"no printing mode for project '{project}'; {nearest(key, PROJECTS)}")
    return _MODES[key](matrix, _classes(classes_per_task, matrix.num_tasks))


def _classes(given: int | Sequence[int] | None, num_tasks: int) -> list[int] | None:
    if given is None:
        return None
    counts = [given] * num_tasks if isinstance(given, int) else [int(count) for count in given]
    if len(counts) != num_tasks or min(counts) < 1:
        raise ShapeError(f"classes_per_task must be {num_tasks} positive numbers, one per task, found {counts}")
    return counts


def _number(value: float | np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(terms: Sequence[float] | FloatArray) -> float | None:
    return _number(np.mean(terms)) if len(terms) else None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


def _points(label: str, curve: Sequence[float | None], change: Callable[[float], float] = float) -> Printed:
    return {f"{label} [{i + 1}]": None if point is None else change(point) for i, point in enumerate(curve)}


def _two_decimals(fraction: float) -> float:
    return float(np.round(100.0 * fraction, 2))


def _ours(matrix: _Matrix, *names: str, scale: float = 100.0) -> Printed:
    summary = matrix.summary()
    return {f"everlora {name}": None if (value := summary[name]) is None else scale * value for name in names}


def _grouped(matrix: _Matrix, classes: list[int] | None) -> Printed:
    """The dictionary of groups printed after the last task."""
    last = matrix.num_tasks - 1
    groups = class_groups(classes, last)
    if groups is None:
        return {}
    row = matrix.values[last]
    result = {f"grouped {label}": _percent(_number(row[task])) for label, task in groups}
    old = 0.0 if last == 0 else np.nan
    if last and matrix.sizes is not None:
        old = float(np.average(row[:last], weights=matrix.sizes[:last]))
    result |= {"grouped old": _percent(_number(old)), "grouped new": _percent(_number(row[last]))}
    return {name: None if value is None else float(np.round(value, 2)) for name, value in result.items()}


def _pilot(matrix: _Matrix, classes: list[int] | None) -> Printed:
    curve = [None if point is None else _two_decimals(point) for point in matrix.curves()["acc_step_samples"]]
    printed = _points("CNN top1 curve", curve)
    printed["Average Accuracy (CNN)"] = _mean([np.nan if point is None else point for point in curve])
    printed["Forgetting (CNN)"] = forgetting_by_column(matrix.values, classes)
    return printed | _grouped(matrix, classes) | _ours(matrix, "last_samples", "avg_samples", "forgetting")


def _sdlora(matrix: _Matrix, classes: list[int] | None) -> Printed:
    printed = _pilot(matrix, classes)
    aligned, wrong = forgetting_by_column(matrix.values, classes), forgetting_by_sorted_label(matrix.values, classes)
    return printed | {
        "Forgetting (CNN)": wrong,
        "forgetting (printed)": wrong,
        "forgetting (column-aligned)": aligned,
    }


def _inflora(matrix: _Matrix, classes: list[int] | None) -> Printed:
    curves = matrix.curves()
    recognition = curves["task_recognition"]
    if classes is not None and len(set(classes)) > 1:
        recognition = [
            None
        ] * matrix.num_tasks  # it divides the label by one group width, so unequal tasks have no value
    return (
        _points("CNN top1 curve", curves["acc_step_samples"], _two_decimals)
        | _points("CNN top1 with task curve", curves["task_aware_step_samples"], _two_decimals)
        | _points("CNN top1 task curve", recognition)
        | _ours(matrix, "last_samples", "avg_samples")
    )


def _libcontinual(matrix: _Matrix, classes: list[int] | None) -> Printed:
    count = matrix.num_tasks
    rounded = np.round(100.0 * matrix.values, 2)
    diagonal = rounded.diagonal()
    batch = [np.nan if p is None else _two_decimals(p) for p in matrix.curves()["acc_step_samples"]]
    by_task = [float(rounded[i, : i + 1].mean()) for i in range(count)]
    forgotten, backward, total = [0.0] * count, [0.0] * count, 0.0
    for step in range(2, count):
        change = float((rounded[step, : step - 1] - diagonal[: step - 1]).sum())
        total += change
        forgotten[step] = -change / step
        backward[step] = 2.0 * total / (step * (step + 1))
    printed = {
        "[Batch] Last Average Acc": _number(batch[-1]),
        "[Task] Last Average Acc": _number(by_task[-1]),
        "Forgetting": _number(forgotten[-1]),
        "Backward Transfer": _number(backward[-1]),
        "[Batch] Overall Avg Acc": _mean(batch),
        "[Task] Overall Avg Acc": _mean(by_task),
        "Overall Frgt": _mean(forgotten[2:]),
        "Overall BwT": _mean(backward[2:]),
    }
    printed |= _points("Forgetting", [_number(value) for value in forgotten])
    printed |= _points("Backward Transfer", [_number(value) for value in backward])
    return printed | _ours(matrix, "last_samples", "last", "forgetting", "bwt")


def _mammoth(matrix: _Matrix, classes: list[int] | None) -> Printed:
    summary, count = matrix.summary(), matrix.num_tasks
    forgetting = None
    if count > 1:
        table = np.where(np.isnan(matrix.values), 0.0, matrix.values)
        forgetting = 100.0 * float(np.mean((table.max(axis=0) - table[-1])[:-1]))
    return {
        "[Class-IL]": _percent(summary["last"]),
        "[Task-IL]": _percent(summary["task_aware_last"]),
        "[Domain-IL]": _percent(summary["last"]),
        "Backward Transfer": _percent(summary["bwt"]),
        "Forgetting": forgetting,
        "Forward Transfer": 0.0 if count > 1 else None,
    } | _ours(matrix, "last", "forgetting", "bwt", "fwt")


def _avalanche(matrix: _Matrix, classes: list[int] | None) -> Printed:
    count, values = matrix.num_tasks, matrix.values
    stream: list[float | None] = [None] * count
    if matrix.sizes is not None:
        stream = [_number(np.average(row, weights=matrix.sizes)) for row in values]
    drops = values.diagonal()[:, None] - values.T  # (task, step)
    forgotten: list[float | None] = [None] * count
    for step in range(1, count):
        measured = drops[:step, step][~np.isnan(drops[:step, step])]
        forgotten[step] = _mean(measured)
    final = forgotten[-1]
    printed = {
        "Top1_Acc_Stream": stream[-1],
        "StreamForgetting": final,
        "StreamBWT": None if final is None else -final,
        "StreamForwardTransfer": matrix.summary()["fwt"],
    }
    printed |= _points("Top1_Acc_Stream", stream)
    printed |= _points("Top1_Acc_Exp", [_number(value) for value in values[-1]])
    printed |= _points("StreamForgetting", forgotten)
    printed |= _points("ExperienceForgetting", [_number(value) for value in drops[:-1, -1]])
    return printed | _ours(matrix, "last_samples", "forgetting", "bwt", "fwt", scale=1.0)


def _trace(matrix: _Matrix, classes: list[int] | None) -> Printed:
    curves = matrix.curves()
    performance = [_percent(point) for point in curves["acc_step"]]
    backward = [
        None if point is None else 100.0 * point * step / (step + 1) for step, point in enumerate(curves["bwt"])
    ]
    printed = {"OP": performance[-1], "BWT": backward[-1]}
    return printed | _points("OP", performance) | _points("BWT", backward) | _ours(matrix, "last", "bwt")


def _easycl(matrix: _Matrix, classes: list[int] | None) -> Printed:
    count = matrix.num_tasks
    needed = np.tril(np.ones((count, count), dtype=bool)) | np.eye(count, k=1, dtype=bool)
    missing = int((np.isnan(matrix.values) & needed).sum())
    if missing:
        logger.warning("%d cells were not measured and count as 0.0, as EasyCL does", missing)
    table = np.where(np.isnan(matrix.values), 0.0, matrix.values)
    baseline = np.zeros(count) if matrix.baseline is None else np.where(np.isnan(matrix.baseline), 0.0, matrix.baseline)
    return {
        "last": float(table[-1].mean()),
        "avg": float(np.mean([table[i, : i + 1].mean() for i in range(count)])),
        "bwt": _mean((table[-1] - table.diagonal())[:-1]),
        "fwt": _mean(table.diagonal(offset=1) - baseline[1:]),
    } | _ours(matrix, "last", "avg", "bwt", "fwt", scale=1.0)


_MODES: Mapping[str, Callable[[_Matrix, list[int] | None], Printed]] = {
    "pilot": _pilot,
    "inflora": _inflora,
    "sdlora": _sdlora,
    "libcontinual": _libcontinual,
    "mammoth": _mammoth,
    "avalanche": _avalanche,
    "trace": _trace,
    "easycl": _easycl,
}
PROJECTS = tuple(_MODES)
