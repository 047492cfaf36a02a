"""Trainable multipliers of the blocks of an adapted layer, held by the caller and shared between layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from everlora.errors import NumericError, OptionError, ShapeError, nearest
from everlora.lowrank.factors import NORMS
from everlora.lowrank.precision import normal_mode, without_autocast

__all__ = ["CURRENT_FORMS", "Magnitudes"]

CURRENT_FORMS = ("raw", "normalised")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Magnitudes:
    """Coefficients `values[k] * gain[k] + offset[k]` of the past blocks, and the one of the current block.

    The current block counts with `values[-1]` ("raw") or `values[-1] / sqrt(n^2 + soft_eps^2)` ("normalised"), where
    n is the norm of its product, taken in float64 where the device has it. Raw computes no norm at all.

    Attributes:
        values: `(blocks + 1,)`, or `(rows, blocks + 1)` with `row`; the caller's own tensor, never copied.
        gain: `(blocks,)`, 1 over the norm of a block included.
        offset: `(blocks,)`, likewise.
        row: which row of `values` counts.
        current: `"raw"` or `"normalised"`.
        norm: `"fro"` or `"factors"`, as in `direction_norm`.
        soft_eps: keeps the normalised form defined where the product is zero.

    Raises:
        OptionError: an option is unknown or out of range.
        ShapeError: a tensor has the wrong shape or dtype.

    Source: sections 1 to 3 of the method page of SD-LoRA.
    """

    values: Tensor
    gain: Tensor
    offset: Tensor
    row: int | None = None
    current: str = "raw"
    norm: str = "fro"
    soft_eps: float = 1.0
    _columns: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.current not in CURRENT_FORMS:
            raise OptionError(f"current={self.current!r} is not known; {nearest(str(self.current), CURRENT_FORMS)}")
        if self.norm not in NORMS:
            raise OptionError(f"norm={self.norm!r} is not known; {nearest(str(self.norm), NORMS)}")
        if not (math.isfinite(self.soft_eps) and self.soft_eps >= 0.0):
            raise OptionError(f"soft_eps must be finite and at least 0, got {self.soft_eps!r}; the usual value is 1.0")
        self._check_shapes()
        with normal_mode():
            # The current block is one more entry, so that all coefficients come from one operation.
            self.gain = torch.cat([self.gain, self.gain.new_ones(1)])
            self.offset = torch.cat([self.offset, self.offset.new_zeros(1)])

    def _check_shapes(self) -> None:
        if self.gain.ndim != 1 or self.gain.shape != self.offset.shape:
            raise ShapeError(
                "gain and offset must be vectors with one entry for each past block, got shapes "
                f"{tuple(self.gain.shape)} and {tuple(self.offset.shape)}"
            )
        width, shape = self.gain.shape[0] + 1, tuple(self.values.shape)
        if not self.values.is_floating_point() or len(shape) != (1 if self.row is None else 2) or shape[-1] != width:
            wanted = f"({width},)" if self.row is None else f"(rows, {width})"
            raise ShapeError(
                f"expected magnitudes of a float dtype and shape {wanted}, one for each past block and the last for "
                f"the current one, got {self.values.dtype} of shape {shape}"
            )
        if self.row is not None and not 0 <= self.row < shape[0]:
            raise OptionError(f"row must be an index from 0 to {shape[0] - 1} into the magnitudes, got {self.row!r}")

    @property
    def sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the coefficients are computed from, apart from the factors."""
        return self.values, self.gain, self.offset

    def coefficients(self, down: Tensor, up: Tensor) -> Tensor:
        """Return `(blocks + 1,)` in the dtype of the factors, differentiable by `values` and, if normalised, by them.

        Raises:
            NumericError: the current block is zero and `soft_eps` is 0.
        """
        with without_autocast(up.device):
            scaled = self._scaled(self.gain.dtype)
            if self.current == "raw":
                return scaled
            size = self._current_norm(down, up).to(scaled.dtype)
            return torch.cat([scaled[:-1], (scaled[-1] / size).view(1)])

    def exact(self, down: Tensor, up: Tensor) -> Tensor:
        """Return what `coefficients` does in float64, detached.

        Raises:
            NumericError: the current block is zero and `soft_eps` is 0.
        """
        with normal_mode():
            scaled = self._scaled(torch.float64)
            if self.current == "normalised":
                scaled[-1] /= self._current_norm(down, up).to(scaled)
            return scaled

    def exact_past(self) -> Tensor:
        """Return the `(blocks,)` float64 coefficients of the past, which never need a norm."""
        with normal_mode():
            return self._scaled(torch.float64)[:-1]

    def columns(self, past_ranks: Tensor) -> Tensor:
        """Return `(total_rank,)` int64, the block of each column of the past; kept until `forget`.

        Raises:
            OptionError: the past now has another number of blocks than the magnitudes were made for.
        """
        if self._columns is None:
            blocks = past_ranks.shape[0]
            if blocks != self.gain.shape[0] - 1:
                raise OptionError(
                    f"the magnitudes are for {self.gain.shape[0] - 1} past blocks, the layer now has {blocks}; "
                    "call set_magnitudes anew"
                )
            with normal_mode():
                self._columns = torch.repeat_interleave(
                    torch.arange(blocks, device=past_ranks.device), past_ranks.to(torch.int64)
                )
        return self._columns

    def forget(self) -> None:
        """Look at the ranks of the past anew at the next use."""
        self._columns = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert gain and offset as the factors are: never to half precision. `values` stays the caller's."""
        for name in ("gain", "offset"):
            before: Tensor = getattr(self, name)
            moved = function(before)
            setattr(self, name, before.to(moved.device) if moved.dtype in _HALF else moved)

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        values = self.values if self.row is None else self.values[self.row]
        place = self.gain.device
        if dtype == torch.float64 and place.type == "mps":  # that device has no float64
            place = torch.device("cpu")
        gain, offset = self.gain.to(place).to(dtype), self.offset.to(place).to(dtype)
        return torch.addcmul(offset, values.to(place).to(dtype), gain)

    def _current_norm(self, down: Tensor, up: Tensor) -> Tensor:
        """Return `sqrt(n^2 + soft_eps^2)`, a scalar."""
        dtype = up.dtype if up.device.type == "mps" else torch.float64
        wide_down, wide_up = down.to(dtype), up.to(dtype)
        if self.norm == "fro":
            square = ((wide_up.T @ wide_up) * (wide_down @ wide_down.T)).sum().clamp_min(0.0)
        else:
            square = wide_up.square().sum() * wide_down.square().sum()
        if self.soft_eps == 0.0 and not bool(square > 0.0):
            raise NumericError(
                "the current block is zero and cannot be normalised with soft_eps=0; take soft_eps > 0, or give the "
                "block a start other than zero"
            )
        return (square + self.soft_eps**2).sqrt()
