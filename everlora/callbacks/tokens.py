"""Tokenised examples as a trainer's collator makes them: kept without padding, collated and joined again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from everlora.errors import DataError, UnsupportedError

__all__ = ["IGNORED", "Batch", "TokenRows", "checked_batch", "collate_rows", "collect_rows", "joined", "num_supervised"]

IGNORED = -100
_KEYS = {"input_ids", "attention_mask", "labels"}

Array = np.ndarray[Any, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens and which of them are labels, any part of a row, laid end to end.

    Attributes:
        token_ids: `(sum of lengths,)`, uint16 where the vocabulary fits, int32 else.
        supervised: `(sum of lengths,)` bool, tokens that are labels.
        offsets: `(n + 1,)` int64, where each row begins and ends.
    """

    token_ids: Array
    supervised: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, rows: Sequence[tuple[Array, Array]], *, vocab_size: int) -> Self:
        """Lay rows end to end.

        Args:
            rows: token ids and whether each is a label.
            vocab_size: number of different tokens.
        """
        dtype = np.uint16 if vocab_size < 2**16 else np.int32
        ids = [np.asarray(row, dtype=dtype) for row, _ in rows]
        flags = [np.asarray(flag, dtype=np.bool_) for _, flag in rows]
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in ids], out=offsets[1:])
        empty = np.zeros(0)
        return cls(np.concatenate([empty.astype(dtype), *ids]), np.concatenate([empty.astype(bool), *flags]), offsets)

    def row(self, index: int) -> tuple[Array, Array]:
        """Return a row's token ids, and which of them are labels."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.token_ids[part], self.supervised[part]

    def select(self, rows: Tensor, /) -> Self:
        """Return the given rows, in the given order."""
        return self._of([self.row(int(index)) for index in rows])

    def join(self, other: Self, /) -> Self:
        """Return these rows and then the other's."""
        return self._of([rows.row(i) for rows in (self, other) for i in range(len(rows))])

    def arrays(self) -> dict[str, Array]:
        """Return the rows as named arrays."""
        return {"token_ids": self.token_ids, "supervised": self.supervised, "offsets": self.offsets}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], /) -> Self:
        """Make rows of what `arrays` returned.

        Raises:
            DataError: the arrays do not fit each other.
        """
        rows = cls(arrays["token_ids"], arrays["supervised"], arrays["offsets"])
        lengths = (len(rows.token_ids), len(rows.supervised))
        if len(rows.offsets) < 1 or (np.diff(rows.offsets) < 0).any() or lengths != (rows.offsets[-1],) * 2:
            raise DataError("expected kept rows whose parts fit each other, found others; restore them from a backup")
        return rows

    def _of(self, rows: Sequence[tuple[Array, Array]]) -> Self:
        return self.of(rows, vocab_size=2**16 if self.token_ids.dtype == np.int32 else 1)


def collect_rows(
    dataset: Any, indices: Sequence[int], collate: Callable[[list[Any]], Mapping[str, Any]], *, vocab_size: int
) -> TokenRows:
    """Collate each row by itself and keep what the model would see of it, without padding.

    Rows without a label that is predicted are left out.

    Raises:
        DataError: a row has no labels, or labels that differ from its tokens.
        UnsupportedError: see `checked_batch`.
    """
    kept = []
    for index in indices:
        batch = checked_batch(collate([dataset[index]]))
        ids, labels, mask = (batch[key][0].cpu() for key in ("input_ids", "labels", "attention_mask"))
        present = mask.bool()
        ids, labels = ids[present], labels[present]
        supervised = labels != IGNORED
        if not torch.equal(ids[supervised], labels[supervised]):
            raise DataError(f"row {index}: expected labels that are tokens of the row or {IGNORED}, found others")
        if supervised[1:].any():
            kept.append((ids.numpy(), supervised.numpy()))
    return TokenRows.of(kept, vocab_size=vocab_size)


def checked_batch(batch: Mapping[str, Any]) -> Batch:
    """Return a batch as `input_ids`, `attention_mask` and `labels`, each `(n, T)`.

    Raises:
        DataError: there are no labels.
        UnsupportedError: it has more, as packed rows and images do: memory rows cannot be joined to those.
    """
    found = {key for key, value in batch.items() if isinstance(value, Tensor)}
    if not {"input_ids", "labels"} <= found:
        raise DataError(f"expected batches with input_ids and labels, found {sorted(found)}; use a collator for both")
    if found - _KEYS:
        raise UnsupportedError(
            f"expected batches of {sorted(_KEYS)} alone, found {sorted(found - _KEYS)} too; switch packing and "
            "padding_free off, and take other columns out of the data"
        )
    mask = batch["attention_mask"] if "attention_mask" in found else torch.ones_like(batch["input_ids"])
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": batch["labels"]}


def collate_rows(rows: TokenRows, *, pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest: `input_ids`, `attention_mask`, `labels`, each `(n, T)` int64."""
    longest = int(np.diff(rows.offsets).max(initial=0))
    shape = (len(rows), longest)
    ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for number in range(len(rows)):
        tokens, supervised = rows.row(number)
        row = torch.from_numpy(tokens.astype(np.int64))
        ids[number, : len(row)] = row
        labels[number, : len(row)] = torch.where(torch.from_numpy(supervised), row, IGNORED)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def joined(current: Batch, memory: Batch, *, pad_token_id: int) -> Batch:
    """Lay memory rows under the current ones; the shorter of the two gains padding on the right.

    Args:
        current: `(b, T)`, padded on either side.
        memory: `(m, T')`.
        pad_token_id: any token; it is masked.
    """
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    length = max(current["input_ids"].shape[1], memory["input_ids"].shape[1])
    result = {}
    for key, value in fill.items():
        parts = (current[key], memory[key].to(current[key]))
        padded = [functional.pad(part, (0, length - part.shape[1]), value=value) for part in parts]
        result[key] = torch.cat(padded)
    return result


def num_supervised(labels: Tensor) -> int:
    """Count labels that are predicted: the first token of a row is not."""
    return int((labels[..., 1:] != IGNORED).sum())
