"""Any method with a head of statistics: it trains as it always does, and is judged by a head that cannot forget.

After a task's training its rows are passed over once more, and what they add to the statistics makes the new head. The
rows the method trained its own heads with stay what drives its adaptation.
"""

# Mixed in before a concrete method, so that super() is never the abstract one.
# mypy: disable-error-code="safe-super"

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from everlora.errors import NumericError, OptionError, UnsupportedError
from everlora.heads import DriftSums, HeadOptions, HeadRows, StatisticalHead, TaskHeads, held_out
from everlora.methods.base import Batch, Collect, Encoder, Method, State, TaskInfo
from everlora.methods.forgetting import INSEPARABLE, Forgetting

__all__ = ["with_head"]

_PREFIX = "statistics_head/"


def with_head(method_class: type[Method], head: HeadOptions) -> type[Method]:
    """Return the class of a method with another head than the linear ones it trains.

    Args:
        method_class: the method.
        head: what turns features into scores; for `linear` the class itself is returned.

    Raises:
        OptionError: `adapt_tasks` for a head that has to be trained.
        UnsupportedError: the method has a network for each task, and so no features that tasks share.
    """
    if head.adapt_tasks is not None and head.head in ("linear", "cosine"):
        raise OptionError(
            f"adapt_tasks leaves later tasks to a head of statistics, found head={head.head}, which is trained; "
            "choose head=ridge, or leave adapt_tasks out."
        )
    if head.head == "linear":
        return method_class
    if method_class.isolated:
        raise UnsupportedError(
            f"{method_class.__name__} has a network for each task, and no features that one head could judge; "
            "leave head out."
        )
    base = _CosineHeads if head.head == "cosine" else _StatisticalHead
    return type(f"{method_class.__name__}WithHead", (base, method_class), {"head_options": head})


