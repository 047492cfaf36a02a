"""Experiment trackers: what training does and what it led to, written where a researcher looks.

The trackers are those of accelerate, used without its `Accelerator`. Nothing of a tracker is imported before it is
asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from everlora.errors import OptionError, nearest
from everlora.results import TaskResult

__all__ = ["TRACKERS", "Trackers", "check_trackers"]

logger = logging.getLogger("everlora.tracking")

# What each tracker is installed by; the names are those of accelerate.
TRACKERS = {
    "tensorboard": "everlora[track]",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}


def check_trackers(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of trackers, checked.

    Args:
        names: a list, or one text with commas.

    Raises:
        OptionError: there is no such tracker, or its package is not installed.
    """
    given = names.split(",") if isinstance(names, str) else names
    wanted = tuple(dict.fromkeys(name.strip().lower().replace("-", "_") for name in given if name.strip()))
    for name in wanted:
        if name not in TRACKERS:
            raise OptionError(f"there is no tracker '{name}'; {nearest(name, TRACKERS)}")
    if wanted:
        available = {str(kind) for kind in import_module("accelerate.tracking").get_available_trackers()}
        for name in wanted:
            if name not in available:
                raise OptionError(
                    f"tracker '{name}' needs a package that is not installed; get it by: pip install '{TRACKERS[name]}'"
                )
    return wanted


class Trackers:
    """Trackers that are fed by a learner: `learner.learn(data, watch=Trackers("tensorboard", folder="logs"))`.

    Steps are counted over all tasks, so that the curves of a stream stand one behind the other. Trackers are opened
    with the first figure; call `close`, or use this as a context, to be sure that all is written.

    Args:
        names: of the trackers, as `check_trackers` takes them.
        name: of what is tracked: the run in TensorBoard, the project in others.
        folder: where trackers put files.
        settings: options to keep with the run, see `Settings.as_parts`; flat, or by group.
        steps: steps that were made before, by earlier tasks.
        every: write the figures of every how many steps.

    Raises:
        OptionError: a tracker that does not exist or is not installed, or `every` below 1.
    """

    def __init__(
        self,
        names: str | Iterable[str],
        *,
        name: str = "everlora",
        folder: str | Path = "tracking",
        settings: Mapping[str, Any] | None = None,
        steps: int = 0,
        every: int = 10,
    ) -> None:
        if every < 1:
            raise OptionError(f"every is {every}; give 1 or more.")
        self.names = check_trackers(names)
        self.name = name
        self.folder = Path(folder)
        self.settings = dict(settings or {})
        self.every = every
        self._steps_before = self._last_step = steps
        self._opened: list[Any] | None = None

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step, of every few of them, or of an epoch."""
        self._last_step = self._steps_before + step
        if step == 1 or step % self.every == 0 or any(key.startswith("epoch") for key in figures):
            self._write({f"train/{key}": value for key, value in figures.items()})

    def task(self, result: TaskResult) -> None:
        """Write what a task cost, and the figures on the rows that were kept back from it and those before it."""
        self._last_step = self._steps_before = self._steps_before + result.steps
        figures = {"number": result.index + 1, "seconds": result.seconds, "rows": result.num_examples}
        self._write({f"task/{key}": float(value) for key, value in figures.items()})
        self._write({f"kept rows/{task}": float(value) for task, value in result.metrics.items()})

    def figures(self, figures: Mapping[str, float]) -> None:
        """Write figures of the present moment, such as those on test sets after a task."""
        self._write(figures)

    def close(self) -> None:
        """Finish all trackers; figures that come later open them anew."""
        opened, self._opened = self._opened or [], None
        for tracker in opened:
            tracker.finish()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, figures: Mapping[str, float]) -> None:
        if not figures:
            return
        if self._opened is None:
            self._opened = self._open()
        for tracker in self._opened:
            tracker.log(dict(figures), step=self._last_step)

    def _open(self) -> list[Any]:
        import_module("accelerate").PartialState()  # accelerate's own log asks which process this is
        classes = import_module("accelerate.tracking").LOGGER_TYPE_TO_CLASS
        opened = []
        for name in self.names:
            if classes[name].requires_logging_directory:
                self.folder.mkdir(parents=True, exist_ok=True)
                tracker = classes[name](self.name, logging_dir=str(self.folder))
            else:
                tracker = classes[name](self.name)
            tracker.start()
            if self.settings:
                tracker.store_init_configuration(_flat(self.settings))
            opened.append(tracker)
            logger.info("tracking %s with %s", self.name, name)
        return opened


def _flat(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Options by one name each, as trackers take them."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            found[key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
