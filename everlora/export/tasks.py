"""Which task's network an export is of, and having it in place meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from everlora.errors import OptionError
from everlora.methods.base import Method
from everlora.methods.isolated import IsolatedMethod

__all__ = ["choose_task", "network_of"]


def choose_task(method: Method, names: Sequence[str], task: int | None) -> int | None:
    """Say whose network is to be exported.

    Args:
        method: that learned the tasks.
        names: of the tasks.
        task: number of the task that was asked for.

    Returns:
        The number of a task where each has a network of its own, else None.

    Raises:
        OptionError: a task was named although all share one network, or must be named because each has its own.
    """
    if not method.isolated:
        if task is not None:
            raise OptionError(
                "one network knows all tasks of this learner, so no task can be exported alone; drop task"
            )
        return None
    if task is None and len(names) > 1:
        raise OptionError(
            "each task of this learner has a network of its own; name the one to export with task, one of: "
            + ", ".join(names)
        )
    return task or 0


@contextmanager
def network_of(method: Method, task: int | None) -> Iterator[None]:
    """Have a task's network in place inside a `with` block, then again the one that was there; None does nothing."""
    if task is None:
        yield
        return
    before = method.task_modules.active if isinstance(method, IsolatedMethod) else task
    method.activate(task)
    try:
        yield
    finally:
        method.activate(before)
