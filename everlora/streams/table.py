"""Columns of raw data, before anyone has decided which one is the text, the image or the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from PIL import Image

from everlora.errors import DataError

__all__ = [
    "Column",
    "Source",
    "Table",
    "column_of_cells",
    "join_tables",
    "table_from_arrow",
    "table_from_dataset",
    "table_from_rows",
]

Kind = Literal["text", "class", "integer", "float", "boolean", "image", "other"]

# How the cells of a file without types look, the first that all cells of a column match; 007 is a code and no number.
_LOOKS: tuple[tuple[Kind, str], ...] = (
    ("integer", r"\A(?:0|-?[1-9][0-9]*)\z"),
    ("text", r"\A-?[0-9]+\z"),
    ("float", r"(?i)\A[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|nan|inf|infinity)\z"),
)


@dataclass(frozen=True, eq=False)
class Column:
    """One column.

    Attributes:
        kind: what its values are; `"class"` is an index into `class_names`, `"other"` anything unusable or mixed.
        data: the values; an Arrow column is turned into Python values only when asked for.
        class_names: names of a `"class"` column.
        is_typed: whether the source has types. The cells of a CSV are strings, whatever `kind` they look like.
    """

    kind: Kind
    data: Any
    class_names: tuple[str, ...] | None = None
    is_typed: bool = True

    def to_list(self) -> list[Any]:
        """Return the values as Python objects."""
        return list(self.data.to_pylist() if isinstance(self.data, pa.ChunkedArray) else self.data)


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length.

    Attributes:
        origin: how error messages call it (a path, a hub id, "the list of rows").
        columns: name -> column, in the source's order.
        num_rows: length of every column.
        folder: where relative image paths start.
    """

    origin: str
    columns: Mapping[str, Column]
    num_rows: int
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What a path, id or object holds: one table per split.

    Attributes:
        tables: split name -> table; a source without splits has the one entry `"train"`.
        is_divided: whether the source itself names its splits.
    """

    tables: Mapping[str, Table]
    is_divided: bool


def column_of_cells(cells: Any) -> Column:
    """Wrap the cells of a file without types, such as a CSV, as the strings they are.

    Args:
        cells: a `pyarrow.ChunkedArray` of strings.

    Returns:
        The column, of the kind that all cells look like; an empty one is of texts.
    """
    looks = (kind for kind, look in _LOOKS if pa.compute.all(pa.compute.match_substring_regex(cells, look)).as_py())
    return Column(next(looks, "text"), cells, is_typed=False)


def table_from_arrow(table: Any, origin: str, *, features: Any = None, folder: Path | None = None) -> Table:
    """Wrap an Arrow table.

    Args:
        table: a `pyarrow.Table`; Hugging Face feature types in its schema's metadata are honoured.
        origin: how error messages call it.
        features: `datasets.Features` where they are known already.
        folder: where relative image paths start.

    Returns:
        The table; values stay in Arrow.
    """
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(index).cast(field.type.value_type)
            table = table.set_column(index, field.name, plain)
    features = features if features is not None else datasets.Features.from_arrow_schema(table.schema)
    columns = {name: _arrow_column(table.column(name), features[name]) for name in table.column_names}
    return Table(origin=origin, columns=columns, num_rows=table.num_rows, folder=folder)


def table_from_dataset(dataset: Any, origin: str) -> Table:
    """Wrap a `datasets.Dataset`, without decoding its images."""
    arrow = dataset.with_format("arrow")[:] if len(dataset) else dataset.data.table
    return table_from_arrow(arrow, origin, features=dataset.features)


def table_from_rows(rows: Sequence[Any], origin: str, *, folder: Path | None = None) -> Table:
    """Build a table from a list of dicts; a key that a row lacks is a missing value there.

    Args:
        rows: one mapping per row.
        origin: how error messages call it.
        folder: where relative image paths start.

    Returns:
        The table, its column kinds found from the values.

    Raises:
        DataError: a row that is not a mapping.
    """
    names: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{origin}: row {index + 1} is a {type(row).__name__}; every row must map names to values")
        names.update(dict.fromkeys(str(name) for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    columns = {name: Column(kind=_kind_of_values(column), data=column) for name, column in values.items()}
    return Table(origin=origin, columns=columns, num_rows=len(rows), folder=folder)


def join_tables(tables: Sequence[Table], origin: str) -> Table:
    """Put the shards of one split one after another.

    Args:
        tables: at least one.
        origin: how error messages call the whole.

    Returns:
        One table.

    Raises:
        DataError: the shards have different columns, kinds of values or class lists. Files without types differ in
            columns only.
    """
    first = tables[0]
    if len(tables) == 1:
        return first
    columns: dict[str, Column] = {}
    for name, column in first.columns.items():
        shards = []
        for table in tables:
            other = table.columns.get(name)
            if other is None or not _agree(column, other):
                found = "has no such column" if other is None else "holds other types or classes there"
                raise DataError(f"{table.origin} {found} ('{name}') than {first.origin}; shards must agree")
            shards.append(other)
        columns[name] = _join_columns(shards)
    return Table(origin, columns, sum(table.num_rows for table in tables), first.folder)


def _agree(one: Column, other: Column) -> bool:
    is_typed = one.is_typed or other.is_typed
    return not is_typed or (one.kind, one.class_names) == (other.kind, other.class_names)


def _join_columns(shards: Sequence[Column]) -> Column:
    first = shards[0]
    if not any(shard.is_typed for shard in shards):
        return column_of_cells(
            pa.chunked_array([chunk for shard in shards for chunk in shard.data.chunks], pa.string())
        )
    values = [value for shard in shards for value in shard.to_list()]
    if all(shard.is_typed for shard in shards):
        return Column(first.kind, values, first.class_names)
    # Numbers of a typed file beside cells are written as such a file would write them: 3 and the cell 3 are one label.
    return Column(first.kind, [value if value is None else str(value) for value in values], is_typed=False)


def _arrow_column(column: Any, feature: Any) -> Column:
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names) if feature.names else None
        return Column("class" if names else "integer", column, names)
    if isinstance(feature, datasets.Image):
        return Column("image", column)
    kind = _kind_of_type(column.type)
    return Column(kind, column)


def _kind_of_type(kind: Any) -> Kind:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "image"
    if pa.types.is_struct(kind) and {kind.field(index).name for index in range(kind.num_fields)} == {"bytes", "path"}:
        return "image"
    return "other"


def _kind_of_values(values: Sequence[Any]) -> Kind:
    kinds = {_kind_of_value(value) for value in values if value is not None}
    if kinds == {"integer", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else "other"


def _kind_of_value(value: Any) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, int | np.integer):
        return "integer"
    if isinstance(value, float | np.floating):
        return "float"
    if isinstance(value, Image.Image | bytes) or (isinstance(value, np.ndarray) and value.ndim >= 2):
        return "image"
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        return "image"
    return "other"
