"""Validation rows that stay with a task, as arrays: strings as UTF-8 bytes with offsets, images as uint8."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everlora.errors import StoreError
from everlora.streams import Examples, Modality

__all__ = ["KEPT_FILE", "pack_rows", "unpack_rows"]

KEPT_FILE = "validation.safetensors"
Arrays = dict[str, NDArray[Any]]


# The name of the array of inputs tells the modality. Rows without labels have a mark, so that a lost array is noticed.
_STRINGS: dict[Modality, str] = {"text": "texts", "language": "language"}
_UNLABELLED = "unlabelled"


def pack_rows(examples: Examples) -> Arrays:
    """Turn rows, labelled or not, into named arrays (see `unpack_rows`)."""
    arrays: Arrays = {"ids": np.ascontiguousarray(examples.ids, dtype=np.int64)}
    if examples.labels is None:
        arrays[_UNLABELLED] = np.ones(1, dtype=np.uint8)
    else:
        arrays |= _pack_strings("labels", [str(name) for name in examples.labels])
    if isinstance(examples.inputs, np.ndarray):
        arrays["images"] = np.ascontiguousarray(examples.inputs)
    else:
        arrays |= _pack_strings(_STRINGS[examples.modality], list(examples.inputs))
    return arrays


def unpack_rows(arrays: Mapping[str, NDArray[Any]]) -> Examples:
    """Turn what `pack_rows` made back into rows.

    Raises:
        StoreError: an array is missing.
    """
    try:
        ids, labels = np.array(arrays["ids"]), None
        if _UNLABELLED not in arrays:
            labels = np.array(_unpack_strings("labels", arrays), dtype=object)
        if "images" in arrays:
            return Examples("image", np.array(arrays["images"]), labels, ids)
        modality: Modality = "language" if f"{_STRINGS['language']}.ends" in arrays else "text"
        return Examples(modality, tuple(_unpack_strings(_STRINGS[modality], arrays)), labels, ids)
    except KeyError as error:
        raise StoreError(f"{KEPT_FILE} has no array {error}; roll the learner back and learn the task anew.") from None


def _pack_strings(name: str, strings: list[str]) -> Arrays:
    pieces = [text.encode("utf-8") for text in strings]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return {f"{name}.bytes": np.frombuffer(b"".join(pieces), dtype=np.uint8).copy(), f"{name}.ends": ends}


def _unpack_strings(name: str, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    raw, ends = arrays[f"{name}.bytes"].tobytes(), arrays[f"{name}.ends"].tolist()
    return [raw[start:end].decode("utf-8") for start, end in pairwise([0, *ends])]
