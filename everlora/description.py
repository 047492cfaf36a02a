"""What a learner says of itself: its lineage, one line, and a table in notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlora.html_tables import NOTHING, html_table, percent
from everlora.settings import Settings
from everlora.status import describe
from everlora.store import LearnerStore

__all__ = ["Describes"]

_LINEAGE = ("base_model", "base_sha256", "method", "scenario")
_MORE_LINEAGE = ("options", "versions", "created", "start_from_sha256")
_FIGURES = ("accuracy_when_learned", "accuracy_now", "cross_entropy_when_learned", "cross_entropy_now")
_MOST_LABELS = 6


class Describes:
    """The part of a learner that describes it."""

    path: Path
    settings: Settings
    _store: LearnerStore

    def card(self) -> dict[str, Any]:
        """Lineage of the learner as plain values.

        Returns:
            `base_model`, `base_sha256`, `method`, `scenario`, `options`, `changed_options` (those that differ from the
            method's defaults), `versions`, `created`, and `tasks`: what was recorded of each, with its name, labels,
            rows, cost and figures on the rows that were kept back, when it was learned and now.
        """
        header, status = self._store.header, describe(self._store)["tasks"]
        tasks = [
            {"name": entry.name, **self._store.read_task(entry.index).record, **{key: now[key] for key in _FIGURES}}
            for entry, now in zip(self._store.tasks, status, strict=True)
        ]
        more = {key: header[key] for key in _MORE_LINEAGE if key in header}
        changed = {"changed_options": self.settings.changed()}
        return {**{key: header[key] for key in _LINEAGE}, **more, **changed, "tasks": tasks}

    def __repr__(self) -> str:
        status = describe(self._store)
        now = status["accuracy_now"]
        return (
            f"Learner({str(self.path)!r}, method={status['method']!r}, scenario={status['scenario']!r}, "
            f"tasks={status['num_tasks']}, classes={len(status['labels'])}"
            + ("" if now is None else f", accuracy={now:.4f}")
            + ")"
        )

    def _repr_html_(self) -> str:
        """A table of the tasks, for notebooks."""
        status = describe(self._store)
        base = Path(status["model"])
        model = base.name if base.is_absolute() else status["model"]
        caption = f"Learner {self.path.name}: {status['method']}, {status['scenario']}, model {model}"
        if status["scenario"] == "language":
            columns = ["Task", "Rows", "Seconds", "Nats a token when learned", "Now"]
            rows = [_language_cells(task) for task in status["tasks"]]
        else:
            columns = ["Task", "Rows", "Seconds", "Labels", "Accuracy % when learned", "Now"]
            rows = [_class_cells(task) for task in status["tasks"]]
        return html_table(caption, columns, rows)


def _common_cells(task: Mapping[str, Any]) -> list[str]:
    seconds = task["seconds"]
    rows = task["num_examples"]
    return [task["name"], NOTHING if rows is None else str(rows), NOTHING if seconds is None else f"{seconds:.1f}"]


def _class_cells(task: Mapping[str, Any]) -> list[str]:
    labels = task["labels"]
    shown = ", ".join(labels[:_MOST_LABELS]) + (f" and {more} more" if (more := len(labels) - _MOST_LABELS) > 0 else "")
    return [*_common_cells(task), shown, percent(task["accuracy_when_learned"]), percent(task["accuracy_now"])]


def _language_cells(task: Mapping[str, Any]) -> list[str]:
    figures = [task["cross_entropy_when_learned"], task["cross_entropy_now"]]
    return [*_common_cells(task), *(NOTHING if value is None else f"{value:.4f}" for value in figures)]
