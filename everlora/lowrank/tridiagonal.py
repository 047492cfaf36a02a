"""Eigenvectors of the largest eigenvalues of a symmetric matrix on the CPU, no more of them than are asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

__all__ = ["Tridiagonal"]

Array = NDArray[np.float64]

_FEW = 0.2  # of all eigenvectors: beyond it taking every one of the tridiagonal form is as fast
_ACCEPTED = 1e-11  # deviation from orthonormal eigenvectors, and residual beside the largest entry
_BLOCK = 64  # columns of workspace for the reflectors
_ALONE = 1536  # rows up to which one thread is used


class Tridiagonal:
    """A symmetric matrix reduced to tridiagonal form once, with all its eigenvalues.

    How many eigenvectors are wanted is mostly known only after a look at the eigenvalues. These cost a third of a
    whole decomposition, and each eigenvector little more than its share of the rest.

    Args:
        matrix: `(k, k)` float64 on the CPU, of which the lower triangle is read; fastest in column-major order.

    Attributes:
        values: `(k,)` eigenvalues, descending.

    Raises:
        LinAlgError: the matrix is not finite, or the eigenvalues did not converge.

    Source: LAPACK's dsytrd and dsterf; dstemr (Dhillon and Parlett, "Multiple representations to compute orthogonal
        eigenvectors of symmetric tridiagonal matrices", 2004), dstevd (divide and conquer) and dormqr.
    Cost: `4/3 k^3` operations, then `O(k n)` and `2 k^2 n` for n eigenvectors; keeps `k^2` numbers.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.size = matrix.shape[0]
        with _threads(self.size):
            self._reflectors, self._diagonal, self._beside, self._factors = _reduce(
                np.asfortranarray(matrix.detach().numpy())
            )
        if not (np.isfinite(self._diagonal).all() and np.isfinite(self._beside).all()):
            raise LinAlgError("a matrix to decompose must be finite; found NaN or infinity in its tridiagonal form")
        values = self._diagonal
        if self.size > 1:
            values, failed = lapack.dsterf(self._diagonal, self._beside)
            _require(failed, "dsterf")
        self.values = torch.from_numpy(values[::-1].copy())

    def leading(self, count: int) -> Tensor:
        """Return orthonormal eigenvectors of the first `count` values, `(k, count)`, of either sign.

        Raises:
            LinAlgError: they did not converge.
        """
        if count == 0 or self.size < 2:
            return torch.eye(self.size, count, dtype=torch.float64)
        with _threads(self.size):
            inner = self._few(count) if count <= _FEW * self.size else None
            if inner is None:
                _, every, failed = lapack.dstevd(self._diagonal, self._beside)
                _require(failed, "dstevd")
                inner = every[:, self.size - count :]
            return torch.from_numpy(self._back(inner[:, ::-1]))

    def _back(self, inner: Array) -> Array:
        """Take vectors of the tridiagonal form to those of the matrix."""
        vectors: Array = np.empty(inner.shape, order="F")
        vectors[0] = inner[0]
        # The first reflector begins in the second row.
        rest = np.asfortranarray(inner[1:])
        reflectors = np.asfortranarray(self._reflectors[1:, : self.size - 1])
        vectors[1:], _, failed = lapack.dormqr(
            "L", "N", reflectors, self._factors, rest, lwork=_BLOCK * self.size, overwrite_c=1
        )
        _require(failed, "dormqr")
        return vectors

    def _few(self, count: int) -> Array | None:
        """Eigenvectors of the tridiagonal form by an index range, ascending; None where they are not accurate."""
        beside = np.append(self._beside, 0.0)  # overwritten
        first = self.size - count + 1
        found, values, vectors, failed = lapack.dstemr(self._diagonal, beside, 2, 0.0, 0.0, first, self.size)
        if failed or found != count:
            return None
        values, vectors = values[:count], vectors[:, :count]
        residual = self._diagonal[:, None] * vectors - vectors * values
        residual[1:] += self._beside[:, None] * vectors[:-1]
        residual[:-1] += self._beside[:, None] * vectors[1:]
        largest = max(np.abs(self._diagonal).max(), np.abs(self._beside).max())
        skew = np.abs(vectors.T @ vectors - np.eye(count)).max()
        return vectors if skew <= _ACCEPTED and np.abs(residual).max() <= _ACCEPTED * largest else None


def _threads(size: int) -> AbstractContextManager[object]:
    """Bound the threads of SciPy's linear algebra, which knows nothing of `torch.set_num_threads`.

    Smaller matrices gain little from threads, and on a busy machine lose ten times that waiting for each other.
    """
    bound: AbstractContextManager[object] = _libraries().limit(limits=1 if size <= _ALONE else torch.get_num_threads())
    return bound


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _reduce(matrix: Array) -> tuple[Array, Array, Array, Array]:
    """Reflectors, diagonal, what lies beside it, and the reflectors' factors."""
    if matrix.shape[0] < 2:
        return matrix, matrix.diagonal(), np.empty(0), np.empty(0)
    work, failed = lapack.dsytrd_lwork(matrix.shape[0], lower=1)
    _require(failed, "dsytrd_lwork")
    reflectors, diagonal, beside, factors, failed = lapack.dsytrd(matrix, lower=1, lwork=int(work))
    _require(failed, "dsytrd")
    return reflectors, diagonal, beside, factors


def _require(failed: int, name: str) -> None:
    if failed:
        raise LinAlgError(f"{name} of LAPACK ended with code {failed}; the eigenvalues or vectors did not converge")
