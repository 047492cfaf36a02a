"""Rows of different lengths laid into rectangular arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["IGNORED", "LinesOfRows", "padded", "width_of"]

IGNORED = -100
_CUDA_MULTIPLE = 8


def width_of(longest: int, max_length: int, device: torch.device) -> int:
    """Return the width of a batch: its longest row, on CUDA rounded up to a multiple of 8 within `max_length`."""
    if device.type != "cuda":
        return longest
    rounded = -(-longest // _CUDA_MULTIPLE) * _CUDA_MULTIPLE
    return min(rounded, max(longest, max_length))


def padded(parts: Sequence[NDArray[Any]], width: int, fill: int, *, left: bool = False) -> NDArray[np.int64]:
    """Lay each part into a row of its own, `(n, width)` int64, filled up on the right or on the left."""
    result = np.full((len(parts), width), fill, dtype=np.int64)
    for row, part in enumerate(parts):
        start = width - len(part) if left else 0
        result[row, start : start + len(part)] = part
    return result


@dataclass(frozen=True)
class LinesOfRows:
    """Which rows lie in which line of a batch, end to end.

    Attributes:
        lengths: tokens of each row.
        lines: row numbers of each line, in order.
    """

    lengths: Sequence[int]
    lines: Sequence[Sequence[int]]

    @classmethod
    def fill(cls, lengths: Sequence[int], capacity: int | None) -> LinesOfRows:
        """Give each row the first line that has room for it.

        Args:
            lengths: tokens of each row.
            capacity: tokens of a line; None for a line per row. A longer row gets a line of its own.
        """
        lines: list[list[int]] = []
        free: list[int] = []
        for row, length in enumerate(lengths):
            place = next((line for line, room in enumerate(free) if room >= length), None)
            if place is None:
                place = len(lines)
                lines.append([])
                free.append(0 if capacity is None else capacity)
            lines[place].append(row)
            free[place] -= length
        return cls(lengths, lines)

    @property
    def longest(self) -> int:
        """Tokens of the fullest line."""
        return max((sum(self.lengths[row] for row in line) for line in self.lines), default=0)

    def lay(self, parts: Sequence[NDArray[Any]], width: int, fill: int) -> NDArray[np.int64]:
        """Lay one array per row into the lines, `(lines, width)` int64, filled up on the right."""
        return padded([np.concatenate([parts[row] for row in line]) for line in self.lines], width, fill)

    def segments(self, width: int) -> NDArray[np.int64]:
        """Return for each token the number of its row within the line, from 1; 0 for padding."""
        numbers = {row: number for line in self.lines for number, row in enumerate(line, start=1)}
        return self.lay([np.full(length, numbers[row]) for row, length in enumerate(self.lengths)], width, 0)
