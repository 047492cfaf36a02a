"""The fields of language data in a table: columns by name, or format strings over columns."""

from __future__ import annotations

from string import Formatter
from typing import Any

import numpy as np

from everlora.errors import DataError, OptionError, nearest
from everlora.streams.table import Column, Table

__all__ = ["FIELDS", "field_values", "text_of"]

FIELDS = (
    "text",
    "instruction",
    "input",
    "output",
    "prompt",
    "answer",
    "messages",
    "label",
    "label_set",
    "id",
    "task",
)


def field_values(table: Table, field: str, name: str | None, *, is_optional: bool = False) -> list[Any]:
    """Read one field of every row.

    Args:
        table: the raw data.
        field: one of `FIELDS`.
        name: a column, or a format string over columns; None to take the column called like the field.
        is_optional: whether a named column may be absent.

    Returns:
        One value per row, None where the row has none. A class is given by its name.

    Raises:
        DataError: a column is missing, or a row lacks a value that a format string uses.
        OptionError: the format string is broken.
    """
    if name is None:
        return _values(table.columns[field]) if field in table.columns else [None] * table.num_rows
    if name in table.columns:
        return _values(table.columns[name])
    used = _used_columns(field, name)
    missing = [column for column in used if column not in table.columns] if used else [name]
    if missing and is_optional:
        return [None] * table.num_rows
    if missing:
        raise DataError(
            f"{table.origin} has no column '{missing[0]}' for '{field}'; {nearest(missing[0], table.columns)}"
        )
    columns = {column: _values(table.columns[column]) for column in used}
    _check_texts(table, columns)
    rows = zip(*columns.values(), strict=True)
    return [name.format(**{column: text_of(value) for column, value in zip(columns, row, strict=True)}) for row in rows]


def _check_texts(table: Table, columns: dict[str, list[Any]]) -> None:
    for column, values in columns.items():
        for index, value in enumerate(values):
            if value is None:
                raise DataError(f"{table.origin}: row {index + 1} has no '{column}'; fill it or drop the row")
            if not isinstance(text_of(value), str):
                kind = type(value).__name__
                raise DataError(f"{table.origin}: row {index + 1} has a {kind} in '{column}'; write a text or a number")


def text_of(value: Any) -> Any:
    """Return a number as its digits; a text, and what is neither, as it is."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return str(value)
    return value


def _values(column: Column) -> list[Any]:
    values = column.to_list()
    if column.class_names is None:
        return values
    return [None if value is None or value < 0 else column.class_names[value] for value in values]


def _used_columns(field: str, text: str) -> list[str]:
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise OptionError(
            f"the format string {text!r} of '{field}' cannot be read ({error}); write columns as {{name}} and a brace "
            "itself as {{ or }}"
        ) from error
    return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
