"""Labelled rows of one data set, in memory or memory-mapped, with stable ids."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from everlora.errors import DataError

__all__ = ["Examples", "Modality", "concatenate", "natural_order"]

Modality = Literal["image", "text", "language"]

_PLURALS: dict[Modality, str] = {"image": "images", "text": "texts", "language": "rows for a language model"}
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct label names: by value when all are whole numbers, else alphabetically.

    Args:
        names: label names, repetitions allowed.

    Returns:
        The distinct names, sorted.
    """
    distinct = set(names)
    if distinct and all(_INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of one modality, with labels as names.

    Attributes:
        modality: `"image"`, `"text"` or `"language"`.
        inputs: images: uint8 `(n, H, W, 3)`, perhaps a memory map; texts: a sequence of n strings; language: n strings
            too, each a row as `everlora.streams.parse_row` reads it.
        labels: `(n,)` object array of label names (`str`), None when the rows carry no labels.
        ids: `(n,)` int64, the stable id of each row in its source; randomness that belongs to a row is keyed by it.
        groups: `(n,)` object array of `str`, the row's value in the task (domain) column where there is one.
        class_names: the source's own list of classes, in its own order; may name classes without rows here.
        has_typed_labels: whether the source tells numbers from names. A CSV does not: its labels are names, 14 and 12a.
    """

    modality: Modality
    inputs: NDArray[np.uint8] | Sequence[str]
    labels: NDArray[np.object_] | None
    ids: NDArray[np.int64]
    groups: NDArray[np.object_] | None = None
    class_names: tuple[str, ...] | None = None
    has_typed_labels: bool = True

    def __post_init__(self) -> None:
        for name in ("labels", "ids", "groups"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.inputs):
                raise DataError(f"{name} has {len(column)} entries for {len(self.inputs)} inputs; give one per input")

    def __len__(self) -> int:
        return len(self.inputs)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The distinct labels of these rows, in the order of `class_names`, else in natural order."""
        if self.labels is None:
            return ()
        present = set(self.labels.tolist())
        if self.class_names is None:
            return natural_order(present)
        unlisted = present.difference(self.class_names)
        return tuple(name for name in self.class_names if name in present) + natural_order(unlisted)

    @property
    def label_kind(self) -> Literal["integer", "name"] | None:
        """`"integer"` when every label is a whole number, `"name"` otherwise, None without labels or their types."""
        if self.labels is None or not len(self) or not self.has_typed_labels:
            return None
        return "integer" if all(_INTEGER.fullmatch(name) for name in self.classes) else "name"

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, over modality, inputs, labels and groups, in row order (ids are left out)."""
        digest = hashlib.sha256(self.modality.encode())
        if isinstance(self.inputs, np.ndarray):
            digest.update(repr(self.inputs.shape).encode())
            for start in range(0, len(self.inputs), 4096):
                digest.update(np.ascontiguousarray(self.inputs[start : start + 4096]).data)
        else:
            _hash_strings(digest, self.inputs)
        for column in (self.labels, self.groups):
            _hash_strings(digest, () if column is None else column.tolist())
        return digest.hexdigest()

    @functools.cached_property
    def rows_by_label(self) -> dict[str, NDArray[np.int64]]:
        """For each class of `classes`, the ascending row indices that carry it."""
        if self.labels is None:
            return {}
        rows: dict[str, list[int]] = {name: [] for name in self.classes}
        for index, name in enumerate(self.labels.tolist()):
            rows[name].append(index)
        return {name: np.asarray(indices, dtype=np.int64) for name, indices in rows.items()}

    def select(self, indices: Sequence[int] | NDArray[Any]) -> Examples:
        """Keep some rows, in the order given; ids, labels, groups and `class_names` come along.

        Args:
            indices: row indices (int) or a boolean mask of length n.

        Returns:
            New examples; image rows are copied into memory.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_:
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        if isinstance(self.inputs, np.ndarray):
            inputs: NDArray[np.uint8] | Sequence[str] = np.asarray(self.inputs[chosen])
        else:
            inputs = tuple(self.inputs[index] for index in chosen.tolist())
        return dataclasses.replace(
            self,
            inputs=inputs,
            labels=None if self.labels is None else self.labels[chosen],
            ids=self.ids[chosen],
            groups=None if self.groups is None else self.groups[chosen],
        )


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Put examples one after another, with distinct ids.

    Ids are kept as they are when no two parts share one (parts of one data set); otherwise each part's ids are moved
    past the largest id before it.

    Args:
        parts: at least one; all of one modality, images of one size, all labelled or none.

    Returns:
        All rows, in the order of the parts. `groups` is kept when every part has it. `class_names` is the union in
        order of appearance, None when a part has none.

    Raises:
        DataError: no parts, or parts that do not fit together.
    """
    if not parts:
        raise DataError("there is nothing to concatenate; give at least one set of examples")
    first = parts[0]
    if len(parts) == 1:
        return first
    if {part.modality for part in parts} != {first.modality}:
        found = " and ".join(sorted({_PLURALS[part.modality] for part in parts}))
        raise DataError(f"{found} cannot be put into one set of examples; keep the modalities apart")
    if len({part.labels is None for part in parts}) > 1:
        raise DataError("some of the examples to concatenate have labels and some do not; label all or none")
    names = [part.class_names for part in parts]
    class_names = None if None in names else tuple(dict.fromkeys(name for part in names for name in part or ()))
    return Examples(
        modality=first.modality,
        inputs=_join_inputs(parts),
        labels=_join_objects([part.labels for part in parts]),
        ids=_join_ids([part.ids for part in parts]),
        groups=_join_objects([part.groups for part in parts]),
        class_names=class_names,
        has_typed_labels=all(part.has_typed_labels for part in parts),
    )


def _join_inputs(parts: Sequence[Examples]) -> NDArray[np.uint8] | Sequence[str]:
    if parts[0].modality != "image":
        return tuple(text for part in parts for text in part.inputs)
    arrays = [np.asarray(part.inputs) for part in parts]
    shapes = sorted({array.shape[1:3] for array in arrays})
    if len(shapes) > 1:
        found = " and ".join(f"{height}x{width}" for height, width in shapes)
        raise DataError(f"images of sizes {found} cannot be put into one set; load them with one image_size")
    return np.concatenate(arrays)


def _join_objects(columns: Sequence[NDArray[np.object_] | None]) -> NDArray[np.object_] | None:
    present = [column for column in columns if column is not None]
    return np.concatenate(present) if len(present) == len(columns) else None


def _join_ids(columns: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    joined = np.concatenate(columns)
    if len(np.unique(joined)) == len(joined):
        return joined
    moved, offset = [], 0
    for ids in columns:
        moved.append(ids + offset)
        offset = max(offset, int(moved[-1].max()) + 1 if len(ids) else 0)
    return np.concatenate(moved)


def _hash_strings(digest: Any, strings: Iterable[str]) -> None:
    # Each string is preceded by its length, so that moving a character across a boundary changes the hash.
    for text in strings:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    digest.update(b"\xff" * 8)
