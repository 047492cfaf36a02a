from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.streams import Examples, hold_out, take_per_class


def rows(**counts: int) -> Examples:
    labels = [name for name, count in counts.items() for _ in range(count)]
    order = np.random.RandomState(0).permutation(len(labels))
    return Examples(
        "text",
        tuple(f"text {index}" for index in range(len(labels))),
        np.array(labels, dtype=object)[order],
        np.arange(len(labels)),
    )


def counts(examples: Examples) -> dict[str, int]:
    return {name: len(indices) for name, indices in examples.rows_by_label.items()}


def test_hold_out_counts_per_class() -> None:
    train, validation = hold_out(rows(a=100, b=3, c=1, d=1000), seed=0)
    assert counts(validation) == {"a": 10, "b": 1, "d": 50}
    assert counts(train) == {"a": 90, "b": 2, "c": 1, "d": 950}


def test_hold_out_is_a_partition_in_row_order_and_repeatable() -> None:
    whole = rows(a=40, b=40)
    train, validation = hold_out(whole, seed=3)
    assert sorted([*train.ids, *validation.ids]) == list(range(80))
    assert (np.diff(train.ids) > 0).all()
    assert (np.diff(validation.ids) > 0).all()
    assert validation.ids.tolist() == hold_out(whole, seed=3)[1].ids.tolist()
    assert validation.ids.tolist() != hold_out(whole, seed=4)[1].ids.tolist()


def test_take_per_class() -> None:
    whole = rows(a=40, b=5)
    kept = take_per_class(whole, 10, 1)
    assert counts(kept) == {"a": 10, "b": 5}
    assert (np.diff(kept.ids) > 0).all()
    assert kept.ids.tolist() == take_per_class(whole, 10, 1).ids.tolist()
    assert kept.ids.tolist() != take_per_class(whole, 10, 2).ids.tolist()


def test_refused() -> None:
    unlabelled = dataclasses.replace(rows(a=4), labels=None)
    with pytest.raises(DataError, match="without labels"):
        hold_out(unlabelled, seed=0)
    with pytest.raises(DataError, match="without labels"):
        take_per_class(unlabelled, 1, 0)
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(rows(a=4), fraction=1.0, seed=0)
    with pytest.raises(DataError, match="at least one row"):
        take_per_class(rows(a=4), 0, 0)
