"""What an adapted layer multiplies by, built from its factors and kept until they change."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everlora.errors import UnsupportedError
from everlora.lowrank.grouped import add_product
from everlora.lowrank.magnitudes import Magnitudes
from everlora.lowrank.precision import full_precision, normal_mode
from everlora.lowrank.sharing import InputGroup

__all__ = ["Block", "ConcatenatedFactors", "PastFactors", "WorkingWeight"]


class Block(NamedTuple):
    """A sum of low-rank terms `up diag(scale) down`.

    `down`: `(rank, in)`, or `(groups * rank, in)` for a convolution in groups; `up`: `(out, rank)`; `scale`:
    `(rank,)`.
    """

    down: Tensor
    up: Tensor
    scale: Tensor


class PastFactors(NamedTuple):
    """The past without its scales.

    `down`: `(total_rank, in)`; `up`: `(out, total_rank)`; `columns`: `(total_rank,)` int64, the block of each column.
    """

    down: Tensor
    up: Tensor
    columns: Tensor


class _Stamp:
    """Recognises whether these are the same tensors, not written since the stamp was made, without reading them.

    A write through `tensor.data` leaves no trace; whoever does that calls `LowRankLayer.invalidate`.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._states = [(weakref.ref(t), *self._state(t)) for t in tensors]

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version

    def fits(self, *tensors: Tensor) -> bool:
        """Return True when these are the same tensors, not written since."""
        if len(tensors) != len(self._states):
            return False
        pairs = zip(self._states, tensors, strict=True)
        return all(ref() is t and (pointer, version) == self._state(t) for (ref, pointer, version), t in pairs)


