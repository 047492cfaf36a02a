"""Rehearsal of rows of earlier tasks: a buffer that each row goes by, draws from it, and both parts in one pass.

For methods that train on a memory along with each batch. The buffer itself knows no tasks' lives and no batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from everlora.buffer import ReplayBuffer
from everlora.errors import UnsupportedError
from everlora.methods.base import Batch, Collect, Recalled, State, TaskInfo
from everlora.methods.keys import keyed_generator

__all__ = ["IGNORED", "Insertion", "Rehearsal", "described_alike", "joined", "stack_rows"]

Insertion: TypeAlias = Literal["task_end", "online", "every_step"]
"""When a task's rows go by the buffer: each once, all at the task's end or when it was first trained on; or before each
step that trains on it, in every epoch anew, as some public code does."""

IGNORED = -100
_FILL = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "segments": 0}
_MAX_PADDING = 1.3


class Rehearsal:
    """The memory of a method: rows of a task go by its buffer, and rows of earlier tasks come back.

    Args:
        size: rows the buffer holds at most.
        seed: of the method.
        insert: see `Insertion`.
        balanced: keep as many rows of each class.
        by_task: let the number of its task stand for the class of a row; for language models, whose rows have none.
    """

    def __init__(
        self, size: int, *, seed: int, insert: Insertion = "task_end", balanced: bool = False, by_task: bool = False
    ) -> None:
        self.buffer = ReplayBuffer(size, balanced=balanced)
        self.insert = insert
        self._seed = seed
        self._by_task = by_task
        self._inserting: _Inserting | None = None
        self._step: Tensor | None = None
        self._lost = False

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Learn what rows are made of, and get ready for those of the task.

        Raises:
            UnsupportedError: the rows of earlier tasks were not saved.
        """
        if self._lost:
            raise UnsupportedError(
                "the rows of earlier tasks were not saved (save_buffer=False), so a learner that was opened again "
                "cannot go on; learn all tasks in one go, or save the buffer."
            )
        like, _ = collect.rows(torch.empty(0, dtype=torch.long))
        self.buffer.restore(like)
        generator = keyed_generator(self._seed, task.index, "buffer")
        self._inserting = _Inserting(self.buffer, task, collect, generator, self._by_task)

    def before_step(self, rows: Tensor) -> None:
        """Note the rows `(n,)` that will have been trained on."""
        self._step = rows.cpu()
        if self.insert == "every_step" and self._inserting is not None:
            self._inserting.add(self._step)

    def recall(self, count: int, generator: torch.Generator, *, newest: int) -> Recalled | None:
        """Draw rows, from when on the buffer holds one of a task before `newest`."""
        if not count or not bool((self.buffer.tasks < newest).any()):
            return None
        return Recalled(*self.buffer.draw(count, generator))

    def after_step(self) -> None:
        """Let the rows of the step go by, if that is done online."""
        if self.insert == "online" and self._inserting is not None and self._step is not None:
            self._inserting.add_new(self._step)
        self._step = None

    def progress_state(self) -> State:
        """The buffer within a task, where rows go by during its steps, and which did."""
        if self.insert == "task_end" or self._inserting is None:
            return {}
        return {**self.state(), **self._inserting.state()}

    def load_progress_state(self, state: State) -> None:
        """Put back what `progress_state` returned, after `begin_task`."""
        if self._inserting is not None and "inserting/done" in state:
            self.load_state(state)
            self._inserting.load_state(state)

    def end_task(self, task: TaskInfo) -> None:
        """Let the task's rows go by, if that is done at its end."""
        if self.insert == "task_end" and self._inserting is not None:
            self._inserting.add_new(torch.arange(task.num_examples))
        self._inserting = None

    def panels(self, num_tasks: int) -> dict[str, dict[str, float]]:
        """Rows of each task in the buffer, and the bytes of all."""
        counts = torch.bincount(self.buffer.tasks, minlength=num_tasks).tolist()
        rows = {f"task {index}": float(count) for index, count in enumerate(counts)}
        return {"buffer_rows": rows, "buffer_bytes": {"buffer": float(self.buffer.nbytes)}}

    def state(self) -> State:
        """The buffer as it is now."""
        return {f"buffer/{name}": value for name, value in self.buffer.state().items()}

    def load_state(self, state: State, *, required: bool = False) -> None:
        """Put back what `state` returned.

        Args:
            state: of the method.
            required: without a buffer in it, refuse to begin another task.
        """
        stored = {k.removeprefix("buffer/"): v for k, v in state.items() if k.startswith("buffer/")}
        if stored:
            self.buffer.load_state(stored)
        self._lost = required and not stored


