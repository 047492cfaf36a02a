"""From whatever a user names to labelled examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from everlora.errors import DataError

# This import registers the data set that comes with scikit-learn.
from everlora.streams import digits as _digits  # noqa: F401
from everlora.streams.columns import Columns, find_columns, read_groups, read_labels, read_texts
from everlora.streams.examples import Examples, Modality
from everlora.streams.images import Progress, decode_images
from everlora.streams.reading import origin_of, pick_split, read_tables
from everlora.streams.registry import find_source
from everlora.streams.table import Table

__all__ = ["Columns", "LoadOptions", "load_examples", "load_splits"]


class LoadOptions(TypedDict, total=False):
    """Options of `load_examples` and `load_splits`.

    Attributes:
        columns: columns named by the user; what is not named is found by type and name.
        modality: `"image"` or `"text"` to insist on one; default: what the data holds.
        require_labels: whether rows without a label column are an error (default True).
        image_size: pixels of the common side of images; needed where their native sizes differ.
        cache: folder of the cache of decoded images.
        progress: called with (images done, images in all) while images are decoded.
    """

    columns: Columns | None
    modality: Modality | None
    require_labels: bool
    image_size: int | None
    cache: Path | None
    progress: Progress | None


def load_examples(data: Any, *, split: str = "train", **options: Unpack[LoadOptions]) -> Examples:
    """Load one split of a data set.

    Args:
        data: a path (CSV, TSV, JSON, JSON Lines, Parquet, a folder of these, an image folder, a saved data set), a
            hub id, a registered name such as `sklearn:digits`, a `datasets.Dataset` or `DatasetDict`, a list of
            dicts, a mapping from split names to any of these, or `Examples`.
        split: which split; data without splits is returned whole, whatever the name.
        **options: see `LoadOptions`.

    Returns:
        The rows, with ids 0 to n - 1 in the source's order (a registered data set has its own ids).

    Raises:
        DataError: the data cannot be found, read or understood; the message names the file, row or column.
    """
    if isinstance(data, Examples):
        return _checked(data, options)
    named = _registered(data)
    if named is not None:
        return _checked(pick_split(named, split, str(data)), options)
    source = read_tables(data)
    if not source.is_divided:
        return _build(source.tables["train"], options)
    return _build(pick_split(source.tables, split, origin_of(data)), options)


def load_splits(data: Any, **options: Unpack[LoadOptions]) -> dict[str, Examples]:
    """Load every split of a data set.

    Args:
        data: as for `load_examples`.
        **options: see `LoadOptions`.

    Returns:
        `"train"` and, where the source has them, `"validation"` and `"test"`; splits of other names are left out.

    Raises:
        DataError: as for `load_examples`, or the source has no train split.
    """
    if isinstance(data, Examples):
        return {"train": _checked(data, options)}
    named = _registered(data)
    if named is not None:
        return {split: _checked(examples, options) for split, examples in named.items()}
    tables = read_tables(data).tables
    pick_split(tables, "train", origin_of(data))
    return {split: _build(tables[split], options) for split in ("train", "validation", "test") if split in tables}


def _registered(data: Any) -> dict[str, Examples] | None:
    if isinstance(data, str) and ":" in data and not Path(data).exists() and "/" not in data and "\\" not in data:
        return find_source(data).load()
    return None


def _checked(examples: Examples, options: LoadOptions) -> Examples:
    """Hold ready-made examples to the same demands as data read from files."""
    if not len(examples):
        raise DataError("the set of examples is empty; give at least one row")
    if options.get("require_labels", True) and examples.labels is None:
        raise DataError("the examples carry no labels; give labelled examples")
    modality = options.get("modality")
    if modality is not None and modality != examples.modality:
        raise DataError(f"the examples are {examples.modality}s, but {modality}s are needed; give other data or model")
    return examples


def _build(table: Table, options: LoadOptions) -> Examples:
    if not table.num_rows:
        raise DataError(f"{table.origin} holds no rows; give at least one")
    found = find_columns(
        table,
        options.get("columns") or Columns(),
        modality=options.get("modality"),
        require_labels=options.get("require_labels", True),
    )
    labels, class_names = (None, None) if found.label is None else read_labels(table, found.label)
    if found.modality == "text":
        inputs: Any = read_texts(table, found.input)
    else:
        inputs = decode_images(
            _image_records(table, found.input),
            table.origin,
            folder=table.folder,
            image_size=options.get("image_size"),
            cache=options.get("cache"),
            progress=options.get("progress"),
        )
    return Examples(
        modality=found.modality,
        inputs=inputs,
        labels=labels,
        ids=np.arange(table.num_rows, dtype=np.int64),
        groups=None if found.task is None else read_groups(table, found.task),
        class_names=class_names,
        has_typed_labels=found.label is None or table.columns[found.label].is_typed,
    )


def _image_records(table: Table, name: str) -> list[Any]:
    column = table.columns[name]
    if column.kind not in ("image", "text"):
        raise DataError(f"{table.origin}: column '{name}' holds no images; name the column with --image-column")
    return column.to_list()