class WorkingWeight:
    """`W0 + past + current` for one layer, in two buffers that exist from the start and keep their size.

    The first buffer holds the base and the past in float32 (float64 for a float64 base), the second adds the current
    block and rounds once to the dtype of the base. A step that changes only the current block costs one thin
    product; the past is folded again only when it changes. With magnitudes every step changes the past, and both are
    folded at once. `generation` counts the rebuilds.

    Args:
        groups: of the factors, see `everlora.lowrank.grouped`. The weight has the shape of the base: of a convolution,
            the products are those of its kernels written as rows.
    """

    def __init__(self, groups: int = 1) -> None:
        self.generation = 0
        self.groups = groups
        self._past: Tensor | None = None
        self._weight: Tensor | None = None
        self._cast: Tensor | None = None
        self._cast_generation = -1
        self.invalidate()

    def invalidate(self) -> None:
        """Forget what the buffers were built from, so that the next refresh builds them anew."""
        self._past_stamp: _Stamp | None = None
        self._stamp: _Stamp | None = None

    def refresh(self, base: Tensor, past: Block, down: Tensor, up: Tensor, *, scale: float = 1.0) -> Tensor:
        """Bring the weight up to date and return it, shape and dtype of `base`; not to be written.

        After a change of `scale`, what the current block counts with, call `invalidate`.
        """
        past_kept = self._past_stamp is not None and self._past_stamp.fits(base, *past)
        if past_kept and self._stamp is not None and self._stamp.fits(down, up) and self._weight is not None:
            return self._weight
        with normal_mode(), full_precision(base.device):
            folded, weight = self._buffers(base, torch.promote_types(base.dtype, up.dtype))
            if not past_kept or self._past_stamp is None:
                folded.copy_(base)
                if past.scale.numel():
                    self._add(folded, past.up * past.scale, past.down)
            if up.shape[1] == 0:
                weight.copy_(folded)
            elif weight.dtype == folded.dtype:
                self._add(folded, up, down, scale=scale, out=weight)
            else:
                weight.copy_(self._add(folded, up, down, scale=scale, out=torch.empty_like(folded)))
        self._past_stamp, self._stamp = _Stamp(base, *past), _Stamp(down, up)
        self.generation += 1
        return weight

    def refresh_scaled(self, base: Tensor, past: PastFactors, down: Tensor, up: Tensor, by: Magnitudes) -> Tensor:
        """Do what `refresh` does, the blocks counting with the coefficients of `by`.

        Cost: `total_rank in out` where something changed, besides `total_rank out` floats that are freed at once.
        """
        sources = (base, past.down, past.up, down, up, *by.sources)
        if self._weight is not None and self._stamp is not None and self._stamp.fits(*sources):
            return self._weight
        with normal_mode(), full_precision(base.device):
            coefficients = by.coefficients(down, up)
            folded, weight = self._buffers(base, torch.promote_types(base.dtype, up.dtype))
            target = weight if weight.dtype == folded.dtype else folded
            wide = base.to(target.dtype)
            if past.columns.numel():
                self._add(wide, past.up * coefficients[past.columns], past.down, out=target)
            else:
                target.copy_(wide)
            if up.shape[1]:
                self._add(target, up * coefficients[-1], down)
            if target is not weight:
                weight.copy_(target)
        self._past_stamp, self._stamp = None, _Stamp(*sources)
        self.generation += 1
        return weight

    def _add(self, total: Tensor, up: Tensor, down: Tensor, *, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """Add a product of factors to a weight, in place without `out`; the weight that took it is returned."""
        up, down = up.to(total.dtype), down.to(total.dtype)
        flat = None if out is None else out.flatten(1)
        add_product(total.flatten(1), up, down, groups=self.groups, scale=scale, out=flat)
        return total if out is None else out

    def require(self, generation: int, *, changed: str) -> None:
        """Refuse a backward pass over a weight that is no longer the one of its forward pass.

        Args:
            generation: what it was in the forward pass.
            changed: what may have changed since, for the message.

        Raises:
            UnsupportedError: the weight was rebuilt.
        """
        if generation != self.generation:
            raise UnsupportedError(
                "the working weight of an adapted layer was rebuilt between this forward pass and its backward pass; "
                f"run backward before the next optimiser step or change of the {changed}"
            )

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of the last refresh in another dtype (autocast); the copy is reused until a rebuild."""
        if self._weight is None:
            raise RuntimeError("refresh must run before weight_as")
        if dtype == self._weight.dtype:
            return self._weight
        if self._cast is None or self._cast.dtype != dtype or self._cast.device != self._weight.device:
            with normal_mode():
                self._cast = torch.empty_like(self._weight, dtype=dtype)
            self._cast_generation = -1
        if self._cast_generation != self.generation:
            with normal_mode():
                self._cast.copy_(self._weight)
            self._cast_generation = self.generation
        return self._cast

    def _buffers(self, base: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._past is None or self._past.dtype != dtype or self._past.device != base.device:
            self._past = torch.empty(base.shape, dtype=dtype, device=base.device)
            self._past_stamp = None
        if self._weight is None or self._weight.dtype != base.dtype or self._weight.device != base.device:
            self._weight = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        return self._past, self._weight

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the buffers were built from: object identities mean nothing in a copy."""
        return {**self.__dict__, "_past_stamp": None, "_stamp": None}


class ConcatenatedFactors:
    """Past and current factors side by side, for the factored form; new tensors whenever a factor changes."""

    def __init__(self) -> None:
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        self.invalidate()

    def invalidate(self) -> None:
        """Forget what the concatenations were built from."""
        self._down_stamp: _Stamp | None = None
        self._up_stamp: _Stamp | None = None

    def refresh(
        self, past: Block, down: Tensor, up: Tensor, group: InputGroup | None, *, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return `down_all (total_rank, in)` and `up_all (out, total_rank)`, past and current columns scaled.

        After a change of `scale`, what the current block counts with, call `invalidate`. With a group, members whose
        rows have the same values are given one tensor, so that they share its product.
        """
        down_parts, up_parts = (past.down, down), (past.up, past.scale, up)
        with normal_mode():
            if self._down is None or self._down_stamp is None or not self._down_stamp.fits(*down_parts):
                joined = torch.cat([past.down, down.detach()])
                # Rows in training change at every step and apart from each other: nothing to look for.
                self._down = joined if group is None or down.requires_grad else group.canonical(joined)
                self._down_stamp = _Stamp(*down_parts)
            if self._up is None or self._up_stamp is None or not self._up_stamp.fits(*up_parts):
                current = up.detach() if scale == 1.0 else up.detach() * scale
                self._up = torch.cat([past.up * past.scale, current], dim=1)
                self._up_stamp = _Stamp(*up_parts)
        return self._down, self._up

    def __getstate__(self) -> dict[str, Any]:
        """Copy nothing: the concatenations are rebuilt at the first use."""
        return {"_down": None, "_up": None, "_down_stamp": None, "_up_stamp": None}