class _Inserting:
    """The rows of one task on their way by the buffer."""

    def __init__(
        self, buffer: ReplayBuffer, task: TaskInfo, collect: Collect, generator: torch.Generator, by_task: bool
    ) -> None:
        self._buffer = buffer
        self._task = task
        self._collect = collect
        self._generator = generator
        self._by_task = by_task
        self._done = torch.zeros(task.num_examples, dtype=torch.bool)

    def add_new(self, rows: Tensor) -> None:
        """Let those of the given rows `(n,)` go by that did not yet, un-augmented."""
        new = rows[~self._done[rows]]
        if len(new):
            self._done[new] = True
            self.add(new)

    def state(self) -> State:
        """Which rows went by, and the state of the generator."""
        return {"inserting/done": self._done, "inserting/generator": self._generator.get_state()}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned, and make rows of those that the buffer was given back."""
        self._done = state["inserting/done"]
        self._generator.set_state(state["inserting/generator"])
        like, _ = self._collect.rows(torch.empty(0, dtype=torch.long))
        self._buffer.restore(like)

    def add(self, rows: Tensor) -> None:
        """Let the given rows go by, whether they did before or not."""
        encoded, labels = self._collect.rows(rows)
        if self._by_task:
            labels = torch.full_like(labels, self._task.index)
        self._buffer.add(encoded, labels, self._task.index, self._generator)


def joined(batch: Batch, task: int) -> list[Batch]:
    """Return the rows of a batch and those of its memory: as one batch where one pass can take them, else as two.

    Batch norms in training mode must see all rows at once; texts of different lengths, which have none, need no common
    padding. Rows of a language model share a pass unless that makes them longer, all together, by more than 30 %.

    Args:
        batch: with its memory, if it has one.
        task: number that the rows of the batch get in `tasks`.
    """
    current = replace(batch, memory=None, tasks=torch.full((len(batch.labels),), task, device=batch.labels.device))
    memory = batch.memory
    if memory is None or memory.tasks is None:
        return [current]
    if batch.labels.ndim == 2:
        return _joined_tokens(current, memory)
    first, second = current.inputs, memory.inputs
    if first.keys() == second.keys() and all(first[k].shape[1:] == second[k].shape[1:] for k in first):
        return [_fused(current, memory)]
    return [current, memory]


def stack_rows(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Put rows of several passes one below the other, `(n, ...)`; shorter rows of tokens are filled up at the end."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim > 1:
        width = max(part.shape[1] for part in parts)
        parts = [_widened(part, width, fill) for part in parts]
    return torch.cat(list(parts))


def _joined_tokens(current: Batch, memory: Batch) -> list[Batch]:
    parts = (current, described_alike(memory, current))
    rows = [len(part.labels) for part in parts]
    widths = [part.labels.shape[1] for part in parts]
    apart = sum(count * width for count, width in zip(rows, widths, strict=True))
    return [_fused(*parts)] if sum(rows) * max(widths) <= _MAX_PADDING * apart else list(parts)


def described_alike(memory: Batch, current: Batch) -> Batch:
    """Beside lines of several packed rows, let each row of the memory be a line with one segment."""
    if "segments" not in current.inputs:
        return memory
    mask = memory.inputs["attention_mask"]
    positions = torch.arange(mask.shape[1], device=mask.device) * mask
    return replace(memory, inputs={**memory.inputs, "position_ids": positions, "segments": mask})


def _fused(current: Batch, memory: Batch) -> Batch:
    tasks = [part.tasks for part in (current, memory) if part.tasks is not None]
    return Batch(
        {k: stack_rows([v, memory.inputs[k]], _FILL.get(k, 0)) for k, v in current.inputs.items()},
        stack_rows([current.labels, memory.labels], IGNORED),
        tasks=torch.cat(tasks),
    )


def _widened(rows: Tensor, width: int, fill: int) -> Tensor:
    missing = width - rows.shape[1]
    return rows if not missing else functional.pad(rows, (*[0, 0] * (rows.ndim - 2), 0, missing), value=fill)
