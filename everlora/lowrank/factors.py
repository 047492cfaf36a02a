"""Low-rank directions as pairs of factors: checks, norms and the decomposition that never forms `(out, in)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from everlora.errors import NumericError, OptionError, ShapeError, nearest
from everlora.lowrank.precision import normal_mode

__all__ = [
    "NORMS",
    "Direction",
    "Prepared",
    "direction_norm",
    "kappa",
    "known_norm",
    "prepare",
    "thin_frobenius",
    "thin_svd",
]

NORMS = ("fro", "factors")
_ALIGNED = 1e-2  # kappa under which products of the factors cancel; such a direction gets other factors first
_ROUNDING = 1e-13  # kappa under which a product holds nothing but the rounding of its factors


class Direction(NamedTuple):
    """A low-rank direction `up @ down`. `down`: `(rank, in)`; `up`: `(out, rank)`; rank 0 is allowed and is zero."""

    down: Tensor
    up: Tensor


class Prepared(NamedTuple):
    """A checked direction `factors * up @ down` in float64, whose factors have no large parts that cancel.

    `kappa` is `|up @ down|_F`, in (0, 1], and `factors` the product of the norms of the factors given; both are 0
    for a direction that is zero.
    """

    down: Tensor
    up: Tensor
    kappa: float
    factors: float

    @property
    def fro(self) -> float:
        """The Frobenius norm of the direction."""
        return self.kappa * self.factors

    def is_empty(self, floor: float) -> bool:
        """Return True when the product is zero, at most `floor`, or only the rounding of its factors."""
        return self.kappa <= _ROUNDING or self.fro <= floor


def direction_norm(direction: Direction, norm: str = "fro") -> float:
    """Return the norm by which a direction is divided.

    Args:
        direction: factors of any float dtype.
        norm: `"fro"` for `|up @ down|_F = sqrt(sum((up^T up) * (down down^T)))`, `"factors"` for
            `|up|_F * |down|_F`, which is larger by `1 / kappa`.

    Returns:
        The norm in float64, 0 for a zero direction.

    Raises:
        OptionError: `norm` is unknown.
        ShapeError: the factors do not fit each other or are not of a float dtype.
        NumericError: NaN or infinity in the factors, or a norm beyond float64.

    Source: section 2 of the method page of SD-LoRA. Where the factors cancel (kappa below 0.01) the identity alone
    would lose digits; there it is applied to the singular factors of the same product.
    Cost: `O(rank^2 (in + out))`.
    """
    kind = known_norm(norm)
    with normal_mode():
        (ready,) = prepare([direction])
    return ready.fro if kind == "fro" else ready.factors


def kappa(direction: Direction) -> float:
    """Return `|up @ down|_F / (|up|_F |down|_F)`: in (0, 1], 1 for rank 1, and 0 for a zero direction.

    Raises:
        ShapeError: the factors do not fit each other or are not of a float dtype.
        NumericError: NaN or infinity in the factors.

    Source: section 2 of the method page of SD-LoRA; about `1 / sqrt(rank)` for unstructured factors.
    """
    with normal_mode():
        (ready,) = prepare([direction])
    return ready.kappa


def known_norm(norm: str) -> str:
    """Return `norm`.

    Raises:
        OptionError: it is neither `"fro"` nor `"factors"`.
    """
    if norm not in NORMS:
        raise OptionError(f"unknown norm {norm!r} of a direction; {nearest(str(norm), NORMS)}")
    return norm


def prepare(directions: Sequence[Direction]) -> list[Prepared]:
    """Check directions of one layer and bring them to float64 on the device of the first (CPU without float64).

    Raises:
        ShapeError: factors that do not fit each other, or directions of different layers.
        NumericError: NaN or infinity in the factors, or a norm beyond float64.
    """
    if not directions:
        return []
    width, height = directions[0][0].shape[-1:], directions[0][1].shape[:1]
    place = directions[0][1].device
    device = torch.device("cpu") if place.type == "mps" else place
    ready = []
    for index, (down, up) in enumerate(directions):
        _require_pair(index, down, up)
        if (down.shape[1:], up.shape[:1]) != (width, height):
            raise ShapeError(
                f"direction {index} maps {down.shape[1]} inputs to {up.shape[0]} outputs, direction 0 {width[0]} to "
                f"{height[0]}; pass directions of one layer"
            )
        # Moved first and widened then: the device it comes from may have no float64.
        wide_down, wide_up = (factor.detach().to(device).to(torch.float64) for factor in (down, up))
        ready.append(_measured(index, wide_down, wide_up))
    return ready


def thin_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose `up @ down` through the QR decompositions of the factors and the SVD of their small core.

    Args:
        down: `(R, in)` float64.
        up: `(out, R)` float64.

    Returns:
        `(out, m)` orthonormal columns, `(m,)` singular values in descending order, `(m, in)` orthonormal rows, with
        `m = min(R, in, out)`.

    Source: section 7 of the method page of SD-LoRA.
    Cost: `O(R^2 (in + out) + R^3)`.
    """
    left_basis, left_core = torch.linalg.qr(up)
    right_basis, right_core = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left_basis @ left, values, right @ right_basis.T


def thin_frobenius(down: Tensor, up: Tensor) -> float:
    """Return `|up @ down|_F` from the cores of the factors: exact to rounding of the factors even where they cancel.

    Cost: `O(R^2 (in + out) + R^3)`.
    """
    left_core = torch.linalg.qr(up, mode="r")[1]
    right_core = torch.linalg.qr(down.T, mode="r")[1]
    return float((left_core @ right_core.T).norm())


def _require_pair(index: int, down: Tensor, up: Tensor) -> None:
    fits = down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1]
    if not fits or not (down.is_floating_point() and up.is_floating_point()):
        raise ShapeError(
            f"direction {index}: expected real factors down (rank, in) and up (out, rank), got {tuple(down.shape)} of "
            f"{down.dtype} and {tuple(up.shape)} of {up.dtype}"
        )


def _measured(index: int, down: Tensor, up: Tensor) -> Prepared:
    """Normalise the factors, so that no square leaves float64, and replace them where their products cancel."""
    size_down, size_up = float(down.norm()), float(up.norm())
    factors = size_down * size_up
    if not math.isfinite(factors):
        raise NumericError(f"direction {index} holds NaN, infinity or values beyond float64; check the training")
    if factors == 0.0:
        return Prepared(torch.zeros_like(down), torch.zeros_like(up), 0.0, 0.0)
    down, up = down / size_down, up / size_up
    aligned = _hadamard(down, up)
    if aligned < _ALIGNED:
        left, values, right = thin_svd(down, up)
        root = values.sqrt()
        down, up = root[:, None] * right, left * root
        aligned = float(values.norm())
    return Prepared(down, up, min(aligned, 1.0), factors)


def _hadamard(down: Tensor, up: Tensor) -> float:
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
