"""The leading part of a spectrum without the rest: block Krylov spaces, with proof that nothing was missed.

Vectors are rows here, because products of a few rows with a symmetric matrix are what runs fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

__all__ = ["Leading", "Wanted", "leading"]

_BLOCK = 16  # rows multiplied at once
_FIRST = 3  # blocks before the first look at the spectrum
_LARGEST = 0.3  # of the free rank: beyond it the full decomposition is as fast
_ROOM = 5  # rows a wanted direction may take before the full decomposition is as fast
_SINE = 1e-7  # accepted bound on the projector error
_TIE = 1e-11  # of the total energy: closer to the limit, rounding could decide
_RESOLVED = 1e-10  # of the largest eigenvalue: below it the squared problem is not accurate
_FLOOR = 1e-12  # of the largest eigenvalue: a residual below it that no longer falls will not
_PROBES, _POWER, _CONFIDENCE = 10, 3, 10.0  # a norm bound that fails with probability _CONFIDENCE ** -_PROBES
_SEED = 20240404


@dataclass(frozen=True)
class Wanted:
    """How many leading directions to find.

    Args:
        count: that many; None to let the energy decide.
        rest: energy of the whole free space, the sum of all its eigenvalues.
        limit: energy that may be left over.
        total: energy that rounding is measured against.
        one_less: stop one direction earlier, though never before the first.
    """

    count: int | None = None
    rest: float = 0.0
    limit: float = 0.0
    total: float = 0.0
    one_less: bool = False

    def found(self, values: Tensor) -> int | None:
        """Return the number of directions, or None while the descending `values (k,)` do not reach the limit."""
        if self.count is not None:
            return self.count
        reached = self._tails(values) <= self.limit
        if not bool(reached.any()):
            return None
        first = int(reached.int().argmax())
        return max(1, first - 1) if self.one_less else first

    def is_enough_already(self) -> bool:
        """Whether the free space as a whole holds clearly no more than may be left over."""
        return not self.one_less and self.rest < self.limit - _TIE * self.total

    def is_tied(self, values: Tensor) -> bool:
        """Whether some count leaves so nearly the limit that rounding would decide."""
        return self.count is None and bool(((self._tails(values) - self.limit).abs() < _TIE * self.total).any())

    def missing(self, values: Tensor) -> int:
        """Guess how many more directions than these values are needed; a guess about speed only."""
        if self.count is not None:
            return max(0, self.count - values.shape[0])
        short = float(self._tails(values)[-1]) - self.limit
        each = float(values[values.shape[0] // 2])
        return 0 if short <= 0 else math.ceil(min(short / max(each, 1e-300), 1e9))

    def _tails(self, values: Tensor) -> Tensor:
        return self.rest - torch.cat([values.new_zeros(1), values.cumsum(0)])


@dataclass(frozen=True)
class Leading:
    """The eigenvalues found, `(n,)` descending, and their directions, `(dim, n)` orthonormal columns."""

    values: Tensor
    directions: Tensor


def leading(moment: Tensor, occupied: Tensor, wanted: Wanted, *, squared: bool) -> Leading | None:
    """Find the leading eigenvectors of a second moment outside the protected space, or say that it cannot.

    A block Krylov space grows from a fixed random start until the residual of the wanted Ritz vectors, divided by
    the gap behind them, bounds their projector error by 1e-7 (Davis and Kahan). That no direction was overlooked is
    shown by probing what the space leaves over: fixed random vectors bound its norm except with probability 1e-10.

    Args:
        moment: `C`, `(dim, dim)` symmetric float64.
        occupied: `M`, `(dim, m)` orthonormal columns; `P = I - M M^T`.
        wanted: how many directions.
        squared: True for the eigenvectors of `P C^2 P`, False for those of `P C P`.

    Returns:
        The directions; None where near-ties, a flat spectrum or the number wanted call for the full decomposition.

    Source: block Lanczos with full orthogonalisation (Golub and Underwood, 1977); the norm bound is lemma 4.1 of
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.
    Cost: `O(dim^2 K)` with `K` a few times the number found; keeps `2 K` rows of length dim.
    """
    space = _Krylov(moment, occupied, squared)
    try:
        return _grow(space, wanted)
    except LinAlgError:
        return None


def _grow(space: _Krylov, wanted: Wanted) -> Leading | None:
    progress, look = _Progress(), _FIRST * _BLOCK
    while space.extend(look):
        ritz = space.ritz()
        look = max(space.size + _BLOCK, int(1.15 * space.size))
        count = wanted.found(ritz.values)
        expected = space.size + wanted.missing(ritz.values) if count is None else count
        if _ROOM * expected + _BLOCK > space.capacity:
            return None
        if not count or count >= space.size:
            continue
        gap = float(ritz.values[count - 1] - ritz.values[count])
        error = float(ritz.residuals[:count].square().sum().sqrt())
        if error <= 0.5 * _SINE * gap:
            if wanted.is_tied(ritz.values) or not space.is_sound(ritz, count):
                return None
            if _nothing_missed(space, ritz, count, gap):
                return Leading(ritz.values[:count], ritz.vectors[:count].T)
        elif error < _FLOOR * float(ritz.values[0]) and error > 0.5 * progress.error:
            return None
        elif progress.is_hopeless(space, error, 0.5 * _SINE * gap):
            return None
    return None


@dataclass
class _Progress:
    """How fast the residual falls; a guess about speed only."""

    size: int = 0
    error: float = math.inf

    def is_hopeless(self, space: _Krylov, error: float, target: float) -> bool:
        """Whether at the present rate, even doubled, the space would be full before the residual is small."""
        grown, ratio = space.size - self.size, self.error / error
        self.size, self.error = space.size, error
        if grown == space.size or space.size < 5 * _BLOCK:
            return False
        if ratio <= 1.0 or target <= 0.0:
            return True
        return math.log(error / target) / math.log(ratio) * grown > 2.0 * (space.capacity - space.size)


@dataclass(frozen=True)
class _Ritz:
    values: Tensor
    vectors: Tensor
    residuals: Tensor


class _Krylov:
    """Orthonormal rows in the free space, closed under ever more products with the operator."""

    def __init__(self, moment: Tensor, occupied: Tensor, squared: bool) -> None:
        self.moment, self.protected, self.squared = moment, occupied.T.contiguous(), squared
        dim, held = occupied.shape
        self.capacity = int(_LARGEST * (dim - held))
        self.size = 0
        rows = max(self.capacity, 0)
        self._rows = moment.new_empty(rows, dim)
        self._images = moment.new_empty(rows, dim)  # the operator on each row
        self._generator = torch.Generator().manual_seed(_SEED)

    def random(self, count: int) -> Tensor:
        """Rows of independent normal numbers, the same ones in the same order for every call of `leading`."""
        rows = torch.randn(count, self.moment.shape[0], generator=self._generator, dtype=torch.float64)
        return rows.to(self.moment.device)

    def outside(self, rows: Tensor) -> Tensor:
        """Remove the protected part of each row."""
        return rows - (rows @ self.protected.T) @ self.protected

    def operate(self, rows: Tensor) -> Tensor:
        """Apply `P C P` or `P C^2 P` to rows of the free space."""
        image = rows @ self.moment
        return self.outside(image @ self.moment if self.squared else image)

    def extend(self, size: int) -> bool:
        """Grow to at least `size` rows; False, unchanged, where that passes the capacity."""
        if -(-(size - self.size) // _BLOCK) * _BLOCK + self.size > self.capacity:
            return False
        while self.size < size:
            last = self._images[self.size - _BLOCK : self.size] if self.size else self.random(_BLOCK)
            block = slice(self.size, self.size + _BLOCK)
            self._rows[block] = self._orthonormal(last)
            self._images[block] = self.operate(self._rows[block])
            self.size += _BLOCK
        return True

    def ritz(self) -> _Ritz:
        """Rayleigh-Ritz in the present space, largest first."""
        rows, images = self._rows[: self.size], self._images[: self.size]
        inner = images @ rows.T
        values, turn = torch.linalg.eigh((inner + inner.T) / 2)
        values, turn = values.flip(0), turn.flip(1).T
        vectors = turn @ rows
        residuals = torch.linalg.vector_norm(turn @ images - values[:, None] * vectors, dim=1)
        return _Ritz(values, vectors, residuals)

    def is_sound(self, ritz: _Ritz, count: int) -> bool:
        """Whether the found rows are orthonormal, free, and large enough to be resolved."""
        rows = ritz.vectors[:count]
        inner = rows @ rows.T - torch.eye(count, dtype=rows.dtype, device=rows.device)
        clean = max(float(inner.abs().max()), float((rows @ self.protected.T).abs().sum(1).max())) < 1e-12
        return clean and float(ritz.values[count - 1]) >= (_RESOLVED if self.squared else 1e-13) * float(ritz.values[0])

    def _orthonormal(self, rows: Tensor) -> Tensor:
        known = self._rows[: self.size]
        # The second round cleans what the first lost to cancellation, dependent rows included.
        for _ in range(2):
            rows = self.outside(rows)
            rows = rows - (rows @ known.T) @ known
            rows = torch.linalg.qr(rows.T)[0].T
        return rows


def _nothing_missed(space: _Krylov, ritz: _Ritz, count: int, gap: float) -> bool:
    """Bound the norm of the operator outside the converged vectors, below the last wanted eigenvalue."""
    behind = ritz.residuals[count:].square().cumsum(0).sqrt()
    settled = count + int((behind <= 0.25 * gap).sum())
    wall = float(ritz.values[count - 1]) - 0.75 * gap
    if settled < space.size and float(ritz.values[settled]) > wall:
        return False
    known = ritz.vectors[:settled]
    rows = space.outside(space.random(_PROBES))
    rows = rows - (rows @ known.T) @ known
    for _ in range(_POWER):
        rows = space.operate(rows)
        rows = rows - (rows @ known.T) @ known
    norm: float = _CONFIDENCE * math.sqrt(2 / math.pi) * float(torch.linalg.vector_norm(rows, dim=1).max())
    return bool(norm ** (1 / _POWER) <= wall)
