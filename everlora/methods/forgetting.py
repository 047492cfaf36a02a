"""Forgetting on request, seen from a method: rows and statistics of classes leave its state.

A request works on a state as plain data, so that one hook serves the newest state, earlier ones and checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.buffer import ReplayBuffer, Rows
from everlora.methods.keys import task_key, tasks_in

__all__ = [
    "INSEPARABLE",
    "TRAINED",
    "Forgetting",
    "differences",
    "forget_gaussians",
    "forget_prototypes",
    "forget_rows",
    "forget_sums",
]

TRAINED = (
    "What trained weights, classifier rows included, and directions or importances computed over whole tasks learned "
    "from these rows stays; only a learner that never saw them is free of it."
)
INSEPARABLE = (
    "Means and statistics of classes are sums over many rows, and single rows cannot be taken out of a sum: they stay "
    "until their whole class is forgotten."
)
_SHARED = (
    "The covariance within classes, by which tasks are recognised, is one sum over all classes: the part of a "
    "forgotten class cannot be taken out of it."
)

_GAUSSIAN = re.compile(r"tasks/(\d+)/statistics/(\d+)/(mean|covariance)")

Choose = Callable[[Rows, Tensor, Tensor], "np.ndarray[Any, Any]"]
"""Of rows, their labels `(n,)` and the learner's numbers of their tasks `(n,)`: which go, `(n,)` bool."""


@dataclass
class Forgetting:
    """What is to be forgotten, and a state that it is to leave.

    Attributes:
        state: of a method, changed in place: a tensor is replaced or its name removed, never written into. Factors of
            adapters are not in it.
        choose: see `Choose`.
        like: any rows of the kind that a buffer keeps, possibly none.
        classes: `(task, class index)` of every class whose rows all go, with its task; empty when single rows go.
        remaining: sentences on what cannot leave, in order.
    """

    state: dict[str, Any]
    choose: Choose
    like: Rows
    classes: frozenset[tuple[int, int]] = frozenset()
    remaining: dict[str, None] = field(default_factory=dict)

    def remains(self, sentence: str) -> None:
        """Note what cannot leave."""
        self.remaining[sentence] = None

    def places(self, task: int) -> list[int]:
        """Places, within a task's classes, of those that are forgotten."""
        classes = self.state.get(task_key(task, "classes"), ())
        return [place for place, number in enumerate(classes) if (task, number) in self.classes]


def forget_rows(request: Forgetting, *, first_task: int = 0, prefix: str = "buffer/") -> dict[str, int]:
    """Let rows leave the replay buffer of a state.

    Args:
        request: what goes.
        first_task: number that the buffer gives the learner's first task.
        prefix: of the buffer's names.

    Returns:
        How many `buffer_rows` went.
    """
    stored = {k.removeprefix(prefix): v for k, v in request.state.items() if k.startswith(prefix)}
    if not stored or not len(stored["labels"]):
        return {}
    arrays = {k.removeprefix("rows/"): v.numpy() for k, v in stored.items() if k.startswith("rows/")}
    goes = request.choose(request.like.from_arrays(arrays), stored["labels"], stored["tasks"] - first_task)
    buffer = ReplayBuffer(len(stored["labels"]))
    buffer.load_state(stored)
    buffer.restore(request.like)
    count = buffer.forget(lambda _, place: bool(goes[place])) if goes.any() else 0
    if count:
        request.state.update({prefix + name: value for name, value in buffer.state().items()})
    return _counted(buffer_rows=count)


def forget_sums(request: Forgetting, sums: str, counts: str) -> dict[str, int]:
    """Set the rows of forgotten classes to nothing in a sum and a count that each task keeps.

    Args:
        request: what goes.
        sums: name of the tensor `(classes, ...)` among a task's entries.
        counts: name of the tensor `(classes,)`.

    Returns:
        How many `class_means` went.
    """
    gone = 0
    for task in range(tasks_in(request.state, "classes")):
        keys = task_key(task, sums), task_key(task, counts)
        places = [place for place in request.places(task) if int(request.state[keys[1]][place])]
        for key in keys if places else ():
            request.state[key] = request.state[key].clone()
            request.state[key][places] = 0
        gone += len(places)
    return _counted(class_means=gone)


def forget_gaussians(request: Forgetting) -> dict[str, int]:
    """Remove the Gaussians of forgotten classes, by which heads are realigned.

    Returns:
        How many `gaussians` went.
    """
    found = {key: _GAUSSIAN.fullmatch(key) for key in request.state}
    keys = [key for key, match in found.items() if match and (int(match[1]), int(match[2])) in request.classes]
    for key in keys:
        del request.state[key]
    if any(found.values()) and not request.classes:
        request.remains(INSEPARABLE)
    return _counted(gaussians=sum(key.endswith("/mean") for key in keys))


def forget_prototypes(request: Forgetting) -> dict[str, int]:
    """Overwrite the means of forgotten classes, by which tasks are recognised, with NaN: no row is near them.

    Returns:
        How many `prototypes` went.
    """
    gone, found = 0, False
    for task in range(tasks_in(request.state, "classes")):
        key = task_key(task, "recognition/means")
        means = request.state.get(key)
        if means is None:
            continue
        found = True
        places = [place for place in request.places(task) if bool(torch.isfinite(means[place]).all())]
        if places:
            request.state[key] = means.clone()
            request.state[key][places] = torch.nan
        gone += len(places)
    if found and not request.classes:
        request.remains(INSEPARABLE)
    if "recognition/scatter" in request.state and request.classes:
        request.remains(_SHARED)
    return _counted(prototypes=gone)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Names of a state that a request removed or replaced."""
    return {key for key, value in before.items() if key not in after or after[key] is not value}


def _counted(**counts: int) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}
