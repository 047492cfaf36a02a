"""What a method saves while a task is being learned, so that the task can go on after an interruption."""

from __future__ import annotations

from typing import Any

__all__ = ["Resumable"]


class Resumable:
    """The hooks of a task that is interrupted and gone on with; a method that changes nothing else needs none.

    On resuming, `begin_task` runs again and must do the same, bit for bit; then trained parameters and moving
    statistics are put back, and `load_progress_state` is called. States are flat: name to tensor or plain JSON value.
    """

    def progress_state(self) -> dict[str, Any]:
        """What the steps and epochs of the task so far changed beyond what is trained; of generators, their state."""
        return {}

    def load_progress_state(self, state: dict[str, Any]) -> None:
        """Put back what `progress_state` returned, after `begin_task`; empty where nothing was saved."""

    def gathered(self) -> dict[str, Any] | None:
        """What the pass over the data that is running has summed up; None to have it made again from its start."""
        return None

    def resume_gathering(self, state: dict[str, Any]) -> None:
        """Put back what `gathered` returned, at the start of the same pass; its first batches will be left out."""
