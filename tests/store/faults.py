"""Steps of a writer that are counted, so that a test can let any one of them fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "write")


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


class Countdown:
    """Lets a number of steps through, then dies before the next one, after it, or half-way through a write.

    Args:
        patch: undone by the caller.
        survive: steps to let through.
        moment: `before` or `after` the step; a write is cut in the middle either way.
        error: what is raised.
        lasting: whether every later step fails, too, as on a disk that stays full; else only one does.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        survive: int,
        moment: str,
        *,
        error: Callable[[], BaseException] = Killed,
        lasting: bool = True,
    ) -> None:
        self.left = survive
        self.moment = moment
        self.error = error
        self.lasting = lasting
        for name in STEPS[:-1]:
            patch.setattr(os, name, self._wrap(getattr(os, name)))
        real_open = Path.open

        def open_counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_open(path, mode, *args, **kwargs)
            return _CountedFile(file, self) if set(mode) & set("xwa") else file

        patch.setattr(Path, "open", open_counted)

    @property
    def struck(self) -> bool:
        """Whether a step failed."""
        return self.left < 0

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            dies = self.step()
            if dies and self.moment == "before":
                raise self.error()
            result = real(*args, **kwargs)
            if dies:
                raise self.error()
            return result

        return step

    def step(self) -> bool:
        """Count one step; whether it fails."""
        self.left -= 1
        return self.left < 0 if self.lasting else self.left == -1


class _CountedFile:
    """A file whose write may stop half-way, as a process killed or a disk cut off would leave it."""

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self.file = file
        self.countdown = countdown

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(self, *_details: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if self.countdown.step():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise self.countdown.error()
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
