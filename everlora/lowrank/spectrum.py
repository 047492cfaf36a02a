"""Eigen-decompositions of a second moment inside a subspace."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from everlora.errors import NumericError, ShapeError

__all__ = [
    "as_symmetric",
    "complete",
    "energy_tails",
    "orient",
    "require_orthonormal",
    "scaled",
    "spectrum",
    "total_energy",
]

# Relative size under which an eigenvalue of the squared problem is no longer resolved well in float64.
_RESOLVED = 1e-10
_ASYMMETRY = 1e-6  # relative, accepted in a second moment given as a matrix
_ORTHONORMAL = 1e-8  # deviation accepted in directions that are replayed


def as_symmetric(matrix: Tensor, dim: int, device: torch.device) -> Tensor:
    """Check a second moment and return it exactly symmetric, `(dim, dim)` float64 on `device`.

    Raises:
        ShapeError: wrong shape or dtype, or asymmetry above 1e-6 of the largest entry.
        NumericError: NaN or infinity.
    """
    if tuple(matrix.shape) != (dim, dim) or not matrix.is_floating_point():
        raise ShapeError(
            f"expected a real second moment of shape ({dim}, {dim}), got {tuple(matrix.shape)} of {matrix.dtype}"
        )
    # Moved first and widened then: the device it comes from may have no float64.
    matrix = matrix.detach().to(device).to(torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericError("the second moment holds NaN or infinity; check the layer's inputs")
    gap = float((matrix - matrix.T).abs().max())
    if gap > _ASYMMETRY * float(matrix.abs().max()):
        raise ShapeError(f"a second moment must be symmetric, found a difference of {gap:.3g}; pass x x^T averaged")
    return matrix / 2 + matrix.T / 2


def scaled(moment: Tensor) -> tuple[Tensor, float]:
    """Divide by a power of two near the largest entry, so that squares neither overflow nor vanish.

    Returns:
        The moment with the same significant bits, and its largest magnitude before; 0 for a zero moment.
    """
    largest = float(moment.abs().max())
    if largest == 0.0:
        return moment, 0.0
    exponent = math.frexp(largest)[1]
    half = exponent // 2  # in two steps, because 2 ** -exponent alone may overflow
    return moment * 2.0**-half * 2.0 ** -(exponent - half), largest


def total_energy(moment: Tensor, squared: bool) -> float:
    """Return the sum of the eigenvalues, squared or not.

    Raises:
        NumericError: the trace of a moment that is not zero is not positive, so it is no mean of `x x^T`.
    """
    total = float(moment.square().sum() if squared else moment.diagonal().sum())
    if total <= 0.0:
        raise NumericError(f"a second moment that is not zero has a positive trace, found {total:.3g}")
    return total


def require_orthonormal(occupied: Tensor, added: Tensor) -> None:
    """Check that the columns `added` are orthonormal to each other and to the orthonormal `occupied`.

    Raises:
        ShapeError: they deviate by more than 1e-8.
    """
    inner = added.T @ added - torch.eye(added.shape[1], dtype=added.dtype, device=added.device)
    worst = max((float(part.abs().max()) for part in (inner, occupied.T @ added) if part.numel()), default=0.0)
    if not worst <= _ORTHONORMAL:
        raise ShapeError(
            "replayed directions must be orthonormal to each other and to the memory, found a deviation of "
            f"{worst:.3g}; the stored directions are damaged or out of order"
        )


def complete(occupied: Tensor) -> Tensor:
    """Return an orthonormal basis `(dim, dim - m)` of the complement of the orthonormal columns `occupied (dim, m)`.

    A deterministic function of its argument: the trailing columns of the complete Householder QR, in float64.
    """
    count = occupied.shape[1]
    if count == 0:
        return torch.eye(occupied.shape[0], dtype=occupied.dtype, device=occupied.device)
    orthogonal: Tensor = torch.linalg.qr(occupied, mode="complete")[0]
    return orthogonal[:, count:].contiguous()


def orient(columns: Tensor) -> Tensor:
    """Flip each column of `(dim, n)` so that its entry of largest magnitude is positive."""
    if columns.numel() == 0:
        return columns
    extreme = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return torch.where(extreme < 0, -columns, columns)


def energy_tails(values: Tensor) -> Tensor:
    """Return `(k + 1,)` sums of what lies after the first n of the descending `values (k,)`, for n = 0 .. k.

    Summed from the smallest upwards, because one minus a running sum loses every digit of a small tail.
    """
    tails = values.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def spectrum(
    moment: Tensor, free: Tensor | None, *, squared: bool, resolve: int | None = None
) -> tuple[Tensor, Tensor]:
    """Decompose a second moment as it acts on the free space, largest first.

    Args:
        moment: `C`, `(dim, dim)` symmetric float64.
        free: `F`, `(dim, k)` orthonormal columns; None stands for the whole space.
        squared: True for `F^T C^2 F`, False for `F^T C F`.
        resolve: how many leading directions must be accurate even when the spectrum is wide; None for all. Where
            the squared problem cannot give that, singular values of `C F` are taken instead.

    Returns:
        Eigenvalues `(k,)`, descending and not negative, and directions `(dim, k)` with orthonormal columns in
        span(F), oriented as `orient` does.

    Cost: `O(dim^2 k + k^3)`; the singular values, where needed, about twice that.
    """
    if free is None:
        # C and C^2 share eigenvectors: no need to square, hence no digits lost.
        values, vectors = _symmetric(moment)
        values = values.square() if squared else values.clamp_min(0.0)
        order = values.argsort(descending=True, stable=True)
        return values[order], orient(vectors[:, order])
    if free.shape[1] == 0:
        return free.new_zeros(0), free
    if squared:
        values, vectors = _squared(moment @ free, resolve)
    else:
        inner = free.T @ moment @ free
        values, vectors = _symmetric((inner + inner.T) / 2)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    return values, orient(free @ vectors)


def _symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; by singular values when the eigen-solver gives up."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError:
        left, _, _ = torch.linalg.svd(matrix)
        values = (left * (matrix @ left)).sum(0)
        order = values.argsort()
        values, vectors = values[order], left[:, order]
    return values, vectors


def _squared(product: Tensor, resolve: int | None) -> tuple[Tensor, Tensor]:
    """Right singular vectors of `product (dim, k)` and squared singular values, descending."""
    count = product.shape[1]
    if resolve is not None:
        try:
            values, vectors = torch.linalg.eigh(product.T @ product)
        except LinAlgError:
            resolve = None
        else:
            values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
            last = min(resolve, count) - 1
            if last < 0 or values[last] >= _RESOLVED * values[0]:
                return values, vectors
    _, singular, right = torch.linalg.svd(product, full_matrices=False)
    return singular.square(), right.T
