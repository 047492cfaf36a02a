"""Where a recipe's examples come from, and how they become its stream."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pyarrow import parquet

from everlora.errors import DataError
from everlora.experiments.network import hub_copy_is_here, hub_is_reachable
from everlora.experiments.schema import ColumnNames, DataSpec, Recipe, Setting, StreamSpec
from everlora.streams import (
    Columns,
    Examples,
    Stream,
    by_class,
    by_column,
    by_datasets,
    hold_out,
    load_examples,
    load_splits,
)

__all__ = ["SHARED_VARIABLE", "Progress", "Source", "Splits", "build_stream", "locate", "read_splits"]

SHARED_VARIABLE = "EVERLORA_SHARED"

logger = logging.getLogger(__name__)
Splits = dict[str, Examples]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A place to load from.

    Attributes:
        value: what `load_splits` is given: a path, hub id, built-in name or data in memory.
        columns: column names, `None` to find them by type.
        kind: `given`, `builtin`, `hub` or `shared`.
    """

    value: Any
    columns: Mapping[str, str] | None
    kind: str

    @property
    def text(self) -> str:
        """One line for the results; machine paths are cut down to the folder's name."""
        name = (
            Path(self.value).name if self.kind in ("given", "shared") and isinstance(self.value, str | Path) else None
        )
        if name is None:
            name = self.value if isinstance(self.value, str) else "data in memory"
        return f"{self.kind}: {name}"


def locate(spec: DataSpec, given: Any = None, *, recipe: str) -> Source:
    """Decide where the data of `spec` is read from.

    The order is: what the caller gives, the built-in set, the hub (only when the set is in its cache already, or the
    hub answers at once), the copy below `$EVERLORA_SHARED/data` (`../shared/data` when the variable is not set).

    Args:
        spec: the recipe's description of its data.
        given: a folder or file, or data in memory; wins over everything else.
        recipe: the recipe's name, for the message.

    Returns:
        The first of these that is there.

    Raises:
        DataError: none of them is.
    """
    if given is not None:
        if isinstance(given, str | Path) and not Path(given).exists() and ":" not in str(given):
            raise DataError(f"{given}: there is no such file or folder; give --data the data set's folder.")
        return Source(given, _fitting_columns(given, (spec.columns, spec.shared_columns)), "given")
    if spec.builtin is not None:
        return Source(spec.builtin, None, "builtin")
    if spec.hub is not None and (hub_copy_is_here(spec.hub) or hub_is_reachable()):
        return Source(spec.hub, _named(spec.columns), "hub")
    folder = _shared_data() / spec.shared if spec.shared is not None else None
    if folder is not None and folder.is_dir():
        return Source(folder, _named(spec.shared_columns), "shared")
    tried = [f"the hub (data set {spec.hub}) does not answer"] if spec.hub is not None else []
    if spec.shared is not None:
        tried.append(f"${SHARED_VARIABLE} has no data/{spec.shared}")
    raise DataError(
        f"The data of recipe '{recipe}' cannot be found: {' and '.join(tried)}; give its folder with --data."
    )


def read_splits(
    spec: DataSpec, given: Any = None, *, recipe: str, progress: Progress | None = None
) -> tuple[Splits, Source]:
    """Load the splits of a data set, without the labels the recipe drops and with a test split.

    Args:
        spec: the recipe's description of its data.
        given: data that replaces it.
        recipe: the recipe's name, for messages.
        progress: called with a stage, the images decoded and their number.

    Returns:
        The splits by name, always with `train` and `test`, and where they were read from.

    Raises:
        DataError: nothing is there, it cannot be read, or there is no test split and no rule to make one.
    """
    source = locate(spec, given, recipe=recipe)
    logger.info("recipe %s reads %s", recipe, source.text)
    splits = {name: _without(part, spec.drop_labels) for name, part in _load(source, spec, progress).items()}
    if "test" not in splits:
        if spec.test_fraction is None:
            raise DataError(f"{source.text} has no test split, which recipe '{recipe}' needs; add one to the data.")
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
    made = _cut(recipe, setting, stream, parts, seed=seed)
    # The class order is that of the whole data, so the first tasks are the same however many are learned.
    return made if stream.tasks is None else dataclasses.replace(made, tasks=made.tasks[: stream.tasks])


def _cut(
    recipe: Recipe, setting: Setting, stream: StreamSpec, parts: Sequence[tuple[str, Splits]], *, seed: int
) -> Stream:
    """All tasks of the stream."""
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
        value = _hub_configuration(spec.hub or "", spec.config)
    tell = (lambda done, total: progress("decode images", done, total)) if progress is not None else None
    columns = Columns.from_mapping(source.columns) if source.columns else None
    if source.kind == "hub" and spec.split is not None:
        return {
            "train": load_examples(value, split=spec.split, columns=columns, image_size=spec.image_size, progress=tell)
        }
    return load_splits(value, columns=columns, image_size=spec.image_size, progress=tell)


def _hub_configuration(name: str, config: str) -> Any:
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the client raises some twenty types, of four libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"The hub's data set {name} ({config}) cannot be loaded: {reason}; give the folder of a copy with --data."
        ) from error


def _splits_to_use(recipe: Recipe, setting: Setting, splits: Splits) -> Splits:
    """Only what may be looked at: the test split is not even handed on when validation examples take its place."""
    if setting.evaluate_on == "test":
        return {"train": splits["train"], "test": splits["test"]}
    if "validation" in splits:
        return {"train": splits["train"], "test": splits["validation"]}
    train, held_out = hold_out(splits["train"], fraction=recipe.validation.fraction, seed=recipe.validation.seed)
    return {"train": train, "test": held_out}


def _without(examples: Examples, dropped: Sequence[str]) -> Examples:
    if not dropped or examples.labels is None:
        return examples
    kept = examples.select(np.flatnonzero(~np.isin(examples.labels.astype(str), list(dropped))))
    if examples.class_names is None:
        return kept
    return dataclasses.replace(kept, class_names=tuple(name for name in examples.class_names if name not in dropped))


def _shared_data() -> Path:
    return Path(os.environ.get(SHARED_VARIABLE, os.path.join(os.pardir, "shared"))) / "data"


def _named(columns: ColumnNames | None) -> dict[str, str] | None:
    return columns.named if columns is not None else None


def _fitting_columns(given: Any, candidates: Sequence[ColumnNames | None]) -> dict[str, str] | None:
    """Column names are known for the hub's layout and for the local one; take those that the given files have."""
    if not isinstance(given, str | Path):
        return None
    present = _column_names(Path(given))
    names = [columns.named for columns in candidates if columns is not None]
    return next((one for one in names if one and present.issuperset(one.values())), None)


def _column_names(path: Path) -> set[str]:
    """Column names of the first table file at `path`; empty for anything else (images, say)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".parquet":
            return set(parquet.read_schema(file).names)
        if file.suffix in (".csv", ".tsv"):
            with file.open(newline="", encoding="utf-8", errors="replace") as lines:
                return set(next(csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ","), []))
    return set()
