"""A recipe's examples, and how they become its stream."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from everlora.errors import DataError
from everlora.experiments.language_data import first_bytes, hold_out_texts
from everlora.experiments.schema import DataSpec, Recipe, Setting, StreamSpec
from everlora.experiments.sources import Source, locate
from everlora.streams import (
    Columns,
    Examples,
    Stream,
    by_class,
    by_column,
    by_datasets,
    hold_out,
    load_dialogue_splits,
    load_dialogues,
    load_examples,
    load_splits,
)

__all__ = [
    "Progress",
    "Splits",
    "build_stream",
    "cut_stream",
    "general_sets",
    "hub_configuration",
    "read_splits",
    "without_labels",
]

logger = logging.getLogger(__name__)
Splits = dict[str, Examples]
Progress = Callable[[str, int, int], None]


def read_splits(
    spec: DataSpec,
    given: Any = None,
    *,
    recipe: str,
    progress: Progress | None = None,
    is_language: bool = False,
) -> tuple[Splits, Source]:
    """Load the splits of a data set, without the labels the recipe drops and with a test split.

    Args:
        spec: the recipe's description of its data.
        given: data that replaces it.
        recipe: the recipe's name, for messages.
        progress: called with a stage, the images decoded and their number.
        is_language: whether the rows are for a language model.

    Returns:
        The splits by name, always with `train` and `test`, and where they were read from.

    Raises:
        DataError: nothing is there, it cannot be read, or there is no test split and no rule to make one.
    """
    source = locate(spec, given, recipe=recipe)
    logger.info("recipe %s reads %s", recipe, source.text)
    found = _load_language(source, spec) if is_language else _load(source, spec, progress)
    splits = {name: without_labels(part, spec.drop_labels) for name, part in found.items()}
    if "test" not in splits:
        if spec.test_fraction is None:
            raise DataError(f"{source.text} has no test split, which recipe '{recipe}' needs; add one to the data.")
        if is_language:
            train, test = hold_out_texts(splits["train"], fraction=spec.test_fraction, seed=spec.split_seed)
            return splits | {"train": train, "test": test}, source
        train, test = hold_out(
            splits["train"], fraction=spec.test_fraction, seed=spec.split_seed, maximum=len(splits["train"])
        )
        splits |= {"train": train, "test": test}
    return splits, source


def build_stream(
    recipe: Recipe, setting: Setting, stream: StreamSpec, parts: Sequence[tuple[str, Splits]], *, seed: int
) -> Stream:
    """Cut loaded data into the tasks of one run.

    Args:
        recipe: the recipe.
        setting: says how much of the data is used, and whether tests are validation examples.
        stream: the stream's description, the setting's changes included.
        parts: the splits of each data set with its name; one entry unless the stream is `by: datasets`.
        seed: the run's seed; orders the tasks when `stream.order` is `seed`.

    Returns:
        The stream. With `evaluate_on: validation` the `test` of each task holds validation examples, and no test
        example is in it.

    Raises:
        DataError: the data does not fit the description.
    """
    parts = [(name, _splits_to_use(recipe, setting, splits)) for name, splits in parts]
    made = cut_stream(recipe, setting, stream, parts, seed=seed)
    # The class order is that of the whole data, so the first tasks are the same however many are learned.
    return made if stream.tasks is None else dataclasses.replace(made, tasks=made.tasks[: stream.tasks])


def general_sets(recipe: Recipe, setting: Setting) -> list[tuple[str, Examples]]:
    """Read the test rows of the recipe's data sets of general abilities, as many as the setting uses."""
    found = []
    for spec in recipe.general:
        splits, _ = read_splits(spec, recipe=recipe.name, is_language=True)
        found.append((str(spec.name), _splits_to_use(recipe, setting, splits)["test"]))
    return found