class _CosineHeads(Method):
    """Mixed into a method: its heads compare directions, and start from the directions of the class means.

    From a random start the few steps of a task mostly turn the rows about what all features have in common.
    Source: Qi, Brown and Lowe, CVPR 2018 (imprinted weights).
    """

    heads: TaskHeads

    def __init__(self, options: Any, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        heads = getattr(self, "heads", None)
        if not isinstance(heads, TaskHeads):
            raise UnsupportedError(f"{type(self).__bases__[1].__name__} trains no heads of classes; leave head out.")
        heads.cosine = True

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """The method's own; then a pass over the task's rows, whose means become the rows of the new head.

        The row of a class that is alone in its task stays its mean: cross-entropy over one class has no gradient.
        """
        super().begin_task(dataclasses.replace(task, judged_apart=True), collect)
        own = torch.tensor(self.heads.classes[-1])
        sums = torch.zeros(len(own), self.encoder.feature_dim, dtype=torch.float64)

        def add(batch: Batch, features: Tensor) -> None:
            unit = nn.functional.normalize(features.detach().cpu().double(), dim=1)
            sums.add_((own[:, None] == batch.labels.cpu()).double() @ unit)

        collect(add, stage="class means", augment=False)
        self.heads.imprint(self.processes.sum(sums))


class _StatisticalHead(Method):
    """Mixed into a method: a head of statistics in place of the trained ones."""

    head_options: HeadOptions

    def __init__(self, options: Any, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        if encoder.output_head is not None:
            raise UnsupportedError("a language model answers by its own output layer; leave head out.")
        self.head = StatisticalHead(self.head_options, encoder.feature_dim, seed=seed)
        self._is_learning = False
        self._before: dict[int, Tensor] = {}
        self._drift: dict[str, float] = {}

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Look at the features before they move, where statistics are to move with them; then the method's own."""
        self._before, self._is_learning = {}, self._adapts(task)
        if not self._is_learning:
            return
        if task.index and not self.fixed_features and self.head_options.head_drift != "none":
            collect(self._keep, stage="features before training", augment=False)
        super().begin_task(dataclasses.replace(task, judged_apart=True), collect)

    def _adapts(self, task: TaskInfo) -> bool:
        """Whether the method learns from this task, or only the head does."""
        return self.head_options.adapt_tasks is None or task.index < self.head_options.adapt_tasks

    def _keep(self, batch: Batch, features: Tensor) -> None:
        for row, feature in zip(_rows(batch).tolist(), features.detach().cpu(), strict=True):
            self._before[row] = feature

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What the method trains; nothing where that would be a linear head alone, or adaptation is over."""
        return super().parameters() if self._is_learning and not self.fixed_features else {}

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """The method's own; then the task's rows enter the statistics."""
        if self._is_learning:
            super().end_task(task, collect)
        part, moved = self.head.gathering(), DriftSums(self.head.expand.dim) if self._before else None

        def add(batch: Batch, features: Tensor) -> None:
            rows = _rows(batch)
            part.update(features, batch.labels, rows)
            if moved is not None:
                old = torch.stack([self._before[row] for row in rows.tolist()]).to(features)
                moved.update(self.head.expand(old), self.head.expand(features), held_out(rows.cpu()))

        collect(add, stage="head statistics", augment=False)
        for statistics in (part.fitted, part.held_out):
            statistics.grow(1 + max(task.classes))
            summed = {name: self.processes.sum(tensor) for name, tensor in statistics.state().items()}
            statistics.load_state(summed)
            if not bool(torch.isfinite(statistics.sums).all()):
                raise NumericError(f"task '{task.name}' gave features that are not finite; check its rows.")
        self._follow(moved)
        self.head.add_task(task.classes, part)
        self._is_learning, self._before = False, {}

    def _follow(self, moved: DriftSums | None) -> None:
        """Measure how features moved; let the statistics of earlier tasks follow, where that is wanted."""
        self._drift = {}
        if moved is None:
            return
        for name in ("sums", "squares", "sizes"):
            setattr(moved, name, self.processes.sum(getattr(moved, name)))
        drift = moved.fit()
        self._drift = {"moved": drift.relative, "explained": drift.explained}
        if self.head_options.head_drift == "linear":
            self.head.map(drift.matrix)

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Scores of the head of statistics; while a task is being learned, those of the heads in training."""
        if self._is_learning:
            return super().logits(batch, task)
        return self.head.class_logits(self.features(batch), task)

    def head_rows(self) -> HeadRows:
        """The head of statistics as rows."""
        return self.head.rows()

    def stored_parameters(self) -> int:
        """Those of the encoder and its adapters: statistics are no parameters."""
        return self.adapted_parameters()

    def panels(self) -> dict[str, dict[str, float]]:
        """The method's own; the penalty chosen, and how far features moved."""
        fit = self.head.fit() if self.head.tasks else None
        chosen = {} if fit is None else {"head_penalty": {"penalty": fit.penalty}}
        return {**super().panels(), **chosen, **({"head_drift": self._drift} if self._drift else {})}

    def state(self) -> State:
        """The method's own, and the statistics as they are now."""
        return {**super().state(), **{_PREFIX + name: value for name, value in self.head.state().items()}}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        super().load_state({name: value for name, value in state.items() if not name.startswith(_PREFIX)})
        if own:
            self.head.load_state(own)

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let the sums of classes go: such a class is never predicted again, unless it is learned again."""
        left = super().forget(request)
        tasks = request.state.get(_PREFIX + "tasks", [])
        gone = {c for _, c in request.classes}
        elsewhere = {c for index, own in enumerate(tasks) for c in own if (index, c) not in request.classes}
        chosen = sorted(gone - elsewhere)
        kinds = [kind for kind in ("fitted", "held_out") if chosen and f"{_PREFIX}{kind}/sums" in request.state]
        seen = [_without(request.state, f"{_PREFIX}{kind}/", chosen) for kind in kinds]
        if not request.classes:
            request.remains(INSEPARABLE)
        if gone & elsewhere:
            request.remains(_OTHER_TASKS)
        if any(f"{_PREFIX}{kind}/gram" in request.state for kind in kinds):
            request.remains(_GRAM)
        return {**left, "class_sums": len(chosen)} if any(seen) else left


def _without(state: State, prefix: str, classes: list[int]) -> bool:
    """Take classes out of sums: their means leave the Gram matrix, too. Whether there was anything of them."""
    sums, counts = state[prefix + "sums"].clone(), state[prefix + "counts"].clone()
    own, rows = sums[classes], counts[classes]
    if state.get(prefix + "gram") is not None:
        state[prefix + "gram"] = state[prefix + "gram"] - own.T @ (own / rows.clamp(min=1)[:, None])
        state[prefix + "forgotten"] = state.get(prefix + "forgotten", 0) + (rows - 1).clamp(min=0).sum()
    sums[classes], counts[classes] = 0, 0
    state[prefix + "sums"], state[prefix + "counts"] = sums, counts
    return bool(rows.any())


_OTHER_TASKS = (
    "Sums of features are over all tasks: those of a class that came with another task, too, stay until the class is "
    "forgotten in all of them."
)
_GRAM = (
    "The Gram matrix of the features is one sum over all classes: the mean of a forgotten class was taken out of it, "
    "how its rows scattered about that mean cannot be."
)


def _rows(batch: Batch) -> Tensor:
    if batch.rows is None:
        raise ValueError("a pass over data must say which rows a batch holds")
    return batch.rows
