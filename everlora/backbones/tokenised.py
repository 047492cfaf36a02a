"""Texts as token ids, each with the number of UTF-8 bytes it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenisedText", "tokenise"]

_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenisedText:
    """One text.

    Attributes:
        ids: `(k,)` int64 token ids, no special token added.
        num_bytes: `(k,)` int64 UTF-8 bytes of each token; they add up to the bytes of the text.
    """

    ids: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[TokenisedText]:
    """Tokenise texts without adding special tokens.

    The bytes of a token come from the places in the text that a fast tokenizer reports. A tokenizer without them has
    the bytes of each text shared out in proportion to what its tokens decode to: exact for the text, near for a token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: any number of texts.

    Returns:
        One result per text.
    """
    result: list[TokenisedText] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        result += _tokenise_some(tokenizer, list(texts[start : start + _TEXTS_AT_ONCE]))
    return result


def _tokenise_some(tokenizer: Any, texts: list[str]) -> list[TokenisedText]:
    has_places = bool(getattr(tokenizer, "is_fast", False))
    rows = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=has_places,
        verbose=False,
    )
    result = []
    for index, text in enumerate(texts):
        ids = np.asarray(rows["input_ids"][index], dtype=np.int64)
        if not len(ids):
            counts = np.zeros(0, dtype=np.int64)
        elif has_places:
            counts = _bytes_by_place(text, np.asarray(rows["offset_mapping"][index], dtype=np.int64))
        else:
            counts = _bytes_by_share(tokenizer, text, ids)
        result.append(TokenisedText(ids, counts))
    return result


def _bytes_by_place(text: str, spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count bytes per token.

    Args:
        text: the text.
        spans: `(k, 2)` first character of each token and the one after its last; k > 0.

    Returns:
        `(k,)` int64. What lies between two tokens counts for the later one. Tokens that stand for the same characters
        (one character in several byte tokens) share their bytes.
    """
    places = _byte_places(text)
    ends = places[np.maximum.accumulate(spans[:, 1])]
    ends[-1] = places[-1]
    counts = np.diff(ends, prepend=0)
    is_first = np.ones(len(spans), dtype=bool)
    is_first[1:] = (spans[1:] != spans[:-1]).any(axis=1)
    firsts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    totals = np.add.reduceat(counts, firsts)
    sizes = np.diff(firsts, append=len(spans))
    rank = np.arange(len(spans)) - firsts[group]
    shared: NDArray[np.int64] = (totals // sizes)[group] + (rank < (totals % sizes)[group])
    return shared


def _byte_places(text: str) -> NDArray[np.int64]:
    """Return the byte at which each character starts, and at last the number of bytes, `(len(text) + 1,)` int64."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _bytes_by_share(tokenizer: Any, text: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    sizes = {token: max(1, len(tokenizer.decode([token]).encode("utf-8"))) for token in np.unique(ids).tolist()}
    shares = np.cumsum([sizes[token] for token in ids.tolist()], dtype=np.int64)
    total = len(text.encode("utf-8"))
    counts: NDArray[np.int64] = np.diff(shares * total // shares[-1], prepend=0)
    return counts
