from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.streams import Examples, concatenate
from everlora.streams.examples import natural_order


def texts(*pairs: tuple[str, str], first_id: int = 0, class_names: tuple[str, ...] | None = None) -> Examples:
    return Examples(
        modality="text",
        inputs=tuple(text for text, _ in pairs),
        labels=np.array([label for _, label in pairs], dtype=object),
        ids=np.arange(first_id, first_id + len(pairs)),
        class_names=class_names,
    )


def images(count: int, size: int = 4, first_id: int = 0) -> Examples:
    pixels = np.random.RandomState(count).randint(0, 256, (count, size, size, 3)).astype(np.uint8)
    return Examples("image", pixels, np.array(["a"] * count, dtype=object), np.arange(first_id, first_id + count))


def test_natural_order() -> None:
    assert natural_order(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert natural_order(["10", "9", "x"]) == ("10", "9", "x")
    assert natural_order(["007", "8"]) == ("007", "8")
    assert natural_order([]) == ()


def test_classes_follow_class_names_then_natural_order() -> None:
    assert texts(("x", "b"), ("y", "a")).classes == ("a", "b")
    assert texts(("x", "b"), ("y", "a"), ("z", "new"), class_names=("c", "b", "a")).classes == ("b", "a", "new")


def test_label_kind() -> None:
    assert texts(("x", "1"), ("y", "12")).label_kind == "integer"
    assert texts(("x", "1"), ("y", "one")).label_kind == "name"
    assert dataclasses.replace(texts(("x", "1")), labels=None).label_kind is None
    untyped = dataclasses.replace(texts(("x", "1"), ("y", "2")), has_typed_labels=False)
    assert untyped.label_kind is None and untyped.select([0]).label_kind is None
    assert concatenate([untyped, texts(("z", "3"))]).label_kind is None


def test_select_by_index_and_mask() -> None:
    examples = texts(("x", "a"), ("y", "b"), ("z", "a"))
    assert examples.select([2, 0]).inputs == ("z", "x")
    assert examples.select([2, 0]).ids.tolist() == [2, 0]
    assert examples.select(np.array([False, True, False])).inputs == ("y",)
    assert len(examples.select([])) == 0
    pictures = images(5)
    kept = pictures.select([4, 1])
    assert (np.asarray(kept.inputs) == np.asarray(pictures.inputs)[[4, 1]]).all()
    kept.inputs[0] = 0  # type: ignore[index]
    assert np.asarray(pictures.inputs)[4].any(), "a selection is a copy"


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="labels has 1 entries for 2 inputs"):
        Examples("text", ("a", "b"), np.array(["x"], dtype=object), np.arange(2))


def test_fingerprint_sees_content_and_order_only() -> None:
    base = texts(("x", "a"), ("yz", "b"))
    assert base.fingerprint == texts(("x", "a"), ("yz", "b"), first_id=7, class_names=("a", "b")).fingerprint
    assert len(base.fingerprint) == 64
    changed = [
        base.select([1, 0]),
        texts(("xy", "a"), ("z", "b")),
        texts(("x", "b"), ("yz", "a")),
        dataclasses.replace(base, labels=None),
        dataclasses.replace(base, groups=np.array(["g", "g"], dtype=object)),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in changed)}) == 6
    pictures = images(3)
    touched = np.array(pictures.inputs)
    touched[2, 3, 3, 2] ^= 1
    assert dataclasses.replace(pictures, inputs=touched).fingerprint != pictures.fingerprint


def test_concatenate_keeps_distinct_ids() -> None:
    joined = concatenate([texts(("x", "a")), texts(("y", "b"), first_id=5)])
    assert joined.ids.tolist() == [0, 5]
    assert joined.inputs == ("x", "y")


def test_concatenate_separates_equal_ids() -> None:
    parts = [images(3), images(2), images(2, first_id=1)]
    joined = concatenate(parts)
    assert len(np.unique(joined.ids)) == 7
    assert (joined.ids == concatenate(parts).ids).all()
    assert joined.inputs.shape == (7, 4, 4, 3)  # type: ignore[union-attr]


def test_concatenate_class_names_and_groups() -> None:
    first = texts(("x", "a"), class_names=("b", "a"))
    second = texts(("y", "c"), class_names=("a", "c"))
    assert concatenate([first, second]).class_names == ("b", "a", "c")
    grouped = dataclasses.replace(first, groups=np.array(["g"], dtype=object))
    assert concatenate([grouped, second]).groups is None
    assert concatenate([grouped, grouped]).groups is not None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "nothing to concatenate"),
        ([images(1), texts(("x", "a"))], "images and texts"),
        ([images(1), images(1, size=5)], "4x4 and 5x5"),
        ([images(1), dataclasses.replace(images(1), labels=None)], "label all or none"),
    ],
)
def test_concatenate_refuses(parts: list[Examples], message: str) -> None:
    with pytest.raises(DataError, match=message):
        concatenate(parts)