def cut_stream(
    recipe: Recipe, setting: Setting, stream: StreamSpec, parts: Sequence[tuple[str, Splits]], *, seed: int
) -> Stream:
    """Cut splits into tasks, all of them; `test` may be missing."""
    sample = {"train": setting.subsample.train, "test": setting.subsample.test}
    subsample = sample if any(sample.values()) else None
    order_seed = {"seed": seed, "natural": None}.get(str(stream.order), stream.order)
    assert order_seed is None or isinstance(order_seed, int)
    name, splits = parts[0]
    if stream.by == "class":
        assert stream.increment is not None  # the schema asks for it
        return by_class(
            splits,
            name=name,
            initial=stream.initial or stream.increment,
            increment=stream.increment,
            seed=order_seed,
            scenario=stream.scenario,
            subsample=subsample,
            subsample_seed=setting.subsample.seed,
        )
    if stream.by == "column":
        return by_column(
            splits,
            name=name,
            scenario=stream.scenario,
            order=stream.task_order,
            seed=order_seed if stream.task_order is None else None,
            subsample=subsample,
            subsample_seed=setting.subsample.seed,
        )
    return by_datasets(
        parts,
        name=recipe.name,
        scenario=stream.scenario,
        subsample=subsample,
        subsample_seed=setting.subsample.seed,
    )


def _load(source: Source, spec: DataSpec, progress: Progress | None) -> Splits:
    value = source.value
    if isinstance(value, Mapping) and all(isinstance(part, Examples) for part in value.values()):
        return dict(value)
    if source.kind == "hub" and spec.config is not None:
        value = hub_configuration(spec.hub or "", spec.config)
    tell = (lambda done, total: progress("decode images", done, total)) if progress is not None else None
    columns = Columns.from_mapping(source.columns) if source.columns else None
    if source.kind == "hub" and spec.split is not None:
        return {
            "train": load_examples(value, split=spec.split, columns=columns, image_size=spec.image_size, progress=tell)
        }
    return load_splits(value, columns=columns, image_size=spec.image_size, progress=tell)


def _load_language(source: Source, spec: DataSpec) -> Splits:
    value = source.value
    if isinstance(value, Mapping) and all(isinstance(part, Examples) for part in value.values()):
        return dict(value)
    if source.kind == "hub" and spec.config is not None:
        value = hub_configuration(spec.hub or "", spec.config)
    if source.kind == "hub" and spec.split is not None:
        return {"train": load_dialogues(value, split=spec.split, columns=source.columns)}
    return load_dialogue_splits(value, columns=source.columns)


def hub_configuration(name: str, config: str) -> Any:
    """Load one configuration of a data set of the hub (DataError where that fails)."""
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the client raises some twenty types, of four libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"The hub's data set {name} ({config}) cannot be loaded: {reason}; give the folder of a copy with --data."
        ) from error


def _splits_to_use(recipe: Recipe, setting: Setting, splits: Splits) -> Splits:
    """Only what may be looked at: the test split is not even handed on when validation examples take its place."""
    chosen = _train_and_test(recipe, setting, splits)
    if recipe.stream.scenario != "language":
        return chosen
    limits = {"train": setting.subsample.train_bytes, "test": setting.subsample.test_bytes}
    return {name: part if (most := limits[name]) is None else first_bytes(part, most) for name, part in chosen.items()}


def _train_and_test(recipe: Recipe, setting: Setting, splits: Splits) -> Splits:
    if setting.evaluate_on == "test":
        return {"train": splits["train"], "test": splits["test"]}
    if "validation" in splits:
        return {"train": splits["train"], "test": splits["validation"]}
    hold = hold_out_texts if recipe.stream.scenario == "language" else hold_out
    train, held_out = hold(splits["train"], fraction=recipe.validation.fraction, seed=recipe.validation.seed)
    return {"train": train, "test": held_out}


def without_labels(examples: Examples, dropped: Sequence[str]) -> Examples:
    """Leave out the rows of some classes, and the classes."""
    if not dropped or examples.labels is None:
        return examples
    kept = examples.select(np.flatnonzero(~np.isin(examples.labels.astype(str), list(dropped))))
    if examples.class_names is None:
        return kept
    return dataclasses.replace(kept, class_names=tuple(name for name in examples.class_names if name not in dropped))
