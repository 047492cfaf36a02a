"""From whatever a user names (a path, a hub id, a list, a data set) to tables, one for each split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from everlora.errors import DataError
from everlora.streams.files import DATA_SUFFIXES, SPLIT_NAMES, read_path
from everlora.streams.hub import is_hub_id, read_hub
from everlora.streams.table import Source, Table, table_from_dataset, table_from_rows

__all__ = ["origin_of", "pick_split", "read_tables"]


def read_tables(data: Any) -> Source:
    """Read data without deciding what its columns mean.

    Args:
        data: as for `load_examples`, but neither `Examples` nor a registered name.

    Raises:
        DataError: the data cannot be found or read.
    """
    if isinstance(data, datasets.DatasetDict) or (isinstance(data, Mapping) and set(data) <= set(SPLIT_NAMES)):
        return _read_mapping(data)
    if isinstance(data, datasets.Dataset):
        return Source({"train": table_from_dataset(data, "the data set")}, is_divided=False)
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError("a streamed data set has no fixed rows; load it with streaming=False")
    if isinstance(data, str | Path):
        return _read_name(str(data))
    if isinstance(data, Sequence):
        return Source({"train": table_from_rows(data, "the list of rows")}, is_divided=False)
    raise DataError(f"a {type(data).__name__} is no data set; give a path, a list of dicts or a datasets.Dataset")


def pick_split(parts: Mapping[str, Any], split: str, origin: str) -> Any:
    """Return the part of a split, by the split's name or one of its usual other names.

    Raises:
        DataError: `parts` has none; `origin` is how the message calls the data.
    """
    wanted = SPLIT_NAMES.get(split, split)
    if wanted not in parts:
        raise DataError(f"{origin} has no {wanted} split, only {', '.join(parts)}; add it or choose another")
    return parts[wanted]


def origin_of(data: Any) -> str:
    """How messages call the data."""
    return str(data) if isinstance(data, str | Path) else "the data set"


def _read_mapping(data: Mapping[str, Any]) -> Source:
    tables: dict[str, Table] = {}
    for name, part in data.items():
        inner = read_tables(part)
        split = SPLIT_NAMES.get(str(name).lower(), str(name))
        table = pick_split(inner.tables, split, origin_of(part)) if inner.is_divided else inner.tables["train"]
        tables[split] = Table(f"{table.origin} ({name})", table.columns, table.num_rows, table.folder)
    if not tables:
        raise DataError("the data set has no splits; give at least a train split")
    return Source(tables, is_divided=True)


def _read_name(name: str) -> Source:
    path = Path(name).expanduser()
    if path.exists():
        return read_path(path)
    if is_hub_id(name):
        return read_hub(name)
    raise DataError(f"{name} does not exist; give a file ({', '.join(DATA_SUFFIXES)}), a folder or a hub id")
