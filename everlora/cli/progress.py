"""Progress on standard error: one bar per stage, shown only once the work has taken two seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["StageProgress"]

_MOST_BARS = 6
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_SIGNS = 30.0  # of life, in the middle of a stage


class StageProgress:
    """Shows calls `progress(stage, done, total)` as bars, one per stage.

    On a terminal the bars appear when the work has lasted `delay_seconds`, even if no call came until then (loading a
    model makes none). Elsewhere, as in a log file, a stage that ends becomes a line, one in ten seconds at most, and a
    long one every half minute.

    Args:
        delay_seconds: how long the work may last before anything is shown.
    """

    def __init__(self, *, delay_seconds: float = 2.0) -> None:
        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
        )
        self._delay_seconds = delay_seconds
        self._begun = time.monotonic()
        self._last_line = float("-inf")
        self._waiting: TaskID | None = self._bars.add_task("working", total=None)
        self._stages: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._lock = threading.Lock()
        self._is_closed = self._is_shown = False
        self._timer = threading.Timer(delay_seconds, self._show)
        self._timer.daemon = True

    def _show(self) -> None:
        with self._lock:
            if not self._is_closed and self._console.is_terminal:
                self._bars.start()
                self._is_shown = True

    def __enter__(self) -> StageProgress:
        self._begun = time.monotonic()
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_closed = True
            self._drop_waiting()
            if self._is_shown:
                self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record that `done` of `total` steps of `stage` are behind us; `total = 0` means it is not known."""
        with self._lock:
            self._drop_waiting()
            if stage not in self._stages:
                self._forget_oldest()
                self._stages[stage] = self._bars.add_task(stage, total=total or None)
            self._bars.update(self._stages[stage], completed=done, total=total or None)
            if total and done >= total:
                self._finish(stage, total)
            else:
                self._finished.discard(stage)
                self._write_line(stage, done, total, first=_SECONDS_BETWEEN_LINES, between=_SECONDS_BETWEEN_SIGNS)

    def _drop_waiting(self) -> None:
        if self._waiting is not None:
            self._bars.remove_task(self._waiting)
            self._waiting = None

    def _forget_oldest(self) -> None:
        if len(self._stages) < _MOST_BARS:
            return
        oldest = next((stage for stage in self._stages if stage in self._finished), None)
        if oldest is not None:
            self._bars.remove_task(self._stages.pop(oldest))

    def _finish(self, stage: str, total: int) -> None:
        if stage in self._finished:
            return
        self._finished.add(stage)
        self._write_line(stage, total, total, first=self._delay_seconds, between=_SECONDS_BETWEEN_LINES)

    def _write_line(self, stage: str, done: int, total: int, *, first: float, between: float) -> None:
        """Write where the work stands, unless it has only begun or a line was written shortly before."""
        now = time.monotonic()
        if now >= max(self._begun + first, self._last_line + between) and not self._console.is_terminal:
            self._last_line = now
            of = f"/{total}" if total else ""
            self._console.print(f"{stage}: {done}{of} after {now - self._begun:.0f} s", soft_wrap=True)
