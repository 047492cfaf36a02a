"""One product for several layers: those that read the same tensor through the same down-projection."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from everlora.lowrank.precision import normal_mode, without_autocast

__all__ = ["InputGroup", "project"]


def project(x: Tensor, down: Tensor) -> Tensor:
    """Return `x down^T`, `(..., rank)`, constant for autograd, in at least the precision of `down`."""
    dtype = torch.promote_types(x.dtype, down.dtype)
    with torch.no_grad(), without_autocast(x.device):
        return x.detach().to(dtype) @ down.detach().to(dtype).T


class InputGroup:
    """Remembers the last `x down^T`, so that the members of the group compute it once.

    A hit needs the same two tensor objects at the same version; anything else is computed anew, so membership is
    a hint that costs nothing when it is wrong.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._key: tuple[int, int] = (-1, -1)
        self._input: weakref.ref[Tensor] | None = None
        self._down: weakref.ref[Tensor] | None = None
        self._product: Tensor | None = None
        self._known: list[weakref.ref[Tensor]] = []

    def project(self, x: Tensor, down: Tensor) -> Tensor:
        """Return `x down^T` as `project` does, from memory where possible."""
        if x.is_inference() or down.is_inference():
            return project(x, down)  # such tensors keep no version, so a change in place could not be seen
        key = (x._version, down._version)
        fresh = self._input is not None and self._down is not None and self._key == key
        if fresh and self._input() is x and self._down() is down and self._product is not None:  # type: ignore[misc]
            return self._product
        product = project(x, down)
        self._key, self._product = key, product
        self._input, self._down = weakref.ref(x), weakref.ref(down)
        return product

    def canonical(self, down: Tensor) -> Tensor:
        """Return the member's tensor with these very values if there is one, else register this one."""
        alive = [(ref, tensor) for ref in self._known if (tensor := ref()) is not None]
        self._known = [ref for ref, _ in alive]
        with normal_mode():
            for _, tensor in alive:
                same = tensor.shape == down.shape and tensor.dtype == down.dtype and tensor.device == down.device
                if same and torch.equal(tensor, down):
                    return tensor
        self._known.append(weakref.ref(down))
        return down

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the membership only: weak references belong to the original's tensors."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clear()
