"""Encoded rows of a causal language model: token ids of all rows in one flat array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everlora.backbones.inputs import Rows, as_rows
from everlora.errors import ShapeError

__all__ = ["EncodedTokens", "token_dtype"]

_SMALL_VOCABULARY = 65_536


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the smallest integer type that everlora keeps token ids of such a vocabulary in."""
    return np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32


@dataclass(frozen=True)
class EncodedTokens:
    """Rows of prompt and answer, or blocks of plain text, as a language model trains on them.

    Attributes:
        token_ids: `(total tokens,)` uint16 for a vocabulary below 65,536, else int32; row `i` is
            `token_ids[offsets[i]:offsets[i + 1]]`.
        offsets: `(n + 1,)` int64.
        prompt_lengths: `(n,)` int32, leading tokens that carry no label: bos and prompt, and always the first token,
            which nothing predicts.
        num_bytes: `(n,)` int64, UTF-8 bytes of the text that the other tokens stand for; bos and eos stand for none.
        ids: `(n,)` int64, stable id of each row.
        num_truncated: how many rows were longer than the model takes and lost part of their prompt or answer.
        num_dropped: how many rows are not here because nothing in them could be supervised.
    """

    token_ids: NDArray[Any]
    offsets: NDArray[Any]
    prompt_lengths: NDArray[Any]
    num_bytes: NDArray[Any]
    ids: NDArray[Any]
    num_truncated: int = 0
    num_dropped: int = 0

    def __post_init__(self) -> None:
        count = len(self.ids)
        for name, expected in (("offsets", count + 1), ("prompt_lengths", count), ("num_bytes", count)):
            found = len(getattr(self, name))
            if found != expected:
                raise ShapeError(
                    f"expected {expected} {name} for {count} encoded rows, found {found}; encode them anew"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[Any]:
        """`(n,)` int64, number of tokens of each row."""
        return np.diff(self.offsets)

    def row(self, index: int) -> NDArray[Any]:
        """Token ids of one row."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def select(self, rows: Rows) -> EncodedTokens:
        """Return the given rows, in the given order; the counts stay those of the whole set."""
        index = as_rows(rows)
        lengths = self.lengths[index]
        offsets = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][index] - offsets[:-1], lengths)
        return replace(
            self,
            token_ids=self.token_ids[places],
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[index],
            num_bytes=self.num_bytes[index],
            ids=self.ids[index],
        )

    def join(self, other: EncodedTokens) -> EncodedTokens:
        """Return these rows and then the other's; the counts add up.

        Raises:
            ShapeError: the token ids are of two types, hence of two vocabularies.
        """
        if self.token_ids.dtype != other.token_ids.dtype:
            raise ShapeError(
                f"expected token ids of type {self.token_ids.dtype} like those kept before, found "
                f"{other.token_ids.dtype}; encode all tasks with one tokenizer and model"
            )
        return EncodedTokens(
            token_ids=np.concatenate([self.token_ids, other.token_ids]),
            offsets=np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            prompt_lengths=np.concatenate([self.prompt_lengths, other.prompt_lengths]),
            num_bytes=np.concatenate([self.num_bytes, other.num_bytes]),
            ids=np.concatenate([self.ids, other.ids]),
            num_truncated=self.num_truncated + other.num_truncated,
            num_dropped=self.num_dropped + other.num_dropped,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the rows as named arrays, as `from_arrays` takes them."""
        return {
            "token_ids": self.token_ids,
            "offsets": self.offsets,
            "prompt_lengths": self.prompt_lengths,
            "num_bytes": self.num_bytes,
            "ids": self.ids,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> EncodedTokens:
        """Make rows of what `arrays` returned; none counts as truncated or dropped."""
        return cls(
            token_ids=arrays["token_ids"],
            offsets=arrays["offsets"],
            prompt_lengths=arrays["prompt_lengths"],
            num_bytes=arrays["num_bytes"],
            ids=arrays["ids"],
        )
