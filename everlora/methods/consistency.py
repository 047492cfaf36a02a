"""How far the hidden states of one adapter lie from those of another, on which rows, tokens and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from everlora.errors import OptionError
from everlora.methods.base import Recalled

__all__ = ["ConsistencyMode", "ConsistencyRows", "ConsistencyTokens", "StepTokens", "distance", "numbered_layers"]

ConsistencyMode: TypeAlias = Literal["mse", "one_sided"]
ConsistencyRows: TypeAlias = Literal["memory", "current", "all"]
ConsistencyTokens: TypeAlias = Literal["attended", "supervised", "all"]


def numbered_layers(layers: Sequence[int] | Literal["all"], num_blocks: int) -> tuple[int, ...]:
    """Resolve numbers of hidden states, -1 being the last, to 0 to `num_blocks`, each once, in ascending order.

    Raises:
        OptionError: a number is out of range, or there is none.
    """
    if layers == "all":
        return tuple(range(num_blocks + 1))
    outside = [layer for layer in layers if not -num_blocks - 1 <= layer <= num_blocks]
    if outside or not layers:
        raise OptionError(
            f"expected hidden_state_layers from {-num_blocks - 1} to {num_blocks}, for a model of {num_blocks} blocks, "
            f"found {outside[0] if outside else 'none'}; -1 is the last."
        )
    return tuple(sorted({int(layer) % (num_blocks + 1) for layer in layers}))


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, mode: ConsistencyMode) -> Tensor:
    """Mean squared distance of hidden states over the masked tokens, their channels and the layers.

    `1 / |S| sum_l sum_t ||student - teacher||^2 / (N d)`; `one_sided` counts a channel only where the teacher's value
    is the larger.

    Args:
        student: `(n, T, d)` for each layer.
        teacher: the same, constant.
        mask: `(n, T)`, true for the N tokens that count; 0 comes out where there is none.
        mode: see above.

    Source: section 2 of the reference on I-LoRA.
    """
    weight = mask.float() / mask.sum().clamp(min=1)
    total = student[0].new_zeros(())
    for moved, target in zip(student, teacher, strict=True):
        behind = target - moved
        squares = behind.relu().square() if mode == "one_sided" else behind.square()
        total = total + (squares.mean(dim=-1) * weight).sum()
    return total / len(student)


class StepTokens:
    """Tokens of a whole optimiser step, to know what part of them a piece of it has.

    Args:
        current: rows of the task in the step, encoded.
        recalled: rows of the memory in the step.
    """

    def __init__(self, current: Any, recalled: Recalled | None) -> None:
        parts = {"current": current, "memory": None if recalled is None else recalled.encoded}
        self._rows = {name: 0 if rows is None else len(rows) for name, rows in parts.items()}
        self._attended = {name: _total(rows, supervised=False) for name, rows in parts.items()}
        self._supervised = {name: _total(rows, supervised=True) for name, rows in parts.items()}

    def count(self, rows: str, *, supervised: bool) -> int:
        """Tokens of `current`, `memory` or `all` rows, those that carry a label or all."""
        counts = self._supervised if supervised else self._attended
        return sum(counts.values()) if rows == "all" else counts[rows]

    def part_of_rows(self, rows: str, count: int) -> float:
        """The share of so many of the `current`, `memory` or `all` rows of the step, which are padded alike."""
        return count / max(sum(self._rows.values()) if rows == "all" else self._rows[rows], 1)

    def part(self, mask: Tensor, rows: str, *, supervised: bool) -> float:
        """The share that the tokens of a mask have in those of the step."""
        return float(mask.sum()) / max(self.count(rows, supervised=supervised), 1)


def _total(rows: Any, *, supervised: bool) -> int:
    """Tokens of encoded rows."""
    if rows is None:
        return 0
    counts = rows.lengths - rows.prompt_lengths if supervised else rows.lengths
    return int(torch.as_tensor(counts).sum())
