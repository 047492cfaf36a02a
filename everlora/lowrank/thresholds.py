"""Schedules of the energy threshold: task index to a number in (0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from everlora.errors import OptionError, TaskCountError

__all__ = ["ConstantThreshold", "GeometricThreshold", "LinearThreshold"]


def _check_task(t: int) -> None:
    if isinstance(t, bool) or not isinstance(t, int) or t < 0:
        raise OptionError(f"a task index is an integer from 0, got {t!r}; pass the number of tasks already done")


def _check_start(start: float) -> None:
    if not 0.0 < start < 1.0:
        raise OptionError(f"start must lie strictly between 0 and 1, got {start!r}; the usual value is 0.95")


@dataclass(frozen=True)
class LinearThreshold:
    """The official schedule, `start + (end - start) * t / total_tasks` for `t = 0 .. total_tasks - 1`.

    `end` itself is never reached: the last value is `end - (end - start) / total_tasks`.

    Raises:
        OptionError: `start` outside (0, 1), `end` outside [start, 1], or `total_tasks` not a positive integer.
    """

    start: float
    end: float
    total_tasks: int

    def __post_init__(self) -> None:
        _check_start(self.start)
        if not self.start <= self.end <= 1.0:
            raise OptionError(
                f"end must lie between start ({self.start}) and 1, got {self.end!r}; the usual value is 1"
            )
        if isinstance(self.total_tasks, bool) or not isinstance(self.total_tasks, int) or self.total_tasks < 1:
            raise OptionError(f"total_tasks must be an integer of at least 1, got {self.total_tasks!r}")

    def __call__(self, t: int) -> float:
        """Return the threshold of task `t`.

        Raises:
            TaskCountError: `t >= total_tasks`; extrapolating would reach 1 and fill the whole input space.
        """
        _check_task(t)
        if t >= self.total_tasks:
            raise TaskCountError(
                f"the linear threshold was declared for {self.total_tasks} tasks, but task index {t} was asked for; "
                "declare more tasks at the start, or use a geometric or constant threshold for an open stream"
            )
        return self.start + (self.end - self.start) * t / self.total_tasks


@dataclass(frozen=True)
class ConstantThreshold:
    """The same threshold for every task; the number of tasks need not be known.

    Raises:
        OptionError: `value` outside (0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        if not 0.0 < self.value <= 1.0:
            raise OptionError(f"a threshold must lie in (0, 1], got {self.value!r}; the usual value is 0.95")

    def __call__(self, t: int) -> float:
        """Return the threshold of task `t`, which is always `value`."""
        _check_task(t)
        return self.value


@dataclass(frozen=True)
class GeometricThreshold:
    """An open-ended schedule: `1 - (1 - start) * rho ** t` with `rho = horizon ** (-1 / (horizon - 1))`.

    It equals `LinearThreshold(start, 1, horizon)` at the first task and at task index `horizon - 1`, and never
    reaches 1, so the number of tasks need not be known.

    Raises:
        OptionError: `start` outside (0, 1), or `horizon` not an integer of at least 2.
    """

    start: float
    horizon: int = 10

    def __post_init__(self) -> None:
        _check_start(self.start)
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int) or self.horizon < 2:
            raise OptionError(f"horizon must be an integer of at least 2, got {self.horizon!r}; the default is 10")

    def __call__(self, t: int) -> float:
        """Return the threshold of task `t`, strictly below 1 for every `t`."""
        _check_task(t)
        # One power, so that task horizon - 1 gives (1 - start) / horizon without piled-up rounding.
        remainder = (1.0 - self.start) * math.pow(self.horizon, -t / (self.horizon - 1))
        return min(1.0 - remainder, math.nextafter(1.0, 0.0))
