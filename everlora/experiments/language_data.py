"""Rows for a language model: as many as a setting wants, and some of them held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from everlora.errors import DataError
from everlora.streams import Examples, hold_out_rows, parse_row
from everlora.streams.dialogue_rows import write_row

__all__ = ["first_bytes", "hold_out_texts"]

_FEW = 20


def first_bytes(examples: Examples, limit: int) -> Examples:
    """Keep the first rows, up to so many bytes of text.

    Args:
        examples: rows for a language model.
        limit: UTF-8 bytes of all that a row says, its prompt included. The last text may be cut short, at a character;
            a row of prompt and answer, or of messages, is kept whole or not at all.

    Raises:
        DataError: not even the first row fits.
    """
    kept: list[str] = []
    left = limit
    for text in examples.inputs:
        row = parse_row(str(text))
        size = _num_bytes(row)
        if size > left:
            piece = row["text"].encode()[:left].decode(errors="ignore") if "text" in row else ""
            if piece:
                kept.append(write_row(row | {"text": piece}))
            break
        kept.append(str(text))
        left -= size
    if not kept:
        raise DataError(f"expected a first row of at most {limit} bytes, found a longer one; allow more bytes")
    return dataclasses.replace(examples.select(range(len(kept))), inputs=tuple(kept))


def hold_out_texts(examples: Examples, *, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split rows without classes into rows to train on and rows to validate on.

    Args:
        examples: rows for a language model.
        fraction: share held out. Of many rows, rows are drawn; of a few long texts the end of each is taken, from the
            beginning of a line on.
        seed: of the draw.

    Returns:
        `(train, validation)`.

    Raises:
        DataError: there are too few rows to hold any out.
    """
    if len(examples) >= _FEW:
        return hold_out_rows(examples, maximum=max(1, round(fraction * len(examples))), seed=seed)
    rows = [parse_row(str(text)) for text in examples.inputs]
    if any("text" not in row for row in rows):
        raise DataError(
            f"expected {_FEW} rows or more to hold some of them out for validation, found {len(rows)}; give more rows "
            "or a validation split"
        )
    pairs = [_in_two(row, fraction) for row in rows]
    first, second = ([write_row(pair[side]) for pair in pairs] for side in (0, 1))
    return dataclasses.replace(examples, inputs=tuple(first)), dataclasses.replace(examples, inputs=tuple(second))


def _in_two(row: dict[str, Any], fraction: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text without its end, and its end."""
    text: str = row["text"]
    place = round((1 - fraction) * len(text))
    line = text.rfind("\n", 0, place) + 1
    place = line if line > place // 2 else place
    if not 0 < place < len(text):
        raise DataError(f"expected texts long enough to hold out a share of {fraction}, found {len(text)} characters")
    return row | {"text": text[:place]}, row | {"text": text[place:]}


def _num_bytes(row: dict[str, Any]) -> int:
    texts: Sequence[str] = [message["content"] for message in row.get("messages", [])]
    texts = [*texts, *(row.get(name, "") for name in ("text", "instruction", "input", "output"))]
    return sum(len(text.encode()) for text in texts)
