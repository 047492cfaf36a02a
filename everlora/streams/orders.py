"""Class orders, as the public class-incremental benchmarks draw them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everlora.errors import DataError

__all__ = ["class_order"]


def class_order(num_classes: int, seed: int | None) -> NDArray[np.int64]:
    """Return the order in which the classes of a data set are learned.

    Args:
        num_classes: length of the data set's own list of classes.
        seed: seed of the permutation; None keeps the data set's own order.

    Returns:
        `(num_classes,)` int64: entry k is the original index of the class learned k-th.

    Raises:
        DataError: `num_classes` is below one, or the seed does not fit 32 bits.

    Source: PyCIL and PILOT, `np.random.seed(s); np.random.permutation(C)`. `RandomState` gives the same numbers and
    leaves NumPy's global state alone; `default_rng` gives other numbers.
    """
    if num_classes < 1:
        raise DataError(f"a class order needs at least one class, not {num_classes}; check the label column")
    if seed is None:
        return np.arange(num_classes, dtype=np.int64)
    if not 0 <= seed < 2**32:
        raise DataError(f"the seed of a class order must lie in 0 to 4294967295, not {seed}")
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int64)
