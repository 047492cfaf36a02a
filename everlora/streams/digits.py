"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.datasets import load_digits

from everlora.streams.examples import Examples
from everlora.streams.registry import register_source
from everlora.streams.splits import hold_out

__all__ = ["digits", "digits_domains"]

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


@register_source("sklearn:digits-domains")
def digits_domains() -> dict[str, Examples]:
    """The digits as five devices would record them, a fifth of the rows each: the same ten classes in every domain.

    Every row stands in one domain, its entry of `groups`: as it is (`1-plain`), dark on bright (`2-negative`), lying on
    its side (`3-turned`), under noise drawn once with a constant seed (`4-noisy`), at half the resolution (`5-coarse`).
    Rows of a class are dealt to the domains in turn.

    Returns:
        `"train"` and `"test"` as `digits` gives them, with groups.
    """
    return {name: _in_domains(part) for name, part in digits().items()}


def _in_domains(part: Examples) -> Examples:
    images = np.asarray(part.inputs).copy()
    noise = np.random.default_rng(_SPLIT_SEED).normal(0, 60, images.shape[:3])[..., None]
    coarse = images.reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4)).repeat(2, axis=1).repeat(2, axis=2)
    changed = {
        "1-plain": images,
        "2-negative": 255 - images,
        "3-turned": np.rot90(images, axes=(1, 2)),
        "4-noisy": np.clip(images + noise, 0, 255).astype(np.uint8),
        "5-coarse": coarse.astype(np.uint8),
    }
    groups = np.empty(len(images), dtype=object)
    result = images.copy()
    for rows in part.rows_by_label.values():
        for place, (name, source) in enumerate(changed.items()):
            result[rows[place :: len(changed)]] = source[rows[place :: len(changed)]]
            groups[rows[place :: len(changed)]] = name
    return dataclasses.replace(part, inputs=result, groups=groups)
