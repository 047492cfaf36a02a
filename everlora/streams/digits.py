"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from everlora.streams.examples import Examples
from everlora.streams.registry import register_source
from everlora.streams.splits import hold_out

__all__ = ["digits"]

_SPLIT_SEED = 20240
_TEST_FRACTION = 0.3


@register_source("sklearn:digits")
def digits() -> dict[str, Examples]:
    """1,797 handwritten digits of 8x8 pixels, 10 classes, shipped with scikit-learn.

    Grey values 0 to 16 become RGB bytes by `value * 255 / 16`, rounded. The set has no split of its own: 30 % of each
    class, drawn once with a constant seed, are the test rows, always the same ones. A row's id is its position in
    scikit-learn's order.

    Returns:
        `"train"` and `"test"`, images uint8 `(n, 8, 8, 3)`, labels `"0"` to `"9"`.
    """
    bunch = load_digits()
    grey = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    whole = Examples(
        modality="image",
        inputs=np.repeat(grey[..., None], 3, axis=-1),
        labels=np.array([str(target) for target in bunch.target], dtype=object),
        ids=np.arange(len(grey), dtype=np.int64),
        class_names=tuple(str(digit) for digit in range(10)),
    )
    train, test = hold_out(whole, fraction=_TEST_FRACTION, seed=_SPLIT_SEED, maximum=len(whole))
    return {"train": train, "test": test}
