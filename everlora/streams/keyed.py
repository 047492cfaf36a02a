"""Random numbers that belong to a sample, not to the moment they are drawn.

A generator that is called batch after batch gives a sample other numbers when the batches change: with another batch
size, after a resume, on another number of processes. Here every number is a hash of the keys (seed, epoch, ...), the
sample's id and a column, so a sample gets the same numbers whatever batch, order or device it comes in.

Source: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in wrapping 64-bit integer arithmetic.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from everlora.errors import ShapeError

__all__ = ["fold_key", "keyed_bits", "keyed_permutation", "keyed_uniform"]

Key = int | str

# SplitMix64's constants, as the signed integers that torch computes with.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_FLOAT_BITS = 24


def fold_key(*keys: Key) -> int:
    """Fold keys into one number, for `torch.manual_seed` and the like.

    Args:
        *keys: integers of any size and strings; order and type count (`1` and `"1"` differ).

    Returns:
        An integer of 63 bits, the same in every process, on every machine and in every version.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in keys:
        encoded = f"{type(key).__name__} {key}".encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def keyed_bits(ids: Tensor, columns: int, *keys: Key) -> Tensor:
    """Hash (keys, id, column) to integers.

    Args:
        ids: `(n,)` int64, the samples' ids, on any device.
        columns: how many numbers each sample gets.
        *keys: for example a purpose, a seed and an epoch.

    Returns:
        `(n, columns)` int64 on the device of `ids`, all 64 bits random.

    Raises:
        ShapeError: `ids` is not a vector of int64.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ShapeError(f"ids must be a vector of int64, not {ids.dtype} of shape {tuple(ids.shape)}; pass row ids")
    rows = _mix(ids * _GOLDEN + fold_key(*keys))
    counters = torch.arange(1, columns + 1, device=ids.device, dtype=torch.int64) * _GOLDEN
    return _mix(rows[:, None] + counters)


def keyed_uniform(ids: Tensor, columns: int, *keys: Key) -> Tensor:
    """Draw uniform numbers that depend on the sample's id and the keys alone.

    Args:
        ids: `(n,)` int64, the samples' ids, on any device.
        columns: how many numbers each sample gets.
        *keys: for example a purpose, a seed and an epoch.

    Returns:
        `(n, columns)` float32 in [0, 1), multiples of 2**-24, bit-equal on every device.

    Raises:
        ShapeError: `ids` is not a vector of int64.
    """
    bits = _shift_right(keyed_bits(ids, columns, *keys), 64 - _FLOAT_BITS)
    return bits.to(torch.float32) * 2.0**-_FLOAT_BITS


def keyed_permutation(n: int, *keys: Key) -> Tensor:
    """Return a random permutation that depends on the keys alone.

    Args:
        n: how many entries.
        *keys: for example a purpose, a seed and an epoch.

    Returns:
        `(n,)` int64 on the CPU, the same with every version of torch and NumPy.
    """
    scores = keyed_bits(torch.arange(n, dtype=torch.int64), 1, *keys)[:, 0]
    return torch.argsort(scores, stable=True)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _FIRST
    value = (value ^ _shift_right(value, 27)) * _SECOND
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, count: int) -> Tensor:
    # torch shifts int64 arithmetically; masking the copies of the sign bit makes the shift logical.
    return (value >> count) & ((1 << (64 - count)) - 1)
