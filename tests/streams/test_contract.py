"""What every registered data set promises; a new one is one more row."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from everlora.errors import DataError
from everlora.streams import Examples, by_class, by_column, list_sources, load_examples, load_splits, register_source

# name, modality, classes, rows of each split
SOURCES = [
    ("sklearn:digits", "image", 10, {"train": 1258, "test": 539}),
    ("sklearn:digits-domains", "image", 10, {"train": 1258, "test": 539}),
]


def test_every_registered_source_has_a_row() -> None:
    assert [source.name for source in list_sources()] == sorted(row[0] for row in SOURCES)


@pytest.mark.parametrize(("name", "modality", "num_classes", "rows"), SOURCES)
def test_source_contract(name: str, modality: str, num_classes: int, rows: dict[str, int]) -> None:
    splits = load_splits(name)
    assert {split: len(examples) for split, examples in splits.items()} == rows
    ids = np.concatenate([examples.ids for examples in splits.values()])
    assert len(np.unique(ids)) == len(ids), "no row is in two splits"
    for split, examples in splits.items():
        assert examples.modality == modality
        assert examples.classes == examples.class_names
        assert len(examples.classes) == num_classes
        assert load_examples(name, split=split).fingerprint == examples.fingerprint, "the same rows at every call"
        if modality == "image":
            assert isinstance(examples.inputs, np.ndarray)
            assert examples.inputs.dtype == np.uint8
            assert examples.inputs.shape[3] == 3
    stream = by_class(splits, name=name, initial=2, increment=2, seed=1993)
    assert sum(len(task.train) for task in stream.tasks) == rows["train"]


def test_digits_are_the_published_rows() -> None:
    bunch = load_digits()
    for examples in load_splits("sklearn:digits").values():
        assert examples.labels is not None
        assert examples.labels.tolist() == [str(bunch.target[index]) for index in examples.ids]
        expected = np.rint(bunch.images[examples.ids] * 255 / 16)
        assert all((np.asarray(examples.inputs)[..., channel] == expected).all() for channel in range(3))
    for digit, rows in load_splits("sklearn:digits")["test"].rows_by_label.items():
        assert len(rows) == round(0.3 * int((bunch.target == int(digit)).sum())), "the split is stratified"


def test_domains_of_digits_change_looks_and_nothing_else() -> None:
    plain, changed = load_splits("sklearn:digits")["train"], load_splits("sklearn:digits-domains")["train"]
    assert changed.groups is not None and plain.labels is not None and changed.labels is not None
    assert plain.labels.tolist() == changed.labels.tolist()
    before, after = np.asarray(plain.inputs).astype(int), np.asarray(changed.inputs).astype(int)
    stream = by_column({"train": changed}, name="digits", seed=None)
    assert stream.scenario == "domain_incremental" and all(len(task.labels) == 10 for task in stream.tasks)
    own = [np.flatnonzero(changed.groups == task.name) for task in stream.tasks]
    assert max(map(len, own)) - min(map(len, own)) <= 10, "rows are dealt in turn"
    assert (before[own[0]] == after[own[0]]).all() and (before[own[1]] + after[own[1]] == 255).all()
    assert (np.rot90(before[own[2]], axes=(1, 2)) == after[own[2]]).all()
    assert 20 < np.abs(before - after)[own[3]].mean() < 60
    assert (after[own[4]][:, ::2] == after[own[4]][:, 1::2]).all()


def test_registry_refuses() -> None:
    def undescribed() -> dict[str, Examples]:
        return {}

    with pytest.raises(DataError, match="did you mean 'sklearn:digits'"):
        load_splits("sklearn:digit")
    with pytest.raises(DataError, match="already registered"):
        register_source("sklearn:digits")
    with pytest.raises(DataError, match="provider:set"):
        register_source("Digits")
    with pytest.raises(DataError, match="docstring"):
        register_source("test:nothing")(undescribed)
    assert "test:nothing" not in {source.name for source in list_sources()}
