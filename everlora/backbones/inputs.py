"""Encoded data sets: what a backbone keeps of a data set after reading it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from everlora.errors import ShapeError

__all__ = ["Encoded", "EncodedImages", "EncodedTexts", "as_rows"]

Rows: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | Tensor"


@dataclass(frozen=True)
class EncodedImages:
    """Images as they were handed in.

    Attributes:
        images: `(n, height, width, 3)` uint8, possibly a memory map.
        ids: `(n,)` int64, stable id of each row; keys the randomness of augmentation.
    """

    images: np.ndarray[Any, Any]
    ids: np.ndarray[Any, Any]

    @property
    def num_truncated(self) -> int:
        """Number of rows that lost content: always 0 for images."""
        return 0

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Rows) -> EncodedImages:
        """Return the given rows, in the given order."""
        index = as_rows(rows)
        return EncodedImages(images=self.images[index], ids=self.ids[index])

    def join(self, other: EncodedImages) -> EncodedImages:
        """Return these rows and then the other's.

        Raises:
            ShapeError: the images differ in size.
        """
        if self.images.shape[1:] != other.images.shape[1:]:
            raise ShapeError(
                f"expected images of shape {self.images.shape[1:]} like those kept before, found shape "
                f"{other.images.shape[1:]}; bring the images of all tasks to one size"
            )
        return EncodedImages(np.concatenate([self.images, other.images]), np.concatenate([self.ids, other.ids]))

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the rows as named arrays, as `from_arrays` takes them."""
        return {"images": self.images, "ids": self.ids}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> EncodedImages:
        """Make rows of what `arrays` returned."""
        return cls(arrays["images"], arrays["ids"])


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of all texts in one flat array, so that a data set of short texts stays small.

    Attributes:
        token_ids: `(total tokens,)` int32; row `i` is `token_ids[offsets[i]:offsets[i + 1]]`.
        offsets: `(n + 1,)` int64.
        ids: `(n,)` int64, stable id of each row.
        num_truncated: how many texts were longer than the model takes and lost their end.
    """

    token_ids: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    ids: np.ndarray[Any, Any]
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """`(n,)` int64, number of tokens of each row."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray[Any, Any]:
        """Token ids of one row."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def select(self, rows: Rows) -> EncodedTexts:
        """Return the given rows, in the given order; `num_truncated` stays that of the whole set."""
        index = as_rows(rows)
        parts = [self.row(int(i)) for i in index]
        flat = np.concatenate(parts) if parts else self.token_ids[:0]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int64)
        return replace(self, token_ids=flat, offsets=offsets, ids=self.ids[index])

    def join(self, other: EncodedTexts) -> EncodedTexts:
        """Return these rows and then the other's; `num_truncated` adds up."""
        return EncodedTexts(
            token_ids=np.concatenate([self.token_ids, other.token_ids]),
            offsets=np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            ids=np.concatenate([self.ids, other.ids]),
            num_truncated=self.num_truncated + other.num_truncated,
        )

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the rows as named arrays, as `from_arrays` takes them."""
        return {"token_ids": self.token_ids, "offsets": self.offsets, "ids": self.ids}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> EncodedTexts:
        """Make rows of what `arrays` returned; none counts as truncated."""
        return cls(arrays["token_ids"], arrays["offsets"], arrays["ids"])


Encoded: TypeAlias = EncodedImages | EncodedTexts


def as_rows(rows: Rows) -> np.ndarray[Any, Any]:
    """Turn a list, array or tensor of row numbers into an int64 array.

    Raises:
        ShapeError: `rows` is not one-dimensional.
    """
    values = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if values.ndim != 1:
        raise ShapeError(f"expected row numbers of shape (n,), found shape {values.shape}; pass a flat list of rows")
    return values.astype(np.int64, copy=False)
