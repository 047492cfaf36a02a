"""Finding the text, image, label and task columns of a table, by type and by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everlora.errors import DataError, OptionError, nearest
from everlora.streams.examples import Modality, natural_order
from everlora.streams.table import Column, Kind, Table

__all__ = ["Columns", "Found", "find_columns", "read_groups", "read_labels", "read_texts"]

_LABEL_NAMES = ("label", "labels", "intent", "class", "category", "target", "topic", "sentiment", "fine_label", "y")
_TEXT_NAMES = ("text", "sentence", "utterance", "content", "question", "query", "document", "review")
_TASK_NAMES = ("task", "domain")
_FEW_ROWS = 20


@dataclass(frozen=True)
class Columns:
    """Which column is what; None leaves it to be found.

    Attributes:
        text: column of texts.
        image: column of images, or of paths to image files.
        label: column of labels.
        task: column whose values tell tasks (domains) apart.
    """

    text: str | None = None
    image: str | None = None
    label: str | None = None
    task: str | None = None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, str | None] | None) -> Columns:
        """Build from a mapping such as `{"text": "utterance", "label": "intent"}`.

        Args:
            mapping: keys among `text`, `image`, `label`, `task`; None for no names at all.

        Returns:
            The columns.

        Raises:
            OptionError: another key, or a value that is no string.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in (mapping or {}).items():
            if key not in known:
                raise OptionError(f"'{key}' is not a kind of column; {nearest(str(key), known)}")
            if value is not None and not isinstance(value, str):
                raise OptionError(f"the {key} column must be given by its name, not by {value!r}")
        return cls(**(mapping or {}))


@dataclass(frozen=True)
class Found:
    """The columns to read: `input` holds texts or images, `label` and `task` are None where there are none."""

    modality: Modality
    input: str
    label: str | None
    task: str | None


def find_columns(table: Table, columns: Columns, *, modality: Modality | None, require_labels: bool) -> Found:
    """Decide which columns of a table to read.

    Named columns are taken as named. Else: the image column is the one of images; the label column is the one with
    class names, then one with a usual name, then the only column left; the text column is the only one of texts, then
    one with a usual name, then the one with clearly the longest texts; the task column is one called task or domain.

    Args:
        table: the raw data.
        columns: columns named by the user.
        modality: what the inputs must be, None to take what is there (images before texts).
        require_labels: whether a missing label column is an error.

    Returns:
        The names of the columns.

    Raises:
        DataError: a named column is missing, or what is not named is not there or ambiguous.
    """
    for option in ("text", "image", "label", "task"):
        named = getattr(columns, option)
        if named is not None and named not in table.columns:
            raise DataError(f"{table.origin} has no column '{named}'; {nearest(named, table.columns)}")
    if modality is None:
        has_images = columns.image is not None or bool(_of_kind(table, "image"))
        modality = "image" if has_images and columns.text is None else "text"
    task = columns.task if columns.task is not None else _find_task(table, columns)
    label = columns.label
    if label is None:
        taken = {name for name in (columns.text, columns.image, task) if name is not None}
        usable = [name for name in table.columns if name not in taken]
        label = _find_label(table, usable, columns, modality=modality, require_labels=require_labels)
    spare = {name for name in (label, task) if name is not None}
    if modality == "image":
        found = columns.image if columns.image is not None else _find_image(table, spare)
    else:
        found = columns.text if columns.text is not None else _find_text(table, spare)
    return Found(modality=modality, input=found, label=label, task=task)


def read_texts(table: Table, name: str) -> tuple[str, ...]:
    """Return the texts of a column; numbers become their digits.

    Raises:
        DataError: a missing value, or values that are no texts.
    """
    column = table.columns[name]
    if column.kind not in ("text", "integer", "float"):
        raise DataError(f"{table.origin}: column '{name}' holds no texts; name the column of texts with --text-column")
    texts = column.to_list()
    for index, text in enumerate(texts):
        if text is None:
            raise DataError(f"{table.origin}: row {index + 1} has no text in column '{name}'; fill it or drop the row")
    return tuple(str(text) for text in texts)


def read_groups(table: Table, name: str) -> NDArray[np.object_]:
    """Return the values of the task column as strings.

    Raises:
        DataError: a missing value, or values that are neither names nor whole numbers.
    """
    column = table.columns[name]
    values = column.to_list()
    if column.kind not in ("text", "class", "integer"):
        raise DataError(f"{table.origin}: the task column '{name}' must hold names or whole numbers")
    for index, value in enumerate(values):
        if value is None:
            raise DataError(f"{table.origin}: row {index + 1} has no value in the task column '{name}'; fill it")
    return np.array([_class_name(column, value) for value in values], dtype=object)


def read_labels(table: Table, name: str) -> tuple[NDArray[np.object_], tuple[str, ...]]:
    """Return the labels of a column as names; those of a file without types are the cells as they stand there.

    Args:
        table: the raw data.
        name: the label column.

    Returns:
        `(n,)` object array of names and the source's list of classes: the declared one, else the natural order.

    Raises:
        DataError: a missing label, labels of two types, or labels that are neither names nor whole numbers.
    """
    column = table.columns[name]
    values = column.to_list()
    kinds: dict[str, int] = {}
    names = []
    for index, value in enumerate(values):
        where = f"{table.origin}: row {index + 1}"
        if value is None or value == "" or (column.kind == "class" and value == -1):
            raise DataError(f"{where} has no label in column '{name}'; fill it or drop the row")
        kinds.setdefault(_label_type(column, value, where, name), index)
        if len(kinds) > 1:
            (kind, _), (other, row) = kinds.items()
            raise DataError(
                f"{table.origin}: row {row + 1} has a {other} as label while earlier rows have a {kind}; "
                f"write all labels of column '{name}' as one type"
            )
        names.append(_class_name(column, value))
    declared = column.class_names if column.class_names is not None else natural_order(names)
    return np.array(names, dtype=object), declared


