"""Parts of a data set: rows held out for validation, a fixed number of rows per class."""

from __future__ import annotations

import numpy as np

from everlora.errors import DataError
from everlora.streams.examples import Examples

__all__ = ["hold_out", "hold_out_rows", "take_per_class", "take_rows"]


def hold_out(
    examples: Examples, *, fraction: float = 0.1, seed: int, minimum: int = 1, maximum: int = 50
) -> tuple[Examples, Examples]:
    """Split training rows into rows to train on and rows to validate on, class by class.

    Per class, `round(fraction * rows)` rows are held out, at least `minimum` and at most `maximum`; one row always
    stays for training, so a class with a single row is not split.

    Args:
        examples: labelled rows.
        fraction: share of each class to hold out, strictly between 0 and 1.
        seed: seed of the choice; keep it apart from the seed of a run.
        minimum: least number of rows held out per class.
        maximum: greatest number of rows held out per class.

    Returns:
        `(train, validation)`, each in the row order of `examples`.

    Raises:
        DataError: no labels, or a fraction out of range.
    """
    if examples.labels is None:
        raise DataError("rows without labels cannot be split by class; name the label column")
    if not 0.0 < fraction < 1.0:
        raise DataError(f"the fraction to hold out must lie between 0 and 1, not {fraction}")
    random = np.random.RandomState(seed)
    held = np.zeros(len(examples), dtype=bool)
    for rows in examples.rows_by_label.values():
        count = min(max(round(fraction * len(rows)), minimum), maximum, len(rows) - 1)
        held[random.permutation(rows)[:count]] = True
    return examples.select(~held), examples.select(held)


def hold_out_rows(examples: Examples, *, maximum: int, seed: int) -> tuple[Examples, Examples]:
    """Split rows without labels into rows to train on and rows to validate on.

    Args:
        examples: the rows.
        maximum: greatest number of rows held out; never more than half of all.
        seed: seed of the choice.

    Returns:
        `(train, validation)`, each in the row order of `examples`; the second may be empty.
    """
    held = np.zeros(len(examples), dtype=bool)
    count = min(maximum, len(examples) // 2)
    held[np.random.RandomState(seed).permutation(len(examples))[:count]] = True
    return examples.select(~held), examples.select(held)


def take_per_class(examples: Examples, count: int, seed: int) -> Examples:
    """Keep at most `count` rows of each class, drawn at random.

    Args:
        examples: labelled rows.
        count: rows to keep per class; classes with fewer keep all of theirs.
        seed: seed of the draw.

    Returns:
        The kept rows, in the row order of `examples`.

    Raises:
        DataError: no labels, or a count below one.
    """
    if examples.labels is None:
        raise DataError("rows without labels cannot be drawn by class; name the label column")
    if count < 1:
        raise DataError(f"at least one row per class must be kept, not {count}")
    random = np.random.RandomState(seed)
    chosen = [random.permutation(rows)[:count] for rows in examples.rows_by_label.values()]
    return examples.select(np.sort(np.concatenate(chosen)) if chosen else [])


def take_rows(examples: Examples, count: int, seed: int) -> Examples:
    """Keep at most `count` rows, drawn at random, whatever their classes.

    Args:
        examples: the rows.
        count: rows to keep.
        seed: seed of the draw.

    Returns:
        The kept rows, in the row order of `examples`.

    Raises:
        DataError: a count below one.
    """
    if count < 1:
        raise DataError(f"at least one row must be kept, not {count}")
    chosen = np.random.RandomState(seed).permutation(len(examples))[:count]
    return examples.select(np.sort(chosen))
