"""Ids of the tasks that an adapter went through, over several runs, and what of an earlier run is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from everlora.errors import OptionError, StoreError
from everlora.methods.base import State, TaskInfo
from everlora.methods.earlier import EarlierFolders, EarlierModel

__all__ = ["IdOptions", "TaskHistory"]

_PLASTIC, _STABLE = "plastic", "stable"
_OTHER_NAMES = ("ema", "ema_adapter")


class IdOptions(Protocol):
    """The options that name tasks and folders."""

    @property
    def current_task_id(self) -> str | None:
        """Id of the next task."""

    @property
    def prev_task_id(self) -> str | None:
        """Id of the task before it."""

    @property
    def previous_task_model(self) -> str | None:
        """Folder of the earlier run."""

    @property
    def ema_adapter_path(self) -> str | None:
        """Folder of the stable adapter."""


class TaskHistory:
    """The tasks learned so far, by id, those of earlier runs included.

    Args:
        options: see `IdOptions`.

    Attributes:
        entries: `id`, `steps` and `examples` of each task.

    Raises:
        OptionError: options that contradict each other.
    """

    def __init__(self, options: IdOptions) -> None:
        self._options = options
        self.entries: list[dict[str, Any]] = []
        path = options.ema_adapter_path
        self._is_elsewhere = path is not None and Path(path).is_absolute()
        if path is not None and not self._is_elsewhere:
            _check_name(path)
        if options.previous_task_model is None and (options.prev_task_id is not None or self._is_elsewhere):
            name = "prev_task_id" if options.prev_task_id is not None else "ema_adapter_path, a full path,"
            raise OptionError(f"{name} is for going on from an earlier run; name its folder with previous_task_model.")

    @property
    def stable_folder(self) -> str:
        """Name of the folder of the stable adapter, within a task's own."""
        return _STABLE if self._is_elsewhere else self._options.ema_adapter_path or _STABLE

    def folders(self) -> EarlierFolders | None:
        """Where the options say that an earlier run left its adapters."""
        model, path = self._options.previous_task_model, self._options.ema_adapter_path
        if model is None:
            return None
        names = (path, _STABLE, *_OTHER_NAMES) if path is not None else (_STABLE, *_OTHER_NAMES)
        return EarlierFolders(model, _PLASTIC, tuple(dict.fromkeys(names)))

    def next_id(self) -> str:
        """Id of the task that is about to begin.

        Raises:
            OptionError: a task of that id was learned before.
        """
        wanted = self._options.current_task_id or f"task-{len(self.entries):03d}"
        if wanted in [entry["id"] for entry in self.entries]:
            raise OptionError(
                f"a task with the id '{wanted}' was learned before; give another current_task_id, or leave it out "
                "where one learner learns several tasks."
            )
        return wanted

    def add(self, task_id: str, task: TaskInfo) -> None:
        """Note a task that was learned."""
        self.entries.append({"id": task_id, "steps": task.steps, "examples": task.num_examples})

    def require_continued(self, continued: bool) -> None:
        """Refuse to begin the first task without what the options name.

        Raises:
            OptionError: it was never handed over.
        """
        if self._options.previous_task_model is not None and not continued:
            raise OptionError(
                f"previous_task_model={self._options.previous_task_model} was not read; make the method with a "
                "learner, or hand it over with everlora.adapters.continue_earlier."
            )

    def check_earlier(self, earlier: EarlierModel) -> None:
        """Compare what was found with what the options say of it, and take over its tasks.

        Raises:
            OptionError: it is of another task than the one named, or of one though none is named.
            StoreError: there is no stable adapter.
        """
        wanted = self._options.prev_task_id
        if earlier.second is not None and wanted is None:
            raise OptionError(
                f"{earlier.source} holds a stable adapter, so a task came before; say with prev_task_id which one."
            )
        if earlier.second is None and not earlier.is_plain:
            raise StoreError(
                f"expected a stable adapter of {earlier.source}, found none; looked in {', '.join(earlier.tried)}."
            )
        entries = list(earlier.carried.get("history", []))
        if entries and entries[-1]["id"] != wanted:
            raise OptionError(
                f"expected the task '{wanted}' (prev_task_id) to be the last in {earlier.source}, found "
                f"'{entries[-1]['id']}'; name that one, or another folder."
            )
        self.entries = entries

    def state(self) -> State:
        """The tasks so far."""
        return {"history": self.entries}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name == _PLASTIC:
        raise OptionError(
            f"ema_adapter_path must be the name of one folder other than '{_PLASTIC}', or a full path, found {name!r}."
        )
