"""The low-rank blocks of one layer: frozen past ones and the current one, as buffers and parameters of a module."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, ShapeError
from everlora.lowrank.grouped import join_rows, per_group
from everlora.lowrank.precision import normal_mode
from everlora.lowrank.ranks import LayerSize
from everlora.lowrank.working import Block

__all__ = ["BlockStore"]

_FACTORS = ("down", "up", "past_down", "past_up", "past_scale")
_HALF = (torch.float16, torch.bfloat16)

Store = TypeVar("Store", bound="BlockStore")


class BlockStore(nn.Module, ABC):
    """Past blocks `past_down (groups * total, in)`, `past_up (out, total)`, `past_scale (total,)`, and `up`, `down`.

    All factors stay in float32 (float64 in a float64 module) whatever the dtype of the base.

    Args:
        size: of the layer.
        like: gives the dtype and device of the factors.
        train_down: whether `down` of a block is trained.
    """

    down: nn.Parameter
    up: nn.Parameter
    past_down: Tensor
    past_up: Tensor
    past_scale: Tensor
    past_ranks: Tensor

    def __init__(self, size: LayerSize, like: Tensor, *, train_down: bool) -> None:
        super().__init__()
        self.size, self.train_down = size, train_down
        with normal_mode():
            empty = torch.zeros(0, dtype=like.dtype, device=like.device)
            self.register_buffer("past_down", empty.new_zeros(0, size.inputs))
            self.register_buffer("past_up", empty.new_zeros(size.outputs, 0))
            self.register_buffer("past_scale", empty)
            self.register_buffer("past_ranks", torch.zeros(0, dtype=torch.int64, device=empty.device))

    @property
    def in_features(self) -> int:
        """Columns of `down`: the width of a linear layer, the length of a patch for a convolution."""
        return self.size.inputs

    @property
    def out_features(self) -> int:
        """Rows of `up`: outputs of a linear layer, output channels of a convolution."""
        return self.size.outputs

    @property
    def groups(self) -> int:
        """Groups that the factors come in; 1 but for convolutions in groups."""
        return self.size.groups

    @property
    def rank(self) -> int:
        """Rank of the current block."""
        return self.down.shape[0] // self.size.groups

    @property
    def total_rank(self) -> int:
        """Rank of all past blocks together."""
        return self.past_scale.shape[0]

    @abstractmethod
    def invalidate(self) -> None:
        """Forget what was computed from the factors."""

    @abstractmethod
    def _refuse_magnitudes(self, action: str) -> None:
        """Refuse to change the blocks while something counts on them."""

    @abstractmethod
    def _scales(self) -> Tensor:
        """What each column of the past counts with now, `(total,)`, constant."""

    @abstractmethod
    def _current_scale(self) -> float:
        """What the current block counts with."""

    def start_block(self, rank: int, down: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Begin a new current block with `up` zero; the one before is dropped unless `fold_block` kept it.

        Args:
            rank: from 0 (no branch) to the smaller side of the layer, or of one of its groups.
            down: `(groups * rank, in)`, copied; an `nn.Parameter` that fits is taken as it is, so that layers can share
                it. By default drawn as LoRA does, uniform with variance `1 / (3 in)`.
            generator: for that draw.

        Raises:
            OptionError: `rank` is out of range, or magnitudes are set.
            ShapeError: `down` has another shape.
        """
        self._refuse_magnitudes("start_block")
        limit = self.size.full_rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= limit:
            raise OptionError(
                f"rank must be an integer from 0 to {limit} for a layer of {self.size.describe()}, got {rank!r}"
            )
        shape = (self.groups * rank, self.in_features)
        if down is not None and tuple(down.shape) != shape:
            raise ShapeError(f"expected down of shape {shape}, got {tuple(down.shape)}")
        trained = self.train_down and rank > 0
        with normal_mode():
            like = self.past_down
            if isinstance(down, nn.Parameter) and down.dtype == like.dtype and down.device == like.device:
                self.down = down
                self.down.requires_grad_(trained)
            else:
                start = self._draw(shape, generator) if down is None else down.detach()
                self.down = nn.Parameter(start.to(like.device, like.dtype, copy=True), requires_grad=trained)
            self.up = nn.Parameter(like.new_zeros(self.out_features, rank), requires_grad=rank > 0)

    def _draw(self, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        # Drawn on the generator's device (the CPU by default), so that a seed means the same rows on every device.
        place = torch.device("cpu") if generator is None else generator.device
        bound = 1.0 / math.sqrt(self.in_features)
        return torch.empty(shape, device=place).uniform_(-bound, bound, generator=generator)

    def fold_block(self, scale: float | None = None) -> None:
        """Append the current block to the past, bit for bit, and leave an empty one of rank 0.

        Args:
            scale: finite factor with which the block counts from now on; None for the one it counts with now.

        Raises:
            OptionError: `scale` is not finite, or magnitudes are set.
        """
        self._refuse_magnitudes("fold_block")
        scale = self._current_scale() if scale is None else scale
        if not math.isfinite(scale):
            raise OptionError(f"the scale of a block must be finite, got {scale!r}")
        with normal_mode():
            rank = self.past_ranks.new_tensor([self.rank])
            self.past_scale = torch.cat([self.past_scale, self.past_scale.new_full((self.rank,), scale)])
            self.past_down = join_rows([self.past_down, self.down.detach()], self.groups)
            self.past_up = torch.cat([self.past_up, self.up.detach()], dim=1)
            self.past_ranks = torch.cat([self.past_ranks, rank])
        self.start_block(0)

    def load_past(
        self, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float | Tensor] | None = None
    ) -> None:
        """Replace the past by the given blocks, bit for bit where the dtype is that of the factors.

        The current block is dropped for an empty one of rank 0, as `fold_block` leaves it.

        Args:
            downs: one `(groups * rank_s, in)` a block.
            ups: one `(out, rank_s)` a block.
            scales: one number or `(rank_s,)` a block; 1 by default.

        Raises:
            ShapeError: the lists differ in length, or a factor has the wrong shape.
            OptionError: magnitudes are set.
        """
        self._refuse_magnitudes("load_past")
        factors = [1.0] * len(downs) if scales is None else list(scales)
        if not len(downs) == len(ups) == len(factors):
            raise ShapeError(f"expected as many downs as ups and scales, got {len(downs)}, {len(ups)}, {len(factors)}")
        ranks = [int(down.shape[0]) // self.groups for down in downs]
        for index, (rank, down, up) in enumerate(zip(ranks, downs, ups, strict=True)):
            fits = tuple(down.shape) == (self.groups * rank, self.in_features)
            if not fits or tuple(up.shape) != (self.out_features, rank):
                raise ShapeError(
                    f"block {index} does not fit a layer of {self.size.describe()}: "
                    f"down {tuple(down.shape)}, up {tuple(up.shape)}"
                )
        with normal_mode():
            like = self.past_scale
            rows = [torch.as_tensor(f).to(like).expand(r) for f, r in zip(factors, ranks, strict=True)]
            none = like.new_zeros(0, self.in_features)
            self.past_down = join_rows([none, *(d.detach().to(like) for d in downs)], self.groups)
            self.past_up = torch.cat([like.new_zeros(self.out_features, 0), *(u.detach().to(like) for u in ups)], dim=1)
            self.past_scale = torch.cat([like.new_zeros(0), *rows])
            self.past_ranks = torch.tensor(ranks, dtype=torch.int64, device=like.device)
        self.start_block(0)

    def blocks(self) -> list[Block]:
        """Return the past block by block, oldest first, as copies; blocks of rank 0 are among them."""
        scales, downs = self._scales(), per_group(self.past_down, self.groups)
        blocks, start = [], 0
        for rank in self.past_ranks.tolist():
            rows = slice(start, start + rank)
            down = downs[:, rows].clone().flatten(0, 1)
            blocks.append(Block(down, self.past_up[:, rows].clone(), scales[rows].clone()))
            start += rank
        return blocks

    def _apply(self: Store, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Store:
        """Move or convert the layer; the factors do not follow the base to a half-precision dtype."""
        masters = {name: getattr(self, name).data for name in _FACTORS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, master in masters.items():
            moved = getattr(self, name)
            if moved.dtype in _HALF:
                moved.data = master.to(moved.device)
        self.invalidate()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the ranks of the saved state before the values are copied in."""
        for name in (*_FACTORS, "past_ranks"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != mine.shape and self._only_rank_differs(name, saved.shape):
                mine.data = mine.data.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        trained = self.rank > 0
        self.up.requires_grad_(trained)
        self.down.requires_grad_(trained and self.train_down)
        self.invalidate()

    def _only_rank_differs(self, name: str, shape: torch.Size) -> bool:
        fixed = {"down": (1, self.in_features), "past_down": (1, self.in_features)}
        fixed |= {"up": (0, self.out_features), "past_up": (0, self.out_features)}
        if name not in fixed:
            return len(shape) == 1
        axis, size = fixed[name]
        return len(shape) == 2 and shape[axis] == size
