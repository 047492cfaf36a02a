"""Who is told what training does, step by step and task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from everlora.results import TaskResult

__all__ = ["Watcher"]


class Watcher(Protocol):
    """Is told of every step and of every learned task; of several processes, in the first alone."""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step, or of an epoch that has just ended.

        Args:
            step: optimiser steps of the task so far.
            figures: `loss` and `lr` of a step; of an epoch what the task's log has of it, by names that begin with
                `epoch`.
        """

    def task(self, result: TaskResult) -> None:
        """Take the result of a task that was learned and is written."""
