"""The streams of a sweep: training rows, some of them held out to judge by, and no test row at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from everlora.errors import DataError
from everlora.experiments.data import Progress, cut_stream, hub_configuration, without_labels
from everlora.experiments.language_data import first_bytes, hold_out_texts
from everlora.experiments.plan import fingerprint_of
from everlora.experiments.recipe import stream_of
from everlora.experiments.schema import DataSpec, Recipe, Setting
from everlora.experiments.sources import Source, given_part, locate
from everlora.streams import Columns, Examples, Stream, Task, hold_out, load_dialogues, load_examples
from everlora.sweep.plan import SweepPlan

__all__ = ["SearchStreams", "read_training_rows"]

_TRAIN = "train"


class SearchStreams:
    """The streams that trials learn and are judged by, by seed.

    They are made of the training split alone. The `test` of each task holds rows that were held out of the task's own
    training rows, and that is all that a trial can be measured on.

    Args:
        plan: of the sweep.
        progress: called while images are decoded.
    """

    def __init__(self, plan: SweepPlan, progress: Progress | None = None) -> None:
        self._plan, self._progress = plan, progress
        self._parts: list[tuple[str, Examples]] | None = None
        self._sources: list[Source] = []
        self._newest: tuple[int, Stream, int] | None = None

    def __call__(self, seed: int) -> Stream:
        """Return the stream of one seed."""
        return self._made(seed)[0]

    def num_tasks(self, seed: int) -> int:
        """Tasks of the recipe's stream, also where only the first is looked at."""
        return self._made(seed)[1]

    def general(self) -> list[tuple[str, Examples]]:
        """Nothing: data sets of general abilities are tests."""
        return []

    @property
    def source(self) -> str:
        """Where the data was read from, as one line."""
        self._read()
        return ", ".join(source.text for source in self._sources)

    @property
    def fingerprint(self) -> str:
        """Hash of all training rows that were read."""
        return fingerprint_of([(name, {_TRAIN: rows}) for name, rows in self._read()])

    def _made(self, seed: int) -> tuple[Stream, int]:
        if self._newest is None or self._newest[0] != seed:
            plan = self._plan.plan
            recipe, setting = plan.recipe, plan.setting
            spec = stream_of(recipe, setting)
            parts = [(name, {_TRAIN: rows}) for name, rows in self._read()]
            whole = cut_stream(recipe, setting, spec, parts, seed=seed)
            tasks = whole.tasks[: spec.tasks]
            chosen = tasks[:1] if self._plan.first_task else tasks
            judged = tuple(self._judged(task, is_language=spec.scenario == "language") for task in chosen)
            self._newest = (seed, dataclasses.replace(whole, tasks=judged), len(tasks))
        return self._newest[1:]

    def _judged(self, task: Task, *, is_language: bool) -> Task:
        """The task with some of its training rows held out as its test."""
        fraction, seed = self._plan.fraction, self._plan.split_seed
        if is_language:
            train, held = hold_out_texts(task.train, fraction=fraction, seed=seed)
        else:
            train, held = hold_out(task.train, fraction=fraction, seed=seed, maximum=len(task.train))
        if not len(held):
            raise DataError(
                f"task '{task.name}' has one training row for each class, so none can be held out to judge by; "
                "give more rows, or judge by the first task only"
            )
        return dataclasses.replace(task, train=train, test=held, validation=None)

    def _read(self) -> list[tuple[str, Examples]]:
        if self._parts is None:
            plan = self._plan.plan
            recipe, specs = plan.recipe, plan.recipe.data.sets or (plan.recipe.data,)
            parts = []
            for spec in specs:
                given = given_part(plan.data, spec.name, recipe.name) if len(specs) > 1 else plan.data
                rows, source = read_training_rows(spec, given, recipe, plan.setting, progress=self._progress)
                parts.append((spec.name or recipe.name, rows))
                self._sources.append(source)
            self._parts = parts
        return self._parts


def read_training_rows(
    spec: DataSpec, given: Any, recipe: Recipe, setting: Setting, *, progress: Progress | None = None
) -> tuple[Examples, Source]:
    """Load the training split of a data set, and no other.

    Where a recipe makes a test set out of the rows of its only split, they are set apart here just as a run does it,
    and go no further.

    Args:
        spec: the recipe's description of its data.
        given: data that replaces it; of splits in memory only `train` is looked up.
        recipe: the recipe.
        setting: says how many bytes of a language model's texts are used.
        progress: called with a stage, the images decoded and their number.

    Returns:
        The rows, and where they were read from.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    source = locate(spec, given, recipe=recipe.name)
    value, split = _train_of(source, spec)
    is_language = recipe.stream.scenario == "language"
    if isinstance(value, Examples):
        rows = value
    elif is_language:
        rows = load_dialogues(value, split=split, columns=source.columns)
    else:
        tell = (lambda done, total: progress("decode images", done, total)) if progress is not None else None
        columns = Columns.from_mapping(source.columns) if source.columns else None
        rows = load_examples(value, split=split, columns=columns, image_size=spec.image_size, progress=tell)
    rows = without_labels(rows, spec.drop_labels)
    if spec.test_fraction is not None:
        hold = hold_out_texts if is_language else _hold_out_of_all
        rows = hold(rows, fraction=spec.test_fraction, seed=spec.split_seed)[0]
    limit = setting.subsample.train_bytes if is_language else None
    return (rows if limit is None else first_bytes(rows, limit)), source


def _hold_out_of_all(rows: Examples, *, fraction: float, seed: int) -> tuple[Examples, Examples]:
    return hold_out(rows, fraction=fraction, seed=seed, maximum=len(rows))


def _train_of(source: Source, spec: DataSpec) -> tuple[Any, str]:
    """What holds the training rows, and under which name; of splits in memory nothing else is looked up."""
    value, split = source.value, _TRAIN
    if source.kind == "hub":
        split = spec.split or _TRAIN
        value = value if spec.config is None else hub_configuration(spec.hub or "", spec.config)
    if isinstance(value, Mapping) and split in value:
        value = value[split]
        return (value if isinstance(value, Examples) else {split: value}), split
    return value, split
