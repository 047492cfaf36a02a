"""Checkpoints within a task: what they hold, when one is due, and how a task goes on from one.

Everything random is keyed by its place in the task, so a checkpoint holds no generators beyond those of a method. What
a task begins with is made again by `begin_task`, bit for bit; then what training had changed is put back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from everlora.errors import InterruptedLearning, OptionError, StoreError
from everlora.methods.base import Method, State
from everlora.training.interruption import is_asked
from everlora.training.processes import Processes

__all__ = ["Checkpoint", "Checkpoints", "Interval", "Saver", "below", "optimizer_entries", "put_entries_back", "under"]

logger = logging.getLogger("everlora.training")

_HALF = (torch.bfloat16, torch.float16)
_BEGIN, _TRAIN, _END = "begin", "train", "end"


@dataclass(frozen=True)
class Interval:
    """How often a checkpoint is written; never, where both are 0.

    Attributes:
        steps: optimiser steps, or batches of a pass over the data.
        seconds: wall seconds.
    """

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, text: str | int) -> Interval:
        """Read `200` (steps), `300s` (seconds) or `0` (never).

        Raises:
            OptionError: anything else.
        """
        found = re.fullmatch(r"(\d{1,9})(s?)", str(text).strip())
        if found is None or isinstance(text, bool):
            raise OptionError(f"expected steps as in 200, seconds as in 300s, or 0 for never, found {text!r}.")
        number = int(found[1])
        return cls(seconds=float(number)) if found[2] else cls(steps=number)

    @property
    def never(self) -> bool:
        """Whether no checkpoint is ever due."""
        return not self.steps and not self.seconds

    def is_over(self, steps: int, seconds: float) -> bool:
        """Whether so many steps and seconds after a checkpoint the next one is due."""
        return bool((self.steps and steps >= self.steps) or (self.seconds and seconds >= self.seconds))


@dataclass(frozen=True)
class Checkpoint:
    """What is saved of a task: named arrays, and plain JSON values."""

    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any], *, copy: bool = False) -> Checkpoint:
        """Sort a state; `copy` where its tensors may change before it is written."""
        arrays = {key: _array(value, copy) for key, value in state.items() if isinstance(value, Tensor)}
        return cls(arrays, {key: value for key, value in state.items() if key not in arrays})

    def state(self) -> State:
        """The state it was made of; numbers of half precision come back as float32, which holds them exactly."""
        return {**{key: torch.from_numpy(np.array(array)) for key, array in self.arrays.items()}, **self.values}


class Checkpoints(Protocol):
    """Where the checkpoints of one task go."""

    @property
    def resumed(self) -> Checkpoint | None:
        """What the task goes on from; None to begin it."""

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint; `step` counts the steps, and batches of passes, so far."""

    def save(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint; False where none are wanted.

        Raises:
            StoreError: it could not be written.
        """


class _Nowhere:
    """Checkpoints of somebody who wants none."""

    resumed = None

    def due(self, step: int) -> bool:
        return False

    def save(self, checkpoint: Checkpoint) -> bool:
        return False


class Saver:
    """Follows a task through its passes and steps, saves where it stands, and tells it where to go on.

    The stages are `begin` (passes of `begin_task`), `train` and `end` (passes of `end_task`). A pass is saved only
    where the method gives out what it gathered so far; others are made again.

    Args:
        method: saves and gets back what it changed during the task.
        checkpoints: where they go; None for nowhere.
        group: the processes; the first of them stops when asked, and others hear of it from that one.
    """

    def __init__(self, method: Method, checkpoints: Checkpoints | None, group: Processes) -> None:
        self._method = method
        self._checkpoints: Checkpoints = checkpoints or _Nowhere()
        self._group = group
        self._is_first = group.is_first
        self._name = ""
        self._stage = _BEGIN
        self._passes = 0
        self._work = 0
        self._trained: State = {}
        resumed = self._checkpoints.resumed
        self._resumed: State | None = None if resumed is None else resumed.state()
        if self._resumed is not None:
            logger.info("the task goes on from a checkpoint")

    def begin(self, name: str) -> None:
        """Begin a task; nothing is begun where somebody asked for a stop already."""
        self._name = name
        self._stop_where_asked(None)

    def training(self) -> tuple[State | None, bool]:
        """Enter the training stage.

        Returns:
            What `Epochs` saved, None to start from the beginning; and whether training was over by then.
        """
        self._stage = _TRAIN
        if self._resumed is None or self._resumed["stage"] == _BEGIN:
            return None, False
        return below(self._resumed, "training/"), self._resumed["stage"] == _END

    def put_method_back(self) -> None:
        """Give the method back what it had changed during training."""
        if self._resumed is not None:
            self._method.load_progress_state(below(self._resumed, "method/"))
            # passes of the last stage may need the rest; these are the large ones
            self._resumed = {k: v for k, v in self._resumed.items() if not k.startswith(("training/", "method/"))}

    def after_step(self, progress: Callable[[], State]) -> None:
        """Save, if that is due, after an optimiser step; `progress` gives what training changed."""
        self._after_work(lambda: self._training_state(progress()))

    def finish_training(self, progress: Callable[[], State]) -> None:
        """Enter the last stage; what training changed is kept until then, because `end_task` changes it further."""
        self._stage, self._passes = _END, 0
        if self._is_first and not isinstance(self._checkpoints, _Nowhere):
            self._trained = Checkpoint.of(self._training_state(progress()), copy=True).state()
            self._after_work(lambda: self._trained)

    def enter_pass(self, name: str) -> tuple[int, int]:
        """Enter the next pass over the data; return how many of its batches and rows are behind it."""
        self._passes += 1
        found = self._resumed
        if found is None or found.get("pass") != [self._passes, name] or found["stage"] != self._stage:
            return 0, 0
        if found.get("processes", 1) != self._group.size:
            return 0, 0  # as many processes as went through the pass are needed to go on with their parts of it
        self._method.resume_gathering(below(found, _gathered(self._group.rank)))
        return found["batches"], found["rows"]

    def after_batch(self, name: str, batches: int, rows: int) -> None:
        """Save, if that is due, after a batch of a pass."""
        parts = self._parts()

        def state() -> State | None:
            found = parts()
            base = self._trained if self._stage == _END else {"stage": _BEGIN}
            if found is None:
                return base if self._stage == _END else None
            place = {"pass": [self._passes, name], "batches": batches, "rows": rows, "processes": self._group.size}
            return {**base, **place, **found}

        self._after_work(state)

    def _parts(self) -> Callable[[], State | None]:
        """What gives out the sums of the running pass: each process has its own, of the batches it went through."""
        if self._group.size == 1:
            return lambda: self._name_parts([self._method.gathered()])
        if isinstance(self._checkpoints, _Nowhere):
            return lambda: None
        # only the first knows whether a checkpoint is due, and the others have to hand their parts over for it
        due = self._is_first and (is_asked() or self._checkpoints.due(self._work + 1))
        if not self._group.sum(torch.tensor([float(due)])):
            return lambda: None
        own = self._method.gathered()
        named = None if own is None else self._name_parts(list(self._group.gather(own)))
        return lambda: named

    @staticmethod
    def _name_parts(parts: Sequence[State | None]) -> State | None:
        state: State = {}
        for rank, part in enumerate(parts):
            if part is None:
                return None
            state |= under(_gathered(rank), part)
        return state

    def _training_state(self, progress: State) -> State:
        return {
            "stage": self._stage,
            **under("training/", progress),
            **under("method/", self._method.progress_state()),
        }

    def _after_work(self, state: Callable[[], State | None]) -> None:
        self._work += 1
        if is_asked() and self._is_first:
            self._stop_where_asked(state)
        elif self._checkpoints.due(self._work):
            self._save(state())

    def _stop_where_asked(self, state: Callable[[], State | None] | None) -> None:
        if not (is_asked() and self._is_first):
            return
        saved = state is not None and self._save(state())
        how = "and a checkpoint was written; the same command goes on from it."
        if not saved:
            how = "where nothing could be saved; the same command goes on from the checkpoint before, if there is one."
        raise InterruptedLearning(f"learning of task '{self._name}' was stopped as asked, {how}")

    def _save(self, state: State | None) -> bool:
        """Write a checkpoint; False where there is none to write, or it cannot be written, which stops nothing."""
        if state is None:
            return False
        if not all(bool(torch.isfinite(v).all()) for k, v in state.items() if k.startswith("training/trained/")):
            logger.warning("no checkpoint is written, since trained numbers are not finite; the one before stays")
            return False
        try:
            return self._checkpoints.save(Checkpoint.of(state))
        except StoreError as error:
            logger.warning("no checkpoint could be written, and training goes on without: %s", error)
            return False


def under(prefix: str, state: Mapping[str, Any]) -> State:
    """Put a prefix before all names of a state."""
    return {prefix + key: value for key, value in state.items()}


def _gathered(rank: int) -> str:
    """Prefix of what a process gathered in a pass."""
    return f"gathered-{rank}/" if rank else "gathered/"


def below(state: Mapping[str, Any], prefix: str) -> State:
    """The entries of a state whose names have a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def optimizer_entries(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> State:
    """All that an optimiser remembers of its parameters, by their place and the entry's name."""
    entries: State = {}
    for place, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            entries[f"{place:05d}/{name}"] = value
    return entries


def put_entries_back(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], entries: State) -> None:
    """Let a new optimiser go on from what `optimizer_entries` returned."""
    for key, value in entries.items():
        place, _, name = key.partition("/")
        parameter = parameters[int(place)]
        if isinstance(value, Tensor):
            # the count of steps stays on the CPU in its own dtype, where the optimiser keeps it
            value = value.clone() if name == "step" else value.to(parameter.device, parameter.dtype, copy=True)
        optimizer.state[parameter][name] = value


def _array(tensor: Tensor, copy: bool) -> np.ndarray[Any, Any]:
    plain = tensor.detach().cpu()
    plain = plain.float() if plain.dtype in _HALF else plain
    array: np.ndarray[Any, Any] = plain.contiguous().numpy()
    return array.copy() if copy else array
