"""Eigen-decompositions of a second moment inside a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from everlora.errors import NumericError, ShapeError
from everlora.lowrank.tridiagonal import Tridiagonal

__all__ = [
    "Complement",
    "Spectrum",
    "as_symmetric",
    "complete",
    "energy_tails",
    "lower_gram",
    "orient",
    "require_orthonormal",
    "scaled",
    "spectrum",
    "total_energy",
]

First = Callable[[int], Tensor]  # takes n to the eigenvectors of the n largest eigenvalues, `(k, n)`

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
    largest = float(matrix.abs().max())  # NaN and infinity pass through a maximum
    if not math.isfinite(largest):
        raise NumericError("the second moment holds NaN or infinity; check the layer's inputs")
    if torch.equal(matrix, matrix.T):
        return matrix
    gap = float((matrix - matrix.T).abs().max())
    if gap > _ASYMMETRY * largest:
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
    dim, count = occupied.shape
    if count == 0:
        return torch.eye(dim, dtype=occupied.dtype, device=occupied.device)
    # The reflectors on the wanted unit vectors alone; the complete factor would be multiplied out for all of them.
    units = torch.eye(dim, dtype=occupied.dtype, device=occupied.device)[:, count:]
    return torch.ormqr(*torch.geqrf(occupied), units).contiguous()


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


class Complement:
    """Orthonormal coordinates of what is free beside the orthonormal columns `occupied (dim, m)`, never formed whole.

    The reflectors of a Householder QR are applied instead of being multiplied out: `4 dim^2 m` operations for a
    whole matrix, where forming the basis and multiplying by it costs `2 dim^2 (dim - m)` more than its QR.
    """

    def __init__(self, occupied: Tensor) -> None:
        self.dim, self.held = occupied.shape
        # With most of the space protected the few free columns themselves are cheaper than their reflectors.
        self._columns = complete(occupied) if 2 * self.held > self.dim else None
        self._reflectors = torch.geqrf(occupied) if 0 < self.held and self._columns is None else None

    def restrict(self, matrix: Tensor) -> Tensor:
        """Return `matrix @ F` for `matrix (n, dim)`, `(n, k)`."""
        if self._columns is not None:
            return matrix @ self._columns
        if self._reflectors is None:
            return matrix
        return torch.ormqr(*self._reflectors, matrix, left=False)[:, self.held :]

    def embed(self, vectors: Tensor) -> Tensor:
        """Return `F @ vectors` for `vectors (k, n)`, `(dim, n)`."""
        if self._columns is not None:
            return self._columns @ vectors
        if self._reflectors is None:
            return vectors
        padded = torch.cat([vectors.new_zeros(self.held, vectors.shape[1]), vectors])
        return torch.ormqr(*self._reflectors, padded)


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` found.

    Args:
        values: `(k,)` eigenvalues, descending and not negative.
        first: takes n to the eigenvectors of the first n values, `(k, n)` orthonormal columns in coordinates of the
            free space.
        complement: takes `(k, n)` to `(dim, n)`.
    """

    values: Tensor
    first: First
    complement: Complement

    def leading(self, count: int) -> Tensor:
        """Return the first directions, `(dim, count)`, oriented as `orient` does."""
        return orient(self.complement.embed(self.first(count)))


def spectrum(moment: Tensor, occupied: Tensor, *, squared: bool, resolve: int | None = None) -> Spectrum:
    """Find all eigenvalues of a second moment as it acts on the free space, largest first.

    Args:
        moment: `C`, `(dim, dim)` symmetric float64.
        occupied: `M`, `(dim, m)` orthonormal columns; `F (dim, k)` is a basis of its complement.
        squared: True for `F^T C^2 F`, False for `F^T C F`.
        resolve: how many leading directions must be accurate even when the spectrum is wide; None for all. Where
            the squared problem cannot give that, singular values of `C F` are taken instead.

    Returns:
        Eigenvalues and directions; the directions are computed when asked for, on the CPU those asked for alone.

    Cost: `O(dim^2 k + k^3)`; the singular values, where needed, several times that.
    """
    complement = Complement(occupied)
    if occupied.shape[1] == 0:
        # C and C^2 share eigenvectors: no need to square, hence no digits lost.
        values, first = _symmetric(moment)
        if squared:
            values, first = _by_magnitude(values, first)
    elif occupied.shape[1] == moment.shape[0]:
        values, first = _known(moment.new_zeros(0), moment.new_zeros(0, 0))
    elif squared:
        values, first = _squared(complement.restrict(moment), resolve)
    else:
        values, first = _symmetric(complement.restrict(complement.restrict(moment).T))
    return Spectrum(values.clamp_min(0.0), first, complement)


def lower_gram(product: Tensor) -> Tensor:
    """Return `(k, k)` whose lower triangle is that of `product.T @ product`; above the diagonal lies no meaning.

    A symmetric eigen-solver reads no more, and four tenths of the whole product are saved. In column-major order, as
    eigen-solvers take it.
    """
    count = product.shape[1]
    gram = product.new_zeros(count, count)
    step = max(-(-count // 6), 64)
    for start in range(0, count, step):
        stop = min(start + step, count)
        gram[:stop, start:stop] = product[:, :stop].T @ product[:, start:stop]
    return gram.T


def _known(values: Tensor, vectors: Tensor) -> tuple[Tensor, First]:
    """Sort what a decomposition gave, largest first."""
    order = values.argsort(descending=True, stable=True)
    return values[order], lambda count: vectors[:, order[:count]]


def _by_magnitude(values: Tensor, first: First) -> tuple[Tensor, First]:
    """Square the eigenvalues; a negative one, of rounding or of no second moment at all, may move forward."""
    squares = values.square()
    order = squares.argsort(descending=True, stable=True)

    def moved(count: int) -> Tensor:
        reached = int(order[:count].max()) + 1 if count else 0
        return first(reached)[:, order[:count]]

    return squares[order], moved


def _symmetric(matrix: Tensor) -> tuple[Tensor, First]:
    """Eigenvalues and eigenvectors by the lower triangle; by singular values when the eigen-solvers give up."""
    try:
        return _solved(matrix)
    except LinAlgError:
        lower = matrix.tril()
        matrix = lower + lower.T - torch.diag(matrix.diagonal())
        vectors, _, _ = torch.linalg.svd(matrix)
        return _known((vectors * (matrix @ vectors)).sum(0), vectors)


def _solved(matrix: Tensor) -> tuple[Tensor, First]:
    """Eigenvalues and eigenvectors by the lower triangle, the vectors when asked for where that is faster."""
    if matrix.device.type != "cpu":
        return _known(*torch.linalg.eigh(matrix, UPLO="L"))
    try:
        reduced = Tridiagonal(matrix)
    except LinAlgError:
        return _known(*torch.linalg.eigh(matrix, UPLO="L"))

    def first(count: int) -> Tensor:
        try:
            return reduced.leading(count)
        except LinAlgError:
            return _known(*torch.linalg.eigh(matrix, UPLO="L"))[1](count)

    return reduced.values, first


def _squared(product: Tensor, resolve: int | None) -> tuple[Tensor, First]:
    """Right singular vectors of `product (dim, k)` and squared singular values."""
    if resolve is not None:
        try:
            values, first = _solved(lower_gram(product))
        except LinAlgError:
            resolve = None
        else:
            last = min(resolve, values.shape[0])
            if last == 0 or values[last - 1] >= _RESOLVED * values[0]:
                return values, first
    _, singular, right = torch.linalg.svd(product, full_matrices=False)
    return _known(singular.square(), right.T)
