"""Obstacle courses: a task that is cut off at many places, and gone on with by a new learner after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.store import LearnerStore
from everlora.training.checkpoint import Saver

Place = tuple[str, int, str]
"""A stage (`begin`, `train`, `end`), the number of a unit of work in it, and whether `before` or `after` its saving."""

PLACES: tuple[Place, ...] = (
    ("begin", 2, "after"),
    ("begin", 1, "before"),
    ("train", 1, "before"),
    ("train", 2, "after"),
    ("train", 2, "before"),
    ("train", 1, "after"),
    ("end", 2, "after"),
    ("end", 1, "before"),
)
WRITE: Place = ("write", 1, "before")


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


@dataclass
class Course:
    """Places at which a learner is cut off, each once, in the order given.

    Attributes:
        places: those that are left.
        met: those at which it was cut off.
        steps: optimiser steps that were made, over all attempts.
    """

    places: list[Place] = field(default_factory=lambda: [*PLACES, WRITE])
    met: list[Place] = field(default_factory=list)
    steps: int = 0

    def run(self, path: Path, learn: Callable[[Learner], Any]) -> Learner:
        """Learn until it comes to an end; each attempt opens the directory anew."""
        for _ in range(2 * len(PLACES) + 4):
            learner = Learner.open(path, device="cpu")
            with self._armed():
                try:
                    learn(learner)
                except Killed:
                    continue
            return learner
        raise AssertionError("the task never came to an end")

    @contextmanager
    def _armed(self) -> Iterator[None]:
        seen: dict[str, int] = {}
        after_work, write = Saver._after_work, LearnerStore.write_task

        def counted(saver: Saver, state: Any) -> None:
            stage = saver._stage
            seen[stage] = seen.get(stage, 0) + 1
            self.steps += stage == "train"
            self._maybe_die((stage, seen[stage], "before"))
            after_work(saver, state)
            self._maybe_die((stage, seen[stage], "after"))

        def written(store: LearnerStore, *args: Any, **options: Any) -> Any:
            self._maybe_die(WRITE)
            return write(store, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Saver, "_after_work", counted)
            patch.setattr(LearnerStore, "write_task", written)
            yield

    def _maybe_die(self, place: Place) -> None:
        if place in self.places:
            self.places.remove(place)
            self.met.append(place)
            raise Killed