def _label_type(column: Column, value: Any, where: str, name: str) -> str:
    # A column of fractions is a measurement that was taken for the labels, in a file without types, too.
    if isinstance(value, str) and (column.kind != "float" or _is_whole(float(value))):
        return "name"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return "number"
    if isinstance(value, float | np.floating) and _is_whole(float(value)):
        return "number"
    raise DataError(
        f"{where} has the label {value} in column '{name}'; labels must be names or whole numbers: rewrite "
        f"the column or name another with --label-column"
    )


def _is_whole(number: float) -> bool:
    return math.isfinite(number) and number.is_integer()


def _class_name(column: Column, value: Any) -> str:
    if column.class_names is not None:
        return str(column.class_names[value])
    return value if isinstance(value, str) else str(int(value))


def _of_kind(table: Table, *kinds: Kind) -> list[str]:
    return [name for name, column in table.columns.items() if column.kind in kinds]


def _usual(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    lowered = {name: name.lower() for name in names}
    return [name for wanted in usual for name in names if lowered[name] == wanted]


def _ambiguous(table: Table, what: str, names: Sequence[str]) -> DataError:
    listed = ", ".join(f"'{name}'" for name in names)
    return DataError(f"{table.origin}: any of the columns {listed} could be the {what}; choose with --{what}-column")


def _find_task(table: Table, columns: Columns) -> str | None:
    taken = (columns.text, columns.image, columns.label)
    free = [name for name in _of_kind(table, "text", "class", "integer") if name not in taken]
    found = _usual(free, _TASK_NAMES)
    return found[0] if len(found) == 1 else None


def _find_label(
    table: Table, usable: Sequence[str], columns: Columns, *, modality: Modality, require_labels: bool
) -> str | None:
    declared = [name for name in usable if table.columns[name].kind == "class"]
    usual = _usual(usable, _LABEL_NAMES)
    for candidates in (declared, usual):
        preferred = [name for name in usual[:1] if name in candidates and name.lower() in ("label", "labels")]
        if len(candidates) == 1 or preferred:
            return (preferred or candidates)[0]
        if candidates and require_labels:
            raise _ambiguous(table, "label", candidates)
    if not require_labels:
        return None
    remaining = _remaining_label(table, usable, modality, is_input_named=bool(columns.text or columns.image))
    if remaining is not None:
        return remaining
    known = ", ".join(f"'{name}'" for name in table.columns) or "none"
    raise DataError(f"{table.origin} has no label column among its columns ({known}); name it with --label-column")


def _remaining_label(table: Table, usable: Sequence[str], modality: Modality, *, is_input_named: bool) -> str | None:
    """Return the one column that is left for the label once the inputs are set aside, None when that is a guess."""
    rest = [name for name in usable if table.columns[name].kind in ("text", "integer")]
    if modality == "text" and not is_input_named:
        texts = [name for name in rest if table.columns[name].kind == "text"]
        inputs = texts if len(texts) == 1 else _usual(texts, _TEXT_NAMES)
        if len(inputs) != 1:
            return None
        rest.remove(inputs[0])
    if len(rest) != 1:
        return None
    # Labels repeat; a column whose values hardly do is something else (an answer, a title, an id).
    values = table.columns[rest[0]].to_list()
    repeats = len(values) < _FEW_ROWS or 2 * len(set(values)) <= len(values)
    return rest[0] if repeats else None


def _find_image(table: Table, spare: set[str]) -> str:
    names = [name for name in _of_kind(table, "image") if name not in spare]
    if not names:
        known = ", ".join(f"'{name}'" for name in table.columns) or "none"
        raise DataError(f"{table.origin} has no column of images ({known}); name it with --image-column")
    if len(names) > 1:
        raise _ambiguous(table, "image", names)
    return names[0]


def _find_text(table: Table, spare: set[str]) -> str:
    names = [name for name in _of_kind(table, "text") if name not in spare]
    if not names:
        known = ", ".join(f"'{name}'" for name in table.columns) or "none"
        raise DataError(f"{table.origin} has no column of texts ({known}); name it with --text-column")
    usual = _usual(names, _TEXT_NAMES)
    if len(names) == 1 or len(usual) == 1:
        return usual[0] if usual else names[0]
    lengths = {name: _mean_length(table.columns[name].to_list()) for name in names}
    ranked = sorted(names, key=lambda name: -lengths[name])
    # Twice as long is what tells a text from a name, a title or an address beside it.
    if lengths[ranked[0]] < 2 * lengths[ranked[1]]:
        raise _ambiguous(table, "text", usual or names)
    return ranked[0]


def _mean_length(values: Sequence[Any]) -> float:
    return sum(len(value) for value in values if isinstance(value, str)) / max(len(values), 1)
