"""When and how far a stable adapter follows the one that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from everlora.errors import OptionError
from everlora.lowrank import retention
from everlora.methods.base import State, TaskInfo
from everlora.methods.stable import StableAdapter

__all__ = ["AverageOptions", "MovingAverage"]

_LEAST_LOSS = 1e-8


class AverageOptions(Protocol):
    """The options that say how the stable adapter follows."""

    @property
    def ema_alpha(self) -> float:
        """Weight of the old value in an update."""

    @property
    def ema_warmup(self) -> bool:
        """Whether to begin with the plain mean."""

    @property
    def ema_horizon(self) -> float | None:
        """Set `ema_alpha` by the length of the task."""

    @property
    def ema_update(self) -> Literal["step", "task_end"] | None:
        """After each step, or a copy at the end of each task."""

    @property
    def selective_update(self) -> bool:
        """Whether there is a gate."""

    @property
    def min_update_threshold(self) -> float:
        """Relative gain that opens the gate."""


class MovingAverage:
    """Updates of a stable adapter, counted over all tasks, and the gate before each.

    Args:
        options: see `AverageOptions`.

    Attributes:
        updates: k, how many were made so far; never starts anew.
        ema_alpha: the retention that holds in the newest task, once the warm-up is over.
        opened: in how many steps of the newest task there was an update.
        steps: how many steps that task had.
        settled: whether the stable adapter is one of unknown age, so that there is no warm-up, which would begin with
            a copy.

    Source: sections 2 and 3.2 of the reference on I-LoRA.
    """

    def __init__(self, options: AverageOptions) -> None:
        self._options = options
        self.updates = 0
        self.ema_alpha = options.ema_alpha
        self.opened = 0
        self.steps = 0
        self.settled = False
        self._last: float | None = None
        self._warned = False

    def begin_task(self, task: TaskInfo) -> None:
        """Set the retention for a task, and say so once where it is too slow for one of this length.

        Raises:
            OptionError: a horizon is given and the steps of the task are not known.
        """
        self.opened = self.steps = 0
        horizon = self._options.ema_horizon
        if horizon is not None:
            if not task.steps:
                raise OptionError("ema_horizon needs the number of steps of the task; leave it out, or set ema_alpha.")
            self.ema_alpha = max(0.0, 1.0 - 1.0 / (horizon * task.steps))
        warm = self._warms_up and self.updates + 1 < 1.0 / max(1.0 - self.ema_alpha, 1e-12)
        left = self.ema_alpha**task.steps
        if task.steps and left > 0.5 and not (warm or self._warned) and self._options.ema_update != "task_end":
            self._warned = True
            warnings.warn(
                f"with ema_alpha={self.ema_alpha:.6g}, {left:.0%} of the stable adapter stay what they were before the "
                f"{task.steps} steps of task '{task.name}'; it will hardly know the task. Set ema_horizon=0.333, or a "
                "smaller ema_alpha.",
                stacklevel=3,
            )

    @property
    def _warms_up(self) -> bool:
        return self._options.ema_warmup and not self.settled

    def after_step(self, stable: StableAdapter, losses: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Update the stable adapter after an optimiser step, if the gate is open.

        Args:
            stable: the adapter.
            losses: `(2,)` cross-entropy of the stable and of the trained adapter in the step, summed over this
                process's tokens.
            total: sums a tensor over all processes.
        """
        if self._options.ema_update == "task_end":
            return
        self.steps += 1
        if self._options.selective_update:
            slow, fast = total(losses).tolist()
            gain = (slow - fast) / max(slow, _LEAST_LOSS)
            if (self.updates or self.settled) and not gain > self._options.min_update_threshold:
                return
        self.opened += 1
        self._last = retention(self.updates, self.ema_alpha, self._warms_up)
        stable.follow(self._last)
        self.updates += 1

    def end_task(self, stable: StableAdapter) -> None:
        """Copy the trained adapter, if that is what follows here."""
        if self._options.ema_update == "task_end":
            stable.follow(0.0)
            self.updates += 1

    def panels(self) -> dict[str, dict[str, float]]:
        """Updates so far, the last retention, and the share of steps with an update."""
        figures = {"ema_updates": {"updates": float(self.updates)}}
        if self._last is not None:
            figures["ema_retention"] = {"retention": self._last}
        if self._options.selective_update and self.steps:
            figures["gate_open_rate"] = {"gate": self.opened / self.steps}
        return figures

    def state(self) -> State:
        """The counts."""
        counts = {"updates": self.updates, "opened": self.opened, "steps": self.steps, "retention": self._last}
        return {"ema": {**counts, "settled": self.settled}}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned; nothing where it is not in there."""
        counts = state.get("ema")
        if counts is not None:
            self.updates, self.opened, self.steps = (int(counts[name]) for name in ("updates", "opened", "steps"))
            self._last = counts["retention"]
            self.settled = bool(counts.get("settled", False))
